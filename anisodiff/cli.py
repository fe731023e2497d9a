"""The command line: one subcommand a stage. The workflow's rules call these, with settings as JSON.

Heavy modules are imported where they are used, so that each stage pays for its own alone.
"""

import errno
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption

from anisodiff.errors import InvalidArgument, StageError, Stopped
from anisodiff.metrics.registry import FeatureFile, Keep
from anisodiff.storage.files import commit, provenance, version
from anisodiff.storage.formats import FORMATS
from anisodiff.training.launch import launch

ENTRY = "datasets.<name>"
KINDS = {  # of what the help lists, by the key that takes it
    "Solvers": f"{ENTRY}.methods.<name>.solver",
    "Grids": f"{ENTRY}.methods.<name>.grid",
    "Paths without training": f"{ENTRY}.paths.<name>.kind",
    "Losses of a run": f"{ENTRY}.runs.<name>.loss",
    "Features": f"{ENTRY}.features.kind",
    "Transforms": f"{ENTRY}.images.transform",
    "Sources of images": f"{ENTRY}.images.url",
}
PAGE = "Every key of the settings is described in config/README.md and checked by workflow/schemas/config.schema.json."


def _filled(text: str | None) -> str | None:
    """Put what a key may be in the place of its `{key}`, when help is asked for and not before."""
    from anisodiff.experiment.config import choices

    return text and re.sub(r"\{([\w.<>]+)\}", lambda key: choices(key[1]), text)


class _Stage(TyperCommand):
    """A stage whose help lists kinds and says where settings are described."""

    def format_help(self, ctx, formatter) -> None:
        for each in self.params:
            if isinstance(each, (TyperArgument, TyperOption)):
                each.help = _filled(each.help)
        self.epilog = PAGE
        super().format_help(ctx, formatter)


class _Stages(TyperGroup):
    """All stages, with the kinds that their settings choose from."""

    def format_help(self, ctx, formatter) -> None:
        kinds = "\n\n".join(f"{name}: {{{key}}}" for name, key in KINDS.items())
        self.epilog = _filled(f"{kinds}\n\n{PAGE}")
        super().format_help(ctx, formatter)


DATA, TRAINING, SAMPLING, RESULTS, HELP = "Data", "Paths and training", "Sampling and shapes", "Results", "About"
app = typer.Typer(
    cls=_Stages, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
    help="The stages of anisodiff, in the order of the data's flow. `anisodiff STAGE --help` describes one.",
)  # fmt: skip


def _print_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(version())
        raise typer.Exit
    return wanted


