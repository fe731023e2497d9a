"""Tuned solvers: levels, label levels and multistep weights that are learned for a budget, under a frozen network.

A step is `z_{k+1} = a_k z_k + sum_{j < window} c_kj v_{k-j}`, where `v_k` is the network's estimate of the clean image,
or its flow, at the level that it is told there. Everything is a correction, 0 at the start, to a linear multistep
solver of `multistep.py` on given levels, so that the start *is* that solver:

    log sigma_k, see `grids/learned.py`                          levels
    log told_k = log sigma_k + scale l_k                         labels
    a_k = theory + scale da_k,  c_kj = theory + scale u_k dc_kj  coefficients, at the present levels

For estimates u_k is 1. For flows it is the step's fall, sigma_k - sigma_{k+1}, and a_k stays 1.

Levels and labels live in the path's subspaces, for the noise does; corrections of coefficients in subspaces of the
solver's own. Restrictions are, in our making, LD3 (arXiv:2405.15506; levels and labels), GS (arXiv:2510.17699; all of
DPM-Solver++'s) and DyWeight (arXiv:2603.11607; labels and coefficients, of flows, from Euler's steps).
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from anisodiff.errors import InvalidArgument
from anisodiff.grids.learned import CurveLevels, FreeLevels
from anisodiff.grids.levels import Levels
from anisodiff.paths.noise_path import NoisePath
from anisodiff.paths.subspaces import Basis, Subspaces, dct_matrix, partition
from anisodiff.solvers.multistep import THEORIES
from anisodiff.solvers.singlestep import ProbabilityFlow, State

LEARNABLE = ("levels", "labels", "coefficients")


class Cells(nn.Module):
    """Common refinement of the solver's own subspaces and the path's, and coordinates in which it is diagonal.

    Args:
        subspaces: the path's.
        kind: the solver's: "path" is the path's; "whole", "block", "radial:J" or a table are of the DCT (`partition`);
            "luma:" before one of these divides each of its subspaces into luma and chroma.

    Raises:
        InvalidArgument: an unknown kind, or one of the DCT on a path over principal subspaces.
    """

    index: Tensor | None
    band: Tensor
    part: Tensor
    modes: Tensor
    colours: Tensor

    def __init__(self, subspaces: Basis, kind: str | list):
        super().__init__()
        table = kind.removeprefix("luma:") if isinstance(kind, str) else kind
        self.colour, self.transforms, index = table != kind, False, None
        if kind in ("path", "whole"):
            part = torch.arange(subspaces.count)
            band = part if kind == "path" else torch.zeros_like(part)
        elif not isinstance(subspaces, Subspaces):
            raise InvalidArgument(f"subspaces: {kind} is of the DCT, the path's basis is another: use path or whole")
        else:
            of_path = subspaces.index
            own = partition(subspaces.size, table).to(of_path.device)
            own = torch.stack([2 * own, 2 * own + 1, 2 * own + 1]) if self.colour else own[None]
            present, index = (own * subspaces.count + of_path).unique(return_inverse=True)
            band, part = present // subspaces.count, present % subspaces.count
            self.transforms = subspaces.count == 1 and bool((index != index[:, :1, :1]).any())
        self.register_buffer("index", index, persistent=False)  # cell of each coefficient; None for the path's
        self.register_buffer("band", band, persistent=False)  # the solver's subspace that a cell is in
        self.register_buffer("part", part, persistent=False)  # the path's
        self.register_buffer("modes", dct_matrix(subspaces.size), persistent=False)
        self.register_buffer("colours", dct_matrix(3), persistent=False)  # the first is grey
        self.bands = int(band.max()) + 1

    def view(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Turn the path's coefficients into the coordinates of the cells.

        Raises:
            InvalidArgument: luma and chroma of images that have not 3 channels.
        """
        if self.transforms:
            modes = self.modes.to(z.dtype)
            z = modes @ z @ modes.T
        if self.colour:
            if z.shape[1] != 3:
                raise InvalidArgument(f"subspaces: luma and chroma are of 3 channels, the images have {z.shape[1]}")
            z = torch.einsum("kc,bchw->bkhw", self.colours.to(z.dtype), z)
        return z

    def back(self, z: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Turn the coordinates of the cells back into the path's coefficients."""
        if self.colour:
            z = torch.einsum("kc,bkhw->bchw", self.colours.to(z.dtype), z)
        if self.transforms:
            modes = self.modes.to(z.dtype)
            z = modes.T @ z @ modes
        return z

    def scale(
        self, problem: ProbabilityFlow, z: Float[Tensor, "b c h w"], values: Float[Tensor, "#b m"]
    ) -> Float[Tensor, "b c h w"]:
        """Multiply every coefficient in the cells by the value of its cell."""
        return problem.scale(z, values) if self.index is None else z * values.to(z.dtype)[:, self.index]


@dataclass(frozen=True)
class TunedStep:
    """A step of a tuned solver at fixed corrections: what `solve` takes, on `levels` and no others.

    The state's history is in the coordinates of the cells.

    Attributes:
        levels: the grid, `[N+1, L, J]`, for every class if classes differ.
        told: levels that the network is told, `[N, L, J]`.
        weights: of the state and of the latest values, in every cell, `[N, 1 + window, L, cells]`.
        cells: where weights differ.
        of_flows: values are flows, and the state's weight is 1; or else estimates of the clean image.
    """

    levels: Levels
    told: Float[Tensor, "n l j"]
    weights: Float[Tensor, "n w l m"]
    cells: Cells
    of_flows: bool

    def __call__(self, problem: ProbabilityFlow, state: State, k: int, levels: Levels) -> State:
        """Take step k. One evaluation.

        Raises:
            InvalidArgument: the levels are not the solver's, or the path has other subspaces.
        """
        if k == 0:
            self._check(problem, levels)
        told = levels.nodes[k] if problem.analytic_next else _of(self.told[k], problem.labels)
        value = (problem.flow if self.of_flows else problem.denoised)(state.z, told)
        carry, *weights = self.weights[k]
        values = (self.cells.view(value), *state.history)[: len(weights)]
        z = self.cells.view(state.z)
        if not self.of_flows:
            z = self.cells.scale(problem, z, _of(carry, problem.labels))
        for each, weight in zip(values, weights, strict=False):
            z = z + self.cells.scale(problem, each, _of(weight, problem.labels))
        return State(self.cells.back(z), values)

    def to(self, device: torch.device | str) -> "TunedStep":
        """The same on a device."""
        moved = self.levels.to(device), self.told.to(device), self.weights.to(device), self.cells.to(device)
        return TunedStep(*moved, self.of_flows)

    def _check(self, problem: ProbabilityFlow, levels: Levels) -> None:
        subspaces = problem.path.subspaces.count
        if self.told.shape[2] != subspaces:
            raise InvalidArgument(
                f"tuned solver: it is for a path of J = {self.told.shape[2]}, this one has {subspaces}"
            )
        if levels.steps != self.levels.steps:
            raise InvalidArgument(f"tuned solver: it makes {self.levels.steps} steps, the levels {levels.steps}")
        if not torch.equal(levels.nodes, self.levels.for_labels(problem.labels).nodes):
            raise InvalidArgument("tuned solver: these are not the levels that it was tuned with")


def _of(values: Float[Tensor, "l m"], labels: Float[Tensor, "b k"] | None) -> Float[Tensor, "_ m"]:
    """Each image's row, by its class, of one row for all or one a class."""
    return values if len(values) == 1 or labels is None else values[labels.argmax(1)]


class TunedSolver(nn.Module):
    """Learnable numbers of a solver for one budget; calling it gives the step that they make now.

    Args:
        path: whose subspaces levels have, and whose classes if they differ. It is not kept.
        levels: the grid, `FreeLevels` or `CurveLevels`.
        learn: which corrections are learned, of `LEARNABLE`; the others stay 0.
        theory: the linear multistep solver that it corrects, of `THEORIES`; its form, of estimates or of flows.
        order: highest order of the theory; 1 is Euler's step, no more than a start.
        window: how many of the latest values a step weighs.
        subspaces: that corrections of coefficients differ between, see `Cells`.
        per_subspace: corrections of labels differ between the path's subspaces.
        rank: corrections of coefficients are a sum of so many products of one number a step and value, and one a
            subspace, smooth in its index at the start; None leaves every subspace free.
        scale: unit of the corrections of labels and coefficients.

    Raises:
        InvalidArgument: nothing to learn, something unknown, or levels for another number of subspaces.
    """

    mean_weights: Tensor

    def __init__(
        self,
        path: NoisePath,
        levels: FreeLevels | CurveLevels,
        learn: Collection[str] = LEARNABLE,
        theory: str = "dpmpp",
        order: int = 3,
        window: int = 3,
        subspaces: str | list = "whole",
        per_subspace: bool = False,
        rank: int | None = None,
        scale: float = 0.1,
    ):
        super().__init__()
        if not learn or not set(learn) <= set(LEARNABLE):
            unknown = ", ".join(sorted(set(learn) - set(LEARNABLE))) or "nothing"
            raise InvalidArgument(f"learn: {unknown}: choose one or more of {', '.join(LEARNABLE)}")
        if theory not in THEORIES:
            raise InvalidArgument(f"theory: {theory!r} is unknown: use one of {', '.join(THEORIES)}")
        if not 1 <= order <= window:
            raise InvalidArgument(f"order: {order} with a window of {window}: an order is from 1 to the window")
        with torch.no_grad():
            steps, _, count = levels().nodes.shape
        steps -= 1
        if count != path.subspaces.count:
            raise InvalidArgument(f"levels: are for J = {count}, the path has {path.subspaces.count}")
        self.theory, self.order, self.window, self.scale = THEORIES[theory], order, window, scale
        self.cells, self.levels = Cells(path.subspaces, subspaces), levels.requires_grad_("levels" in learn)
        self.register_buffer("mean_weights", path.weights.to(torch.float64), persistent=False)
        zeros = lambda *shape: nn.Parameter(torch.zeros(shape, dtype=torch.float64))  # noqa: E731
        self.labels = zeros(steps, 1, count if per_subspace else 1).requires_grad_("labels" in learn)
        bands, free = self.cells.bands, "coefficients" in learn
        self.coefficients = zeros(steps, 1 + window, rank or bands).requires_grad_(free)
        self.shapes = None
        if rank is not None:
            if not 1 <= rank <= bands:
                raise InvalidArgument(f"rank: {rank} for {bands} subspaces: give 1 to {bands}")
            place = (torch.arange(bands, dtype=torch.float64) + 0.5) * math.pi / bands
            self.shapes = nn.Parameter((torch.arange(rank)[:, None] * place).cos()).requires_grad_(free)

    @property
    def steps(self) -> int:
        """Steps of the budget: evaluations of the network, but for an analytic first step."""
        return len(self.labels)

    @property
    def numbers(self) -> int:
        """How many numbers are learned, without weights of values before the first, and of the state under flows."""
        count = sum(each.numel() for each in (*self.levels.parameters(), self.labels) if each.requires_grad)
        if not self.coefficients.requires_grad:
            return count
        weighed = sum(min(self.window, k + 1) + (not self.theory.of_flows) for k in range(self.steps))
        return count + weighed * self.coefficients.shape[2] + (0 if self.shapes is None else self.shapes.numel())

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the numbers of a `state_dict`.

        Raises:
            InvalidArgument: it is of another budget, path or form.
        """
        own = self.state_dict()
        for name in sorted(own.keys() | tensors.keys()):
            found, wanted = (tuple(each[name].shape) if name in each else "missing" for each in (tensors, own))
            if found != wanted:
                raise InvalidArgument(
                    f"tuned solver: {name} is {found} and not {wanted}: tuned for other steps, subspaces or form"
                )
        self.load_state_dict(tensors)

    def _mean(self, sigma: Float[Tensor, "l j"]) -> Float[Tensor, "l 1"]:
        return (sigma.log() @ self.mean_weights).exp()[:, None]

    def forward(self) -> TunedStep:
        """The step at the present corrections, whose gradients pass through it."""
        levels = self.levels()
        told = levels.nodes[:-1] * (self.scale * self.labels).exp()
        corrections = self.scale * (self.coefficients if self.shapes is None else self.coefficients @ self.shapes)
        weights = []
        for k in range(self.steps):
            carry, theory = self.theory.step(levels, k, min(self.order, k + 1), self._mean)
            carry = torch.ones_like(told[k]) if carry is None else carry
            rows = torch.stack([carry, *theory, *[torch.zeros_like(carry)] * (self.window - len(theory))])
            own = corrections[k][:, None, self.cells.band]
            if self.theory.of_flows:
                own = own * (levels.nodes[k] - levels.nodes[k + 1])[:, self.cells.part]
            weights.append(rows[..., self.cells.part] + own)
        return TunedStep(levels, told, torch.stack(weights), self.cells, self.theory.of_flows)
