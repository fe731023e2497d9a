"""References inside a dataset's settings: every name is of something, and every budget can be spent."""

from anisodiff.errors import StageError, naming
from anisodiff.experiment.budgets import budgets, grid_nfe, steps_for_nfe, warp_budgets, warp_steps
from anisodiff.experiment.settings import (
    DatasetSettings,
    MethodSettings,
    RunSettings,
    SearchSettings,
    ToySettings,
    TrainingSettings,
    TuningSettings,
)
from anisodiff.experiment.settings.base import basis_of, turns
from anisodiff.grids.registry import GRIDS
from anisodiff.metrics.registry import FEATURES
from anisodiff.objectives.registry import LOSSES
from anisodiff.solvers.registry import SOLVERS


def check_references(where: str, dataset: DatasetSettings) -> None:
    """Refuse the first reference to nothing, and the first budget that cannot be spent.

    Args:
        where: the dataset's key.
        dataset: its settings.

    Raises:
        StageError: what is wrong, with the path of its key.
    """
    runs, paths, warps, searches, methods = (
        dataset.runs, dataset.paths, dataset.warps, dataset.searches, dataset.methods,
    )  # fmt: skip
    networks = {"base", *runs}

    def check(key: str, name: str, known: set[str]) -> None:
        if name not in known:
            raise StageError(f"{where}.{key}: {name!r} is unknown; known here: {', '.join(sorted(known)) or 'none'}")

    for kind in ("paths", "runs"):
        for name, entry in getattr(dataset, kind).items():
            if basis := basis_of(entry.subspaces):
                check(f"{kind}.{name}.subspaces", basis, set(dataset.bases))
            if entry.schedules == "class" and not dataset.class_conditional:
                raise StageError(
                    f"{where}.{kind}.{name}.schedules: one a class needs labels: set class_conditional to true"
                )
    if clash := sorted((set(runs) & set(paths)) | ({"base"} & set(runs))):
        raise StageError(f"{where}.runs: {clash[0]!r} names a path or the base network too: rename the run")
    trained: dict[str, TrainingSettings] = {f"runs.{name}": run for name, run in runs.items()}
    trained |= {f"warps.{name}": warp for name, warp in warps.items()}
    if dataset.pretrain is not None:
        trained["pretrain"] = dataset.pretrain
    for key, settings in trained.items():
        _check_micro_batch(f"{where}.{key}", settings)
    for name, run in runs.items():
        _check_forward_process(f"{where}.runs.{name}", run)
        check(f"runs.{name}.start", run.start, networks)
        check(f"runs.{name}.path", run.path, {*paths, *runs})
        _ancestry(where, runs, name)
        if not LOSSES[run.loss].learns_path:
            continue
        begun = (paths | runs)[run.path]
        if run.subspaces == "whole" and begun.subspaces != "whole":
            raise StageError(
                f"{where}.runs.{name}.subspaces: {run.path!r} has several, the run one: set it to {begun.subspaces}"
            )
        if begun.schedules == "class" and run.schedules != "class":
            raise StageError(
                f"{where}.runs.{name}.schedules: {run.path!r} has a schedule a class, the run a shared one: set it to "
                "class, or start from another path"
            )
    for name, warp in warps.items():
        check(f"warps.{name}.network", warp.network, networks)
        check(f"warps.{name}.path", warp.path, {*paths, *runs})
        if (paths | runs)[warp.path].schedules == "class":
            raise StageError(f"{where}.warps.{name}.path: {warp.path!r} has a schedule a class, and no common time")
    for kind in ("searches", "geometry", "likelihoods"):
        for name, entry in getattr(dataset, kind).items():
            check(f"{kind}.{name}.network", entry.network, networks)
            check(f"{kind}.{name}.path", entry.path, {*paths, *runs})
    for name, search in searches.items():
        if SOLVERS[search.solver].stochastic or SOLVERS[search.solver].tuned:
            known = ", ".join(each for each, entry in SOLVERS.items() if not (entry.stochastic or entry.tuned))
            raise StageError(
                f"{where}.searches.{name}.solver: {search.solver} has no images to try: use one of {known}"
            )
    for name, entry in dataset.geometry.items():
        on = (paths | runs)[entry.path]
        basis = basis_of(on.subspaces)
        if on.schedules == "class" or (basis and dataset.bases[basis].per != "all"):
            raise StageError(f"{where}.geometry.{name}.path: {entry.path!r} differs between classes: take a shared one")
    for name, entry in dataset.likelihoods.items():
        on = (paths | runs)[entry.path]
        if on.schedules == "class" and "ode" in entry.estimators:
            raise StageError(
                f"{where}.likelihoods.{name}.path: {entry.path!r} has a schedule a class, and no common time for the "
                "flow: set estimators to [bound]"
            )
        if basis_of(on.subspaces):
            raise StageError(
                f"{where}.likelihoods.{name}.path: {entry.path!r} is on principal subspaces, which keep no "
                "coefficients: take one of other subspaces than basis:NAME"
            )
    for name, tuning in dataset.tunings.items():
        check(f"tunings.{name}.start", tuning.start, set(methods))
        check(f"tunings.{name}.teacher", tuning.teacher, set(methods))
        _check_tuning(where, name, dataset, tuning)
    starts = {name: methods[tuning.start] for name, tuning in dataset.tunings.items()}
    for name, method in methods.items():
        check(f"methods.{name}.network", method.network, networks)
        check(f"methods.{name}.path", method.path, {*paths, *runs})
        if SOLVERS[method.solver].tuned and method.grid != "tuned":
            raise StageError(f"{where}.methods.{name}.grid: the solver tuned goes with the grid tuned: set it")
        for grid, key, made, said in (
            ("warped", "warp", warps, "the warp of"),
            ("searched", "search", searches, "a search on"),
            ("tuned", "tuning", starts, "tuned on"),
        ):
            chosen = getattr(method, key)
            if method.grid == grid:
                check(f"methods.{name}.{key}", chosen or "", set(made))
                if made[chosen].path != method.path:
                    raise StageError(f"{where}.methods.{name}.{key}: {chosen!r} is {said} another path")
            elif chosen is not None:
                raise StageError(f"{where}.methods.{name}.{key}: only the grid {grid!r} takes one: remove it")
        if method.tuning is not None:
            _check_tuned(where, name, dataset, dataset.tunings[method.tuning])
        if method.grid == "mean-karras" and (paths | runs)[method.path].schedules == "class":
            raise StageError(
                f"{where}.methods.{name}.grid: {method.path!r} has a schedule a class, and no common mean level: take "
                "another grid"
            )
        _check_method(where, name, method, budgets(dataset, name), searches.get(method.search or ""))
    for name in dataset.used("warp"):
        if warps[name].steps == "per_nfe":
            for nfe in sorted(warp_budgets(dataset, name)):
                with naming(f"{where}.warps.{name}.steps", "give each a warp of its own, or a number of steps"):
                    warp_steps(dataset, name, nfe)
    for name in dataset.plots.strip_methods or []:
        check("plots.strip_methods", name, set(methods))
    for series, names in dataset.plots.trained.items():
        for name in names:
            check(f"plots.trained.{series}", name, set(methods))
            path = methods[name].path
            if path in runs and runs[path].guard != "loss":
                raise StageError(f"{where}.plots.trained.{series}: {name!r} is not watched by its loss: leave it out")
        if sum(methods[name].path in runs for name in names) < 2:
            raise StageError(f"{where}.plots.trained.{series}: a line needs two methods whose path is trained: add one")
    for name in dataset.ladder:
        check("ladder", name, set(methods))
    for name, nfe in dataset.convergence.items():
        check("convergence", name, set(methods))
        key = f"{where}.convergence.{name}"
        _check_budget(where, key, name, methods[name], nfe, searches.get(methods[name].search or ""))
        tuning = methods[name].tuning
        if tuning is not None and nfe not in dataset.tunings[tuning].nfe:
            raise StageError(f"{key}: {nfe} is not tuned by {tuning!r}: give one of its nfe")
    if dataset.plots.published and not FEATURES[dataset.features.kind].is_fid:
        raise StageError(f"{where}.plots.published: published values are FIDs, of Inception's features: leave it out")
    known = {str(nfe) for name in methods for nfe in budgets(dataset, name)}
    unknown = sorted(set(dataset.sampling.ranges_at) - known)
    if unknown:
        raise StageError(f"{where}.sampling.ranges_at.{unknown[0]}: no method has such a budget")
    if dataset.reference is not None and not FEATURES[dataset.features.kind].is_fid:
        raise StageError(f"{where}.reference: published statistics are of Inception's features: set it to null")
    for name in dataset.plots.strip_methods or []:
        if (nfe := grid_nfe(dataset)) not in budgets(dataset, name):
            raise StageError(f"{where}.plots.grid_nfe: {nfe} is no budget of {name!r} in strip_methods")


