"""How a budget of denoiser evaluations is spent: what the configuration checks and grids are built from. No torch."""

from dataclasses import dataclass

from anisodiff.errors import InvalidArgument, StageError
from anisodiff.experiment.settings import DatasetSettings, MethodSettings
from anisodiff.grids.registry import GRIDS
from anisodiff.solvers.registry import SOLVERS


@dataclass(frozen=True)
class StepCount:
    """Nodes above 0, and whether a step to 0 follows them.

    Attributes:
        points: nodes above 0.
        append_zero: a last Euler step from the last of them.
    """

    points: int
    append_zero: bool

    @property
    def steps(self) -> int:
        return self.points - 1 + self.append_zero


def budgets(dataset: DatasetSettings, method: str) -> list[int]:
    """Budgets of a method: its own, or those of the dataset."""
    return dataset.methods[method].nfe or dataset.sampling.nfe


def grid_nfe(dataset: DatasetSettings) -> int:
    """Budget of the strips and sample grids."""
    return dataset.plots.grid_nfe or min(dataset.sampling.nfe)


def strip_methods(dataset: DatasetSettings) -> list[str]:
    """Methods of the strips, the isotropic one first: by default iso and ani where both can be drawn, or none."""
    if chosen := dataset.plots.strip_methods:
        return chosen
    drawn = {name for name in dataset.methods if grid_nfe(dataset) in budgets(dataset, name)}
    return ["iso", "ani"] if {"iso", "ani"} <= drawn else []


def steps_for_nfe(nfe: int, method: MethodSettings) -> StepCount:
    """The grid's size for exactly `nfe` evaluations an image.

    A step costs one evaluation, or two for solvers that evaluate between nodes; a step to 0 always costs one, and an
    analytic first step saves one.

    Args:
        nfe: the budget.
        method: its settings.

    Raises:
        StageError: the solver cannot spend exactly this budget on this grid.
    """
    solver, grid, each = method.solver, GRIDS[method.grid], SOLVERS[method.solver].evaluations
    evaluations = nfe + method.afs
    append_zero = method.append_zero
    if append_zero is None:
        append_zero = grid.ends_at_min or (evaluations % each == each - 1 and (each == 2 or grid.in_path_time))
    steps, rest = divmod(evaluations - append_zero, each)
    if rest:
        ends = "ends in one step to 0" if append_zero else "has no step to 0"
        kind = "odd" if append_zero != method.afs else "even"
        raise StageError(
            f"{nfe} cannot be spent: {solver} on the {method.grid} grid {ends} and takes {kind} budgets; "
            f"use {nfe - 1} or {nfe + 1}"
        )
    budget = StepCount(steps + 1, append_zero)
    if budget.steps < 1 or (each == 2 and steps < 1):
        raise StageError(f"{nfe} cannot be spent: {solver} needs {each} or more")
    if method.order is not None and method.order > budget.steps:
        raise StageError(
            f"{nfe} cannot be spent: {solver} of order {method.order} makes {budget.steps} steps with it; "
            "use more, or a lower order"
        )
    return budget


def warp_budgets(dataset: DatasetSettings, warp: str) -> set[int]:
    """Budgets of all methods on a warp."""
    on = [method for method, settings in dataset.methods.items() if settings.warp == warp]
    followed = {nfe for method, nfe in dataset.convergence.items() if method in on}
    return followed.union(*(budgets(dataset, method) for method in on))


def warp_steps(dataset: DatasetSettings, warp: str, nfe: int) -> int:
    """Steps K of the grid, without one to 0, on which the methods of a warp spend a budget.

    Args:
        dataset: its settings.
        warp: one that is learned for each budget.
        nfe: a budget of such a method.

    Raises:
        InvalidArgument: they spend it in unequal numbers of steps.
    """
    on = {name: method for name, method in dataset.methods.items() if method.warp == warp}
    spent = {
        name: max(1, steps_for_nfe(nfe, method).points - 1)
        for name, method in on.items()
        if nfe in budgets(dataset, name) or dataset.convergence.get(name) == nfe
    }
    if len(set(spent.values())) > 1:
        (first, one), *others = spent.items()
        name, other = next(each for each in others if each[1] != one)
        raise InvalidArgument(f"{nfe} evaluations are {one} steps of {first!r}, and {other} of {name!r}")
    return next(iter(spent.values()))
