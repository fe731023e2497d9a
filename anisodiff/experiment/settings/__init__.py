"""Settings: every key of the configuration with its description, unit, default and bounds, checked and frozen."""

from anisodiff.experiment.settings.base import Section
from anisodiff.experiment.settings.cluster import ClusterSettings, JobSettings
from anisodiff.experiment.settings.datasets import DatasetSettings, ExperimentSettings, ImageSpace, SamplingSettings
from anisodiff.experiment.settings.figures import FigureSettings, PublishedValues
from anisodiff.experiment.settings.methods import (
    GeometrySettings,
    LikelihoodSettings,
    MethodSettings,
    SearchSettings,
)
from anisodiff.experiment.settings.paths import BasisSettings, PathSettings
from anisodiff.experiment.settings.toys import PlaneSettings, ToyRowSettings, ToySettings, ToyTrainingSettings
from anisodiff.experiment.settings.training import (
    FeatureTrainingSettings,
    NetworkSettings,
    PretrainSettings,
    RunSettings,
    TrainingSettings,
    WarpSettings,
)
from anisodiff.experiment.settings.tunings import TuningSettings

__all__ = [
    "BasisSettings",
    "ClusterSettings",
    "DatasetSettings",
    "ExperimentSettings",
    "FeatureTrainingSettings",
    "FigureSettings",
    "GeometrySettings",
    "ImageSpace",
    "JobSettings",
    "LikelihoodSettings",
    "MethodSettings",
    "NetworkSettings",
    "PathSettings",
    "PlaneSettings",
    "PretrainSettings",
    "PublishedValues",
    "RunSettings",
    "SamplingSettings",
    "SearchSettings",
    "Section",
    "ToyRowSettings",
    "ToySettings",
    "ToyTrainingSettings",
    "TrainingSettings",
    "TuningSettings",
    "WarpSettings",
]
