"""Tidy tables of feature statistics: one distance a seed range, one row a cell, one page a reader."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from anisodiff.errors import StageError, one_line
from anisodiff.experiment.files import cells_of
from anisodiff.experiment.settings import MethodSettings, PublishedValues
from anisodiff.metrics import frechet
from anisodiff.metrics.cells import load_reference, read_cell
from anisodiff.metrics.registry import FEATURES
from anisodiff.objectives.likelihood import bits_per_dimension
from anisodiff.storage import checkpoints
from anisodiff.storage.files import Metadata, write_text

TEXTS = (
    "dataset", "network", "method", "features", "device", "host", "version", "commit", "kind", "name", "denoiser",
    "source", "plane", "row",
)  # fmt: skip
COLUMNS = [
    "dataset", "method", "nfe", "evaluations", "images", "ranges", "mean", "std", "min", "features",
    "version", "commit",
]  # fmt: skip


def distances(
    dataset: str, reference: Path, manifests: Sequence[Path], images: int, features: str, output: Path
) -> None:
    """One row a method, budget and seed range: the distance of its summed shards to the reference.

    Args:
        dataset: its name.
        reference: feature statistics of the data.
        manifests: of the sampling jobs, one a method and shard, in folders named by method.
        images: images of a seed range; shards are summed in the order of their seeds.
        features: kind of the feature network.
        output: CSV file.
    """
    truth = load_reference(reference, features)
    shards: dict[tuple, list] = {}
    for manifest in manifests:
        for cell in cells_of(manifest):
            metadata = checkpoints.header(cell)
            try:
                nfe, first = int(metadata["settings"]["nfe"]), int(metadata["settings"]["seeds"][0])
            except (LookupError, TypeError, ValueError) as error:
                raise StageError(f"{cell}: holds no cell of a budget and seeds: {checkpoints.MEND}") from error
            shards.setdefault((manifest.parent.name, nfe, first // images), []).append((first, cell))
    rows = []
    for (method, nfe, seed_range), parts in sorted(shards.items(), key=lambda item: (str(item[0][0]), item[0][1:])):
        total, headers = frechet.FeatureStatistics(0), []
        for _, cell in sorted(parts):  # one at a time in memory
            statistics, metadata = read_cell(cell)
            total = total + statistics
            headers.append(metadata)
        if total.count != images:
            raise StageError(
                f"{method}, nfe {nfe}, range {seed_range}: {total.count} of {images} images: sample the rest"
            )
        last = headers[0].get("last_step", (float("nan"), float("nan")))  # cells of early versions do not say it
        rows.append(
            {
                "dataset": dataset,
                "method": method,
                "nfe": nfe,
                "range": seed_range,
                "images": total.count,
                "evaluations": max(metadata["evaluations"] for metadata in headers),
                "last_from": last[0],
                "last_to": last[1],
                "distance": frechet.distance(total.gaussian, truth),
                "features": features,
                "kimg": headers[0]["kimg"],
                "stopped_early": any(metadata["stopped_early"] for metadata in headers),
                "seconds": sum(metadata["seconds"] for metadata in headers),
                "training_seconds": headers[0]["device_seconds"],
                "device": ", ".join(sorted({metadata["environment"]["device"] for metadata in headers})),
                "host": " ".join(sorted({metadata["environment"]["host"] for metadata in headers})),
                "version": " ".join(sorted({each for metadata in headers for each in metadata["versions"]})),
                "commit": " ".join(sorted({each for metadata in headers for each in metadata["commits"]})),
            }
        )
    write_text(output, pd.DataFrame(rows).to_csv(index=False))


def read(file: Path | str) -> pd.DataFrame:
    """Read a CSV of this project's. What is text stays text: hosts, commits and names may read as numbers, or as "nan".

    Raises:
        StageError: it is missing, or no CSV.
    """
    try:
        columns = pd.read_csv(file, nrows=0).columns
        empty = {name: [""] for name in columns if name not in TEXTS}
        return pd.read_csv(file, dtype=dict.fromkeys(TEXTS, str), keep_default_na=False, na_values=empty)
    except (OSError, ValueError) as error:
        raise StageError(f"{file}: no table ({one_line(error)}): mend it, or delete it and run again") from error


def cells(distance_rows: pd.DataFrame, order: Sequence[str]) -> pd.DataFrame:
    """One row a cell: mean, standard deviation (N - 1; empty for one range) and minimum over its seed ranges."""
    groups = distance_rows.groupby(["dataset", "method", "nfe"], sort=False)
    table = groups.agg(
        evaluations=("evaluations", "max"),
        images=("images", "min"),
        ranges=("range", "nunique"),
        mean=("distance", "mean"),
        std=("distance", "std"),
        min=("distance", "min"),
        features=("features", "first"),
        version=("version", _union),
        commit=("commit", _union),
    ).reset_index()
    return _in_order(table, order)[COLUMNS]


def _in_order(table: pd.DataFrame, order: Sequence[str]) -> pd.DataFrame:
    """Rows by method as the configuration has them, then by budget."""
    rank = {name: index for index, name in enumerate(order)}
    return table.sort_values(
        ["method", "nfe"], key=lambda column: column.map(rank) if column.name == "method" else column
    )


def _union(values: pd.Series, separator: str = " ") -> str:
    return separator.join(sorted({each for value in values for each in value.split(separator)}))


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its head."""
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])


