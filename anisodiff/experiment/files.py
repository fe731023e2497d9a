"""Names of the files of an experiment: patterns for the rules, and the files of a dataset by what they hold."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from anisodiff.data.download import address_path, is_pickle
from anisodiff.errors import StageError, one_line
from anisodiff.experiment.budgets import budgets, grid_nfe, strip_methods
from anisodiff.experiment.settings import DatasetSettings
from anisodiff.experiment.settings.base import basis_of
from anisodiff.experiment.settings.figures import FigureSettings, PublishedValues
from anisodiff.experiment.training_seeds import first_of

RESULTS = "results"
FETCHED = RESULTS + "/fetched/{file}"
REPORT = RESULTS + "/report.html"
FOLDER = RESULTS + "/{dataset}"
IMAGES = FOLDER + "/images"
CONVERTED = FOLDER + "/base.safetensors"
PRETRAINED = FOLDER + "/pretrained/base.safetensors"
TRAINED_FEATURES = FOLDER + "/pretrained/features.safetensors"
BASIS = FOLDER + "/bases/{basis}.safetensors"
PATH = FOLDER + "/paths/{path}.safetensors"
NETWORK_OF_RUN = FOLDER + "/runs/{run}/network.safetensors"
PATH_OF_RUN = FOLDER + "/runs/{run}/path.safetensors"
WARP = FOLDER + "/warps/{warp}.safetensors"
WARP_OF_BUDGET = FOLDER + "/warps/{warp}/nfe{nfe}.safetensors"
SEARCH = FOLDER + "/searches/{search}.safetensors"
PAIRS = FOLDER + "/pairs/{method}-nfe{nfe}/{first}-{last}.safetensors"
TUNING = FOLDER + "/tunings/{tuning}.safetensors"
SAMPLES = FOLDER + "/samples"
MANIFEST = SAMPLES + "/{method}/{first}-{last}.json"
TRAJECTORY = FOLDER + "/trajectories/{method}-nfe{nfe}.safetensors"
GEOMETRY = FOLDER + "/geometry/{geometry}.safetensors"
LIKELIHOOD = FOLDER + "/likelihoods/{likelihood}/{first}-{last}.safetensors"
GEOMETRY_TABLE = FOLDER + "/geometry.csv"
GEOMETRY_PAGE = FOLDER + "/geometry.md"
CONVERGENCE = FOLDER + "/convergence/{method}-nfe{nfe}.csv"
REFERENCE = FOLDER + "/reference.safetensors"
DISTANCES = FOLDER + "/distances.csv"
LEFT_OUT = FOLDER + "/distances-left-out.csv"
TABLE = FOLDER + "/table.csv"
TABLE_PAGE = FOLDER + "/table.md"
TABLE_TEX = FOLDER + "/table.tex"
METRICS_PAGE = FOLDER + "/metrics.md"
LIKELIHOOD_TABLE = FOLDER + "/likelihood.csv"
LIKELIHOOD_OF_IMAGES = FOLDER + "/likelihood-images.csv"
COST = FOLDER + "/cost.csv"
COST_PAGE = FOLDER + "/cost.md"
PLOTS = FOLDER + "/plots"
THROUGHPUT = FOLDER + "/throughput.json"
TOY = "fp-toy"
TOY_ROW = RESULTS + "/fp-toy/rows/{plane}/{row}/seed-{seed}.safetensors"
TOY_TABLE = RESULTS + "/fp-toy/table.csv"
TOY_PAGE = RESULTS + "/fp-toy/table.md"
TOY_PLOTS = RESULTS + "/fp-toy/plots"
PROVENANCE = RESULTS + "/reference/{dataset}/provenance.json"


def fetched(url: str) -> str:
    """Where a published file is put: by host and path, so that data sets share it."""
    return FETCHED.format(file=address_path(url))


def cell_of(manifest: Path, nfe: int) -> Path:
    """The cell of a budget, beside the manifest of its seed range."""
    return manifest.parent / f"nfe{nfe}" / f"{manifest.stem}.safetensors"


def cells_of(manifest: Path) -> list[Path]:
    """The cells that a manifest names.

    Raises:
        StageError: it is missing or damaged.
    """
    try:
        named = json.loads(manifest.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise StageError(f"{manifest}: no manifest of cells ({one_line(error)}): delete it and run again") from error
    if not isinstance(named, list) or not all(isinstance(each, str) for each in named):
        raise StageError(f"{manifest}: no manifest of cells: delete it and run again")
    return [manifest.parent / each for each in named]


def note_of_lost_cells(manifest: Path) -> Path:
    """The note of a manifest's lost cells. Cells are no outputs that Snakemake knows, but their note is an input of
    their job: a new one makes it run again, once."""
    return manifest.with_suffix(".lost")


def ranges(dataset: DatasetSettings, nfe: int) -> int:
    """Number of seed ranges of a budget."""
    return dataset.sampling.ranges_at.get(str(nfe), dataset.sampling.ranges)


def shards(dataset: DatasetSettings, method: str) -> list[tuple[int, int]]:
    """First and last seed of a method's sampling jobs: fixed ranges, so that a new one leaves the others alone."""
    images, shard = dataset.sampling.images, dataset.sampling.shard
    return [
        (first, min(first + shard, (index + 1) * images) - 1)
        for index in range(max(ranges(dataset, nfe) for nfe in budgets(dataset, method)))
        for first in range(index * images, (index + 1) * images, shard)
    ]


