"""Exported methods: the document says all that sampling takes, and other software makes our images of the lists."""

import importlib.util
import json
import re
import shutil
import sys
import types
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
import yaml
from exact import mixture_over
from runs import SPACE
from scipy.fft import dctn, idctn
from typer.testing import CliRunner

from anisodiff import cli
from anisodiff.compute import CPU
from anisodiff.errors import StageError
from anisodiff.experiment.config import read
from anisodiff.experiment.files import DatasetFiles
from anisodiff.grids.fixed import given
from anisodiff.grids.learned import FreeLevels
from anisodiff.methods import Method, MethodFiles, Sampler
from anisodiff.paths.noise_path import NoisePath
from anisodiff.paths.schedules import KnotSchedule, karras_logs
from anisodiff.paths.subspaces import Subspaces, partition
from anisodiff.solvers.generation import Draws
from anisodiff.solvers.generation import start as first_state
from anisodiff.solvers.loop import solve
from anisodiff.solvers.registry import SOLVERS
from anisodiff.solvers.tuned import TunedSolver
from anisodiff.stages.exporting import export
from anisodiff.storage import checkpoints
from anisodiff.storage.files import digest
from anisodiff.storage.formats import FORMATS, LISTS
from anisodiff.storage.tunings import save_tuning

EDM = {"network": "base", "path": "edm", "grid": "karras"}
FEW = EDM | {"grid": "log-snr", "append_zero": False}
TUNED = {"network": "base", "grid": "tuned", "solver": "tuned", "nfe": [4]}
METHODS = {
    "heun": EDM | {"solver": "heun", "nfe": [7]},
    "midpoint": EDM | {"solver": "midpoint", "nfe": [7]},
    "dpmpp": EDM | {"solver": "dpmpp", "order": 2},
    "unipc": EDM | {"solver": "unipc"},
    "plain": FEW | {"solver": "dpmpp"},
    "short": FEW | {"solver": "dpmpp", "order": 2},
    "afs": FEW | {"solver": "ipndm", "afs": True, "threshold": True},
    "ani": {"network": "base", "path": "ani", "grid": "path-time", "solver": "ipndm", "append_zero": False},
    "gs": TUNED | {"path": "edm", "tuning": "gs"},
    "gs-ani": TUNED | {"path": "ani", "tuning": "gs-ani"},
    "ld3": TUNED | {"path": "edm", "tuning": "ld3"},
}
TUNING = {"teacher": "heun", "teacher_nfe": 7, "nfe": [4], "window": 4}
TUNINGS = {  # what they start from, their subspaces, and what they learn
    "gs": ("plain", "radial:3", ["levels", "labels", "coefficients"]),
    "gs-ani": ("ani", "radial:3", ["labels", "coefficients"]),
    "ld3": ("plain", "whole", ["levels"]),
}
CONFIG = {
    "datasets": {
        "digits": SPACE.model_dump()
        | {
            "images": {"url": "digits"},
            "base": {"url": "base.safetensors"},
            "features": {"kind": "digits-cnn", "url": "features.safetensors"},
            "paths": {"edm": {"kind": "karras"}, "ani": {"kind": "spectral", "subspaces": "block"}},
            "methods": METHODS,
            "tunings": {
                name: TUNING | {"start": start, "subspaces": kind, "learn": learn}
                for name, (start, kind, learn) in TUNINGS.items()
            },
            "sampling": {"nfe": [4], "images": 8, "shard": 8},
        }
    }
}
CONFIGURED = [Path("config.yaml")]


