"""Settings of methods, of the searches that some of them use, and of the shapes of trajectories."""

from typing import Annotated, Literal

from pydantic import Field

from anisodiff.experiment.settings.base import Budgets, Digits, Named, OneOf, Section, Unique, Whole, key
from anisodiff.grids.registry import GRIDS
from anisodiff.solvers.registry import SOLVERS

SolverName = Annotated[str, OneOf(SOLVERS)]
ORDER = (
    "Order of a solver that remembers, or the number of evaluations it uses; null is its highest (4 for iPNDM and "
    "DEIS, 3 for DPM-Solver++ and UniPC)."
)
Order = Annotated[Whole, Field(ge=1, le=4)] | None
Positive = Annotated[float, Field(gt=0)]


class SearchSettings(Section):
    """A search of levels (GITS): Euler steps between them stay close to a teacher's trajectory, for all budgets."""

    network: Named = key("base or a run.")
    path: Named = key("One of paths or a run.")
    grid: Literal["karras", "path-time"] = key(
        "Fine grid that is searched: EDM's polynomial, or uniform in the path's time.", "karras"
    )
    points: Whole = key("Nodes of the fine grid.", 61, unit="points", ge=3)
    images: Whole = key("Warm-up noises.", 256, unit="images", ge=1)
    seed: Whole = key("Seed of the first of them; none that is reported on.", 1_000_000_000, ge=0)
    cost: Literal["deviation", "l2", "l1"] = key(
        "How much farther the step's end is from the chord between the trajectory's ends than the teacher's point "
        "(deviation, as published), or its distance to that point in pixels (l2, l1).",
        "deviation",
    )
    gamma: float = key("Factor on the costs of later steps.", 1.15, gt=0)
    analytic: Literal["images", "costs", "joint"] = key(
        "How the node after an analytic first step (afs) is chosen: images tries each before the way's next and takes "
        "the one from which the solver's images come closest to the teacher's, as published; costs compares the costs "
        "of the two steps around it; joint searches all nodes of the way again with the analytic step's costs.",
        "images",
    )
    analytic_nfe: Whole = key("Most evaluations for which images are tried.", 10, unit="evaluations", ge=1)
    solver: SolverName = key("Solver whose images are tried; methods with afs on this search must have it.", "ipndm")
    order: Order = key("Its order, where it remembers; null is its highest.", None)


class GeometrySettings(Section):
    """Shapes of a network's trajectories over a path, beside those of closed-form denoisers, as figures and a table."""

    network: Named = key("base or a run.")
    path: Named = key("One of paths or a run, shared by all classes.")
    images: Whole = key("Trajectories of the network.", 256, unit="trajectories", ge=2)
    shown: Whole = key(
        "Trajectories of the closed forms, and of the figures in three dimensions.",
        30,
        unit="trajectories",
        ge=2,
        le=32,
    )
    steps: Whole = key("Euler's steps.", 100, unit="steps", ge=10)
    fine_steps: Whole = key("Euler's steps, for curvature and torsion.", 1000, unit="steps", ge=40)
    seed: Whole = key("Seed of the first trajectory.", 0, ge=0)
    exact: Annotated[list[Annotated[str, OneOf(("kernel", "gaussian", "mixture"))]], Unique] = key(
        "Closed forms: kernel is the optimal denoiser for the training images, gaussian that of one Gaussian fitted to "
        "them, mixture of one a class.",
        ["kernel", "gaussian"],
    )
    rank: Whole = key("Principal directions of a fitted Gaussian.", 1000, unit="directions", ge=1)
    data: Whole = key("Training images of the kernel, at most; in memory.", 50_000, unit="images", ge=2)


class LikelihoodSettings(Section):
    """Likelihood of held-out images under a network over a path, beside the distance of every method of the two."""

    network: Named = key("base or a run.")
    path: Named = key("One of paths or a run; of other subspaces than basis:NAME, which keep no coefficients.")
    estimators: Annotated[list[Annotated[str, OneOf(("ode", "bound"))]], Field(min_length=1), Unique] = key(
        "ode is the density along the probability flow, of dequantised images; bound is a lower bound of the "
        "probability of grey levels.",
        ["ode", "bound"],
    )
    images: Whole = key("Held-out images, at most.", 10_000, unit="images", ge=2)
    shard: Whole = key("Images of a job.", 1000, unit="images", ge=1)
    batch: Whole = key("Images at a time.", 40, unit="images", ge=1)
    grey_levels: Whole = key("Grey levels of a pixel, evenly spaced.", 256, unit="levels", ge=2, le=256)
    steps: Whole = key("Midpoint steps of the flow, of two evaluations each.", 64, unit="steps", ge=1)
    probes: Whole = key(
        "Random probes of the flow's divergence, an image; 0 takes the exact one, up to 64 dimensions.",
        1,
        unit="probes",
        ge=0,
    )
    times: Whole = key("Times of the bound, an image: one in each of as many equal parts.", 64, unit="times", ge=1)
    decoder_noise: float = key(
        "Noise that all levels of the bound start from, in steps between grey levels; at 0.12 rounding is certain.",
        0.12,
        unit="grey levels",
        gt=0,
    )
    seed: Whole = key("Seed of the first image's noise.", 0, ge=0)


class MethodSettings(Section):
    """A row of the table, network x path x grid x solver."""

    network: Named = key("base or a run.")
    path: Named = key("One of paths or a run.")
    grid: Annotated[str, OneOf(GRIDS)] = key(
        "Where the path is evaluated: EDM's polynomial, uniform in log sigma, in the time of the variance-preserving "
        "process, in the path's time, at times when its mean level is on EDM's polynomial, in its warped time, at "
        "levels that a search found or a tuning learned, or given by hand."
    )
    solver: SolverName = key(
        "How a step is taken: euler is DDIM; heun, midpoint and dpm2 evaluate twice a step; the others once, and "
        "remember; tuned has the weights of a tuning, on its levels."
    )
    nfe: Budgets | None = key("Budgets of this row, where not those of sampling.", None, unit="evaluations")
    order: Order = key(ORDER, None)
    afs: bool = key("Analytic first step: the first direction is x / sqrt(1 + sigma^2), without an evaluation.", False)
    threshold: bool = key("Dynamic thresholding of the estimates of the clean image.", False)
    append_zero: bool | None = key(
        "End with a step to 0; null does so on grids that end at sigma_min, and on a path's times where the budget "
        "asks for it.",
        None,
    )
    rho: Positive | None = key(
        "Exponent of the grids karras and mean-karras (1 is uniform in sigma; null is 7) and vp-time (null is 1; DEIS "
        "is published with 2).",
        None,
    )
    last_level: Positive | None = key(
        "Geometric-mean level at which the grids path-time and warped end where a step to 0 follows; null is 0.03, "
        "better on the digits than 0.002 from 5 to 13 evaluations and as good at 35. Without a step to 0 they end at "
        "t = 0.",
        None,
        unit="pixel values",
    )
    levels: dict[Digits, Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=2)]] | None = key(
        "Levels of the grid given, falling, by budget: {5: [80, 6.7, 2.2, 0.8, 0.2, 0.002]}.",
        None,
        unit="pixel values",
    )
    warp: Named | None = key("One of warps, for the grid warped.", None)
    search: Named | None = key("One of searches, for the grid searched.", None)
    tuning: Named | None = key("One of tunings, for the grid tuned, and the solver tuned with it.", None)