@dataclass(frozen=True)
class Beside:
    """What belongs to a table besides distances.

    Attributes:
        searches: files of the stage `search`, by name, whose time belongs to the cost.
        likelihoods: files of the stage `likelihood`, by name: columns where there are any, and a table of their own.
        tunings: files of the stage `tune`, by name: a table of their own, and a mark on rows that learned the metric.
        published: values of others, whose bits per dimension stand beside the likelihoods.
    """

    searches: Mapping[str, Path] = field(default_factory=dict)
    likelihoods: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    tunings: Mapping[str, Path] = field(default_factory=dict)
    published: PublishedValues | None = None


def table(
    distance_file: Path,
    methods: Mapping[str, MethodSettings],
    output: Path,
    ladder: Sequence[str] = (),
    beside: Beside | None = None,
) -> None:
    """Write `table.csv`, `table.md`, `table.tex`, `cost.csv` and `cost.md` into the folder `output`.

    Args:
        distance_file: from `distances`.
        methods: settings of the methods, in the order of the rows.
        output: folder.
        ladder: methods, each one ingredient more than the one before: what each buys is a page part of its own.
        beside: what belongs to the table besides distances.
    """
    beside, rows = beside or Beside(), read(distance_file)
    measured = likelihood_rows(beside.likelihoods)
    tidy = with_likelihoods(cells(rows, list(methods)), measured, methods)
    if len(measured):
        write_text(output / "likelihood.csv", measured.to_csv(index=False, float_format="%.6g"))
    write_text(output / "table.csv", tidy.to_csv(index=False, float_format="%.6g"))
    spent = costs(rows, list(methods))
    write_text(output / "cost.csv", spent.to_csv(index=False, float_format="%.6g"))
    write_text(output / "cost.md", cost_page(spent) + search_page(beside.searches) + tuning_page(beside.tunings))
    page = Page(tidy, rows, methods, on_metric(beside.tunings, tidy["features"].iloc[0]))
    published = beside.published
    others = published and published_values(rows["dataset"].iloc[0], published.file, published.methods)
    likelihood = likelihood_page(measured, others) if len(measured) else ""
    parts = [page.markdown(), page.ladder(ladder) if ladder else "", likelihood]
    write_text(output / "table.md", "".join(parts))
    write_text(output / "table.tex", page.latex())


PUBLISHED = ["dataset", "network", "method", "nfe", "fid", "bits_per_dim", "bits_per_dim_bound", "images", "source"]


def published_values(dataset: str, file: str, methods: Sequence[str]) -> pd.DataFrame:
    """Values that others published for a dataset.

    Args:
        dataset: its name.
        file: CSV of the columns `PUBLISHED`; what is not stated is empty.
        methods: by name.

    Raises:
        StageError: nothing is known of a method.
    """
    rows = read(file) if methods else pd.DataFrame(columns=PUBLISHED)
    rows = rows[rows["dataset"] == dataset]
    if unknown := sorted(set(methods) - set(rows["method"])):
        known = ", ".join(sorted(set(rows["method"]))) or "nothing"
        raise StageError(f"plots.published: {unknown[0]!r} has no values for {dataset} in {file}; it has {known}")
    return rows[rows["method"].isin(methods)].sort_values("nfe")


