"""Trajectories: a batch of images at every node of a grid."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from anisodiff.denoiser import Denoiser
from anisodiff.errors import InvalidArgument
from anisodiff.grids.levels import Levels
from anisodiff.solvers.generation import start
from anisodiff.solvers.loop import SolveOptions, solve
from anisodiff.solvers.singlestep import NoiseSource, ProbabilityFlow, State, Step


@dataclass(frozen=True)
class Trajectory:
    """Sampling trajectories of a batch on a grid of N nodes.

    Attributes:
        states: coefficients at every node, `[N, B, C, H, W]`.
        flows: the flow at every node but the last, `[N-1, B, C, H, W]`; None where the solver keeps none.
        evaluations: how many the denoiser has made up to each node.
        levels: the grid, as the images see it.
        problem: what was solved.
    """

    states: Float[Tensor, "n b c h w"]
    flows: Float[Tensor, "m b c h w"] | None
    evaluations: list[int]
    levels: Levels
    problem: ProbabilityFlow

    @property
    def denoised(self) -> Float[Tensor, "m b c h w"]:
        """Estimates of the clean image at every node but the last, in coefficients: the denoising trajectory."""
        if self.flows is None:
            raise InvalidArgument("trajectory: its flows were not kept")
        nodes = zip(self.states, self.flows, self.levels.nodes, strict=False)
        return torch.stack([z + self.problem.scale(flow, sigma) for z, flow, sigma in nodes])

    def denoise_every_node(self) -> list[Float[Tensor, "b c h w"]]:
        """Estimates of the clean image at every node, each by an evaluation of its own; at 0, the states."""
        denoiser, labels = self.problem.denoiser, self.problem.labels

        def denoised(z: Tensor, sigma: Tensor) -> Tensor:
            return denoiser.denoise(z, sigma.to(z.device).square(), labels) if (sigma > 0).all() else z

        with torch.no_grad():
            return [denoised(z, sigma) for z, sigma in zip(self.states, self.levels.nodes, strict=True)]

    def euler_step(self, j: int, analytic: bool = False) -> Float[Tensor, "m b c h w"]:
        """Where one Euler step from node j leads at every later node; with the analytic first direction, if asked."""
        z, sigma = self.states[j], self.levels.nodes[j]
        if not analytic and self.flows is None:
            raise InvalidArgument("trajectory: its flows were not kept")
        flow = self.problem.analytic_flow(z, sigma) if analytic or self.flows is None else self.flows[j]
        return torch.stack([z - self.problem.scale(flow, later - sigma) for later in self.levels.nodes[j + 1 :]])

    def first(self, count: int) -> "Trajectory":
        """The trajectories of the first images alone."""
        flows = None if self.flows is None else self.flows[:, :count]
        return Trajectory(self.states[:, :count], flows, self.evaluations, self.levels, self.problem)


def record_trajectory(
    denoiser: Denoiser,
    noise: Float[Tensor, "b c h w"],
    levels: Levels,
    labels: Float[Tensor, "b k"] | None,
    step: Step,
    keep_flows: bool = False,
    source: NoiseSource | None = None,
    told: Callable[[int, int], object] = lambda done, total: None,
    **options: Unpack[SolveOptions],
) -> Trajectory:
    """Run a solver and keep every node.

    Args:
        denoiser: over the path.
        noise: standard normal, in pixels.
        levels: the grid, as the images see it.
        labels: one-hot classes.
        step: takes one step of the solver.
        keep_flows: keep the flow at every node, of a solver that remembers flows (`euler`, `ipndm`, `deis`).
        source: of a stochastic solver's noise.
        told: called after each step with how many are done, and of how many.
        options: keyword arguments of `solve`.
    """
    states, flows = [start(denoiser, noise, levels, labels)], []
    evaluations, before = [0], denoiser.evaluations

    def watch(k: int, state: State) -> None:
        states.append(state.z)
        evaluations.append(denoiser.evaluations - before)
        if keep_flows:
            flows.append(state.history[0])
        told(len(states) - 1, len(levels.nodes) - 1)

    solve(denoiser, states[0], levels, step, labels, watch, source=source, **options)
    kept = torch.stack(flows) if keep_flows else None
    return Trajectory(torch.stack(states), kept, evaluations, levels, ProbabilityFlow(denoiser, labels))
