"""GITS: levels searched so that Euler steps between them stay close to a teacher's trajectory (arXiv:2506.10177, 5.1).

Sampling trajectories of one network share their shape, so that a few warm-up noises tell where steps must be short. The
search is over nodes of a fine grid of any path: on an anisotropic one, over its time.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from anisodiff.denoiser import Denoiser
from anisodiff.errors import InvalidArgument
from anisodiff.grids.levels import GridRequest, Levels, at
from anisodiff.solvers.loop import solve
from anisodiff.solvers.registry import SOLVERS
from anisodiff.solvers.singlestep import Step
from anisodiff.solvers.trajectories import Trajectory, record_trajectory

TEACHER = "ipndm"  # of order 4


def from_chord(
    points: Float[Tensor, "n b d"], first: Float[Tensor, "b d"], last: Float[Tensor, "b d"]
) -> tuple[Float[Tensor, "n b"], Float[Tensor, "n b d"]]:
    """Place along the chord between two ends, measured from the last, and what is perpendicular to it.

    The norm of the perpendicular part is the trajectory deviation (Section 3.1).
    """
    chord = torch.nn.functional.normalize(first - last, dim=1)
    away = points - last
    along = (away * chord).sum(2)
    return along, away - along[..., None] * chord


def _l2(found: Tensor, taught: Tensor) -> Tensor:
    return (found - taught).flatten(2).norm(dim=2).mean(1)


def _l1(found: Tensor, taught: Tensor) -> Tensor:
    return (found - taught).flatten(2).abs().sum(2).mean(1)


def _deviation(trajectories: Trajectory) -> Callable[[Tensor, Tensor], Tensor]:
    """How much farther from the chord between a trajectory's ends the step leads than the teacher is (signed)."""
    ends = [trajectories.states[each].flatten(1) for each in (0, -1)]

    def deviation(points: Tensor) -> Tensor:
        return from_chord(points.flatten(2), *ends)[1].norm(dim=2)

    return lambda found, taught: (deviation(found) - deviation(taught)).mean(1)


def costs(trajectories: Trajectory, kind: str = "l2", analytic: bool = False) -> Float[Tensor, "n n"]:
    """Cost of an Euler step from every node (row) to every later one (column), a mean over images; infinite elsewhere.

    Args:
        trajectories: the teacher's, as `record_trajectory` keeps them.
        kind: "l2" or "l1" distance to the teacher's point, in pixels, or "deviation" from the chord, signed.
        analytic: of the first node's analytic direction; the other rows are infinite then.
    """
    to_pixels = trajectories.problem.path.to_pixels
    measure = {"l2": _l2, "l1": _l1, "deviation": _deviation(trajectories)}[kind]
    count = len(trajectories.states)
    found = torch.full((count, count), torch.inf, dtype=torch.float64)
    for j in range(1 if analytic else count - 1):
        ends, taught = trajectories.euler_step(j, analytic), trajectories.states[j + 1 :]
        if kind == "l1":  # the others are the same in coefficients
            ends, taught = (torch.stack([to_pixels(each) for each in batch]) for batch in (ends, taught))
        found[j, j + 1 :] = measure(ends, taught).to("cpu", torch.float64)
    return found


def shortest(cost: Float[Tensor, "n n"], gamma: float = 1.15) -> dict[int, list[int]]:
    """Cheapest ways from the first node to the last, by number of steps, in one pass of dynamic programming.

    `V[j][k] = min_i cost[j][i] + gamma V[i][k-1]`: with gamma above 1 later steps weigh more.

    Args:
        cost: of the step from node j to node i > j; infinite elsewhere.
        gamma: factor on the costs of later steps.

    Returns:
        number of steps, 1 to all -> nodes, the first and the last among them.
    """
    count = len(cost)
    value = torch.full((count,), torch.inf, dtype=cost.dtype)
    value[-1] = 0.0
    following, ways = [], {}
    for k in range(1, count):
        total = cost + gamma * value[None]
        value, chosen = total.min(1)
        following.append(chosen)
        way = [0]
        for step in reversed(range(k)):
            way.append(int(following[step][way[-1]]))
        ways[k] = way
    return ways


def with_analytic_step(
    ways: dict[int, list[int]], cost: Float[Tensor, "n n"], analytic: Float[Tensor, "n n"], gamma: float = 1.15
) -> dict[int, list[int]]:
    """Ways of one step more, whose first, analytic step costs no evaluation: the node that it leads to is searched.

    Args:
        ways: from `shortest`.
        cost: its costs.
        analytic: costs of the analytic direction from the first node.
        gamma: as there.
    """
    found = {}
    for steps, way in ways.items():
        between = range(1, way[1])
        if between:
            best = min(between, key=lambda node: float(analytic[0, node] + gamma * cost[node, way[1]]))
            found[steps + 1] = [0, best, *way[1:]]
    return found