def _check_tuning(where: str, name: str, dataset: DatasetSettings, tuning: TuningSettings) -> None:
    """That a tuning corrects a solver that it can, learns from a stronger one, and from noises of its own."""
    key, start = f"{where}.tunings.{name}", dataset.methods[tuning.start]
    if not SOLVERS[start.solver].linear:
        known = ", ".join(solver for solver, entry in SOLVERS.items() if entry.linear)
        raise StageError(f"{key}.start: {start.solver} of {tuning.start!r} has no weights to tune: use one of {known}")
    order = SOLVERS[start.solver].usual_order(start.order) or 1
    if order > tuning.window:
        raise StageError(f"{key}.window: {tuning.window} for {start.solver} of order {order}: give {order} or more")
    for role, method, nfes in (("start", tuning.start, tuning.nfe), ("teacher", tuning.teacher, [tuning.teacher_nfe])):
        settings = dataset.methods[method]
        if settings.tuning is not None:
            raise StageError(f"{key}.{role}: {method!r} is tuned itself: take another method")
        for nfe in nfes:
            _check_budget(where, key, method, settings, nfe, dataset.searches.get(settings.search or ""))
    if tuning.teacher_nfe <= max(tuning.nfe):
        raise StageError(
            f"{key}.teacher_nfe: {tuning.teacher_nfe} is no more than the {max(tuning.nfe)} that are tuned: raise it"
        )
    judged = dataset.sampling.images * max([dataset.sampling.ranges, *dataset.sampling.ranges_at.values()])
    if tuning.first_seed < judged:
        raise StageError(f"{key}.first_seed: seeds up to {judged - 1} are judged: give {judged} or more")


