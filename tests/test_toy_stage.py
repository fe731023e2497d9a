"""The toy's stage: what it measures against closed forms, what it writes, how it goes on, what it refuses."""

import copy
import os
import signal
from pathlib import Path

import matplotlib.colors
import pandas as pd
import pytest
import torch
import yaml
from workflow_runs import ROOT, SHORT, jobs

from anisodiff.denoiser import Denoiser
from anisodiff.errors import InvalidArgument, StageError, Stopped
from anisodiff.exact.flexible_process import ProcessCoordinates, critically_damped
from anisodiff.exact.toys import Plane
from anisodiff.experiment.config import parse, resolve
from anisodiff.experiment.settings import PlaneSettings, ToyRowSettings, ToySettings
from anisodiff.grids.levels import at
from anisodiff.networks.mlp import Mlp
from anisodiff.networks.turned import PlaneFrame, Turned
from anisodiff.objectives.losses import kinetic
from anisodiff.paths.noise_path import NoisePath
from anisodiff.paths.rotated import DenseBasis, random_vectors
from anisodiff.paths.schedules import ExponentSchedule
from anisodiff.report import toy_figures, toy_table
from anisodiff.solvers.loop import solve
from anisodiff.solvers.registry import SOLVERS
from anisodiff.stages import publishing, toys
from anisodiff.storage import checkpoints

CONFIG = yaml.safe_load((ROOT / "config/fp-toy.yaml").read_text())
TOY = parse(ToySettings, CONFIG["toy"] | {"kimg": 2.56, "images": 64, "steps": [2, 3], "learning_rate": 0.01})
FEW = 10  # times of a kinetic energy whose value no test asks for
TILTED = Plane(2.0, (1.0, 0.09), 0.6)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def frame_of(rate: float) -> PlaneFrame:
    basis = DenseBasis(torch.zeros(3, 1, 1, dtype=torch.int64), random_vectors(3, 1))
    return PlaneFrame([0, 1], torch.tensor([rate]), basis)


def path_of(rates: list[float]) -> NoisePath:
    basis = DenseBasis(torch.arange(3).reshape(3, 1, 1), random_vectors(3, 0))
    return NoisePath(basis, ExponentSchedule(torch.tensor(rates, dtype=torch.float64).log()))


@torch.no_grad()
@pytest.mark.parametrize(("rates", "frame"), [([0.5, 1.0, 2.0], None), ([1.0, 1.0, 1.0], frame_of(0.8))])
def test_the_velocity_is_that_of_a_trajectory_in_the_processs_own_coordinates(rates, frame):
    """Central difference of the flow, integrated in the path's coordinates."""
    path = path_of(rates)
    coordinates, exact = ProcessCoordinates(path, frame), TILTED.denoiser(path)
    nodes = path.schedule.nodes
    t, h = (nodes[250:251] + nodes[251:252]) / 2, 1e-4
    noise, z = path.at(t), 3 * normal(5, 3, 1, 1)
    assert torch.allclose(coordinates.back(coordinates.of(z, noise), noise), z, atol=1e-12)

    def later(by: float) -> torch.Tensor:
        there = path.at(t + by)
        ends = torch.stack([noise.sigma, there.sigma])
        if by < 0:
            moved = solve(exact, z, at(ends), SOLVERS["heun"].step)
        else:  # upwards a solver's levels do not go: Heun's step by hand
            flow = exact.flow(z, noise.g)
            change = there.sigma - noise.sigma
            flow_there = exact.flow(z - path.scale(flow, change), there.g)
            moved = z - path.scale((flow + flow_there) / 2, change)
        return coordinates.of(moved, there)

    found = coordinates.velocity(exact, z, t)
    assert torch.allclose(found, (later(h) - later(-h)) / (2 * h), rtol=1e-4, atol=1e-4)