@pytest.fixture(scope="module")
def run(start, tmp_path_factory) -> Path:
    """A folder with the results of a run: a trained network, two paths, tunings of random numbers."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    files = DatasetFiles("digits", read([folder / "config.yaml"]).datasets["digits"])
    logs = torch.cat([karras_logs(8, 1e-9, 0.002, 80.0), karras_logs(8, 1e-7, 0.01, 60.0)])
    equal = torch.full((2,), 0.5, dtype=torch.float64)
    for name, source in (("base", start[0]), ("edm", start[1])):
        target = folder / (files.network(name) if name == "base" else files.path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    checkpoints.save_path(
        folder / files.path("ani"), NoisePath(Subspaces(partition(8, "block")), KnotSchedule(logs), equal)
    )
    for name, (begun, kind, learn) in TUNINGS.items():
        method = files.settings.methods[begun]
        network, path = folder / files.network("base"), folder / files.path(method.path)
        sampler = Sampler(Method(SPACE, method, MethodFiles(network, path)), CPU)
        levels = sampler.solver(4, None)[0]
        solver = TunedSolver(sampler.path, FreeLevels(levels), learn, method.solver, 3, 4, subspaces=kind)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in (each for each in solver.parameters() if each.requires_grad):
                parameter += 0.3 * torch.randn_like(parameter)
            made = {"network": digest(network), "path": digest(path)}
            made["settings"] = {"start": method.model_dump(), "tuning": {"learn": learn}}
            save_tuning(
                folder / files.of("results/{dataset}/tunings/" + name + ".safetensors"), {4: solver()}, kind, **made
            )
    return folder


@pytest.fixture
def here(run, monkeypatch) -> Path:
    monkeypatch.chdir(run)
    return run


def sampler_of(method: str) -> Sampler:
    files = DatasetFiles("digits", read(CONFIGURED).datasets["digits"])
    settings = files.settings.methods[method]
    grids = tuple(map(Path, files.grids(method, [4])))
    chosen = MethodFiles(Path(files.network("base")), Path(files.path(settings.path)), grids)
    return Sampler(Method(SPACE, settings, chosen), CPU)


def rerun(document: dict, noise: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    """Sample by the document and the network alone, as its words have it."""
    network = checkpoints.load_network(document["files"]["network"]["file"])[0].double()
    solver, basis, s = document["solver"], document["basis"], document["sigma_data"]
    modes = (lambda z: torch.from_numpy(dctn(z.numpy(), axes=(2, 3), norm="ortho")),
             lambda z: torch.from_numpy(idctn(z.numpy(), axes=(2, 3), norm="ortho")))  # fmt: skip
    into, back = (lambda z: z,) * 2 if basis["kind"] == "pixels" else modes
    numbers = lambda values: torch.tensor(values[0], dtype=torch.float64)  # noqa: E731 - classes share one
    spread = lambda values: numbers(values)[torch.tensor(basis["index"])]  # noqa: E731

    def estimate(z, told):
        label = sum(w * sigma for w, sigma in zip(document["label_weights"], numbers(told).log(), strict=True)) / 4
        sigma = spread(told)
        scale = (sigma**2 + s**2).sqrt()
        raw = network(back(z / scale), label.expand(len(z)), labels)
        return s**2 / scale**2 * z + sigma * s / scale * into(raw)

    cells, values = solver["cells"], []
    enter, leave = (lambda z: z,) * 2 if len(cells["coordinates"]) == 1 else modes
    index = torch.tensor(basis["index"] if isinstance(cells["index"], str) else cells["index"])
    z = spread(document["levels"][0]) * into(noise)
    for k, (told, weights) in enumerate(zip(document["told"], solver["weights"], strict=True)):
        if k == 0 and solver["analytic_first"]:
            sigma = spread(document["levels"][0])
            value = z - sigma * z / (1 + sigma**2).sqrt()
        else:
            value = estimate(z, told)
        if solver["threshold"]:
            pixels = back(value)
            limit = pixels.abs().flatten(1).quantile(0.995, dim=1).clamp(min=1)[:, None, None, None]
            value = into(pixels.clamp(-limit, limit) / limit)
        if solver["of_flows"]:
            value = (value - z) / spread(document["levels"][0] if k == 0 and solver["analytic_first"] else told)
        values = [enter(value), *values]
        terms = zip(weights, [enter(z), *values], strict=False)
        z = leave(sum(numbers(weight)[index] * each for weight, each in terms))
    return back(z)


@pytest.mark.parametrize("method", ["dpmpp", "plain", "afs", "ani", "gs", "gs-ani", "ld3"])
def test_a_document_alone_makes_the_images_again(here, method, tmp_path):
    export(CONFIGURED, None, method, 4, "json", tmp_path / "out.json")
    document = json.loads((tmp_path / "out.json").read_text())
    sampler = sampler_of(method)
    denoiser = sampler.denoiser.double()
    drawn = Draws(range(2), sampler.shape, sampler.classes)
    noise, labels = drawn.noise.double(), drawn.labels.double()
    levels, step = sampler.solver(4, sampler.files.grid(4, [4]))
    z = first_state(denoiser, noise, levels, labels)
    before = denoiser.evaluations
    ours = sampler.path.to_pixels(solve(denoiser, z, levels, step, labels, **sampler.options))
    assert denoiser.evaluations - before == document["network_calls"] == 4
    assert torch.allclose(rerun(document, noise, labels), ours, rtol=0, atol=1e-11)


def test_a_document_says_what_it_is_of(here, capsys):
    export(CONFIGURED, "digits", "midpoint", 7, "json", None)
    document = json.loads(capsys.readouterr().out)
    assert (document["dataset"], document["method"], document["nfe"]) == ("digits", "midpoint", 7)
    for each in document["files"].values():
        assert digest(each["file"]) == each["sha256"]
    assert document["settings"]["method"] == METHODS["midpoint"] | document["settings"]["method"]
    assert document["versions"]
    assert document["commits"]
    levels, _ = sampler_of("midpoint").solver(7, None)
    assert document["levels"] == levels.nodes.tolist()
    assert document["solver"]["inner"] == levels.inner.tolist()  # where it evaluates; it has no weights in numbers
    assert "weights" not in document["solver"]


def listed(kind: str, method: str, nfe: int, capsys) -> tuple[list[float], str]:
    """A list of sigmas, and what is said of it."""
    export(CONFIGURED, None, method, nfe, kind, None)
    said = capsys.readouterr()
    return json.loads(said.out), said.err


def test_lists_are_the_levels(here, capsys):
    levels = sampler_of("heun").solver(7, None)[0].nodes[:, 0, 0]
    for kind in ("k-diffusion", "diffusers"):
        found, said = listed(kind, "heun", 7, capsys)
        assert found == levels.tolist()
        assert found[-1] == 0
        assert re.search(r"; the solver is heun, in [\w-]+: (sample_heun|HeunDiscreteScheduler\(\))$", said)
    flow = torch.tensor(listed("diffusers-flow", "heun", 7, capsys)[0], dtype=torch.float64)
    assert torch.allclose(flow / (1 - flow), levels[:-1], rtol=1e-12)
    export(CONFIGURED, None, "plain", 4, "comfyui", None)
    said = capsys.readouterr()
    # as ComfyUI's node reads its text
    read_there = [float(each) for each in re.findall(r"[-+]?(?:\d*\.*\d+)", said.out)]
    assert read_there == listed("k-diffusion", "plain", 4, capsys)[0]
    assert "the solver is dpmpp of order 3, in ComfyUI: no sampler that is known to make the same steps" in said.err
    assert LISTS["comfyui"].write([80.0, 1e-9, 0.0]) == "80.0, 0.000000001, 0.0"


def test_the_command_writes_a_file(here, tmp_path):
    words = ["export", "heun", "--nfe", "7", "--format", "diffusers", "--configfile", "config.yaml"]
    ran = CliRunner().invoke(cli.app, [*words, "--output", str(tmp_path / "sigmas.json")])
    assert (ran.exit_code, ran.stdout) == (0, "")
    assert json.loads((tmp_path / "sigmas.json").read_text()) == json.loads(CliRunner().invoke(cli.app, words).stdout)


def test_levels_that_were_tuned_alone_are_a_list(here, capsys):
    found, said = listed("k-diffusion", "ld3", 4, capsys)
    assert (
        found == sampler_of("ld3").solver(4, Path("results/digits/tunings/ld3.safetensors"))[0].nodes[:, 0, 0].tolist()
    )
    assert "the solver is dpmpp of order 3" in said


def test_a_tuning_that_does_not_say_what_it_learned_is_refused(here, tmp_path, monkeypatch):
    shutil.copytree(here, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    file = Path("results/digits/tunings/ld3.safetensors")
    tensors, metadata = checkpoints.read(file)
    checkpoints.save(file, tensors, metadata | {"settings": None})
    with pytest.raises(StageError, match=r"ld3\.safetensors: does not say what was tuned: tune again"):
        export(CONFIGURED, None, "ld3", 4, "k-diffusion", None)


@pytest.mark.parametrize(
    ("kind", "method", "words"),
    [
        (
            "k-diffusion",
            "gs",
            "k-diffusion: carries sigmas alone, not tuned labels, tuned coefficients: use --format json",
        ),
        ("comfyui", "ani", "not levels that differ between subspaces or classes: use"),
        ("diffusers", "afs", "not an analytic first step, thresholding: use"),
        ("diffusers-flow", "plain", "not a last level above 0: use"),
        ("diffusers", "none", "method: 'none' is unknown: use one of heun, midpoint"),
        ("numpy", "plain", "format: 'numpy' is unknown: use one of json, k-diffusion, comfyui, diffusers"),
    ],
)
def test_what_a_format_does_not_carry_is_refused(here, kind, method, words):
    with pytest.raises(StageError, match=words):
        export(CONFIGURED, None, method, 4, kind, None)


def test_what_is_missing_is_named(here, tmp_path, monkeypatch):
    with pytest.raises(StageError, match="dataset: 'faces' is unknown: use one of digits"):
        export(CONFIGURED, "faces", "plain", 4, "json", None)
    with pytest.raises(StageError, match=r"none\.yaml: no such file"):
        export([Path("none.yaml")], None, "plain", 4, "json", None)
    monkeypatch.chdir(tmp_path)
    target = re.escape("results/fetched/local/base.safetensors")
    with pytest.raises(
        StageError, match=f"^{target}: not made yet: run snakemake --profile local {target} --configfile /"
    ):
        export([here / "config.yaml"], None, "plain", 4, "json", None)


def test_configurations_are_merged_as_snakemake_merges_them(tmp_path):
    config = pytest.importorskip("snakemake.utils", reason="the workflow's own merging is compared with")
    one, other = tmp_path / "one.yaml", tmp_path / "other.json"
    one.write_text(yaml.safe_dump(CONFIG, sort_keys=False))
    changes = {
        "threads": 3,
        "datasets": {"digits": {"sampling": {"images": 16}, "methods": {"new": EDM | {"solver": "euler"}}}},
    }
    other.write_text(json.dumps(changes))
    found = read([one, other])
    merged = yaml.safe_load(one.read_text())
    config.update_config(merged, changes)
    assert merged == yaml.safe_load(yaml.safe_dump(merged))
    (tmp_path / "merged.yaml").write_text(yaml.safe_dump(merged))
    assert found == read([tmp_path / "merged.yaml"])
    assert (found.threads, found.datasets["digits"].sampling.images) == (3, 16)
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(StageError, match=r"empty\.yaml: holds no keys"):
        read([one, tmp_path / "empty.yaml"])


MIXTURE = mixture_over(NoisePath(Subspaces(partition(2, "whole")), KnotSchedule(karras_logs(8, 1e-9, 0.002, 80.0))))


def denoise(x: torch.Tensor, sigma) -> torch.Tensor:
    """An exact denoiser of 2x2 images, in float64."""
    return MIXTURE[0](x.double(), torch.as_tensor(sigma).double())


def ours(solver: str, sigmas: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise at the first level, and our images. Names are `SOLVERS`', with an order where they remember."""
    name, _, order = solver.rpartition("-")
    name, order = (name, int(order)) if order.isdigit() else (solver, None)
    x = MIXTURE[1] * sigmas[0]
    return x, solve(MIXTURE[0], x, given(sigmas, 1), SOLVERS[name].with_order(order))