ESTIMATORS = {"ode": "bits_per_dim", "bound": "bits_per_dim_bound"}  # in the header of a table


def likelihood_rows(files: Mapping[str, Sequence[Path]]) -> pd.DataFrame:
    """One row a likelihood and estimator: bits per dimension, mean and standard error over images.

    Args:
        files: of the stage `likelihood`, by name, a file a shard.

    Raises:
        StageError: a file holds no likelihood.
    """
    rows = []
    for name, shards in files.items():
        read_shards = [checkpoints.read(file) for file in shards]
        for file, (_, metadata) in zip(shards, read_shards, strict=True):
            if not metadata.get("likelihood"):
                raise StageError(f"{file}: holds no likelihood: delete it and run again")
        settings = read_shards[0][1]["settings"]["likelihood"]
        for estimator in settings["estimators"]:
            nats = torch.cat([tensors[estimator] for tensors, _ in read_shards])
            grey_levels = settings["grey_levels"] if estimator == "ode" else None
            bits = bits_per_dimension(nats, read_shards[0][1]["dimensions"], grey_levels)
            rows.append(
                {
                    "likelihood": name,
                    "network": settings["network"],
                    "path": settings["path"],
                    "estimator": estimator,
                    "bits_per_dim": float(bits.mean()),
                    "error": float(bits.std() / len(bits) ** 0.5),
                    "images": len(bits),
                    "grey_levels": settings["grey_levels"],
                    "version": " ".join(sorted({each for _, about in read_shards for each in about["versions"]})),
                    "commit": " ".join(sorted({each for _, about in read_shards for each in about["commits"]})),
                }
            )
    return pd.DataFrame(rows)


def with_likelihoods(tidy: pd.DataFrame, measured: pd.DataFrame, methods: Mapping[str, MethodSettings]) -> pd.DataFrame:
    """Cells with the bits per dimension of their method's network over its path, and the error of these, where those
    were measured."""
    of_method = [(methods[name].network, methods[name].path) for name in tidy["method"]]
    for estimator, column in ESTIMATORS.items() if len(measured) else ():
        of = measured[measured["estimator"] == estimator].drop_duplicates(["network", "path"])
        known = of.set_index(["network", "path"])[["bits_per_dim", "error"]].reindex(of_method)
        tidy[column], tidy[f"{column}_error"] = known["bits_per_dim"].to_numpy(), known["error"].to_numpy()
    return tidy


def bits_columns(tidy: pd.DataFrame) -> list[str]:
    """Columns of a table with bits per dimension, where any were measured."""
    return [column for column in ESTIMATORS.values() if column in tidy and tidy[column].notna().any()]


def likelihood_page(measured: pd.DataFrame, published: pd.DataFrame | None = None) -> str:
    """Bits per dimension as a part of a page for people.

    Args:
        measured: rows of `likelihood_rows`, one or more.
        published: rows of `published_values`; those without a likelihood are left out.
    """
    rows = [["network", "path", "estimator", "bits per dimension", "images"]]
    for row in measured.to_dict("records"):
        value = f"{row['bits_per_dim']:.3f} ± {row['error']:.3f}"
        rows.append([row["network"], row["path"], row["estimator"], value, str(row["images"])])
    others = published_values("", "", []) if published is None else published
    others = others.dropna(subset=list(ESTIMATORS.values()), how="all").to_dict("records")
    for row in others:
        stated = not pd.isna(row["bits_per_dim"])
        value = f"{row['bits_per_dim']:.2f}" if stated else f"< {row['bits_per_dim_bound']:.2f}"
        rows.append([f"{row['method']}, published", "", "" if stated else "bound", value, ""])
    notes = (
        "Likelihood of held-out images, ± standard error over them. ode: density along the probability flow, of images "
        f"dequantised from {measured['grey_levels'].iloc[0]} grey levels; bound: lower bound of the probability of "
        "grey levels, so an upper one here. Lower is better; the images are the same in every row, so differences "
        "between rows are better known than the rows."
    )
    if others:
        sources = "; ".join(dict.fromkeys(row["source"] for row in others))
        notes += f"\n\nPublished values are of other networks and images, as printed in {sources}."
    return f"\n{markdown(rows)}\n\n{notes}\n"


