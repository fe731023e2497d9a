"""The geometry and convergence stages, on a small network and the digits."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from runs import SPACE, method_of

from anisodiff.denoiser import Denoiser
from anisodiff.errors import StageError
from anisodiff.experiment.settings import GeometrySettings, MethodSettings
from anisodiff.grids import fixed
from anisodiff.grids.levels import Levels, levels
from anisodiff.metrics import feature_networks, frechet
from anisodiff.metrics.registry import FeatureFile
from anisodiff.pixels import to_uint8
from anisodiff.report import geometry_figures, geometry_table, published
from anisodiff.solvers.generation import draw
from anisodiff.solvers.generation import start as start_of
from anisodiff.solvers.loop import solve
from anisodiff.solvers.registry import SOLVERS
from anisodiff.solvers.singlestep import euler
from anisodiff.solvers.trajectories import record_trajectory
from anisodiff.stages import measuring, sampling
from anisodiff.stages.convergence import node_distances
from anisodiff.storage import checkpoints

ROOT = Path(__file__).parents[1]
FEATURES = FeatureFile("digits-cnn", ROOT / "config/checkpoints/digits/features.safetensors")
SETTINGS = GeometrySettings(
    network="base", path="edm", images=40, shown=3, steps=12, fine_steps=40, seed=5,
    exact=["kernel", "gaussian", "mixture"], data=200,
)  # fmt: skip
METHOD = MethodSettings(network="base", path="edm", grid="karras", solver="ipndm", append_zero=False)


@pytest.fixture(scope="module")
def measured(start, tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("geometry") / "edm.safetensors"
    measuring.measure_geometry(SPACE, SETTINGS, start[2], start[0], start[1], file)
    return file


def test_network_is_measured_in_batches_as_one(start, measured):
    """Forty trajectories are more than a batch; all of them at once, by hand."""
    tensors, about = checkpoints.read(measured)
    network, _ = checkpoints.load_network(start[0])
    path, _ = checkpoints.load_path(start[1])
    model = Denoiser(network, path, SPACE.sigma_data)
    fine, means = fixed.at_mean_levels(path, 13, SPACE.sigma_min, SPACE.sigma_max)
    noise, labels = draw(range(5, 45), network.shape, network.classes)
    states = record_trajectory(model, noise, fine, labels, euler, keep_flows=True).states.flatten(2).double()
    chord = torch.nn.functional.normalize(states[0] - states[-1], dim=1)
    away = states - states[-1]
    deviation = (away - (away * chord).sum(2, keepdim=True) * chord).norm(dim=2)
    assert torch.allclose(tensors["network.deviation"].double(), deviation, atol=1e-3)
    summary = about["summary"]["network"]
    assert summary["deviation"] == pytest.approx(float(deviation.max(0).values.mean()), rel=1e-3)
    assert summary["trajectories"] == 40
    assert tensors["network.curve"].shape == (13, 3, 3)
    assert torch.allclose(tensors["means"], means.float())
    assert 0 <= summary["close_to_optimum"] <= 1


def test_on_an_isotropic_path_the_residual_is_the_deviation(measured):
    tensors, _ = checkpoints.read(measured)
    for kind in ("network", "kernel", "gaussian", "mixture"):
        assert torch.allclose(tensors[f"{kind}.residual_deviation"], tensors[f"{kind}.deviation"], atol=1e-4)


def test_closed_forms_are_measured_beside_it(measured):
    tensors, about = checkpoints.read(measured)
    assert list(about["summary"]) == sorted(["network", "kernel", "gaussian", "mixture"])
    assert tensors["kernel.deviation"].shape == (13, 3)
    assert tensors["entropy.optimal"][0].max() <= torch.tensor(200.0).log() + 1e-4
    assert (tensors["entropy.optimal"][-1] < 0.1).all()  # it has settled on an image
    assert tensors["neighbours"].shape == (2, 5, 1, 8, 8)
    ends = (tensors["ends"][1] - tensors["neighbours"][1, 0]).abs().max()
    assert ends < 0.05  # and the optimum replays it
    residual, deviation = tensors["gaussian.residual"], tensors["gaussian.deviation"]
    assert (deviation <= residual + 1e-4).all()


def test_table_and_figures_of_two_paths(measured, tmp_path):
    files = {"one": measured, "other": measured}
    geometry_table.write(files, tmp_path)
    rows = pd.read_csv(tmp_path / "geometry.csv")
    assert rows["denoiser"].tolist() == ["network", "kernel", "gaussian", "mixture"] * 2
    page = (tmp_path / "geometry.md").read_text()
    assert page.count("| other |") == 8
    assert f"{rows['deviation'][1]:.2f} ±" in page
    assert "other: the network is no farther from the optimum for 200 training images" in page
    found = geometry_figures.figures({name: str(file) for name, file in files.items()})
    assert set(found) == {f"geometry-{name}" for name in (
        "deviation", "projections", "shapes", "bending", "noise", "optimum", "pictures", "gaussian",
    )}  # fmt: skip


def test_a_mixture_needs_classes(start, tmp_path, monkeypatch):
    loaded = measuring.image_sets.load(start[2])
    without = measuring.image_sets.Images(loaded.pixels, loaded.labels, 0)
    monkeypatch.setattr(measuring.image_sets, "load", lambda folder: without)
    with pytest.raises(StageError, match=r"has no classes for a mixture: leave it out"):
        measuring.measure_geometry(SPACE, SETTINGS, start[2], start[0], start[1], tmp_path / "edm.safetensors")


@pytest.fixture(scope="module")
def followed(start, tmp_path_factory) -> pd.DataFrame:
    folder = tmp_path_factory.mktemp("convergence")
    sampling.reference(start[2], FEATURES, None, 8, folder / "reference.safetensors")
    method = method_of(start, METHOD)
    node_distances(method, 5, 50, 20, FEATURES, folder / "reference.safetensors", folder / "convergence.csv")
    found = pd.read_csv(folder / "convergence.csv")
    found.attrs["folder"] = folder
    return found


def test_last_state_is_the_sample(start, followed):
    """Its distance is the one that the method's cell has."""
    folder = followed.attrs["folder"]
    drawing = sampling.Drawing([5], 0, 49, 20)
    sampling.sample(method_of(start, METHOD), drawing, FEATURES, folder / "ipndm/0-49.json")
    cell = folder / "ipndm" / json.loads((folder / "ipndm/0-49.json").read_text())[0]
    statistics = frechet.FeatureStatistics.from_tensors(checkpoints.read(cell)[0])
    truth = sampling.load_reference(folder / "reference.safetensors", "digits-cnn").gaussian
    last = followed[(followed["kind"] == "state") & (followed["evaluations"] == 5)]
    assert last["distance"].item() == pytest.approx(frechet.distance(statistics.gaussian, truth), rel=1e-6)
    assert followed["images"].unique().tolist() == [50]