@pytest.fixture(scope="module")
def k_diffusion():
    """Its module of samplers alone: the package imports what trains networks."""
    found = importlib.util.find_spec("k_diffusion")
    if found is None:
        pytest.skip("k-diffusion is not installed: `make` does it, without its dependencies")
    with pytest.MonkeyPatch.context() as patch:
        package = types.ModuleType("k_diffusion")
        package.__path__ = list(found.submodule_search_locations)
        patch.setitem(sys.modules, "k_diffusion", package)
        for name in ("torchdiffeq", "torchsde"):  # for likelihoods and Brownian noise
            patch.setitem(sys.modules, name, MagicMock())
        return importlib.import_module("k_diffusion.sampling")


def exported(kind: str, capsys) -> list[float]:
    return listed(kind, "unipc", 8, capsys)[0]


@pytest.mark.parametrize(("solver", "name"), LISTS["k-diffusion"].samplers.items())
def test_k_diffusion_makes_our_images(here, capsys, k_diffusion, solver, name):
    sigmas = exported("k-diffusion", capsys)
    x, expected = ours(solver, sigmas)
    found = getattr(k_diffusion, name)(denoise, x, torch.tensor(sigmas, dtype=torch.float64), disable=True)
    assert torch.allclose(found, expected, atol=1e-9)