def costs(rows: pd.DataFrame, order: Sequence[str]) -> pd.DataFrame:
    """One row a cell: its mean distance, beside what sampling and training took on which device.

    Args:
        rows: from `distances`.
        order: of the methods.
    """
    groups = rows.groupby(["method", "nfe"], sort=False)
    found = groups.agg(
        mean=("distance", "mean"), evaluations=("evaluations", "max"), images=("images", "sum"),
        seconds=("seconds", "sum"), training_seconds=("training_seconds", "max"),
        device=("device", partial(_union, separator=", ")), host=("host", _union),
    ).reset_index()  # fmt: skip
    found["images_per_second"] = found["images"] / found["seconds"]
    found["seconds_per_1000"] = 1000 / found["images_per_second"]
    return _in_order(found, order)


def cost_page(spent: pd.DataFrame) -> str:
    """`costs` as a page for people."""
    head = ["method", "NFE", "distance", "s per 1,000 images", "images/s", "training, device hours", "device"]
    lines = [
        [row["method"], str(row["nfe"]), f"{row['mean']:.2f}", f"{row['seconds_per_1000']:.1f}",
         f"{row['images_per_second']:.1f}", f"{row['training_seconds'] / 3600:.3g}", row["device"]]
        for row in spent.to_dict("records")
    ]  # fmt: skip
    notes = (
        "Sampling with its features, averaged over seed ranges. Training: of network, path, warp, search and "
        "tuning since the base network, summed over devices. Times are comparable on one device, with nothing beside."
    )
    return f"{markdown([head, *lines])}\n\n{notes}\n"


def _header(file: Path, kind: str) -> Metadata:
    """The header of a file of a stage's, which says its kind."""
    metadata = checkpoints.header(file)
    if not metadata.get(kind):
        raise StageError(f"{file}: holds no {kind}: give the file of a {kind}")
    return metadata


def search_page(searches: Mapping[str, Path]) -> str:
    """Seconds of every search's parts (GITS, Table 4); nothing where nothing was searched."""
    if not searches:
        return ""
    rows = [
        ["search", "trajectories, s", "costs, s", "programming, s", "analytic step, s", "noises", "points", "device"]
    ]
    for name, file in searches.items():
        metadata = _header(file, "search")
        parts, settings = metadata["parts"], metadata["settings"]["search"]
        seconds = [f"{parts[key]:.3f}" for key in ("trajectories", "costs", "programming", "analytic step")]
        counts = [str(settings[key]) for key in ("images", "points")]
        rows.append([name, *seconds, *counts, metadata["environment"]["device"]])
    return f"\nEach search of levels, once for all budgets:\n\n{markdown(rows)}\n"


def on_metric(tunings: Mapping[str, Path], features: str) -> set[str]:
    """Names of the tunings whose loss compares images in the features of the table's own distance.

    Args:
        tunings: files of the stage `tune`, by name.
        features: kind of the table's feature network.
    """
    compared = {name: _header(file, "tuning")["settings"]["tuning"]["features"] for name, file in tunings.items()}
    return {name for name, each in compared.items() if each is not None and each["kind"] == features}


def tuning_page(tunings: Mapping[str, Path]) -> str:
    """Held-out error of every tuning's budgets before and after, and what it took; nothing where nothing was tuned."""
    if not tunings:
        return ""
    rows = [["tuning", "from", "teacher", "NFE", "error at the start", "tuned", "s", "numbers", "device"]]
    for name, file in tunings.items():
        metadata = _header(file, "tuning")
        settings = metadata["settings"]["tuning"]
        for nfe, each in metadata["outcomes"].items():
            taught = f"{settings['teacher']} at NFE {settings['teacher_nfe']}"
            measured = [f"{each['start']:.4g}", f"{each['tuned']:.4g}", f"{each['seconds']:.0f}", str(each["numbers"])]
            rows.append([name, settings["start"], taught, nfe, *measured, metadata["environment"]["device"]])
    notes = (
        "Error: mean squared distance of an image to the teacher's from the same noise, in pixels or in the features "
        "of the tuning's loss, on held-out noises. numbers: of the solver, that were learned. The teacher's images "
        "belong to training's device hours above."
    )
    return f"\nEach tuned solver, budget by budget:\n\n{markdown(rows)}\n\n{notes}\n"


