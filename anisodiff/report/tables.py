"""Tables for people: method by budget, with the best of each column marked and what a reader must know below."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from anisodiff.experiment.settings import MethodSettings, PublishedValues
from anisodiff.metrics.registry import FEATURES
from anisodiff.report.cells import cells
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
