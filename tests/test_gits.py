"""The search against brute force, its costs against their definitions, its levels against the published ones."""

import itertools
from pathlib import Path

import pytest
import torch
from exact import SIDE, gaussian, solution, unequal_path
from runs import SPACE

from anisodiff import methods
from anisodiff.errors import StageError
from anisodiff.experiment.settings import MethodSettings, SearchSettings
from anisodiff.grids import gits
from anisodiff.grids.fixed import karras, uniform
from anisodiff.grids.levels import Levels, levels
from anisodiff.paths.noise_path import edm_path
from anisodiff.solvers.generation import start as start_of
from anisodiff.solvers.loop import solve
from anisodiff.solvers.registry import SOLVERS
from anisodiff.solvers.trajectories import record_trajectory
from anisodiff.stages import searching
from anisodiff.storage import checkpoints

# GITS (arXiv:2506.10177), Table 9, CIFAR-10
PUBLISHED = [
    [80.0000, 3.8811, 0.9654, 0.0020],
    [80.0000, 5.8389, 1.8543, 0.4700, 0.0020],
    [80.0000, 6.6563, 2.1632, 0.8119, 0.2107, 0.0020],
    [80.0000, 10.9836, 3.8811, 1.5840, 0.5666, 0.1698, 0.0020],
    [80.0000, 12.3816, 3.8811, 1.5840, 0.5666, 0.1698, 0.0395, 0.0020],
    [80.0000, 10.9836, 3.8811, 1.8543, 0.9654, 0.4700, 0.2107, 0.0665, 0.0020],
    [80.0000, 12.3816, 4.4590, 2.1632, 1.1431, 0.5666, 0.2597, 0.1079, 0.0300, 0.0020],
    [80.0000, 12.3816, 4.4590, 2.1632, 1.1431, 0.5666, 0.3183, 0.1698, 0.0665, 0.0225, 0.0020],
]
OTHERS = [[80.0000, 6.9503, 1.2867, 0.0020], [80.0000, 9.6090, 1.1542, 0.1386, 0.0167, 0.0020]]  # uniform, log-SNR