class Page:
    """Method by budget, with the best of each column marked and what a reader must know below.

    Args:
        tidy: from `cells`.
        rows: from `distances`.
        methods: settings of the methods.
        on_metric: tunings that learned the distance itself: their rows are marked, and never the best.
    """

    def __init__(
        self,
        tidy: pd.DataFrame,
        rows: pd.DataFrame,
        methods: Mapping[str, MethodSettings],
        on_metric: Collection[str] = (),
    ):
        self.on_metric = [name for name, method in methods.items() if method.tuning in on_metric]
        self.tidy, self.methods = tidy, methods
        self.mean = tidy.pivot(index="method", columns="nfe", values="mean").reindex(list(methods))
        self.judged = self.mean.drop(index=self.on_metric)
        self.cell = {(row["method"], row["nfe"]): row for row in tidy.to_dict("records")}
        by_method = rows.groupby("method")
        self.kimg, self.early = by_method["kimg"].first(), by_method["stopped_early"].any()
        self.usual = tidy["version"].mode()[0]
        self.rows = rows

    def _entry(self, method: str, nfe: int, bold: str, plus_minus: str, dagger: str) -> str:
        cell = self.cell.get((method, nfe))
        if cell is None:
            return ""
        text = f"{cell['mean']:.2f}"
        if cell["ranges"] > 1:
            text += f"{plus_minus}{cell['std']:.2f}"
        if method not in self.on_metric and cell["mean"] == self.judged[nfe].min():
            text = bold.format(text)
        return text + (dagger if cell["version"] != self.usual else "")

    def _rows(self, bold: str, plus_minus: str, dagger: str, early: str, section: str) -> list[list[str]]:
        rows = []
        for method, settings in self.methods.items():
            name = method + (early if self.early[method] else "") + (section if method in self.on_metric else "")
            made_of = [settings.network, settings.path, settings.grid, settings.solver]
            entries = [self._entry(method, int(nfe), bold, plus_minus, dagger) for nfe in self.mean.columns]
            rows.append([name, *made_of, f"{self.kimg[method]:.0f}", *self._bits(method), *entries])
        return rows

    @property
    def _head(self) -> list[str]:
        bits = {"bits_per_dim": "bits/dim", "bits_per_dim_bound": "bits/dim, bound"}
        measured = [bits[column] for column in bits_columns(self.tidy)]
        budgets = [f"NFE {nfe}" for nfe in self.mean.columns]
        return ["method", "network", "path", "grid", "solver", "kimg", *measured, *budgets]

    def _bits(self, method: str) -> list[str]:
        """Bits per dimension of a method's network over its path, where any were measured."""
        first = self.tidy[self.tidy["method"] == method].iloc[0]
        columns = bits_columns(self.tidy)
        return ["" if pd.isna(first[column]) else f"{first[column]:.3f}" for column in columns]

    def _notes(self, plus_minus: str, dagger: str, early: str, section: str) -> list[str]:
        ranges = self.tidy.groupby("nfe")["ranges"].max()
        several = ", ".join(f"{count} ranges at NFE {nfe}" for nfe, count in ranges.items() if count > 1)
        notes = [
            f"{FEATURES[self.tidy['features'].iloc[0]].title}: lower is better, the best of each column is bold. "
            f"{self.tidy['images'].min()} images a seed range.",
            f"Mean{plus_minus}standard deviation (N - 1) over {several}; one seed range elsewhere."
            if several
            else "One seed range a cell: no spread is known.",
            "kimg: thousands of images the row's network has seen since the base checkpoint.",
        ]
        if steps := self._last_steps():
            notes.append(f"Last step, by the mean noise level: {'; '.join(steps)}.")
        unequal = self.tidy[self.tidy["evaluations"] != self.tidy["nfe"]]
        if len(unequal):
            spent = "; ".join(f"{row.method} {row.evaluations:g} of {row.nfe}" for row in unequal.itertuples())
            notes.append(f"Evaluations made, where not the budget: {spent}.")
        if (self.tidy["version"] != self.usual).any():
            notes.append(f"{dagger} made by, or from networks made by, another version of the code than {self.usual}.")
        if any(self.early[method] for method in self.methods):
            notes.append(f"{early} training was stopped early: its held-out loss rose; the last good state is used.")
        if self.on_metric:
            notes.append(f"{section} tuned in the features of this very distance: not comparable, and never the best.")
        return notes

    def _last_steps(self) -> list[str]:
        """What the last evaluation of a row is spent on: a step to 0 returns the denoised image."""
        steps: dict[str, dict[str, list[int]]] = {}
        every = self.rows.reindex(columns=["method", "nfe", "last_from", "last_to"])  # early versions' do not say it
        known = every.drop_duplicates(["method", "nfe"]).dropna(subset="last_to")
        for row in sorted(known.to_dict("records"), key=lambda row: list(self.methods).index(row["method"])):
            said = f"from {row['last_from']:g} to 0" if row["last_to"] == 0 else f"to {row['last_to']:g}"
            steps.setdefault(said, {}).setdefault(row["method"], []).append(row["nfe"])
        budgets = self.rows.groupby("method")["nfe"].nunique()

        def named(method: str, nfes: list[int]) -> str:
            return method if len(nfes) == budgets[method] else f"{method} at NFE {', '.join(map(str, sorted(nfes)))}"

        return [f"{', '.join(named(*each) for each in by.items())} {said}" for said, by in steps.items()]

    def markdown(self) -> str:
        table = markdown([self._head, *self._rows("**{}**", " ± ", " †", " ‡", " §")])
        return "\n".join([table, "", *(f"{note}\n" for note in self._notes(" ± ", "†", "‡", "§"))])

    def ladder(self, names: Sequence[str]) -> str:
        """Rows that add one ingredient each, cells with their change from the row above; and the best of all rows."""
        columns = [nfe for nfe in self.mean.columns if self.mean.loc[list(names), nfe].notna().any()]
        head = ["row", "adds", *(f"NFE {nfe}" for nfe in columns)]
        rows = [head]
        for above, name in zip([None, *names], names, strict=False):
            cells = []
            for nfe in columns:
                value = self.mean[nfe][name]
                before = self.mean[nfe][above] if above else float("nan")
                text = "" if pd.isna(value) else f"{value:.2f}"
                cells.append(text if pd.isna(value - before) else f"{text} ({value - before:+.2f})")
            rows.append([name, self._added(above, name), *cells])
        best = [f"{self.judged[nfe].min():.2f} {self.judged[nfe].idxmin()}" for nfe in columns]
        rows.append(["best of the table", "", *best])
        lines = ["", "What each ingredient buys (change from the row above):", ""]
        return "\n".join([*lines, markdown(rows), ""])

    def _added(self, above: str | None, name: str) -> str:
        """Settings that are not those of the row above."""
        if above is None:
            return ""
        new, old = self.methods[name], self.methods[above]
        changes = {kind: getattr(new, kind) for kind in ("network", "path", "grid", "solver")}
        return ", ".join(f"{kind} {value}" for kind, value in changes.items() if value != getattr(old, kind))

    def latex(self) -> str:
        head, body = self._head, self._rows("\\textbf{{{}}}", " $\\pm$ ", " $\\dagger$", " $\\ddagger$", " \\S")
        columns = "l" * 5 + "r" * (len(head) - 5)
        lines = [f"\\begin{{tabular}}{{{columns}}}", "\\hline", " & ".join(head) + " \\\\", "\\hline"]
        lines += [" & ".join(row) + " \\\\" for row in body]
        lines += ["\\hline", "\\end{tabular}"]
        lines += [f"% {note}" for note in self._notes(" +- ", "dagger:", "ddagger:", "section:")]
        return "\n".join(lines) + "\n"
