"""Every stage on a pretended GPU: it mixes no devices, and makes what it makes on the CPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pretend_gpu import PretendGpu
from runs import ROOT, RUN, SPACE, WARP, inputs_of, method_of

import anisodiff
from anisodiff.compute import CPU, Compute
from anisodiff.experiment.settings import (
    BasisSettings,
    GeometrySettings,
    LikelihoodSettings,
    MethodSettings,
    PathSettings,
    PlaneSettings,
    PretrainSettings,
    RunSettings,
    SearchSettings,
    ToyRowSettings,
    ToyTrainingSettings,
    TrainingSettings,
    TuningSettings,
)
from anisodiff.methods import Method, MethodFiles
from anisodiff.metrics.registry import FeatureFile
from anisodiff.stages import (
    convergence,
    finetuning,
    initial_paths,
    likelihoods,
    measuring,
    sampling,
    searching,
    throughput,
    toys,
    tuning,
)
from anisodiff.storage import checkpoints

FEATURES = FeatureFile("digits-cnn", ROOT / "config/checkpoints/digits/features.safetensors")
Files = Callable[[Path, Compute], Path]  # a stage that writes a file into a folder


@pytest.fixture
def gpu(monkeypatch) -> Compute:
    """Settings of the pretended GPU."""
    monkeypatch.setattr(Compute, "__post_init__", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a pretended GPU")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    return Compute(device="cuda")


@pytest.fixture(scope="module")
def paths(start, tmp_path_factory) -> dict[str, Path]:
    """A path on two subspaces, one of each class, one whose basis can be learned, and principal subspaces."""
    folder = tmp_path_factory.mktemp("paths")
    asked = {
        "block": PathSettings(kind="spectral", subspaces="block", knots=8),
        "class": PathSettings(kind="karras", schedules="class", knots=8),
        "separable": PathSettings(kind="spectral", subspaces="separable:64"),
    }
    for name, settings in asked.items():
        checkpoints.save_path(folder / name, initial_paths.initial_path(SPACE, settings, start[2]))
    checkpoints.save_basis(
        folder / "basis", initial_paths.principal_basis(SPACE, BasisSettings(rank=8, per="class"), start[2])
    )
    settings = PathSettings(kind="karras", subspaces="basis:pca", knots=8)
    checkpoints.save_path(folder / "pca", initial_paths.initial_path(SPACE, settings, start[2], folder / "basis"))
    return {file.name: file for file in folder.iterdir()}


def compared(stage: Files, gpu: Compute, folder: Path, close: float = 1e-4, without: str = "none") -> None:
    """What a stage makes on the two devices, where networks have another memory layout, and round otherwise."""
    here = checkpoints.read(stage(folder / "cpu", CPU))[0]
    with PretendGpu():
        file = stage(folder / "gpu", gpu)
    there = checkpoints.read(file)[0]
    assert here.keys() == there.keys()
    for name in [name for name in here if without not in name]:
        torch.testing.assert_close(there[name], here[name], rtol=close, atol=close, msg=f"{name} differs")


ROWS = {
    "heun": ("edm", {"grid": "karras", "solver": "heun"}),
    "midpoint": ("block", {"grid": "path-time", "solver": "midpoint"}),
    "classes": ("class", {"grid": "path-time", "solver": "midpoint"}),
    "pca": ("pca", {"grid": "path-time", "solver": "midpoint"}),
    "mean levels": ("separable", {"grid": "mean-karras", "solver": "dpmpp", "append_zero": False}),
    "unipc": ("edm", {"grid": "log-snr", "solver": "unipc", "append_zero": False}),
    "deis": ("edm", {"grid": "vp-time", "solver": "deis", "append_zero": False}),
    "ipndm": ("block", {"grid": "karras", "solver": "ipndm", "afs": True, "append_zero": False}),
    "threshold": ("edm", {"grid": "karras", "solver": "dpm2", "threshold": True}),
    "stochastic": ("block", {"grid": "path-time", "solver": "euler-maruyama", "append_zero": True}),
    "by hand": ("edm", {"grid": "given", "levels": {"5": [80.0, 9.0, 2.0, 0.5, 0.1, 0.0]}, "solver": "euler"}),
}


@pytest.mark.parametrize("row", ROWS)
def test_sampling(start, paths, gpu, tmp_path, row):
    path, settings = ROWS[row]
    files = MethodFiles(start[0], paths.get(path, start[1]))
    method = Method(SPACE, MethodSettings(network="base", path=path, **settings), files)

    def stage(folder: Path, computing: Compute) -> Path:
        sampling.sample(method, sampling.Drawing([5], 0, 9, 6, "features"), FEATURES, folder / "0-9.json", computing)
        return folder / "nfe5/0-9.safetensors"

    compared(stage, gpu, tmp_path)


def test_pairs_tunings_and_their_rows(start, paths, gpu, tmp_path):
    begun = MethodSettings(network="base", path="block", grid="path-time", solver="dpmpp")
    files = MethodFiles(start[0], paths["block"])
    asked = TuningSettings(
        start="a", teacher="b", teacher_nfe=7, nfe=[3, 4], steps=4, batch=8, warm_up=1, pairs=8, heldout=8
    )

    def stage(folder: Path, computing: Compute, features: FeatureFile | None = None, **changes) -> Path:
        pairs = folder / "pairs.safetensors"
        teacher = method_of(start, MethodSettings(network="base", path="edm", grid="karras", solver="heun"))
        tuning.make_pairs(teacher, 7, range(16), 8, pairs, computing)
        output = folder / "tuning.safetensors"
        tuning.tune(asked.changed(**changes), Method(SPACE, begun, files), pairs, features, output, computing)
        row = begun.changed(grid="tuned", solver="tuned", tuning="gs", append_zero=None)
        method = Method(SPACE, row, MethodFiles(*start[:1], paths["block"], (output,)))
        sampling.sample(method, sampling.Drawing([3], 0, 7, 8), FEATURES, folder / "0-7.json", computing)
        return folder / "nfe3/0-7.safetensors"

    compared(stage, gpu, tmp_path / "free")
    compared(lambda *given: stage(*given, FEATURES, shared_levels=True), gpu, tmp_path / "shared")


def test_searches_and_their_rows(start, gpu, tmp_path):
    asked = SearchSettings(network="base", path="edm", points=7, images=4, analytic_nfe=4)
    row = MethodSettings(
        network="base", path="edm", grid="searched", search="s", solver="ipndm", append_zero=False, afs=True
    )

    def stage(folder: Path, computing: Compute) -> Path:
        search = folder / "search.safetensors"
        searching.search_levels(SPACE, asked, *start[:2], search, computing)
        method = Method(SPACE, row, MethodFiles(*start[:2], (search,)))
        sampling.trajectory(method, 4, range(3), folder / "trajectory.safetensors", computing)
        return folder / "trajectory.safetensors"

    compared(stage, gpu, tmp_path)


@pytest.mark.parametrize("path", ["edm", "separable"])
def test_likelihoods(start, paths, gpu, tmp_path, path):
    asked = LikelihoodSettings(network="base", path=path, batch=4, grey_levels=17, steps=4, times=3)

    def stage(folder: Path, computing: Compute) -> Path:
        output = folder / "likelihood.safetensors"
        files = start[2], start[0], paths.get(path, start[1])
        likelihoods.measure_likelihood(SPACE, asked, range(5), *files, output, computing)
        return output

    compared(stage, gpu, tmp_path)


def test_geometry(start, paths, gpu, tmp_path):
    asked = GeometrySettings(
        network="base", path="block", images=3, shown=2, steps=10, fine_steps=40, data=50,
        exact=["kernel", "gaussian", "mixture"], rank=5,
    )  # fmt: skip

    def stage(folder: Path, computing: Compute) -> Path:
        output = folder / "geometry.safetensors"
        measuring.measure_geometry(SPACE, asked, start[2], start[0], paths["block"], output, computing)
        return output

    compared(stage, gpu, tmp_path, without="torsion")  # a quotient of small numbers


SHORT = {"kimg": 0.128, "batch": 32, "save_seconds": 100.0, "guard_kimg": 0.05, "guard_images": 8}
RUNS = {
    "tlsm": ("edm", {"path_gradient": "full", "kinetic": [0.1, 0.1]}),
    "edm": ("edm", {"loss": "edm", "subspaces": "whole", "label_weights": "rank"}),
    "level": ("edm", {"path_gradient": "level", "subspaces": "whole", "label_weights": "rank"}),
    "images": ("edm", {"guard": "images"}),
    "basis": ("separable", {"subspaces": "separable:64", "learn_basis": True, "label_weights": "rank"}),
    "planes": ("edm", {"planes": 3}),
    "discretisation": ("edm", {"loss": "discretisation"}),
    "classes": ("class", {"subspaces": "whole", "schedules": "class", "label_weights": "rank"}),
}


@pytest.mark.parametrize("run", RUNS)
def test_finetuning(start, paths, gpu, tmp_path, run):
    path, changes = RUNS[run]
    settings = RunSettings(**RUN.model_dump() | SHORT | changes)
    inputs = inputs_of((start[0], paths.get(path, start[1]), start[2]))

    def stage(folder: Path, computing: Compute) -> Path:
        finetuning.finetune(SPACE, settings, inputs, folder / "network", folder / "path", computing)
        return folder / "path"

    compared(stage, gpu, tmp_path)


def test_other_trainings(start, gpu, tmp_path):
    shared = RUN.model_dump(include=set(TrainingSettings.model_fields)) | {"kimg": 0.064}
    settings = PretrainSettings(
        **shared, network={"model_channels": 8, "channel_mult": [1], "num_blocks": 1}, augment=0.5
    )

    def base(folder: Path, computing: Compute) -> Path:
        finetuning.pretrain(SPACE, settings, start[2], folder / "base", computing)
        return folder / "base"

    def warp(folder: Path, computing: Compute) -> Path:
        finetuning.learn_warp(SPACE, WARP.changed(kimg=0.064), inputs_of(start), folder / "warp", computing)
        row = MethodSettings(network="base", path="edm", grid="warped", warp="w", solver="midpoint")
        method = Method(SPACE, row, MethodFiles(*start[:2], (folder / "warp",)))
        sampling.trajectory(method, 5, range(3), folder / "trajectory", computing)
        return folder / "trajectory"

    compared(base, gpu, tmp_path / "base", close=1e-2)
    compared(warp, gpu, tmp_path / "warp")


def test_references_convergence_and_throughput(start, gpu, tmp_path):
    method = method_of(
        start, MethodSettings(network="base", path="edm", grid="karras", solver="ipndm", append_zero=False)
    )

    def stage(folder: Path, computing: Compute) -> Path:
        output = folder / "reference.safetensors"
        sampling.reference(start[2], FEATURES, None, 8, output, computing)
        convergence.node_distances(method, 4, 8, 8, FEATURES, output, folder / "convergence.csv", computing)
        measured = [SPACE, 4, {"run": RUN}, {"warp": WARP}, start[2], start[0], FEATURES, folder / "throughput.json"]
        throughput.measure_throughput(*measured, computing, 0.0)
        return output

    compared(stage, gpu, tmp_path)


@pytest.mark.parametrize("learns", ["noise", "drift"])
def test_the_toy(gpu, tmp_path, monkeypatch, learns):
    monkeypatch.setattr(toys, "TIMES", 10)
    asked = ToyTrainingSettings(kimg=0.128, batch=64, learning_rate=0.01, images=8, steps=[2, 3])
    row = ToyRowSettings(learns=learns, kinetic=0.05)

    def stage(folder: Path, computing: Compute) -> Path:
        toys.learn_plane(asked, PlaneSettings(), row, folder / "seed-0.safetensors", computing)
        return folder / "seed-0.safetensors"

    compared(stage, gpu, tmp_path)


def test_models_for_people(start, paths, gpu):
    here = anisodiff.sample(anisodiff.load(start[0], paths["block"]), nfe=5, seeds=range(3))
    with PretendGpu():
        there = anisodiff.sample(anisodiff.load(start[0], paths["block"], device="cuda"), nfe=5, seeds=range(3))
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-4)


def test_what_mixes_devices_is_refused():
    with PretendGpu():
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        for mixed in (lambda: there + here, lambda: torch.where(there > 0, there, here), lambda: here[there.long()]):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        assert (there + torch.tensor(1.0)).device.type == there[here.long()].device.type == "cuda"
        assert there.cpu().device.type == (here + 1).device.type == "cpu"