def _check_tuned(where: str, name: str, dataset: DatasetSettings, tuning: TuningSettings) -> None:
    """That a method uses a tuning as it was tuned."""
    method, start = dataset.methods[name], dataset.methods[tuning.start]
    if SOLVERS[method.solver].evaluations > 1:
        raise StageError(
            f"{where}.methods.{name}.solver: {method.solver} evaluates twice a step, tuned levels have a step an "
            "evaluation: use tuned, or another of one"
        )
    for key in ("network", "path", "afs", "threshold"):
        if (own := getattr(method, key)) != (wanted := getattr(start, key)):
            raise StageError(
                f"{where}.methods.{name}.{key}: {method.tuning!r} is tuned with {wanted!r}, not {own!r}: set it so"
            )
    if unknown := [nfe for nfe in budgets(dataset, name) if nfe not in tuning.nfe]:
        raise StageError(
            f"{where}.methods.{name}.nfe: {unknown[0]} is not tuned by {method.tuning!r}: add it to its nfe, or give "
            "the method budgets of its own"
        )


def check_toy(where: str, toy: ToySettings) -> None:
    """Refuse the first row whose settings have nothing to act on.

    Args:
        where: the toy's key.
        toy: its settings.

    Raises:
        StageError: what is wrong, with the path of its key.
    """
    _check_micro_batch(where, toy)
    if SOLVERS[toy.solver].stochastic or SOLVERS[toy.solver].tuned:
        raise StageError(f"{where}.solver: {toy.solver} is not one of a fixed flow's: use midpoint")
    for name, row in toy.rows.items():
        if row.kinetic and row.learns not in ("noise", "drift"):
            raise StageError(f"{where}.rows.{name}.kinetic: it moves what noise and drift learn: set it to 0")
        if row.ends == "fixed" and row.learns != "noise":
            raise StageError(f"{where}.rows.{name}.ends: they are fixed but where noise learns: leave it out")


def _check_micro_batch(where: str, settings: TrainingSettings) -> None:
    if settings.micro_batch is not None and settings.batch % settings.micro_batch:
        raise StageError(f"{where}.micro_batch: {settings.micro_batch} does not divide the batch of {settings.batch}")