@app.callback()
def stages(
    wanted: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Take the options that belong to no stage."""


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise typer.BadParameter(f"not JSON ({error})") from error


def _settings(kind: str) -> Callable[[str], Any]:
    """A parser of the settings of a section, which is named as `anisodiff.experiment.settings` names it."""

    def parser(text: str) -> Any:
        from anisodiff.experiment import settings
        from anisodiff.experiment.config import parse

        try:
            return parse(getattr(settings, kind), _json(text))
        except StageError as error:
            raise StageError(f"{kind}: {error}") from error

    return parser


def _several(kind: str) -> Callable[[str], Any]:
    """A parser of settings by name."""

    def parser(text: str) -> Any:
        return {name: _settings(kind)(json.dumps(each)) for name, each in _json(text).items()}

    return parser


def _option(parser: Callable[[str], Any], description: str, *names: str) -> Any:
    return typer.Option(*names, parser=parser, metavar="JSON", help=description)


def _section(kind: str, key: str) -> Any:
    return _option(_settings(kind), f"Settings of the stage: {ENTRY}.{key}.", "--settings")


Space = Annotated[Any, _option(_settings("ImageSpace"), f"What {ENTRY} says of its images.", "--dataset")]
MethodOption = Annotated[
    Any,
    _option(
        _settings("MethodSettings"),
        f"Settings of the method: {ENTRY}.methods.<name>. Solvers: {{{KINDS['Solvers']}}}. "
        f"Grids: {{{KINDS['Grids']}}}.",
        "--method",
    ),
]
Output = Annotated[Path, typer.Option(help="File to write; it appears when it is complete.")]
Computing = Annotated[Any, typer.Option("--compute", parser=_json, metavar="JSON", help="device, dtype, compile.")]
Threads = Annotated[int, typer.Option(min=1, help="CPU threads, of all processes together.")]
BasisFile = Annotated[Path | None, typer.Option("--basis", help="Principal subspaces, for subspaces basis:NAME.")]
Processes = Annotated[int, typer.Option(min=1, help="On each machine, a GPU each; more than one run under torchrun.")]
Machines = Annotated[int, typer.Option(min=1, help="Machines of the Slurm job this runs in.")]
ImagesFolder = Annotated[Path, typer.Option("--images", help="Folder of images, from the stage images.")]
SourceName = Annotated[str, typer.Option(help=f"{{{KINDS['Sources of images']}}}.")]
Resolution = Annotated[int | None, typer.Option(min=1, help="Side of the images; leave out to keep theirs.")]
TransformName = Annotated[str, typer.Option(help=f"How images are made square: {{{KINDS['Transforms']}}}.")]
Workers = Annotated[int, typer.Option(min=1, help="Processes.")]
NetworkFile = Annotated[Path, typer.Option("--network", help="Network, safetensors.")]
PathFile = Annotated[Path, typer.Option("--path", help="Noise path, safetensors.")]
GridFiles = Annotated[
    list[Path], typer.Option("--grid", help="Warp, one a budget or one for all; or a search, or a tuning.")
]
FeaturesFile = Annotated[Path, typer.Option("--features", help="Feature network.")]
FeaturesKind = Annotated[str, typer.Option(help=f"Kind of the feature network: {{{KINDS['Features']}}}.")]


def _method(space: Any, settings: Any, network: Path, path: Path, grids: list[Path]) -> Any:
    from anisodiff.methods import Method, MethodFiles

    return Method(space, settings, MethodFiles(network, path, tuple(grids)))


def _range(first: int, last: int) -> range:
    if last < first:
        raise StageError(f"last: {last} is below the first, {first}: give one that is not")
    return range(first, last + 1)


def _compute(settings: dict, threads: int):
    from anisodiff.compute import Compute

    version()  # kept from here on: of the code that runs, though somebody edits its files meanwhile
    commit()
    try:
        return Compute(**settings, threads=threads)
    except TypeError as error:
        raise StageError(f"compute: {error}: known are device, dtype and compile") from error


@app.command(rich_help_panel=DATA)
def download(
    url: Annotated[str, typer.Option(help="https or file address, a path, or package://module/file.")],
    output: Output,
    sha256: Annotated[str | None, typer.Option(help="Hex digest of the file.")] = None,
    md5: Annotated[str | None, typer.Option(help="Hex digest, where only that is published.")] = None,
    lock: Annotated[Path | None, typer.Option(help="JSON file of hashes seen before.")] = None,
    mirror: Annotated[Path | None, typer.Option(help="Folder looked into before the network.")] = None,
    offline: Annotated[bool, typer.Option(help="Do not use the network.")] = False,
) -> None:
    """Get a published file, with resume and retries, and refuse it if its hash differs."""
    from anisodiff.data.download import fetch

    fetch(url, output, sha256, md5, lock, mirror, offline)


@app.command(rich_help_panel=DATA)
def convert(
    source: Annotated[Path, typer.Argument(help="EDM's pickle.")],
    output: Annotated[Path, typer.Argument(help="Safetensors file to write.")],
) -> None:
    """Turn a pickled network of EDM's into safetensors, without running anything in it."""
    from anisodiff.storage import checkpoints

    checkpoints.convert(source, output)


@app.command(rich_help_panel=DATA)
def images(
    source: SourceName,
    output: Annotated[Path, typer.Option(help="Folder to make.")],
    resolution: Resolution = None,
    transform: TransformName = "none",
    workers: Workers = 1,
    sha256: Annotated[str | None, typer.Option(help="Hex digest of the source, if it is one file.")] = None,
    md5: Annotated[str | None, typer.Option(help="Hex digest, where only that is published.")] = None,
) -> None:
    """Read a data set (EDM zip, folder or zip of images, CIFAR archive) into a memory-mapped folder."""
    from anisodiff.data import sources
    from anisodiff.data.download import check

    check(Path(source), source, sha256, md5)
    sources.make_images(source, output, resolution, transform, workers)


@app.command(rich_help_panel=DATA)
def archive(
    source: SourceName,
    output: Output,
    resolution: Resolution = None,
    transform: TransformName = "none",
    workers: Workers = 1,
) -> None:
    """Write a data set as EDM's dataset zip: uncompressed PNGs and dataset.json."""
    from anisodiff.data import sources

    sources.make_zip(source, output, resolution, transform, workers)


@app.command(rich_help_panel=TRAINING)
def pretrain(
    dataset: Space,
    settings: Annotated[Any, _section("PretrainSettings", "pretrain")],
    images: ImagesFolder,
    output: Output,
    compute: Computing = "{}",
    threads: Threads = 1,
    processes: Processes = 1,
    machines: Machines = 1,
) -> None:
    """Train a base network from nothing with EDM's loss."""
    launch(processes, machines, threads)
    from anisodiff.stages import finetuning

    finetuning.pretrain(dataset, settings, images, output, _compute(compute, max(1, threads // processes)))


@app.command("train-features", rich_help_panel=TRAINING)
def train_features(
    settings: Annotated[Any, _section("FeatureTrainingSettings", "features")],
    images: ImagesFolder,
    output: Output,
    threads: Threads = 1,
) -> None:
    """Train the digits classifier whose features the demo's distance uses."""
    from anisodiff.metrics.feature_networks import train_digits_cnn
    from anisodiff.storage import checkpoints

    _compute({}, threads).begin()
    network, accuracy = train_digits_cnn(images, **settings.model_dump())
    metadata = provenance(settings) | {"config": network.config, "heldout_accuracy": accuracy}
    checkpoints.save(output, network.state_dict(), metadata)


@app.command(rich_help_panel=TRAINING)
def basis(
    dataset: Space,
    settings: Annotated[Any, _section("BasisSettings", "bases.<name>")],
    images: ImagesFolder,
    output: Output,
    threads: Threads = 1,
) -> None:
    """Principal subspaces of the training images: global, per class, or clustered."""
    from anisodiff.stages import initial_paths
    from anisodiff.storage import checkpoints

    _compute({}, threads).begin()
    made = initial_paths.principal_basis(dataset, settings, images)
    checkpoints.save_basis(output, made, **provenance({"dataset": dataset, "basis": settings}))


@app.command("path", rich_help_panel=TRAINING)
def make_path(
    dataset: Space,
    settings: Annotated[Any, _section("PathSettings", "paths.<name>")],
    images: ImagesFolder,
    output: Output,
    basis: BasisFile = None,
) -> None:
    """Make a path that needs no training: EDM's, the closed form for the data's spectrum, or the flexible process's."""
    from anisodiff.stages import initial_paths
    from anisodiff.storage import checkpoints

    path = initial_paths.initial_path(dataset, settings, images, basis)
    checkpoints.save_path(output, path, **provenance({"dataset": dataset, "path": settings}))


@app.command(rich_help_panel=TRAINING)
def finetune(
    dataset: Space,
    settings: Annotated[Any, _section("RunSettings", "runs.<name>")],
    images: ImagesFolder,
    network: NetworkFile,
    path: PathFile,
    output_network: Annotated[Path, typer.Option(help="Averaged weights to write.")],
    output_path: Annotated[Path, typer.Option(help="Path to write: as last trained, or averaged (path_ema_kimg).")],
    basis: BasisFile = None,
    compute: Computing = "{}",
    threads: Threads = 1,
    processes: Processes = 1,
    machines: Machines = 1,
) -> None:
    """Finetune a network with EDM's loss, or network and path with trajectory-level score matching."""
    launch(processes, machines, threads)
    from anisodiff.stages import finetuning

    inputs = finetuning.TrainingInputs(images, network, path, basis)
    computing = _compute(compute, max(1, threads // processes))
    finetuning.finetune(dataset, settings, inputs, output_network, output_path, computing)


@app.command(rich_help_panel=TRAINING)
def warp(
    dataset: Space,
    settings: Annotated[Any, _section("WarpSettings", "warps.<name>")],
    images: ImagesFolder,
    network: NetworkFile,
    path: PathFile,
    output: Output,
    compute: Computing = "{}",
    threads: Threads = 1,
) -> None:
    """Learn the time warp of a path."""
    from anisodiff.stages import finetuning

    inputs = finetuning.TrainingInputs(images, network, path)
    finetuning.learn_warp(dataset, settings, inputs, output, _compute(compute, threads))


@app.command(rich_help_panel=TRAINING)
def search(
    dataset: Space,
    settings: Annotated[Any, _section("SearchSettings", "searches.<name>")],
    network: NetworkFile,
    path: PathFile,
    output: Output,
    compute: Computing = "{}",
    threads: Threads = 1,
) -> None:
    """Search levels for every budget along a teacher's trajectories (GITS)."""
    from anisodiff.stages import searching

    searching.search_levels(dataset, settings, network, path, output, _compute(compute, threads))


@app.command(rich_help_panel=TRAINING)
def pairs(
    dataset: Space,
    method: MethodOption,
    nfe: Annotated[int, typer.Option(min=1, help="The teacher's budget, in evaluations.")],
    first: Annotated[int, typer.Option(min=0, help="First seed.")],
    last: Annotated[int, typer.Option(min=0, help="Last seed, inclusive.")],
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")],
    network: NetworkFile,
    path: PathFile,
    output: Output,
    grid: GridFiles = [],  # noqa: B006
    compute: Computing = "{}",
    threads: Threads = 1,
) -> None:
    """Draw a teacher's images, from which solvers are tuned."""
    from anisodiff.stages import tuning

    chosen = _method(dataset, method, network, path, grid)
    tuning.make_pairs(chosen, nfe, _range(first, last), batch, output, _compute(compute, threads))


@app.command(rich_help_panel=TRAINING)
def tune(
    dataset: Space,
    settings: Annotated[Any, _section("TuningSettings", "tunings.<name>")],
    method: MethodOption,
    network: NetworkFile,
    path: PathFile,
    pairs: Annotated[Path, typer.Option(help="Made by the stage pairs.")],
    output: Output,
    grid: GridFiles = [],  # noqa: B006
    features: Annotated[Path | None, typer.Option(help="Feature network of the loss; none compares pixels.")] = None,
    compute: Computing = "{}",
    threads: Threads = 1,
) -> None:
    """Tune levels, labels and weights of a solver for each budget, under a frozen network."""
    from anisodiff.stages import tuning

    chosen = _method(dataset, method, network, path, grid)
    given = settings.features
    if (given is None) != (features is None):
        raise StageError("features: give the file that the settings name, and none where they compare pixels")
    compared = None if given is None or features is None else FeatureFile(given.kind, features)
    tuning.tune(settings, chosen, pairs, compared, output, _compute(compute, threads))


@app.command(rich_help_panel=SAMPLING)
def throughput(
    dataset: Space,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time when sampling.")],
    runs: Annotated[dict, _option(_several("RunSettings"), "Settings of the runs.", "--runs")],
    warps: Annotated[dict, _option(_several("WarpSettings"), "Settings of the warps.", "--warps")],
    images: ImagesFolder,
    network: NetworkFile,
    features: FeaturesFile,
    features_kind: FeaturesKind,
    output: Output,
    compute: Computing = "{}",
    threads: Threads = 1,
) -> None:
    """Time sampling and training on this machine, for the plan."""
    from anisodiff.stages.throughput import measure_throughput

    extractor = FeatureFile(features_kind, features)
    measure_throughput(dataset, batch, runs, warps, images, network, extractor, output, _compute(compute, threads))


@app.command(rich_help_panel=SAMPLING)
def reference(
    images: ImagesFolder,
    features: FeaturesFile,
    features_kind: FeaturesKind,
    output: Output,
    published: Annotated[Path | None, typer.Option(help="npz of mu and sigma, in place of the images'.")] = None,
    keep: Annotated[
        int, typer.Option(min=0, help="Images whose features are kept, for KID, precision and recall.")
    ] = 0,
    compute: Computing = "{}",
    threads: Threads = 1,
) -> None:
    """Feature statistics of the data."""
    from anisodiff.stages import sampling

    network = FeatureFile(features_kind, features)
    sampling.reference(images, network, published, keep, output, _compute(compute, threads))


@app.command(rich_help_panel=SAMPLING)
def sample(
    dataset: Space,
    method: MethodOption,
    nfe: Annotated[list[int], typer.Option(help="Budget; repeat for several.")],
    first: Annotated[int, typer.Option(min=0, help="First seed.")],
    last: Annotated[int, typer.Option(min=0, help="Last seed.")],
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")],
    network: NetworkFile,
    path: PathFile,
    features: FeaturesFile,
    features_kind: FeaturesKind,
    output: Output,
    grid: GridFiles = [],  # noqa: B006 - typer's way to an empty list
    keep: Annotated[Keep, typer.Option(help="What stays of the images.")] = "statistics",
    compute: Computing = "{}",
    threads: Threads = 1,
) -> None:
    """Sample a seed range and write its feature statistics, a cell a budget; cells already made are kept."""
    from anisodiff.stages import sampling

    drawing = sampling.Drawing(nfe, first, last, batch, keep)
    chosen = _method(dataset, method, network, path, grid)
    sampling.sample(chosen, drawing, FeatureFile(features_kind, features), output, _compute(compute, threads))


@app.command(rich_help_panel=SAMPLING)
def trajectory(
    dataset: Space,
    method: MethodOption,
    nfe: Annotated[int, typer.Option(min=1, help="Budget.")],
    images: Annotated[int, typer.Option(min=1, help="Seeds 0 to this, exclusive.")],
    network: NetworkFile,
    path: PathFile,
    output: Output,
    grid: GridFiles = [],  # noqa: B006
    compute: Computing = "{}",
    threads: Threads = 1,
) -> None:
    """Record states and denoised estimates of a few images along a method's grid."""
    from anisodiff.stages import sampling

    chosen = _method(dataset, method, network, path, grid)
    sampling.trajectory(chosen, nfe, range(images), output, _compute(compute, threads))


@app.command(rich_help_panel=SAMPLING)
def geometry(
    dataset: Space,
    settings: Annotated[Any, _section("GeometrySettings", "geometry.<name>")],
    images: ImagesFolder,
    network: NetworkFile,
    path: PathFile,
    output: Output,
    compute: Computing = "{}",
    threads: Threads = 1,
) -> None:
    """Measure the shape of a network's trajectories over a path, and of closed-form denoisers' beside them."""
    from anisodiff.stages import measuring

    measuring.measure_geometry(dataset, settings, images, network, path, output, _compute(compute, threads))


@app.command(rich_help_panel=SAMPLING)
def likelihood(
    dataset: Space,
    settings: Annotated[Any, _section("LikelihoodSettings", "likelihoods.<name>")],
    first: Annotated[int, typer.Option(min=0, help="Place of the first image among the held-out ones.")],
    last: Annotated[int, typer.Option(min=0, help="Place of the last one.")],
    images: ImagesFolder,
    network: NetworkFile,
    path: PathFile,
    output: Output,
    compute: Computing = "{}",
    threads: Threads = 1,
) -> None:
    """Measure the likelihood of held-out images, by the probability flow and by the bound."""
    from anisodiff.stages.likelihoods import measure_likelihood

    rows, computing = _range(first, last), _compute(compute, threads)
    measure_likelihood(dataset, settings, rows, images, network, path, output, computing)


@app.command(rich_help_panel=SAMPLING)
def convergence(
    dataset: Space,
    method: MethodOption,
    nfe: Annotated[int, typer.Option(min=1, help="Budget.")],
    images: Annotated[int, typer.Option(min=1, help="Seeds 0 to this, exclusive.")],
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")],
    network: NetworkFile,
    path: PathFile,
    features: FeaturesFile,
    features_kind: FeaturesKind,
    reference: Annotated[Path, typer.Option(help="Feature statistics of the data.")],
    output: Output,
    grid: GridFiles = [],  # noqa: B006
    compute: Computing = "{}",
    threads: Threads = 1,
) -> None:
    """Frechet distance of a method's states, and of their denoised estimates, at every node of its grid."""
    from anisodiff.stages.convergence import node_distances

    chosen, extractor = _method(dataset, method, network, path, grid), FeatureFile(features_kind, features)
    node_distances(chosen, nfe, images, batch, extractor, reference, output, _compute(compute, threads))


@app.command(rich_help_panel=SAMPLING)
def toy(
    settings: Annotated[Any, _option(_settings("ToyTrainingSettings"), "How rows are trained: toy.", "--settings")],
    plane: Annotated[Any, _option(_settings("PlaneSettings"), "The data: toy.planes.<name>.", "--plane")],
    row: Annotated[Any, _option(_settings("ToyRowSettings"), "What is learned: toy.rows.<name>.", "--row")],
    seeds: Annotated[int, typer.Option(min=1, help="Trainings, by seeds that count up from the settings'.")],
    output: Annotated[Path, typer.Option(help="Folder of a file for each seed.")],
    compute: Computing = "{}",
    threads: Threads = 1,
) -> None:
    """Learn the flexible forward process on a plane in three dimensions, and measure its flow."""
    from anisodiff.stages.toys import learn_plane

    for seed in range(settings.seed, settings.seed + seeds):
        file = output / f"seed-{seed}.safetensors"
        learn_plane(settings.changed(seed=seed), plane, row, file, _compute(compute, threads))


@app.command(rich_help_panel=RESULTS)
def distance(
    dataset: Annotated[str, typer.Option(help="Name of the dataset.")],
    reference: Annotated[Path, typer.Option(help="Feature statistics of the data.")],
    images: Annotated[int, typer.Option(min=1, help="Images of a seed range.")],
    features_kind: FeaturesKind,
    output: Output,
    left_out: Annotated[Path, typer.Option(help="CSV of the distances without each group of images.")],
    manifests: Annotated[list[Path], typer.Argument(help="Manifests of the sampling jobs.")],
) -> None:
    """Frechet distance of every cell and seed range."""
    from anisodiff.report.distances import distances

    distances(dataset, reference, manifests, images, features_kind, output, left_out)


@app.command(rich_help_panel=RESULTS)
def evaluate(
    source: Annotated[str, typer.Argument(help="Zip or folder of images.")],
    reference: Annotated[Path, typer.Option(help="From the stage reference, or a published npz.")],
    features: FeaturesFile,
    features_kind: FeaturesKind,
    resolution: Resolution = None,
    transform: TransformName = "none",
    compute: Computing = "{}",
    threads: Threads = 1,
) -> None:
    """Print the Frechet distance of images from outside, as JSON."""
    from anisodiff.stages import sampling

    network = FeatureFile(features_kind, features)
    found = sampling.evaluate(source, reference, network, resolution, transform, _compute(compute, threads))
    typer.echo(json.dumps(found, indent=1))


@app.command(rich_help_panel=RESULTS)
def table(
    distances: Annotated[Path, typer.Option(help="CSV of the distance stage.")],
    left_out: Annotated[Path, typer.Option(help="Its CSV of distances without each group of images.")],
    methods: Annotated[dict, _option(_several("MethodSettings"), "Settings of the methods.", "--methods")],
    output: Annotated[Path, typer.Option(help="Folder for table.csv, table.md and table.tex.")],
    ladder: Annotated[list[str], typer.Option(help="Method that adds to the one given before.")] = [],  # noqa: B006
    searches: Annotated[Any, typer.Option(parser=_json, metavar="JSON", help="Files of searches, by name.")] = "{}",
    likelihoods: Annotated[Any, _option(_json, "Files of likelihoods, by name.", "--likelihoods")] = "{}",
    tunings: Annotated[Any, _option(_json, "Files of tunings, by name.", "--tunings")] = "{}",
    published: Annotated[Any, _option(_settings("PublishedValues"), "Values of others.", "--published")] = None,
) -> None:
    """The table: a tidy CSV, and method by NFE for people."""
    from anisodiff.report import tables

    found = {name: Path(file) for name, file in searches.items()}
    measured = {name: [Path(file) for file in files] for name, files in likelihoods.items()}
    tuned = {name: Path(file) for name, file in tunings.items()}
    beside = tables.Beside(found, measured, tuned, published)
    tables.table(distances, left_out, methods, output, ladder, beside)


@app.command(rich_help_panel=RESULTS)
def compare(
    folder: Annotated[Path, typer.Argument(help="A dataset's results, such as results/digits.")],
    baseline: Annotated[str, typer.Argument(help="Row that the others are compared with.")],
    rows: Annotated[list[str], typer.Argument(help="Other rows of the table.")],
) -> None:
    """Print each row's distance less the baseline's on shared noises, ± half of its 95 % interval: lower is better."""
    from anisodiff.report import comparisons

    typer.echo(comparisons.compare(folder, baseline, rows))


@app.command("geometry-table", rich_help_panel=RESULTS)
def geometry_table(
    files: Annotated[dict, typer.Option(parser=_json, metavar="JSON", help="Files of the geometry stage, by name.")],
    output: Annotated[Path, typer.Option(help="Folder for geometry.csv and geometry.md.")],
) -> None:
    """The shape of trajectories: a row for each denoiser over each path."""
    from anisodiff.report import geometry_table as page

    page.write({name: Path(file) for name, file in files.items()}, output)


@app.command("toy-report", rich_help_panel=RESULTS)
def toy_report(
    files: Annotated[dict, _option(_json, "Files of the stage toy, by plane and row.", "--files")],
    output: Annotated[Path, typer.Option(help="Folder for table.csv, table.md and the figures, in plots/.")],
) -> None:
    """Table and figures of the toy: rows by plane, over seeds."""
    from anisodiff.report import toy_figures, toy_table

    toy_table.write(files, output)
    toy_figures.make(files, output / "plots")


@app.command(rich_help_panel=RESULTS)
def plot(
    table: Annotated[Path, typer.Option(help="table.csv.")],
    settings: Annotated[Any, _section("FigureSettings", "plots")],
    output: Annotated[Path, typer.Option(help="Folder for SVG and PNG figures.")],
) -> None:
    """Every figure of a dataset."""
    from anisodiff.report import plots

    plots.make(table, settings, output)


@app.command(rich_help_panel=RESULTS)
def report(
    results: Annotated[list[Path], typer.Argument(help="Folders of finished runs, in the order of the page.")],
    output: Annotated[Path, typer.Option(help="HTML file to write.")],
) -> None:
    """Put tables and figures on one page that opens offline."""
    from anisodiff.report import html_page

    html_page.write(results, output)


@app.command(rich_help_panel=RESULTS)
def export(
    method: Annotated[str, typer.Argument(help=f"Name of the method: {ENTRY}.methods.<name>.")],
    nfe: Annotated[int, typer.Option(min=1, help="Budget.")],
    kind: Annotated[str, typer.Option("--format", help=f"One of {', '.join(FORMATS)}.")],
    configfile: Annotated[list[Path], typer.Option(help="Configuration; repeat for several, the last holds.")] = [  # noqa: B006
        Path("config/config.yaml")
    ],
    dataset: Annotated[str | None, typer.Option(help="Name of the dataset, where there are several.")] = None,
    output: Annotated[Path | None, typer.Option(help="File to write; left out, it is printed.")] = None,
) -> None:
    """Write a method's levels, and what else it takes to sample with it, for other software to read."""
    from anisodiff.stages import exporting

    exporting.export(configfile, dataset, method, nfe, kind, output)


@app.command(rich_help_panel=RESULTS)
def publish(
    results: Annotated[Path, typer.Option(help="Folder of the run.")],
    settings: Annotated[Any, _option(_json, f"Settings of what was run: {ENTRY}, or toy.", "--settings")],
    output: Annotated[Path, typer.Option(help="Folder to fill.")],
    files: Annotated[list[Path], typer.Argument(help="What is copied: files of the run, and folders of some.")],
) -> None:
    """Copy tables and figures to where they can be committed, with what made them."""
    from anisodiff.stages import publishing

    publishing.publish(results, files, settings, output)


@app.command(rich_help_panel=HELP)
def inspect(file: Annotated[Path, typer.Argument(help="A safetensors file of anisodiff.")]) -> None:
    """Print the config and provenance of a network, path, warp or cell, and its sha256, as JSON."""
    from anisodiff.storage import checkpoints
    from anisodiff.storage.files import digest

    typer.echo(json.dumps(checkpoints.header(file) | {"sha256": digest(file)}, indent=1, sort_keys=True))


@app.command(rich_help_panel=HELP)
def verify(results: Annotated[Path, typer.Argument(help="Folder of results; everything below it is read.")]) -> None:
    """Check a tree of results: name what is damaged, missing, orphaned, left over, of another version; and the mend."""
    from anisodiff.stages import verifying

    if not verifying.verify(results):
        raise typer.Exit(1)


@app.command("describe-config", rich_help_panel=HELP)
def describe_config(
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema in its place, for editors.")] = False,
) -> None:
    """Print the page of every configuration key."""
    from anisodiff.experiment.config import describe, json_schema

    typer.echo(json_schema() if schema else describe(), nl=False)


@app.command("version", rich_help_panel=HELP)
def show_version() -> None:
    """Print the version, with the digest of the source."""
    typer.echo(version())


for _stage in app.registered_commands:
    _stage.cls = _Stage


def main() -> None:
    """Run a stage; a failure that the user can mend is one line and a non-zero exit."""
    try:
        app(standalone_mode=True)
    except (StageError, InvalidArgument) as error:
        # the ranks of a machine fail alike: one says why
        sys.exit(f"anisodiff: {error}" if os.environ.get("LOCAL_RANK", "0") == "0" else 1)
    except OSError as error:
        mends: dict[int | None, str] = {
            errno.ENOSPC: "free some space",
            errno.EDQUOT: "free some space",
            errno.EACCES: "give yourself write permission",
            errno.EROFS: "write elsewhere",
        }
        mend = mends.get(error.errno)
        if mend is None:
            raise
        sys.exit(f"anisodiff: {error.filename or 'output'}: {error.strerror}: {mend} and run the stage again")
    except Stopped as error:
        print(f"anisodiff: {error}", file=sys.stderr)
        sys.exit(143)
