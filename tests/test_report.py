"""The report: one page that holds tables and figures in place, opens offline and shows text as text."""

import base64
import re
from pathlib import Path

import pytest

from anisodiff.errors import StageError
from anisodiff.report import html_page
from anisodiff.report.captions import FIGURES, HEADLINE, LADDER

ROOT = Path(__file__).parents[1]
TABLE = """\
| method | grid | NFE 5 | NFE 7 |
| --- | --- | --- | --- |
| edm | karras | 25.39 ± 0.10 |  |
| ani<script> | uniform | **3.85** † | 1.06 |

Lower is better & the best is bold.

What each ingredient buys:

| row | NFE 5 |
| --- | --- |
| edm | 25.39 |
| ani | 3.85 (-21.54) |
"""
COST = "| method | s per 1,000 images |\n| --- | --- |\n| edm | 0.8 |\n\nTimes of one device.\n"


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder of a finished run, as far as the page looks at it."""
    folder = tmp_path / "digits"
    (folder / "plots").mkdir(parents=True)
    (folder / "table.md").write_text(TABLE)
    (folder / "cost.md").write_text(COST)
    (folder / "table.csv").write_text("method,version,commit\nedm,0.1.0+aa,abc\nani,0.1.0+aa 0.1.0+bb,abc\n")
    for name in ("dct-bases", "learned-levels", HEADLINE):
        for kind in ("svg", "png"):
            (folder / "plots" / f"{name}.{kind}").write_text(f"{kind} of {name}")
    return folder


def made(tmp_path: Path, *folders: Path) -> str:
    html_page.write(folders, tmp_path / "page.html")
    return (tmp_path / "page.html").read_text(encoding="utf-8")


def figures(page: str) -> list[str]:
    return [base64.b64decode(data).decode() for data in re.findall(r'src="data:image/[^;]+;base64,([^"]+)"', page)]


def test_the_headline_figure_comes_first_and_then_the_tables(run, tmp_path):
    page = made(tmp_path, run)
    assert figures(page) == [f"svg of {name}" for name in (HEADLINE, "learned-levels", "dct-bases")]
    places = [page.index(text) for text in ("<figure>", "25.39 ± 0.10", "ingredient", "s per 1,000", "noise levels of")]
    assert places == sorted(places)
    assert "Made by version 0.1.0+aa, 0.1.0+bb; commit abc." in page


def test_the_page_needs_nothing_from_outside(run, tmp_path):
    page = made(tmp_path, run)
    assert not re.search(r"<script|<link|<iframe|https?:|url\(", page)
    assert all(source.startswith("data:") for source in re.findall(r'src="([^"]*)"', page))


def test_a_tables_cells_are_text_with_the_best_in_bold():
    page = html_page.html(TABLE)
    assert "<td>ani&lt;script&gt;</td><td>uniform</td>" in page
    assert '<td class="number"><strong>3.85</strong> †</td><td class="number">1.06</td>' in page
    assert '<th class="number">NFE 7</th>' in page
    assert "<p>Lower is better &amp; the best is bold.</p>" in page
    assert page.count("<table>") == page.count("</table>") == 2


def test_geometry_is_shown_where_it_was_measured(run, tmp_path):
    assert "Shapes of trajectories" not in made(tmp_path, run)
    (run / "geometry.md").write_text("| name | turning |\n| --- | --- |\n| edm | 52° |\n")
    assert '<td class="number">52°</td>' in made(tmp_path, run)


def test_a_heavy_drawing_is_shown_as_pixels(run, tmp_path):
    (run / "plots" / f"{HEADLINE}.svg").write_text("x" * (html_page.HEAVY + 1))
    assert figures(made(tmp_path, run))[0] == f"png of {HEADLINE}"
    (run / "plots" / "learned-levels.svg").unlink()
    assert figures(made(tmp_path, run))[1] == "png of learned-levels"


@pytest.mark.parametrize("name", ["table.md", "cost.md", f"plots/{HEADLINE}.*"])
def test_an_unfinished_run_is_named(run, tmp_path, name):
    for file in run.glob(name):
        file.unlink()
    with pytest.raises(StageError, match=r"digits.*: run the workflow until it has"):
        made(tmp_path, run)
    assert not (tmp_path / "page.html").exists()


def test_every_figure_has_a_title_and_a_caption():
    names = {path.stem for path in (ROOT / "results/reference").glob("*/plots/*.png")}
    assert len(names) > 10
    assert names <= set(FIGURES)
    assert all(caption.text.endswith(".") and not caption.title.endswith(".") for caption in FIGURES.values())


def test_committed_results_make_a_page(tmp_path):
    folder = ROOT / "results/reference/digits"
    page = made(tmp_path, folder)
    assert page.count("<figure>") == len(list(folder.glob("plots/*.png")))
    assert "What each ingredient buys" in page
    assert "Variance of the points themselves" in page


def test_the_ladder_is_the_first_figure_where_there_is_one(run, tmp_path):
    (run / "plots" / f"{LADDER}.svg").write_text(f"svg of {LADDER}")
    assert figures(made(tmp_path, run))[:2] == [f"svg of {LADDER}", f"svg of {HEADLINE}"]