def test_a_solver_that_remembers_ends_in_a_lower_order_than_theirs_above_zero(here, capsys, k_diffusion):
    """So a list that does not end at 0 names no sampler for it."""
    sigmas, said = listed("k-diffusion", "short", 4, capsys)
    assert said.endswith(
        "the solver is dpmpp of order 2, in k-diffusion: no sampler that is known to make the same steps\n"
    )
    x, expected = ours("dpmpp-2", sigmas)
    found = k_diffusion.sample_dpmpp_2m(denoise, x, torch.tensor(sigmas, dtype=torch.float64), disable=True)
    assert (found - expected).abs().max() > 1e-3


def by_diffusers(scheduler, x: torch.Tensor, alpha) -> torch.Tensor:
    """Run a scheduler on the exact denoiser.

    Args:
        scheduler: with its timesteps and sigmas set.
        x: noise at the first level, of unit scale of the data.
        alpha: the data's scale in the scheduler's own coordinates, a function of its sigma.
    """
    scheduler.set_begin_index(0)
    sample = x * alpha(scheduler.sigmas[0])
    for k, t in enumerate(scheduler.timesteps):
        own = scheduler.sigmas[k].double()
        scheduler.scale_model_input(sample, t) if hasattr(scheduler, "scale_model_input") else None
        x = sample / alpha(own)
        sigma = own if "flow" not in str(scheduler.config.get("prediction_type", "flow")) else own / (1 - own)
        clean = denoise(x, sigma)
        noise = (x - clean) / sigma
        output = noise - clean if sigma is not own else noise
        sample = scheduler.step(output, t, sample, return_dict=False)[0].double()
    return sample


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("solver", "name"), LISTS["diffusers"].samplers.items())
def test_diffusers_makes_our_images(here, capsys, solver, name):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: the extra `export-tests`")
    sigmas = exported("diffusers", capsys)
    scheduler = eval(name, vars(diffusers) | {each: getattr(diffusers, each) for each in re.findall(r"^\w+", name)})
    steps, scaled = len(sigmas) - 1, lambda sigma: (1 + sigma**2) ** -0.5
    if solver == "euler":
        scheduler.set_timesteps(sigmas=sigmas)
    else:
        scheduler.set_timesteps(steps)
        own = torch.tensor(sigmas, dtype=torch.float64)
        scheduler.sigmas = torch.cat([own[:1], own[1:-1].repeat_interleave(2), own[-1:]]) if solver == "heun" else own
    x, expected = ours(solver, sigmas)
    found = by_diffusers(scheduler, x, (lambda sigma: 1.0) if solver in ("euler", "heun") else scaled)
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("solver", "name"), LISTS["diffusers-flow"].samplers.items())
def test_diffusers_flow_schedulers_make_our_images(here, capsys, solver, name):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: the extra `export-tests`")
    scheduler = eval(name, {each: getattr(diffusers, each) for each in re.findall(r"^\w+", name)})
    scheduler.set_timesteps(sigmas=np.array(exported("diffusers-flow", capsys)))
    x, expected = ours(solver, exported("k-diffusion", capsys))
    found = by_diffusers(scheduler, x, lambda sigma: 1 - sigma)
    assert torch.allclose(found, expected, atol=1e-4)


def test_every_format_is_tested():
    assert FORMATS == ("json", "k-diffusion", "comfyui", "diffusers", "diffusers-flow")
