"""Settings of the toy: the flexible forward process on a plane in three dimensions."""

from typing import Annotated, Literal

from pydantic import Field

from anisodiff.experiment.settings.base import Budgets, Name, OneOf, Section, Whole, key
from anisodiff.experiment.settings.methods import SolverName
from anisodiff.experiment.settings.training import TrainingSettings
from anisodiff.objectives.registry import WEIGHTS


class PlaneSettings(Section):
    """A Gaussian on a plane, which is the data."""

    distance: float = key("Distance of the mean from the origin, along the normal.", 2.0, ge=0)
    variances: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=2, max_length=2)] = key(
        "In the plane: in the direction that tilts, and along the y axis.", [1.0, 1.0]
    )
    tilt: float = key("Turn of the normal from the z axis towards the x axis.", 0.0, unit="radians")
    thickness: float = key("Standard deviation along the normal.", 0.0, ge=0)


class ToyRowSettings(Section):
    """A row of the toy's table."""

    learns: Literal["exact", "network", "noise", "drift"] = key(
        "What is learned: exact is the flow in closed form on the fixed process, where nothing is; network the network "
        "alone; noise the network and R^-1 (FP-Noise); drift the network and omega (FP-Drift)."
    )
    weight: Annotated[str, OneOf(WEIGHTS)] = key("Weight of the flow's error in the loss.", "simple")
    ends: Literal["fixed", "moving"] = key(
        "Ends of the variances where noise learns: fixed at those of rate 1 in all directions, or moving with the "
        "rates, as published.",
        "moving",
    )
    kinetic: float = key("Factor on the kinetic energy of the flow, which is added to the loss.", 0.0, ge=0)


class ToyTrainingSettings(TrainingSettings):
    """What a row is told: how it is trained, and how it is measured."""

    path_learning_rate: float = key("Peak rate of Adam for the process's rates and basis.", 0.003, ge=0)
    spread: float = key(
        "Standard deviation of the process's log rates at the start, 1 in FP-Diffusion; a basis has no gradient at 0.",
        0.1,
        gt=0,
    )
    solver: SolverName = key("Solver that samples, in steps uniform in the process's time.", "midpoint")
    steps: Budgets = key("Numbers of its steps; trajectories are of the last.", [5, 10, 40], unit="steps")
    images: Whole = key("Samples of a distance.", 10_000, unit="samples", ge=4)


class ToySettings(ToyTrainingSettings):
    """The toy of the flexible forward process (arXiv:2206.10365, 4.1), made by the target `fp_toy`."""

    seeds: Whole = key("Trainings of each row on each plane, by seeds that count up from seed.", 3, ge=1)
    planes: dict[Name, PlaneSettings] = key("Planes, by name.", min_length=1)
    rows: dict[Name, ToyRowSettings] = key("Rows of the table, by name.", min_length=1)

    @property
    def training(self) -> ToyTrainingSettings:
        """What a row is told; the rest of the configuration can change without training it again."""
        return ToyTrainingSettings(**{name: getattr(self, name) for name in ToyTrainingSettings.model_fields})
