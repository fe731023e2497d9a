"""The report: one page of a run's tables and figures, plain HTML that opens offline and can be printed."""

import base64
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path

import pandas as pd

from anisodiff.errors import StageError
from anisodiff.report.captions import FIGURES, HEADLINE, LADDER, Caption
from anisodiff.storage.files import write_text

PAGES = {
    "table.md": "Distances",
    "metrics.md": "Other metrics",
    "cost.md": "Cost",
    "geometry.md": "Shapes of trajectories",
}
OPTIONAL = ("metrics.md", "geometry.md")  # results of early versions have not the first, the second is configured
HEAVY = 200_000  # bytes of an SVG, from which on its PNG is shown
KINDS = {".svg": "image/svg+xml", ".png": "image/png"}
NUMBER = re.compile(r"[*+\-]*\d.*|")
STYLE = """\
body { font: 15px/1.5 system-ui, sans-serif; color: #111; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin-top: 3rem; border-bottom: 2px solid #111; }
p { max-width: 50rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .6rem; text-align: left; white-space: nowrap; }
th { border-bottom: 1px solid #111; }
tr:nth-child(even) td { background: #f4f4f4; }
.number { text-align: right; }
figure { margin: 2rem 0; }
img { width: 48rem; max-width: 100%; height: auto; }
figcaption { max-width: 50rem; }
@media print {
  body { max-width: none; margin: 0; font-size: 11px; }
  table { font-size: 8px; }
  th, td { padding: .1rem .3rem; }
  h2 { break-before: page; }
  h3 { break-after: avoid; }
  .wide { overflow: visible; }
  figure, tr { break-inside: avoid; }
}
"""


def write(folders: Sequence[Path], output: Path) -> None:
    """Write the page.

    Args:
        folders: of datasets' finished runs, in the order of the page.
        output: HTML file.

    Raises:
        StageError: a folder lacks what belongs on the page.
    """
    contents = "".join(f'<li><a href="#{escape(each.name)}">{escape(each.name)}</a></li>' for each in folders)
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>anisodiff: {escape(', '.join(each.name for each in folders))}</title>\n"
        f"<style>\n{STYLE}</style>\n</head>\n<body>\n<h1>Few-step sampling on learned noise paths</h1>",
        *([f"<ul>{contents}</ul>"] if len(folders) > 1 else []),
        *(_dataset(each) for each in folders),
        "</body>\n</html>\n",
    ]
    write_text(output, "\n".join(parts))


def _dataset(folder: Path) -> str:
    figures = _figures(folder)
    if HEADLINE not in figures:
        raise StageError(f"{folder / 'plots'}: no {HEADLINE}: run the workflow until it has drawn the figures")
    found = [f'<h2 id="{escape(folder.name)}">{escape(folder.name)}</h2>']
    first = LADDER if LADDER in figures else HEADLINE
    found.append(_figure(folder.name, first, figures.pop(first)))
    for name, title in PAGES.items():
        if (page := folder / name).is_file():
            found += [f"<h3>{title}</h3>", html(page.read_text(encoding="utf-8"))]
        elif name not in OPTIONAL:
            raise StageError(f"{page}: not there: run the workflow until it has made the tables")
    found.append("<h3>Figures</h3>")
    found += [_figure(folder.name, name, file) for name, file in figures.items()]
    made = pd.read_csv(folder / "table.csv", dtype=str)
    by = "; ".join(f"{key} {', '.join(sorted({*' '.join(made[key]).split()}))}" for key in ("version", "commit"))
    found.append(f"<p>Made by {escape(by)}.</p>")
    return "\n".join(found)


def _figures(folder: Path) -> dict[str, Path]:
    """Name -> file to show, in the captions' order; a drawing as SVG, unless that is heavy."""
    files: dict[str, Path] = {}
    for kind in KINDS:
        for file in sorted((folder / "plots").glob(f"[!.]*{kind}")):
            if file.stem not in files or files[file.stem].stat().st_size > HEAVY:
                files[file.stem] = file
    rank = {name: place for place, name in enumerate(FIGURES)}
    return {name: files[name] for name in sorted(files, key=lambda name: (rank.get(name, len(rank)), name))}


def _figure(dataset: str, name: str, file: Path) -> str:
    caption = FIGURES.get(name, Caption(f"{{dataset}}: {name}", ""))
    title, text = escape(caption.title.format(dataset=dataset)), escape(caption.text)
    data = base64.b64encode(file.read_bytes()).decode()
    return (
        f'<figure>\n<img alt="{title}" src="data:{KINDS[file.suffix]};base64,{data}">\n'
        f"<figcaption><strong>{title}.</strong> {text}</figcaption>\n</figure>"
    )


def html(page: str) -> str:
    """The HTML of a page that this package writes: tables, paragraphs and bold text, and no other Markdown."""
    blocks = [block for block in re.split(r"\n\s*\n", page.strip()) if block]
    return "\n".join(_table(block) if block.startswith("|") else f"<p>{_inline(block)}</p>" for block in blocks)


def _inline(text: str) -> str:
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escape(text))


def _table(block: str) -> str:
    head, _, *rows = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in block.splitlines()]
    numbers = [all(NUMBER.fullmatch(row[column]) for row in rows) for column in range(len(head))]
    sides = [' class="number"' if each else "" for each in numbers]

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(f"<{tag}{side}>{_inline(cell)}</{tag}>" for side, cell in zip(sides, row, strict=True))

    body = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    top = f"<thead><tr>{cells('th', head)}</tr></thead>"
    return f'<div class="wide"><table>\n{top}\n<tbody>\n{body}\n</tbody>\n</table></div>'
