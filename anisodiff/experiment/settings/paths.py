"""Settings of bases and of paths that need no training."""

from typing import Annotated, Literal

from anisodiff.experiment.settings.base import OneOf, Section, Subspaces, Whole, key
from anisodiff.paths.registry import PATHS

SUBSPACES = (
    "Partition of the DCT basis: whole (J = 1), block (the paper's J = 2), radial:J, or a table of H rows of H "
    "subspace numbers; or basis:NAME, the principal subspaces of one of bases (J = 2); or separable:J and dense:J, "
    "bases that can be learned (of rows, columns and channels apart from the DCT on, or of all pixels together)."
)
SCHEDULES = "shared is one schedule a subspace for all images, class one for the images of each class."
LABEL_WEIGHTS = "Weights of the mean log-level told to the network: rank, or equal per subspace (the paper's J = 2)."
C = "Scale of the data's variance in the weight (M + c I)^(-1/2)."
C_UNIT = "squared pixel values, images in [-1, 1]"
KNOTS = "Knots of the schedule, ends included."

Schedules = Literal["shared", "class"]
LabelWeights = Literal["rank", "equal"]


class BasisSettings(Section):
    """Principal subspaces of the training images, computed on the channel mean and shared by the channels."""

    rank: Whole = key("Dimension of the first subspace.", unit="components a channel", ge=1)
    per: Literal["all", "class", "cluster"] = key(
        "all images share a basis, each class has its own, or each cluster of classes.", "all"
    )
    clusters: Whole = key("Number of clusters, for per cluster.", 1, unit="clusters", ge=1)


class PathSettings(Section):
    """A path that needs no training."""

    kind: Annotated[str, OneOf(PATHS)] = key(
        "karras is EDM's isotropic schedule; spectral the closed form for Gaussian data with the measured spectrum; "
        "exponent the flexible process's exp(lambda beta(t)) - 1, all lambda 1 at the start."
    )
    subspaces: Subspaces = key(SUBSPACES, "whole")
    schedules: Schedules = key(SCHEDULES, "shared")
    label_weights: LabelWeights = key(LABEL_WEIGHTS, "rank")
    c: float = key(C, 1.0, unit=C_UNIT, gt=0)
    knots: Whole = key(KNOTS, 32, unit="knots", ge=3)
    ends: Literal["fixed", "moving"] = key(
        "Ends of kind exponent: fixed at g_min and sigma_max^2 in all subspaces, so that likelihoods compare, or "
        "moving with lambda, as published.",
        "fixed",
    )
    basis_start: Literal["dct", "identity", "pca", "random"] = key(
        "Vectors that the basis dense:J starts from; pca are the principal directions of the training images.", "dct"
    )