def test_the_kinetic_energy_of_a_turned_network_is_that_of_its_velocity():
    path, frame = path_of([1.0, 1.0, 1.0]), frame_of(0.8)
    denoiser = Denoiser(Turned(Mlp(1, 3).double(), frame), path, 1.0)
    z, t = 3 * normal(6, 3, 1, 1), torch.rand(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    energy, _ = kinetic(denoiser, z, t, torch.ones_like(z))
    velocity = ProcessCoordinates(path, frame).velocity(denoiser, z, t)
    assert torch.allclose(energy, velocity.square().flatten(1).sum(1), rtol=1e-10)
    (gradient,) = torch.autograd.grad(energy.sum(), frame.rates, retain_graph=True)
    assert gradient.abs() > 0.1
    energy.sum().backward()
    assert all(each.grad is None for each in denoiser.network.network.parameters())


@torch.no_grad()
def test_what_omega_adds_to_the_kinetic_energy_of_the_exact_flow():
    """`beta'^2 E|omega x|^2`, and nothing across: the regulariser can only lower it to 0."""
    path, frame = path_of([1.0, 1.0, 1.0]), frame_of(0.8)
    exact, t = TILTED.denoiser(path), torch.tensor([0.4], dtype=torch.float64)
    noise, count = path.at(t), 40_000
    z = path.from_pixels(TILTED.draw(count, torch.Generator().manual_seed(0)))
    z = z + path.scale(normal(count, 3, 1, 1, seed=1), noise.sigma)
    straight, turned = (
        ProcessCoordinates(path, each).velocity(exact, z, t).square().flatten(1).sum(1) for each in (None, frame)
    )
    rate = 0.999 * (0.1 + 19.9 * (0.001 + 0.999 * 0.4))
    added = rate**2 * frame.omega(ProcessCoordinates(path).of(z, noise)).square().flatten(1).sum(1)
    across = turned - straight - added
    assert float(added.mean()) > 5
    assert abs(float(across.mean())) < 4 * float(across.std()) / count**0.5 + 0.02 * float(added.mean())


@torch.no_grad()
def test_the_fixed_process_has_the_energy_and_the_shares_of_closed_forms():
    """7.844 along the normal from time 0.001; shares along the plane 0, 0.12 and 0.32 for variances 1, 1/4 and 4."""
    path = path_of([1.0, 1.0, 1.0])
    for variance, share in ((1.0, 0.0), (0.25, 0.12), (4.0, 0.32)):
        plane = Plane(variances=(variance, variance))
        energy, along = toys._energies(TOY, plane, toys.Process(plane.denoiser(path)))
        assert along == pytest.approx(share, abs=0.006)
        assert (1 - along) * energy == pytest.approx(7.844, abs=0.08)


def test_damped_dynamics_reach_the_stationary_distribution_fastest_at_critical_friction():
    """Noise on the velocities alone; the slowest mode decays by 1 at friction 2, by less on either side."""
    start = torch.tensor([2.0, 0.0], dtype=torch.float64)
    left = {}
    for friction in (1.0, 2.0, 4.0):
        phi, covariance = critically_damped(1, friction).transition(12.0)
        left[friction] = float((phi @ start).norm()) + float((covariance - torch.eye(2).double()).norm())
    assert left[2.0] < 1e-3
    assert left[2.0] < 0.1 * min(left[1.0], left[4.0])


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, dict]:
    """Every row on one plane, ten steps of each training, one row with two seeds; and the report."""
    folder = tmp_path_factory.mktemp("toy")
    files = {"tilted": {}}
    for name, row in TOY.rows.items():
        seeds = (0, 1) if name == "noise" else (0,)
        files["tilted"][name] = [str(folder / "rows/tilted" / name / f"seed-{seed}.safetensors") for seed in seeds]
        for seed, file in enumerate(files["tilted"][name]):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(toys, "TIMES", FEW)
                toys.learn_plane(TOY.training.changed(seed=seed), TOY.planes["tilted"], row, Path(file))
    toy_table.write(files, folder)
    toy_figures.make(files, folder / "plots")
    return folder, files


