"""Settings of datasets, and of the whole experiment."""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from anisodiff.data.sources import TRANSFORMS
from anisodiff.experiment.settings.base import (
    Budgets,
    Digits,
    Name,
    OneOf,
    Section,
    Seen,
    Unique,
    Whole,
    key,
    section,
)
from anisodiff.experiment.settings.cluster import STAGES, ClusterSettings, JobSettings
from anisodiff.experiment.settings.methods import (
    GeometrySettings,
    LikelihoodSettings,
    MethodSettings,
    SearchSettings,
)
from anisodiff.experiment.settings.paths import BasisSettings, PathSettings
from anisodiff.experiment.settings.sources import FeaturesSettings, FileSettings
from anisodiff.experiment.settings.toys import ToySettings
from anisodiff.experiment.settings.training import PretrainSettings, RunSettings, WarpSettings
from anisodiff.experiment.settings.tunings import TuningSettings
from anisodiff.metrics.registry import Keep

OneOrMore = Annotated[Whole, Field(ge=1)]


class ImagesSettings(FileSettings):
    """The training images."""

    url: Seen = key(
        "digits or mnist-5k (inside installed packages), or the path or address of a zip, a folder of images or a "
        "CIFAR .tar.gz."
    )
    resolution: Annotated[Whole, Field(ge=4)] | None = key(
        "Side of the images; null keeps theirs.", None, unit="pixels"
    )
    transform: Annotated[str, OneOf(TRANSFORMS)] = key("How they are made square, by EDM's rules.", "none")


class SamplingSettings(Section):
    """What is drawn for a cell of the table."""

    nfe: Budgets = key("Budgets of denoiser evaluations an image.", unit="evaluations")
    images: Whole = key("Images of a seed range.", 50_000, unit="images", ge=2)
    shard: Whole = key("Images of a sampling job.", 10_000, unit="images", ge=1)
    batch: Whole = key("Images at a time.", 500, unit="images", ge=1)
    keep: Keep = key(
        "What stays of the images: statistics are all that a distance needs; features (4 bytes each: 8 MB for 1,000 "
        "images by Inception's 2,048) are what its error over images, KID, precision and recall need; images adds to "
        "them one zip a cell, in EDM's dataset format, numbered by seed.",
        "features",
    )
    ranges: Whole = key(
        "Seed ranges a cell; distances are computed for each and their spread is reported.", 1, unit="ranges", ge=1
    )
    ranges_at: dict[Digits, OneOrMore] = section(
        "Seed ranges at single budgets, where not `ranges`.", json_schema_extra={"unit": "ranges"}
    )


class PlotsSettings(Section):
    """What the figures show."""

    strip_methods: Annotated[list[Name], Field(min_length=2, max_length=2)] | None = key(
        "The isotropic and the anisotropic method of the denoising strips; null is iso and ani, or no strips where one "
        "is missing.",
        None,
    )
    published: Annotated[list[str], Unique] = key(
        "Methods of config/published.csv drawn behind the dataset's own, by name; its metric must be FID. Their bits "
        "per dimension stand below the dataset's own.",
        [],
    )
    trained: dict[str, Annotated[list[Name], Field(min_length=2), Unique]] = section(
        "Methods that differ in how long their path was trained, by the name of a panel: distance and held-out loss "
        "against the images seen. One whose path is not trained, as edm, is a level line."
    )
    grid_nfe: Whole | None = key(
        "Budget of the strips and sample grids; null takes the smallest.", None, unit="evaluations"
    )


class ImageSpace(Section):
    """What a stage is told of its dataset: the images' classes and scale, and the ends of every path."""

    class_conditional: bool = key("Class-conditional networks.", False)
    flips: bool = key("Mirror training images at random.", True)
    heldout: Whole = key("Images never trained on, for the guard.", 1024, unit="images", ge=1)
    sigma_data: float = key("Standard deviation of the data.", 0.5, unit="pixel values", gt=0)
    sigma_min: float = key("Smallest level of EDM's grid.", 0.002, unit="pixel values", gt=0)
    sigma_max: float = key("Largest level of every path, the square root of T.", 80.0, unit="pixel values", gt=0)
    g_min: float = key("Variance of every path at t = 0.", 1e-9, unit="squared pixel values", gt=0)


