"""Settings of tuned solvers."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from anisodiff.experiment.settings.base import SEEDS, Budgets, Named, Section, Seeds, Unique, Whole, key
from anisodiff.experiment.settings.sources import FeaturesSettings

OF_DCT = r"(?:luma:)?(whole|block|radial:[0-9]+)"


def _bands(value: Any) -> Any:
    if value == "path" or (isinstance(value, str) and re.fullmatch(OF_DCT, value)):
        return value
    raise PydanticCustomError("bands", "{value} is none of the solver's subspaces", {"value": repr(value)})


Bands = Annotated[str, BeforeValidator(_bands), WithJsonSchema({"type": "string", "pattern": f"^(path|{OF_DCT})$"})]


class TuningSettings(Section):
    """A tuned solver: levels, labels and weights of a method, learned for each budget under its frozen network."""

    start: Named = key(
        "One of methods: its network, path, levels, solver (one that is linear in its values: ipndm, dpmpp, ...), afs "
        "and threshold are what every correction starts from."
    )
    teacher: Named = key("One of methods, whose images are learned from.")
    teacher_nfe: Whole = key("Its budget, larger than all that are tuned.", 35, unit="evaluations", ge=2)
    nfe: Budgets = key("Budgets, in the order in which they are tuned.", unit="evaluations")
    learn: Annotated[list[Literal["levels", "labels", "coefficients"]], Field(min_length=1), Unique] = key(
        "What is learned: the levels; the labels, levels that the network is told; the coefficients, weights of the "
        "state and of the latest values.",
        ["levels", "labels", "coefficients"],
    )
    window: Whole = key("Latest values that a step weighs.", 3, unit="values", ge=1, le=8)
    subspaces: Bands = key(
        "Where coefficients differ: whole; path, in the path's subspaces; block or radial:J of the DCT; luma: before "
        "one of these parts each into luma and chroma.",
        "whole",
    )
    per_subspace: bool = key("Levels and labels differ between the path's subspaces.", False)
    rank: Annotated[Whole, Field(ge=1)] | None = key(
        "Corrections of coefficients are a sum of so many products of a number a step and one a subspace; null leaves "
        "them free.",
        None,
    )
    shared_levels: bool = key("All budgets take their levels from one curve, and are tuned together.", False)
    features: FeaturesSettings | None = key(
        "Feature network in which images are compared; null compares pixels. Of a tuning in the features of the "
        "table's own distance the table says so, and leaves it out of the best.",
        None,
    )
    pairs: Whole = key("Noises with their images to learn from.", 1536, unit="images", ge=1)
    heldout: Whole = key("Noises with their images to choose by.", 256, unit="images", ge=1)
    first_seed: Whole = key("Seed of the first of them, above all that are judged.", 2_000_000_000, ge=0)
    steps: Whole = key("Steps of Adam a budget.", 300, unit="steps", ge=1)
    batch: Whole = key("Images a step.", 128, unit="images", ge=1)
    warm_up: Whole = key("Steps of the linear warm-up, under half a cosine.", 10, unit="steps", ge=0)
    learning_rate: float = key("Peak rate of Adam.", 0.02, gt=0)
    scale: float = key("Unit of the corrections of labels and coefficients.", 0.1, gt=0)
    seeds: Seeds = key(SEEDS + " Each has pairs of its own.", 1, unit="trainings")
    seed: Whole = key("Number that the choice of pairs follows from.", 0, ge=0, le=1_000_000)
    save_seconds: float = key("Longest time between two saves of the resume state.", 120.0, unit="seconds", gt=0)
