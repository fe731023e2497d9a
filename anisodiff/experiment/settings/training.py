"""Settings of trainings: base networks, runs that learn a path, warps."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from anisodiff.experiment.settings.base import SEEDS, Named, OneOf, Section, Seeds, Subspaces, Whole, key, whole_number
from anisodiff.experiment.settings.paths import (
    C_UNIT,
    KNOTS,
    LABEL_WEIGHTS,
    SCHEDULES,
    SUBSPACES,
    C,
    LabelWeights,
    Schedules,
)
from anisodiff.networks.registry import NETWORKS
from anisodiff.objectives.registry import LOSSES, WEIGHTS

KIMG = "thousands of images"


class TrainingSettings(Section):
    """What every training is told."""

    kimg: float = key("Images to see.", unit=KIMG, gt=0)
    batch: Whole = key("Images a step.", 256, unit="images", ge=1)
    learning_rate: float = key("Peak rate of Adam (for a network, or a warp).", ge=0)
    ramp_kimg: float = key("Linear warm-up of the rates.", 10.0, unit=KIMG, ge=0)
    decay: Literal["continuous", "steps"] = key(
        "Decay of the rates after half the run: continuous halves them smoothly in every eighth of it, as the "
        "published code does; steps at once, at the half and at every further eighth.",
        "continuous",
    )
    ema_kimg: float = key(
        "Half-life of the average that is saved of the network's weights; 0 saves the last ones.",
        500.0,
        unit=KIMG,
        ge=0,
    )
    micro_batch: Annotated[Whole, Field(ge=1)] | None = key(
        "Images whose gradient is taken at a time; a step adds up the pieces of its batch, and processes share them, "
        "so that the number of GPUs changes no result (another piece has other dropout masks and probes). Divides the "
        "batch; null is the whole of it.",
        None,
        unit="images",
    )
    ema_ramp: Annotated[float, Field(gt=0)] | None = key(
        "Half-life of every average as a share of the images seen, where shorter; null never shortens it.", 0.05
    )
    seed: Whole = key("Number that every draw of the run follows from.", 0, ge=0, le=1_000_000)
    save_seconds: float = key("Longest time between two saves of the resume state.", 300.0, unit="seconds", gt=0)


class FeatureTrainingSettings(Section):
    """Recipe of the digits classifier whose features the demo's distance uses."""

    seed: Whole = key("Number that every draw follows from.", 0, ge=0)
    steps: Whole = key("Steps of AdamW.", 800, unit="steps", ge=1)
    batch: Whole = key("Images a step.", 128, unit="images", ge=1)
    learning_rate: float = key("Peak rate.", 0.002, gt=0)
    heldout: Whole = key("Images for the accuracy, never trained on.", 160, unit="images", ge=1)


class NetworkSettings(Section):
    """Architecture of the U-Net."""

    model_type: Annotated[str, OneOf(NETWORKS)] = key("SongUNet (DDPM++ and NCSN++) or DhariwalUNet (ADM).", "SongUNet")
    model_channels: Whole = key("Width at full resolution.", 128, unit="channels", ge=8)
    channel_mult: list[Annotated[Whole, Field(ge=1)]] = key(
        "Width at each resolution, in units of model_channels.", [2, 2, 2], min_length=1
    )
    channel_mult_emb: Whole = key("Width of the embedding, in units of model_channels.", 4, ge=1)
    num_blocks: Whole = key("Residual blocks a resolution.", 4, unit="blocks", ge=1)
    attn_resolutions: list[Annotated[Whole, Field(ge=1)]] | None = key(
        "Resolutions with self-attention; the middle has it always, but for null, which is no attention.",
        [16],
        unit="pixels",
    )
    dropout: float = key("Probability while training.", 0.1, ge=0, le=1)
    label_dropout: float = key("Share of the labels dropped while training.", 0.0, ge=0, le=1)
    embedding_type: Literal["positional", "fourier"] | None = key(
        "Embedding of the noise label; fourier for NCSN++ (SongUNet only).", None
    )
    channel_mult_noise: Annotated[Whole, Field(ge=1)] | None = key(
        "Width of the noise embedding, in units of model_channels; 2 for NCSN++ (SongUNet only).", None
    )
    encoder_type: Literal["standard", "skip", "residual"] | None = key(
        "How the downsampled image joins the encoder; residual for NCSN++ (SongUNet only).", None
    )
    decoder_type: Literal["standard", "skip"] | None = key(
        "Output at full resolution, or summed over resolutions (SongUNet only).", None
    )
    resample_filter: list[Annotated[Whole, Field(ge=1)]] | None = key(
        "Taps of the resampling filter; 1, 3, 3, 1 for NCSN++ (SongUNet only).", None
    )

    def arguments(self) -> dict[str, Any]:
        """Arguments of the network: what is left at null is the network's own."""
        own = ("embedding_type", "channel_mult_noise", "encoder_type", "decoder_type", "resample_filter")
        return {name: value for name, value in self.model_dump().items() if value is not None or name not in own}


class PretrainSettings(TrainingSettings):
    """Recipe of the base network, made again by the target `pretrain_<dataset>`."""

    augment: float = key(
        "Probability of each of EDM's augmentations, of which the network is told: 0.12 for its CIFAR-10, 0.15 for its "
        "AFHQv2 and FFHQ; each image is mirrored with probability 1/2 then, in place of flips. 0 augments nothing.",
        0.0,
        ge=0,
        le=1,
    )
    network: NetworkSettings = key("Architecture of the U-Net.")


