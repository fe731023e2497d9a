import numpy as np
import pytest
import torch
from PIL import Image

from anisodiff import frechet
from anisodiff.files import StageError


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
    again = frechet.FeatureStatistics.of(parts.tensors())
    assert torch.equal(again.outer, parts.outer)


def test_distance_of_gaussians_in_closed_form():
    """For diagonal covariances: |mean difference|^2 + sum (sqrt a - sqrt b)^2."""

    def exact(mean, variances):
        return frechet.Gaussian(torch.tensor(mean).double(), torch.diag(torch.tensor(variances).double()))

    found = frechet.distance(exact([0.0, 1.0, 2.0], [1.0, 4.0, 9.0]), exact([1.0, 1.0, 0.0], [4.0, 4.0, 1.0]))
    assert found == pytest.approx(5 + 1 + 0 + 4, rel=1e-6)


def test_one_image_has_no_covariance():
    with pytest.raises(StageError, match="use two or more"):
        _ = statistics(torch.ones(1, 3), [1]).gaussian


class StandIn(torch.nn.Module):
    """Has the face of the published Inception file: images in 0..255 of any size, 2,048 features."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Linear(27, 2048)

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        small = torch.nn.functional.interpolate((x - 128) / 128, size=[3, 3], mode="bilinear")
        return self.layers(small.flatten(1)).tanh()


@pytest.fixture
def inception(tmp_path, monkeypatch):
    """The stand-in under the published name, where clean-fid and we look for it."""
    import cleanfid.features

    torch.manual_seed(0)
    file = tmp_path / "inception-2015-12-05.pt"
    torch.jit.script(StandIn()).save(str(file))
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
    extract = frechet.FEATURES["inception"](inception, "cpu")
    a, b = (statistics(extract(pixels), [25, 35]) for pixels in sets)
    frechet.distance(a.gaussian, b.gaussian)
    for theirs, ours in zip(*seen, strict=True):
        assert np.allclose(theirs, ours, rtol=1e-3, atol=1e-6)
        assert np.abs(ours).max() > 1e-3


def test_inception_needs_its_name(tmp_path):
    with pytest.raises(StageError, match="rename it"):
        frechet.FEATURES["inception"](tmp_path / "weights.pt", "cpu")