def test_denoised_estimates_are_what_a_jump_returns(start, followed):
    """From the third node: two steps, and one to 0."""
    network, _ = checkpoints.load_network(start[0])
    path, _ = checkpoints.load_path(start[1])
    model = Denoiser(network, path, SPACE.sigma_data)
    whole = fixed.karras(6, 1, SPACE.sigma_min, SPACE.sigma_max, append_zero=False)
    cut = levels(whole.nodes[:3], whole.inner[:2], True)
    extract = feature_networks.digits_cnn(FEATURES.file, "cpu")
    noise, labels = draw(range(50), network.shape, network.classes)
    # order 1 on the step to 0: that is the jump
    z = start_of(model, noise, cut, labels)
    before = solve(model, z, Levels(cut.nodes[:3], cut.inner[:2]), SOLVERS["ipndm"].with_order(), labels)
    clean = model.denoise(before, cut.nodes[2].square(), labels)
    statistics = frechet.FeatureStatistics(64)
    statistics.add(extract(to_uint8(path.to_pixels(clean))))
    truth = sampling.load_reference(followed.attrs["folder"] / "reference.safetensors", "digits-cnn").gaussian
    row = followed[(followed["kind"] == "denoised") & (followed["node"] == 2)]
    assert row["evaluations"].item() == 3
    assert row["distance"].item() == pytest.approx(frechet.distance(statistics.gaussian, truth), rel=1e-2)


def test_published_values_by_name():
    file = str(ROOT / "config/published.csv")
    rows = published.published_values("cifar10", file, ["iPNDM + GITS 1.15 AFS", "EDM"])
    assert rows[(rows["method"] == "iPNDM + GITS 1.15 AFS") & (rows["nfe"] == 9)]["fid"].item() == 2.46
    assert rows[(rows["method"] == "EDM") & (rows["nfe"] == 9)]["network"].item() == "edm-cifar10-32x32-cond-vp"
    with pytest.raises(StageError, match=r"'iPNDN' has no values for ffhq in .*; it has AMED"):
        published.published_values("ffhq", file, ["iPNDN"])


def test_published_values_are_complete():
    """Every row says what it is of; the tables' sizes are those of the papers."""
    rows = pd.read_csv(ROOT / "config/published.csv")
    assert not rows[["dataset", "network", "method", "fid", "source"]].isna().any().any()
    assert not rows.duplicated(["dataset", "network", "method", "nfe", "fid"]).any()
    of = lambda source: rows[rows["source"].str.contains(source)]  # noqa: E731
    assert len(of("Trajectory Optimal")) == 5 * 3 * 5
    gits = of("2506.10177")
    counts = {table: int(gits["source"].str.contains(f"Table {table}").sum()) for table in (1, 3, 8)}
    assert counts[3] == 8 * 4
    assert counts[8] == (11 + 11 + 11) * 8
    ours = rows[rows["source"].str.contains("Trajectory Optimal|2506.10177")]
    assert (ours["images"] == 50000).all()
    assert ours["nfe"].notna().all()