def joint_with_analytic_step(
    cost: Float[Tensor, "n n"], analytic: Float[Tensor, "n n"], gamma: float = 1.15
) -> dict[int, list[int]]:
    """Cheapest ways whose first step is analytic, by number of steps, two or more; all their nodes are searched.

    Args:
        cost: see `shortest`.
        analytic: costs of the analytic direction from the first node, which take the place of its own.
        gamma: see `shortest`.
    """
    ways = shortest(torch.cat([analytic[:1], cost[1:]]), gamma)
    return {steps: way for steps, way in ways.items() if steps > 1}


def analytic_step_by_images(
    ways: dict[int, list[int]],
    trajectories: Trajectory,
    step: Step,
    told: Callable[[int, int], None] = lambda done, total: None,
) -> dict[int, list[int]]:
    """Ways of one step more, whose first, analytic step leads to the node from which a student's images come out best.

    Each node before the next is tried; what counts is the mean distance of the student's last images to the teacher's
    (the published code's choice).

    Args:
        ways: from `shortest`; ways of as many evaluations as steps.
        trajectories: the teacher's, as `record_trajectory` keeps them.
        step: the student's.
        told: called after each node that is tried with how many steps are done, and of how many.
    """
    first, teacher = trajectories.states[0], trajectories.states[-1]
    denoiser, labels = trajectories.problem.denoiser, trajectories.problem.labels

    tried = {steps: [[0, node, *way[1:]] for node in range(1, way[1])] for steps, way in ways.items()}
    done, total = 0, sum(steps * len(candidates) for steps, candidates in tried.items())

    def off(way: list[int]) -> float:
        nonlocal done
        end = solve(denoiser, first, at(trajectories.levels.nodes[way]), step, labels, analytic_first=True)
        done += len(way) - 2
        told(done, total)
        return float((end - teacher).flatten(1).norm(dim=1).mean())

    return {steps + 1: min(candidates, key=off) for steps, candidates in tried.items() if candidates}


@dataclass(frozen=True)
class Search:
    """What a search found.

    Attributes:
        ways: number of steps -> nodes of the fine grid.
        analytic_ways: the same, where the first step is analytic.
        seconds: of the teacher's trajectories, the costs, the dynamic programming, and the choice of the analytic step.
    """

    ways: dict[int, list[int]]
    analytic_ways: dict[int, list[int]]
    seconds: tuple[float, float, float, float]


def search(
    denoiser: Denoiser,
    noise: Float[Tensor, "b c h w"],
    levels: Levels,
    labels: Float[Tensor, "b k"] | None,
    kind: str = "deviation",
    gamma: float = 1.15,
    analytic: str = "costs",
    student: Step | None = None,
    most: int = 10,
    told: Callable[[str, int, int], None] = lambda part, done, total: None,
) -> Search:
    """The parts in a row, timed: the teacher's trajectories, the costs, the ways.

    Args:
        denoiser: over the path.
        noise: warm-up noise, standard normal in pixels.
        levels: the fine grid, as the images see it.
        labels: one-hot classes.
        kind: of the costs.
        gamma: see `shortest`.
        analytic: how the node after an analytic first step is chosen: by "images" of a student, by "costs" between the
            nodes of a way, or "joint" with all others of the way.
        student: step of the solver whose images count.
        most: evaluations for which images are made.
        told: called after each step with the part that it is of, how many are done, and of how many.

    Raises:
        InvalidArgument: images of a student are asked for, and there is no student.
    """
    began = time.perf_counter()
    step = SOLVERS[TEACHER].with_order()
    trajectories = record_trajectory(
        denoiser, noise, levels, labels, step, keep_flows=True, told=partial(told, "trajectories")
    )
    taught = time.perf_counter()
    cost, direction = costs(trajectories, kind), costs(trajectories, kind, analytic=True)
    measured = time.perf_counter()
    ways = shortest(cost, gamma)
    programmed = time.perf_counter()
    if analytic == "images":
        if student is None:
            raise InvalidArgument("student: its images are asked for: give its step")
        few = {steps: way for steps, way in ways.items() if steps <= most}
        analytic_ways = analytic_step_by_images(
            few, trajectories, student, partial(told, "images of analytic first steps")
        )
    elif analytic == "joint":
        analytic_ways = joint_with_analytic_step(cost, direction, gamma)
    else:
        analytic_ways = with_analytic_step(ways, cost, direction, gamma)
    seconds = (taught - began, measured - taught, programmed - measured, time.perf_counter() - programmed)
    return Search(ways, analytic_ways, seconds)


def searched_grid(request: GridRequest) -> Levels:
    """Levels that a search found for a number of steps.

    Raises:
        InvalidArgument: the search found none for this number.
    """
    steps = request.points - 1
    name = f"{'analytic' if request.analytic_first else 'way'}-{steps}"
    if request.search is None or name not in request.search:
        raise InvalidArgument(f"found no levels for {steps} steps")
    return at(request.search["nodes"][request.search[name]], request.append_zero)