def test_a_short_run_learns_every_row_and_draws_it(made):
    folder, files = made
    table = pd.read_csv(folder / "table.csv")
    assert len(table) == 1 + len(TOY.rows)
    assert table[["w2_2", "w2_3", "energy", "length"]].gt(0).all().all()
    by_row = table.set_index("row")
    assert by_row.loc["noise", "rate_normal"].notna().all()
    assert pd.isna(by_row.loc["vp", "angle"])
    for column in ("omega", "omega_start"):
        assert by_row[column].notna().groupby("row").all().to_dict() == {row: "drift" in row for row in TOY.rows}
    page = (folder / "table.md").read_text()
    assert page.count("\n| ") == len(TOY.rows) + 2
    assert page.count(" ± ") > 5
    assert "tilted by 0.6 rad, variances in it 1 and 0.09" in page
    for name in ("toy-forward", "toy-velocities", "toy-trajectories", "toy-damped"):
        for kind in ("svg", "png"):
            assert (folder / f"plots/{name}.{kind}").stat().st_size > 1000
    tensors, metadata = checkpoints.read(files["tilted"]["drift"][0])
    assert {name: list(each.shape) for name, each in tensors.items()} == {
        "exact_velocity": [81, 3], "forward": [151, 3, 3], "places": [81, 2], "sampling": [4, 4, 3],
        "velocity": [81, 3],
    }  # fmt: skip
    assert metadata["settings"]["row"]["learns"] == "drift"
    assert (Path(files["tilted"]["vp"][0]).with_suffix(".jsonl")).is_file()


def test_the_toy_is_published_with_what_made_it(made, tmp_path):
    folder, _ = made
    every = [folder / name for name in ("table.csv", "table.md", "plots")]
    (folder / "earlier.csv").touch()
    publishing.publish(folder, [*every, folder / "earlier.csv"], TOY.model_dump(), tmp_path)
    earlier = tmp_path / "earlier.csv"
    assert earlier.exists()
    (tmp_path / "README.md").touch()
    publishing.publish(folder, every, TOY.model_dump(), tmp_path)
    with pytest.raises(StageError, match=r"none\.csv: no such file: make the dataset's results first"):
        publishing.publish(folder, [folder / "none.csv"], TOY.model_dump(), tmp_path)
    found = {str(each.relative_to(tmp_path)) for each in tmp_path.rglob("*") if each.is_file()}
    assert {"provenance.json", "table.csv", "table.md", "plots/toy-forward.svg", "README.md"} <= found
    assert not earlier.exists()
    assert not any("rows" in each for each in found)


def test_every_row_has_a_panel_of_its_own_colour(made, monkeypatch):
    drawn = {}
    keep = lambda figures, *_: drawn.update({name: draw() for name, draw in figures.items()})  # noqa: E731
    monkeypatch.setattr(toy_figures, "save", keep)
    toy_figures.make(made[1], made[0])
    colour = toy_figures.colours(list(TOY.rows))
    for name in ("toy-forward", "toy-velocities", "toy-trajectories"):
        shown = {axes.get_title(loc="left").removeprefix("tilted: "): axes for axes in drawn[name].axes}
        assert list(shown) == list(TOY.rows)
        for row, axes in shown.items():
            curves = axes.lines[1:]  # after the plane
            assert {each.get_color() for each in curves} == ({colour[row]} if curves else set())
            assert curves or len(axes.collections) == 2  # arrows, exact and learned


def test_a_row_has_one_colour_and_no_other_has_it():
    found = toy_figures.colours(list(TOY.rows))
    assert list(found) == list(TOY.rows)
    assert len({matplotlib.colors.to_hex(each) for each in found.values()}) == len(TOY.rows)


@pytest.mark.parametrize("row", ["noise-kinetic", "drift-kinetic"])
def test_stopped_while_it_learns_and_started_again_it_ends_the_same(row, made, tmp_path, monkeypatch):
    _, files = made
    draw, drawn = toys.PlaneBatches.draw, []

    def stopping(self, *arguments):
        drawn.append(1)
        if len(drawn) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(self, *arguments)

    monkeypatch.setattr(toys.PlaneBatches, "draw", stopping)
    monkeypatch.setattr(toys, "TIMES", FEW)
    file = tmp_path / "seed-0.safetensors"
    learn = lambda: toys.learn_plane(TOY.training, TOY.planes["tilted"], TOY.rows[row], file)  # noqa: E731
    with pytest.raises(Stopped, match="state saved"):
        learn()
    assert not file.exists()
    before = len(drawn)
    learn()
    assert len(drawn) - before < 10  # it went on
    (expected, about), (found, again) = (checkpoints.read(each) for each in (files["tilted"][row][0], file))
    assert about["summary"] == again["summary"]
    assert all(torch.equal(found[name], each) for name, each in expected.items())
    assert not list(tmp_path.glob(".state/**/*"))


