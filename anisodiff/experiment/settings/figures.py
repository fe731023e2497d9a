"""What the figures of a dataset are drawn from; the workflow fills it in."""

from anisodiff.experiment.settings.base import Section, key


class PublishedValues(Section):
    """Published values that are drawn behind a dataset's own."""

    file: str = key("Table of published values.")
    methods: list[str] = key("Its methods that are drawn.")


class FigureSettings(Section):
    """Names and files of what the figures show, in the order in which they show it."""

    dataset: str = key("Name of the dataset.")
    sigma_max: float = key("Largest level of every path.", unit="pixel values")
    methods: dict[str, list[str]] = key("Path and solver of each method.")
    ladder: list[str] = key("Methods that add one ingredient each.")
    paths: dict[str, str] = key("Files of the paths whose levels are shown, by name.")
    warps: dict[str, list[str]] = key("File of each warp, and the name of its path.")
    strips: dict[str, str] = key("Files of the trajectories that are shown as strips, by method.")
    geometry: dict[str, str] = key("Files of the shapes of trajectories, by name.")
    convergence: dict[str, str] = key("Files of distances from node to node, by method.")
    trained: dict[str, dict[str, str | None]] = key(
        "Files of the paths of methods that differ in training, by series; null for one that is not trained."
    )
    published: PublishedValues = key("Published values behind the dataset's own.")
    grid_nfe: int = key("Budget of the sample grids.", unit="evaluations")
    reference: str = key("Feature statistics of the data, with some of its images.")
    samples: dict[str, str] = key("Cells whose images are shown, by method.")