@pytest.fixture(scope="module")
def taught():
    """Trajectories of Gaussian data on levels that differ between subspaces, in double precision."""
    path = unequal_path()
    model = gaussian(path)
    noise = torch.randn(12, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (
        model,
        noise,
        record_trajectory(
            model, noise, uniform(path, 9, append_zero=False), None, SOLVERS["ipndm"].with_order(), keep_flows=True
        ),
    )


def test_the_teacher_follows_the_exact_trajectory():
    path = unequal_path()
    model = gaussian(path)
    fine = uniform(path, 201, append_zero=False)
    noise = torch.ones(1, 1, SIDE, SIDE, dtype=torch.float64)
    found = record_trajectory(model, noise, fine, None, SOLVERS["ipndm"].with_order(), keep_flows=True)
    first = start_of(model, noise, fine)
    assert torch.allclose(found.states[-1], solution(model, first, fine), rtol=1e-3)
    assert torch.allclose(found.flows[100], model.flow(found.states[100], fine.nodes[100].square()))
    assert (len(found.states), len(found.flows)) == (201, 200)


@pytest.mark.parametrize("kind", ["l2", "l1", "deviation"])
def test_costs_by_their_definition(taught, kind):
    """One pair, an image at a time."""
    model, _, found = taught
    j, i = 2, 6
    expected = []
    chord = found.states[0] - found.states[-1]
    for image in range(12):
        step = found.levels.nodes[i] - found.levels.nodes[j]
        end = found.states[j][image] - model.path.scale(found.flows[j][image][None], step)[0]
        there = found.states[i][image]

        def from_chord(point, image=image):
            away, along = (point - found.states[-1][image]).flatten(), chord[image].flatten()
            return (away - along * (away @ along) / (along @ along)).norm()

        expected.append(
            {
                "l2": (end - there).norm(),
                "l1": (model.path.to_pixels(end[None]) - model.path.to_pixels(there[None])).abs().sum(),
                "deviation": from_chord(end) - from_chord(there),
            }[kind]
        )
    cost = gits.costs(found, kind)
    assert float(cost[j, i]) == pytest.approx(float(torch.stack(expected).mean()))
    assert torch.isinf(cost.tril()[torch.ones_like(cost).tril() > 0]).all()
    assert cost.triu(1).isfinite().all()


def test_costs_of_the_analytic_direction(taught):
    model, _, found = taught
    cost = gits.costs(found, "l2", analytic=True)
    sigma, after = found.levels.nodes[0], found.levels.nodes[3]
    direction = model.path.scale(found.states[0], (1 + sigma.square()).rsqrt())
    end = found.states[0] + model.path.scale(direction, after - sigma)
    assert float(cost[0, 3]) == pytest.approx(float((end - found.states[3]).flatten(1).norm(dim=1).mean()))
    assert torch.isinf(cost[1:]).all()


@pytest.mark.parametrize("gamma", [0.8, 1.0, 1.15])
@pytest.mark.parametrize("seed", range(4))
def test_dynamic_programming_is_brute_force(gamma, seed):
    count = 8
    cost = torch.rand(count, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 0.2
    cost = torch.where(torch.ones(count, count).triu(1) > 0, cost, torch.inf)

    def total(way) -> float:
        return sum(gamma**k * float(cost[a, b]) for k, (a, b) in enumerate(itertools.pairwise(way)))

    found = gits.shortest(cost, gamma)
    assert found.keys() == set(range(1, count))
    for steps, way in found.items():
        every = [(0, *inner, count - 1) for inner in itertools.combinations(range(1, count - 1), steps - 1)]
        assert tuple(way) == min(every, key=total)


def test_the_analytic_step_leads_to_the_best_node(taught):
    _, _, found = taught
    cost, analytic = gits.costs(found), gits.costs(found, analytic=True)
    ways = gits.shortest(cost)
    again = gits.with_analytic_step(ways, cost, analytic, 1.15)
    for steps, way in again.items():
        assert [way[0], *way[2:]] == ways[steps - 1]
        best = min(float(analytic[0, node] + 1.15 * cost[node, way[2]]) for node in range(1, way[2]))
        assert float(analytic[0, way[1]] + 1.15 * cost[way[1], way[2]]) == best


def test_the_joint_analytic_step_is_brute_force():
    """Of all ways, with the analytic costs for the first step: never worse than the paper's choice, at times better."""
    assert sorted(better_than_the_papers(seed) for seed in range(4))[-1]


def better_than_the_papers(seed: int) -> bool:
    count, gamma = 8, 1.15
    generator = torch.Generator().manual_seed(seed)
    cost, analytic = torch.rand(2, count, count, generator=generator, dtype=torch.float64)
    cost = torch.where(torch.ones(count, count).triu(1) > 0, cost, torch.inf)
    analytic = torch.where((torch.arange(count)[:, None] == 0) & (torch.arange(count) > 0), analytic, torch.inf)

    def total(way) -> float:
        first, *rest = itertools.pairwise(way)
        return float(analytic[first]) + sum(gamma ** (k + 1) * float(cost[pair]) for k, pair in enumerate(rest))

    found = gits.joint_with_analytic_step(cost, analytic, gamma)
    papers = gits.with_analytic_step(gits.shortest(cost, gamma), cost, analytic, gamma)
    assert found.keys() == set(range(2, count))
    for steps, way in found.items():
        every = [(0, *inner, count - 1) for inner in itertools.combinations(range(1, count - 1), steps - 1)]
        assert tuple(way) == min(every, key=total)
        assert steps not in papers or total(way) <= total(papers[steps])
    return any(total(found[steps]) < total(way) for steps, way in papers.items())


def test_the_analytic_step_by_images_is_the_best_of_all(taught):
    """Every node before the way's next, by the last images of the student that will sample."""
    model, noise, found = taught
    step = SOLVERS["ipndm"].with_order(2)
    ways = {steps: way for steps, way in gits.shortest(gits.costs(found)).items() if steps <= 3}
    told: list[tuple[int, int]] = []
    chosen = gits.analytic_step_by_images(ways, found, step, lambda done, total: told.append((done, total)))
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] == sum(steps * (way[1] - 1) for steps, way in ways.items())
    first = start_of(model, noise, found.levels)
    for steps, way in chosen.items():
        assert [way[0], *way[2:]] == ways[steps - 1]
        off = {}
        for node in range(1, way[2]):
            nodes = found.levels.nodes[[0, node, *way[2:]]]
            end = solve(model, first, levels(nodes, nodes[1:], False), step, analytic_first=True)
            off[node] = float((end - found.states[-1]).flatten(1).norm(dim=1).mean())
        assert way[1] == min(off, key=off.get)
    assert len(chosen) >= 2


def test_the_published_levels_are_points_of_the_fine_grid():
    grid = karras(61, 1, 0.002, 80.0, append_zero=False).nodes.flatten()
    near = lambda level: float((grid - level).abs().min()) < 6e-5  # noqa: E731
    assert all(near(level) for row in PUBLISHED for level in row)
    assert not any(all(near(level) for level in row) for row in OTHERS)


def test_euler_on_searched_levels_is_closer_to_the_truth_than_on_edms():
    """On Gaussian data, from noise that the search has not seen (as the paper's Table 3 has it on CIFAR-10)."""
    path = unequal_path()
    model = gaussian(path)
    edms = lambda points: karras(points, 2, 0.002, 80.0, append_zero=False)  # noqa: E731
    fine = edms(61)
    noises = torch.randn(2, 32, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = gits.search(model, noises[0], fine, None)
    first = start_of(model, noises[1], fine)
    truth = solution(model, first, fine)
    for steps in (3, 4, 5, 6, 8, 10):
        nodes = fine.nodes[torch.tensor(found.ways[steps])]
        searched = solve(model, first, levels(nodes, nodes[1:], False), SOLVERS["euler"].with_order())
        even = solve(model, first, edms(steps + 1), SOLVERS["euler"].with_order())
        assert (searched - truth).norm() < 0.9 * (even - truth).norm()


@pytest.fixture(scope="module")
def searched(start, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("search") / "search.safetensors"
    settings = SearchSettings(network="base", path="edm", points=21, images=16, cost="l2", analytic="costs")
    searching.search_levels(SPACE, settings, start[0], start[1], output)
    return output


def levels_in(search: Path, points: int, append_zero: bool, analytic: bool = False) -> Levels:
    """Levels of a search for a number of nodes, with the solver that makes one step between two."""
    method = MethodSettings(
        network="base",
        path="edm",
        grid="searched",
        search="gits",
        solver="ipndm",
        afs=analytic,
        append_zero=append_zero,
    )
    nfe = points - 1 + append_zero - analytic
    return methods.levels_of(method, nfe, SPACE, edm_path(8), search=search)


def test_levels_for_every_budget_from_one_file(searched):
    fine = karras(21, 1, 0.002, 80.0, append_zero=False).nodes
    for steps in range(1, 21):
        found = levels_in(searched, steps + 1, False)
        assert isinstance(found, Levels)
        assert found.steps == steps
        assert {float(node) for node in found.nodes.flatten()} <= {float(node) for node in fine.flatten()}
        assert (found.nodes[0], found.nodes[-1]) == (fine[0], fine[-1])
    assert levels_in(searched, 5, True).ends_at_zero(4)
    assert levels_in(searched, 5, False, True).steps == 4
    about = checkpoints.header(searched)
    assert about["parts"].keys() == {"trajectories", "costs", "programming", "analytic step"}


def test_a_search_shows_how_far_it_is(start, tmp_path, capfd):
    settings = SearchSettings(network="base", path="edm", points=7, images=4, analytic_nfe=2)
    searching.search_levels(SPACE, settings, start[0], start[1], tmp_path / "search.safetensors")
    shown = capfd.readouterr().err
    assert "trajectories: 100%" in shown
    assert "images of analytic first steps: 100%" in shown


def test_a_budget_larger_than_the_grid(searched):
    with pytest.raises(StageError, match="found no levels for 21 steps: give it more points"):
        levels_in(searched, 22, False)