def budgets_at(dataset: DatasetSettings, method: str, first: int) -> list[int]:
    """Budgets of a method whose seed ranges reach the image `first`."""
    every = budgets(dataset, method)
    return [nfe for nfe in every if first < ranges(dataset, nfe) * dataset.sampling.images]


@dataclass(frozen=True)
class DatasetFiles:
    """Files of one dataset.

    Attributes:
        name: of the dataset.
        settings: its settings.
    """

    name: str
    settings: DatasetSettings

    def of(self, pattern: str, **names: str | int) -> str:
        """The file of a pattern."""
        return pattern.format(dataset=self.name, **names)

    @property
    def base(self) -> str:
        """The base network: fetched, and converted where it is one of EDM's pickles."""
        url = self.settings.base.url
        return self.of(CONVERTED) if is_pickle(url) else fetched(url)

    def network(self, name: str) -> str:
        """A network by its name, `base` or a run's."""
        return self.base if name == "base" else self.of(NETWORK_OF_RUN, run=name)

    def path(self, name: str) -> str:
        """A path by its name, one of `paths` or a run's."""
        return self.of(PATH_OF_RUN, run=name) if name in self.settings.runs else self.of(PATH, path=name)

    def basis(self, subspaces: str | list[list[int]]) -> list[str]:
        """The basis that a path's subspaces are on, if they are on one."""
        basis = basis_of(subspaces)
        return [] if basis is None else [self.of(BASIS, basis=basis)]

    def grids(self, method: str, nfes: Sequence[int]) -> list[str]:
        """What a method's grid comes from: no file, one for all budgets, or one for each."""
        settings = self.settings.methods[method]
        if settings.search is not None:
            return [self.of(SEARCH, search=settings.search)]
        if settings.tuning is not None:
            return [self.of(TUNING, tuning=settings.tuning)]
        if settings.warp is None:
            return []
        if self.settings.warps[settings.warp].steps == "per_nfe":
            return [self.of(WARP_OF_BUDGET, warp=settings.warp, nfe=nfe) for nfe in nfes]
        return [self.of(WARP, warp=settings.warp)]

    @property
    def manifests(self) -> list[str]:
        """Manifests of all sampling jobs."""
        return [
            self.of(MANIFEST, method=method, first=first, last=last)
            for method in self.settings.methods
            for first, last in shards(self.settings, method)
        ]

    @property
    def results(self) -> list[str]:
        """What people look at: tables and figures."""
        geometry = [self.of(GEOMETRY_TABLE)] if self.settings.geometry else []
        return [self.of(TABLE), *geometry, self.of(PLOTS)]

    @property
    def published(self) -> list[str]:
        """What is copied to where it can be committed: tables and figures, and what is small of what they show."""
        settings = self.settings
        patterns = [TABLE, TABLE_PAGE, TABLE_TEX, METRICS_PAGE, COST, COST_PAGE, DISTANCES, LEFT_OUT]
        patterns += [GEOMETRY_TABLE, GEOMETRY_PAGE] if settings.geometry else []
        patterns += [LIKELIHOOD_TABLE, LIKELIHOOD_OF_IMAGES] if settings.likelihoods else []
        curves = [self.of(CONVERGENCE, method=name, nfe=count) for name, count in settings.convergence.items()]
        return [*map(self.of, patterns), *curves, *self.tunings.values(), self.of(PLOTS)]

    @property
    def pretrained(self) -> list[str]:
        """Networks made again by their recipes."""
        features = [self.of(TRAINED_FEATURES)] if self.settings.features.kind == "digits-cnn" else []
        return [self.of(PRETRAINED), *features]

    @property
    def geometry(self) -> dict[str, str]:
        """Shapes of trajectories, by name."""
        return {name: self.of(GEOMETRY, geometry=name) for name in self.settings.geometry}

    @property
    def likelihoods(self) -> dict[str, list[str]]:
        """Likelihoods by name, a file a shard."""
        found = {}
        for name, asked in self.settings.likelihoods.items():
            images = min(asked.images, self.settings.heldout)
            firsts = range(0, images, asked.shard)
            found[name] = [
                self.of(LIKELIHOOD, likelihood=name, first=first, last=min(first + asked.shard, images) - 1)
                for first in firsts
            ]
        return found

    @property
    def searches(self) -> dict[str, str]:
        """Searches that some method uses, by name."""
        return {name: self.of(SEARCH, search=name) for name in self.settings.used("search")}

    @property
    def tunings(self) -> dict[str, str]:
        """Tunings that some method uses, by name."""
        return {name: self.of(TUNING, tuning=name) for name in self.settings.used("tuning")}

    def pairs(self, tuning: str) -> str:
        """Noises and images that a tuning learns from; tunings of one teacher share them."""
        asked = self.settings.tunings[tuning]
        last = asked.first_seed + asked.pairs + asked.heldout - 1
        return self.of(PAIRS, method=asked.teacher, nfe=asked.teacher_nfe, first=asked.first_seed, last=last)

    def figures(self, published: str) -> FigureSettings:
        """Names and files of what the figures show: of trainings, the first seed.

        Args:
            published: file of published values.
        """
        settings = self.settings
        methods = {name: settings.methods[name] for name in first_of(settings.methods)}
        shown = dict.fromkeys(method.path for method in methods.values())
        paths = {name: method.path for name, method in settings.methods.items()}
        nfe = grid_nfe(settings)
        return FigureSettings(
            dataset=self.name,
            sigma_max=settings.sigma_max,
            methods={name: [method.path, method.solver] for name, method in methods.items()},
            ladder=settings.ladder,
            paths={name: self.path(name) for name in shown},
            warps={
                name: [self.of(WARP, warp=name), settings.warps[name].path]
                for name in first_of(settings.warps)
                if settings.warps[name].steps != "per_nfe"
            },
            strips={name: self.of(TRAJECTORY, method=name, nfe=nfe) for name in strip_methods(settings)},
            geometry=self.geometry,
            convergence={
                name: self.of(CONVERGENCE, method=name, nfe=count) for name, count in settings.convergence.items()
            },
            trained={
                series: {name: self.path(path) if (path := paths[name]) in settings.runs else None for name in names}
                for series, names in settings.plots.trained.items()
            },
            published=PublishedValues(file=published, methods=settings.plots.published),
            grid_nfe=nfe,
            reference=self.of(REFERENCE),
            samples={name: self._first_cell(name, nfe) for name in methods if nfe in budgets(settings, name)},
        )

    def _first_cell(self, method: str, nfe: int) -> str:
        """The cell of a method's first images."""
        first, last = shards(self.settings, method)[0]
        return str(cell_of(Path(self.of(MANIFEST, method=method, first=first, last=last)), nfe))