class RunSettings(TrainingSettings):
    """A training run. It makes a network and the path that the network was trained on, both under the run's name."""

    seeds: Seeds = key(SEEDS, 1, unit="trainings")
    start: Named = key("Network to start from, base or another run.")
    path: Named = key("Path to start from, one of paths or another run.", "edm")
    loss: Annotated[str, OneOf(LOSSES)] = key(
        "tlsm trains network and path; edm trains the network with EDM's loss and leaves the path; discretisation, the "
        "loss of a warp with eight steps, trains the path and leaves the network."
    )
    subspaces: Subspaces = key(SUBSPACES, "whole")
    schedules: Schedules = key(SCHEDULES, "shared")
    label_weights: LabelWeights = key(LABEL_WEIGHTS, "rank")
    c: float = key(C, 1.0, unit=C_UNIT, gt=0)
    path_learning_rate: float = key("Peak rate of Adam for the path's parameters.", 0.001, ge=0)
    path_ema_kimg: float = key(
        "Half-life of the average that is saved of the path's parameters; 0, as in the published code, saves the last "
        "ones.",
        0.0,
        unit=KIMG,
        ge=0,
    )
    path_gradient: Literal["full", "level", "envelope"] = key(
        "Gradient of the path: full has the derivative of an exact network's flow in the path, estimated with probes; "
        "level that of this network through the level it is told, as the published code for one subspace (the only one "
        "it is for): cheaper, and less noisy; envelope leaves it out.",
        "full",
    )
    probes: Whole = key("Random probes an image in the derivative of the flow.", 1, unit="probes", ge=1)
    probe_fraction: float = key(
        "Share of the batch on which the derivative of the flow is estimated.", 0.125, gt=0, le=1
    )
    weight: Annotated[str, OneOf(WEIGHTS)] = key(
        "Weight of the flow's error for loss tlsm: tlsm; elbo, which bounds the likelihood; or simple, 1 in all "
        "subspaces: a path that learns lowers it by raising its levels without end, unless kinetic is added.",
        "tlsm",
    )
    learn_basis: bool = key(
        "Learn the basis too, of subspaces separable:J or dense:J, from a path whose schedules differ.", False
    )
    basis_learning_rate: float = key("Peak rate of Adam for the basis's angles.", 0.001, ge=0)
    kinetic: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=2, max_length=2)] | None = key(
        "Two factors, on the kinetic energy of the path's flow and on that of its gradient, which are added to the "
        "loss; null leaves them out.",
        None,
    )
    freeze_after: float = key(
        "Share of the run after which path, basis and the rates of planes are held: 0.5 is FP-Diffusion's mix "
        "training, 1 its joint one.",
        1.0,
        gt=0,
        le=1,
    )
    planes: Whole = key(
        "Pairs of directions in whose plane the network's images are turned (FP-Drift), each at a rate that is N(0, 1) "
        "at first and learns at learning_rate; 0 turns nothing.",
        0,
        unit="planes",
        ge=0,
    )
    guard: Literal["loss", "images"] = key(
        "What decides where a run ends: the held-out loss, whose rise stops it; or the error of images in few steps of "
        "the midpoint, uniform in the path's time, to those of the run's start in 35 evaluations from the same noise: "
        "the run ends with the state of the least error. The path of least loss is not that of least error.",
        "loss",
    )
    guard_nfe: Whole = key("Evaluations of these images.", 5, unit="evaluations", ge=3)
    guard_images: Whole = key("Noises of these images.", 256, unit="images", ge=1)
    guard_kimg: float = key(
        "Images between two checks of what would be saved; the end of the run is checked too.",
        50.0,
        unit=KIMG,
        gt=0,
    )
    guard_tolerance: float = key(
        "Relative rise over the best check at which a run is stopped and goes back to it.", 0.1, ge=0
    )


def _window_steps(value: Any) -> Any:
    value = whole_number(value)
    if value == "per_nfe" or (type(value) is int and value >= 1):
        return value
    raise PydanticCustomError("steps", "{value} is neither a number of steps nor per_nfe", {"value": repr(value)})


class WarpSettings(TrainingSettings):
    """A learned time warp."""

    seeds: Seeds = key(SEEDS, 1, unit="trainings")
    network: Named = key("Network it is learned under, base or a run.")
    path: Named = key("Path whose time is warped, one of paths or a run.")
    c: float = key(C, 0.5, unit=C_UNIT, gt=0)
    ema_kimg: float = key(
        "Half-life of the average that is saved of the warp's parameters; 0, as in the published code, saves the last "
        "ones.",
        0.0,
        unit=KIMG,
        ge=0,
    )
    knots: Whole = key(KNOTS, 32, unit="knots", ge=3)
    steps: Annotated[
        int | str,
        BeforeValidator(_window_steps),
        WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"const": "per_nfe"}]}),
    ] = key("Steps K of the grid that the window T/K stands for; per_nfe takes each budget's own.", 8, unit="steps")
    window: Literal["fixed", "uniform"] = key(
        "Length of the window between two grid points: fixed at T/K, or uniform in (0, T/K).", "fixed"
    )
