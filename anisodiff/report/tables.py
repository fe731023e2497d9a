"""Tables for people: method by budget, with the best of each column marked and what a reader must know below."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from anisodiff.experiment.settings import MethodSettings, PublishedValues
from anisodiff.metrics.registry import FEATURES
from anisodiff.report.cells import cells
from anisodiff.report.comparisons import Comparisons
from anisodiff.report.costs import cost_page, costs, on_metric, search_page, tuning_page
from anisodiff.report.likelihood_table import bits_columns, likelihood_page, likelihood_rows, with_likelihoods
from anisodiff.report.plain_tables import markdown, read
from anisodiff.report.published import published_values
from anisodiff.storage.files import write_text


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
    left_out_file: Path,
    methods: Mapping[str, MethodSettings],
    output: Path,
    ladder: Sequence[str] = (),
    beside: Beside | None = None,
) -> None:
    """Write `table.csv`, `table.md`, `table.tex`, `metrics.md`, `cost.csv` and `cost.md` into the folder `output`.

    Args:
        distance_file: CSV file of `distances`.
        left_out_file: its CSV file of distances without each group of images.
        methods: settings of the methods, in the order of the rows.
        output: folder.
        ladder: methods, each one ingredient more than the one before: what each buys is a page part of its own.
        beside: what belongs to the table besides distances.
    """
    beside, rows, left_out = beside or Beside(), read(distance_file), read(left_out_file)
    if "training_seed" not in rows:  # tables of before there were several
        rows["training_seed"] = 0
    measured, of_images = likelihood_rows(beside.likelihoods)
    tidy = with_likelihoods(cells(rows, left_out, list(methods)), measured, methods)
    of_metric = on_metric(beside.tunings, tidy["features"].iloc[0])
    tidy["on_metric"] = [methods[name].tuning in of_metric for name in tidy["method"]]
    for name, found in (("likelihood.csv", measured), ("likelihood-images.csv", of_images)):
        if len(found):
            write_text(output / name, found.to_csv(index=False, float_format="%.6g"))
        else:  # of an earlier configuration
            (output / name).unlink(missing_ok=True)
    write_text(output / "table.csv", tidy.to_csv(index=False, float_format="%.6g"))
    spent = costs(rows, list(methods))
    write_text(output / "cost.csv", spent.to_csv(index=False, float_format="%.6g"))
    write_text(output / "cost.md", cost_page(spent) + search_page(beside.searches) + tuning_page(beside.tunings))
    write_text(output / "metrics.md", metrics_page(tidy))
    page = Page(tidy, rows, left_out, methods)
    published = beside.published
    others = published and published_values(rows["dataset"].iloc[0], published.file, published.methods)
    likelihood = likelihood_page(measured, others) if len(measured) else ""
    parts = [page.markdown(), page.ladder(ladder) if ladder else "", likelihood]
    write_text(output / "table.md", "".join(parts))
    write_text(output / "table.tex", page.latex())


def metrics_page(tidy: pd.DataFrame) -> str:
    """What else is known of every cell, as a page for people.

    Args:
        tidy: rows of `cells`.
    """
    head = ["method", "NFE", "distance ± s.e.", "without bias", "KID ± s.e., 1e-3", "precision", "recall"]
    lines = []
    for row in tidy.to_dict("records"):
        known = lambda key, text, of=row: "" if pd.isna(of[key]) else text.format(**of)  # noqa: E731
        kid = "" if pd.isna(row["kid"]) else f"{1000 * row['kid']:.3f} ± {1000 * row['kid_error']:.3f}"
        distance = f"{row['mean']:.3f}" + known("error", " ± {error:.3f}")
        others = [known("corrected", "{corrected:.3f}"), kid]
        others += [known("precision", "{precision:.3f}"), known("recall", "{recall:.3f}")]
        lines.append([row["method"], str(row["nfe"]), distance, *others])
    feature = FEATURES[tidy["features"].iloc[0]]
    notes = [
        f"All in the features of one network. Distance: {feature.title}, ± standard error over images. It falls as the "
        "number of images grows, so it compares at equal numbers: 50,000 for a published FID. The next column takes "
        "the bias out, by the line through it and the distances without each group of the images.",
        "KID: squared maximum mean discrepancy, kernel (x y / d + 1)^3, unbiased at any number of images: mean of ten "
        "groups ± its standard error; a thousand images are enough.",
        "Precision: share of drawn images within the third neighbour's distance of a real one; recall: of real ones so "
        "close to a drawn one. Both depend on the numbers of images; 10,000 are usual.",
    ]
    return "\n\n".join([markdown([head, *lines]), *notes]) + "\n"


class Page:
    """Method by budget, with the best of each column marked and what a reader must know below.

    Args:
        tidy: rows of `cells`, and whether each was tuned in the features of its own distance (`on_metric`).
        rows: rows of `distances`.
        left_out: its distances without each group of images.
        methods: settings of the methods.
    """

    def __init__(
        self,
        tidy: pd.DataFrame,
        rows: pd.DataFrame,
        left_out: pd.DataFrame,
        methods: Mapping[str, MethodSettings],
    ):
        # tuned for this very distance: marked, and never the best
        self.on_metric = list(tidy["method"][tidy["on_metric"]].unique())
        self.tidy, self.methods = tidy, methods
        self.mean = tidy.pivot(index="method", columns="nfe", values="mean").reindex(list(methods))
        self.judged = self.mean.drop(index=self.on_metric)
        self.cell = {(row["method"], row["nfe"]): row for row in tidy.to_dict("records")}
        by_method = rows.groupby("method")
        self.kimg, self.early = by_method["kimg"].first(), by_method["stopped_early"].any()
        self.usual = tidy["version"].mode()[0]
        self.rows = rows
        self.comparisons = Comparisons(rows, left_out)
        self.best = {int(nfe): self._not_worse(int(nfe)) for nfe in self.mean.columns}

    def _not_worse(self, nfe: int) -> set[str]:
        """Rows of a column that are not above its lowest by the test."""
        known = self.judged[nfe].dropna()
        if known.empty:
            return set()
        lowest = str(known.idxmin())
        return {name for name in known.index if not self.comparisons.difference(name, lowest, nfe).is_above}

    def _entry(self, method: str, nfe: int, bold: str, plus_minus: str, dagger: str) -> str:
        cell = self.cell.get((method, nfe))
        if cell is None:
            return ""
        text = f"{cell['mean']:.2f}"
        if cell["seeds"] > 1:
            text += f"{plus_minus}{cell['seed_error']:.2f}"
        if not pd.isna(cell["error"]):
            text += f" ({cell['error']:.2f})"
        if method in self.best[nfe]:
            text = bold.format(text)
        return text + self._version_mark(method, nfe, dagger)

    def _version_mark(self, method: str, nfe: int, dagger: str) -> str:
        return dagger if self.cell[method, nfe]["version"] != self.usual else ""

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
        usual = int(ranges.min())
        drawn = "one range" if usual == 1 else f"{usual} ranges"
        drawn += "".join(f", {count} at NFE {nfe}" for nfe, count in ranges.items() if count > usual)
        seeds = self.tidy.groupby("method")["seeds"].max()
        trained = ", ".join(f"{count} of {name}" for name, count in seeds.items() if count > 1)
        known = self.tidy["error"].notna().any()
        test = (
            "bold: not worse than the lowest of its column by a one-sided t-test at 5 % on the noises that both share, "
            "each row by itself"
            if known or trained
            else "the best of each column is bold"
        )
        notes = [
            f"{FEATURES[self.tidy['features'].iloc[0]].title}: lower is better; {test}. "
            f"{self.tidy['images'].min()} images a seed range, {drawn}.",
            f"Mean{plus_minus}standard error over training seeds: {trained}; one elsewhere."
            if trained
            else "One training a row: nothing is known of its spread over trainings.",
            "In brackets: standard error over images, by leaving out groups of them."
            if known
            else "Nothing is known of the spread over images: no features were kept, nor shards to leave out.",
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
            notes.append(
                f"{early} stopped early: the held-out loss, or the error of its images, rose; the best state is used."
            )
        if (floor := self._floor) is not None:
            notes.append(floor)
        if self.on_metric:
            notes.append(f"{section} tuned in the features of this very distance: not comparable, and never the best.")
        return notes

    @property
    def _floor(self) -> str | None:
        """What images of the data come to, against the rest of it."""
        known = self.rows.reindex(columns=["floor", "floor_images", "rest"]).dropna()
        if known.empty:
            return None
        first = known.iloc[0]
        few, others = int(first["floor_images"]), int(first["rest"])
        return f"{few} images of the data are at {first['floor']:.2f} from the other {others}."

    def _last_steps(self) -> list[str]:
        """What the last evaluation of a row is spent on: a step to 0 returns the denoised image."""
        steps: dict[str, list[str]] = {}
        every = self.rows.reindex(columns=["method", "nfe", "last_from", "last_to"])  # early versions' do not say it
        known, budgets = every.dropna(subset="last_to"), every.groupby("method")["nfe"].nunique()
        for method in self.methods:
            own = known[known["method"] == method]
            for ends_at_zero, each in own.groupby(own["last_to"] == 0):
                nfes = sorted(set(each["nfe"]))
                at = "" if len(nfes) == budgets[method] else f" at NFE {', '.join(map(str, nfes))}"
                said = f"from {_between(each['last_from'])} to 0" if ends_at_zero else f"to {_between(each['last_to'])}"
                steps.setdefault(f"{at} {said}", []).append(method)
        return [f"{', '.join(methods)}{said}" for said, methods in steps.items()]

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
                if pd.isna(value):
                    cells.append("")
                    continue
                text = f"{value:.2f}"
                if above and not pd.isna(self.mean[nfe][above]):
                    text += f" ({self.comparisons.difference(name, above, int(nfe)):.2f})"
                cells.append(text + self._version_mark(name, int(nfe), " †"))
            rows.append([name + " §" * (name in self.on_metric), self._added(above, name), *cells])
        judged = (self.judged[nfe].dropna() for nfe in columns)
        best = [f"{known.min():.2f} {known.idxmin()}" if len(known) else "" for known in judged]
        rows.append(["best of the table", "", *best])
        said = "What each ingredient buys (change from the row above, ± half of its 95 % confidence interval):"
        lines = ["", said, ""]
        return "\n".join([*lines, markdown(rows), ""])

    def _added(self, above: str | None, name: str) -> str:
        """Settings that are not those of the row above."""
        if above is None:
            return ""
        new, old = self.methods[name].model_dump(exclude={"nfe"}), self.methods[above].model_dump()
        changed = {kind: value for kind, value in new.items() if value != old[kind]}
        return ", ".join(_as_text(kind, value) for kind, value in changed.items())

    def latex(self) -> str:
        head, body = self._head, self._rows("\\textbf{{{}}}", " $\\pm$ ", " $\\dagger$", " $\\ddagger$", " \\S")
        columns = "l" * 5 + "r" * (len(head) - 5)
        lines = [f"\\begin{{tabular}}{{{columns}}}", "\\hline", " & ".join(head) + " \\\\", "\\hline"]
        lines += [" & ".join(row) + " \\\\" for row in body]
        lines += ["\\hline", "\\end{tabular}"]
        lines += [f"% {note}" for note in self._notes(" +- ", "dagger:", "ddagger:", "section:")]
        return "\n".join(lines) + "\n"


def _as_text(kind: str, value: Any) -> str:
    """A setting as a configuration has it, or that it is left to its default."""
    if value is None:
        return f"no {kind}" if kind in ("warp", "search", "tuning") else f"{kind} by default"
    return kind if isinstance(value, dict) else f"{kind} {str(value).lower() if isinstance(value, bool) else value}"


def _between(levels: pd.Series) -> str:
    """The level of all budgets, or the lowest and the highest."""
    return f"{levels.min():g}" if levels.nunique() == 1 else f"{levels.min():.2g}-{levels.max():.2g}"