class DatasetSettings(ImageSpace):
    """What is reproduced on one data set."""

    images: ImagesSettings = key("The training images.")
    jobs: dict[Annotated[str, OneOf(STAGES)], JobSettings] = section(
        "What this dataset's jobs ask for, where it differs from cluster.jobs."
    )
    features: FeaturesSettings = key("Feature network of the distance.")
    reference: FileSettings | None = key(
        "Published reference statistics, an npz of mu and sigma of Inception's features; null takes those of the "
        "images.",
        None,
    )
    base: FileSettings = key("The base network's checkpoint, safetensors of ours or a pickle of EDM's.")
    pretrain: PretrainSettings | None = key(
        "Recipe of the base network, made again by the target `pretrain_<dataset>`.", None
    )
    bases: dict[Name, BasisSettings] = section("Principal subspaces.")
    paths: dict[Name, PathSettings] = section("Paths that need no training.")
    runs: dict[Name, RunSettings] = section("Training runs.")
    warps: dict[Name, WarpSettings] = section("Learned time warps.")
    searches: dict[Name, SearchSettings] = section("Searches of levels.")
    tunings: dict[Name, TuningSettings] = section(
        "Solvers whose levels and weights are learned, under a frozen network."
    )
    geometry: dict[Name, GeometrySettings] = section("Shapes of trajectories.")
    likelihoods: dict[Name, LikelihoodSettings] = section("Likelihoods of held-out images, in bits per dimension.")
    convergence: dict[Name, OneOrMore] = section(
        "Methods whose states and denoised estimates are followed from node to node, by the Frechet distance, with the "
        "budget: {ddim: 35}.",
        json_schema_extra={"unit": "evaluations"},
    )
    methods: dict[Name, MethodSettings] = key("Rows of the table.", min_length=1)
    ladder: Annotated[list[Name], Unique] = key(
        "Methods that add one ingredient each: the table ends with what each of them buys.", []
    )
    sampling: SamplingSettings = key("What is drawn for a cell of the table.")
    plots: PlotsSettings = section("What the figures show.")

    def used(self, key: Literal["warp", "search", "tuning"]) -> list[str]:
        """Names that some method has under a key, sorted."""
        return sorted({name for method in self.methods.values() if (name := getattr(method, key)) is not None})

    @property
    def space(self) -> ImageSpace:
        """What a stage is told; the rest of the configuration can change without running it again."""
        return ImageSpace(**{name: getattr(self, name) for name in ImageSpace.model_fields})


class ExperimentSettings(Section):
    """Everything a run depends on. Unknown keys are refused."""

    device: Annotated[str, StringConstraints(pattern=r"^[a-z]+(:[0-9]+)?$")] = key(
        "Where networks run, as torch names it (cpu, cuda, cuda:1); it must have float64, which paths are in.", "cpu"
    )
    threads: Whole = key("CPU threads of a training or sampling job.", 1, unit="threads", ge=1)
    dtype: Literal["float32", "bfloat16", "float16"] = key(
        "Precision of the networks' bodies. Paths, losses and solvers always run in float32 or better.", "float32"
    )
    compile: bool = key("Let torch compile the networks; minutes at the start of a job, for faster steps.", False)
    mirror: Seen = key(
        "Folder looked into before the network, laid out as host/path. Files there are checked like downloads.",
        "downloads",
    )
    offline: bool = key(
        "Do not use the network; a file that is missing from the mirror is named with the place it belongs.", False
    )
    cluster: ClusterSettings = section("What jobs ask of Slurm; config/cluster.yaml sets it.")
    toy: ToySettings | None = key("The toy in three dimensions; config/fp-toy.yaml sets it.", None)
    datasets: dict[Name, DatasetSettings] = key(
        "What to reproduce; a target of its name makes one dataset.", min_length=1
    )