def _check_forward_process(where: str, run: RunSettings) -> None:
    """That what a run learns of the forward process has a gradient, and something that holds it."""
    learns = LOSSES[run.loss].learns_path
    if run.guard == "images" and not learns:
        raise StageError(f"{where}.guard: nothing is watched where the path is left as it is: take loss tlsm")
    if not LOSSES[run.loss].learns_network and run.learning_rate > 0:
        raise StageError(f"{where}.learning_rate: no network learns from loss {run.loss}: set it to 0")
    if run.loss == "discretisation" and (run.learn_basis or run.planes or run.kinetic or run.guard == "images"):
        raise StageError(
            f"{where}.loss: discretisation learns schedules alone: leave out basis, planes, kinetic, guard"
        )
    if run.learn_basis and not (learns and turns(run.subspaces)):
        raise StageError(f"{where}.learn_basis: takes loss tlsm and subspaces separable:J or dense:J: set them")
    if run.learn_basis and str(run.subspaces).endswith(":1"):
        raise StageError(f"{where}.learn_basis: one subspace is the same in every basis: give it two or more")
    if learns and run.weight == "simple" and run.kinetic is None and run.path_learning_rate > 0:
        raise StageError(f"{where}.weight: every rise of a level lowers simple, so the path runs away: give kinetic")
    if run.path_gradient == "level" and (run.kinetic is not None or run.learn_basis):
        raise StageError(f"{where}.path_gradient: level is for the levels of one subspace alone: take full")


def _ancestry(where: str, runs: dict[str, RunSettings], name: str) -> None:
    for key in ("start", "path"):
        seen, at = [name], getattr(runs[name], key)
        while at in runs:
            if at in seen:
                raise StageError(f"{where}.runs.{name}.{key}: runs start from one another in a circle")
            seen.append(at)
            at = getattr(runs[at], key)


def _check_method(
    where: str, name: str, method: MethodSettings, nfes: list[int], search: SearchSettings | None
) -> None:
    highest = SOLVERS[method.solver].max_order
    if method.order is not None and highest is None:
        raise StageError(f"{where}.methods.{name}.order: {method.solver} has one order: leave it out")
    if (method.order or 0) > (highest or 1):
        raise StageError(f"{where}.methods.{name}.order: {method.solver} has orders 1 to {highest}")
    for key in ("rho", "last_level"):
        grids = [grid for grid, entry in GRIDS.items() if key in entry.takes]
        if getattr(method, key) is not None and method.grid not in grids:
            raise StageError(
                f"{where}.methods.{name}.{key}: only the grids {' and '.join(grids)} take one: leave it out"
            )
    if search is not None and method.afs and search.analytic == "images" and _solver(method) != _solver(search):
        raise StageError(
            f"{where}.methods.{name}.search: {method.search!r} chooses the analytic step by images of "
            f"{_solver(search)}, this is {_solver(method)}: give it a search of its own"
        )
    if (method.grid == "given") != (method.levels is not None):
        raise StageError(f"{where}.methods.{name}.levels: the grid 'given' needs them, and no other takes them")
    for nfe in nfes:
        _check_budget(where, f"{where}.sampling.nfe", name, method, nfe, search)


def _solver(settings: MethodSettings | SearchSettings) -> str:
    return f"{settings.solver} of order {SOLVERS[settings.solver].usual_order(settings.order) or 1}"


def _check_budget(
    where: str, key: str, name: str, method: MethodSettings, nfe: int, search: SearchSettings | None
) -> None:
    """That a method can spend a budget, which was given under `key`."""
    try:
        budget = steps_for_nfe(nfe, method)
    except StageError as error:
        raise StageError(f"{key}: method {name!r}: {error}") from error
    if search is not None and budget.points > search.points:
        raise StageError(
            f"{where}.searches.{method.search}.points: {search.points} are too few for {nfe} evaluations of "
            f"method {name!r}: give {budget.points} or more"
        )
    if search is not None and method.afs and search.analytic == "images" and nfe > search.analytic_nfe:
        raise StageError(
            f"{where}.searches.{method.search}.analytic_nfe: {search.analytic_nfe} is less than the {nfe} of "
            f"method {name!r}: raise it, or choose the analytic step by costs"
        )
    if method.levels is not None:
        levels = method.levels.get(str(nfe), [])
        if len(levels) != budget.steps + 1:
            raise StageError(
                f"{where}.methods.{name}.levels.{nfe}: {len(levels)} levels, this budget needs {budget.steps + 1}"
            )
        if sorted(set(levels), reverse=True) != levels:
            raise StageError(f"{where}.methods.{name}.levels.{nfe}: the levels must fall")