def test_kinetic_removes_omega():
    settings = TOY.training.changed(kimg=20.48, ramp_kimg=0.0, learning_rate=0.05)
    omega = {}
    for factor in (0.0, 1.0):
        row = ToyRowSettings(learns="drift", kinetic=factor)
        network, path = toys._start(settings, row)
        batches = toys.PlaneBatches(TILTED, 0, "cpu")
        work = toys.network_work(toys.SPACE, toys._run(settings, row), network, path, batches, toys.CPU)
        for _ in work.records:
            pass
        omega[factor] = float(network.frame.rates.detach().abs())
    assert omega[1.0] < 0.1 < omega[0.0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": {"vp": {"learns": "sideways"}}}, r"rows\.vp\.learns: 'sideways' is not one of 'exact', 'network'"),
        ({"rows": {"vp": {"learns": "network", "kinetic": 0.1}}}, r"rows\.vp\.kinetic: it moves what noise and drift"),
        ({"rows": {"vp": {"learns": "drift", "ends": "fixed"}}}, r"rows\.vp\.ends: they are fixed but where noise"),
        ({"rows": {"vp": {"learns": "noise", "weight": "best"}}}, r"rows\.vp\.weight: 'best' is not one of"),
        ({"planes": {"one": {"variances": [1.0]}}}, r"planes\.one\.variances: 1 given, where 2 are needed"),
        ({"planes": {"one": {"variances": [1.0, -1.0]}}}, r"planes\.one\.variances\.1: -1.0 is less than the minimum"),
        ({"planes": {}}, r"planes: 0 given, where 1 or more are needed"),
        ({"micro_batch": 100}, r"micro_batch: 100 does not divide the batch of 256"),
        ({"planse": {}}, r"planse: unknown key; known here: "),
    ],
)
def test_bad_settings_are_one_line(changes, words):
    config = copy.deepcopy(SHORT) | {"toy": CONFIG["toy"] | changes}
    with pytest.raises(StageError, match=rf"^configuration: toy\.{words}") as refused:
        resolve(config)
    assert "\n" not in str(refused.value)


def test_a_name_that_the_toy_has_is_no_datasets():
    config = copy.deepcopy(SHORT)
    config["datasets"]["fp-toy"] = config["datasets"].pop("digits")
    with pytest.raises(StageError, match=r"datasets\.fp-toy: a folder has this name"):
        resolve(config)


def test_an_odd_number_of_coordinates_makes_no_planes():
    with pytest.raises(InvalidArgument, match="3 coordinates are no pairs: leave one out"):
        PlaneFrame([0, 1, 2], torch.ones(1))


def test_a_solver_that_cannot_follow_is_one_line(tmp_path):
    settings = TOY.training.changed(solver="euler-maruyama")
    with pytest.raises(StageError, match=r"solver: .*draws noise at every step.*: take another"):
        toys.learn_plane(settings, PlaneSettings(), ToyRowSettings(learns="exact"), tmp_path / "seed-0.safetensors")
    assert not list(tmp_path.iterdir())


def test_another_kind_of_file_is_no_toy(tmp_path):
    checkpoints.save(tmp_path / "other.safetensors", {"x": torch.zeros(1)}, {})
    with pytest.raises(StageError, match=r"other\.safetensors: holds no toy: give a file of the stage `toy`"):
        toy_table.write({"paper": {"vp": [str(tmp_path / "other.safetensors")]}}, tmp_path)


def test_the_target_asks_for_a_job_a_row_and_plane(tmp_path):
    pytest.importorskip("snakemake", reason="the workflow needs snakemake (extra `workflow`)")
    found = jobs(tmp_path, SHORT, "fp_toy", "reference_fp_toy")
    assert found == {
        "toy": 2 * len(TOY.rows), "toy_report": 1, "publish_toy": 1, "fp_toy": 1, "reference_fp_toy": 1
    }  # fmt: skip
