"""The pages: short enough, links that lead somewhere, commands that are there, and code and configurations that run."""

import copy
import json
import os
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
import yaml
from exact import SIDE, gaussian, measured_orders, solution, unequal_path

from anisodiff.experiment.config import resolve
from anisodiff.grids.fixed import uniform
from anisodiff.solvers import singlestep
from anisodiff.solvers.loop import solve
from anisodiff.solvers.registry import SOLVERS, Solver

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "results/README.md", *sorted((ROOT / "docs").glob("*.md"))]
BASE = "config/checkpoints/digits/base.safetensors"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)


def anchors(page: Path) -> set[str]:
    """Names that code hosts give to headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_read_in_five_minutes():
    assert len((ROOT / "README.md").read_text().split()) <= 700
    assert (ROOT / "README.md").read_text().count("![") == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for link in (each for each in links if not each.startswith("https://")):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_are_there(page):
    targets = set(re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(), re.M)
    assert set(named) <= targets


def sections(diff: str) -> dict:
    """Section -> what the diff adds to it. A section's heading may be added or be there."""
    found, section = {}, None
    for line in diff.splitlines():
        text = line[1:] if line[:1] in "+ " else line
        if heading := re.match(r"    (\w+):", text):
            section = heading[1]
        elif line.startswith("+"):
            found.setdefault(section, []).append(text)
    return {name: "\n".join(lines) + "\n" for name, lines in found.items()}


CONFIGURATIONS = [
    each for each in blocks(ROOT / "docs/extending.md", "diff") if "def " not in each and "Solver(" not in each
]


@pytest.mark.parametrize("diff", CONFIGURATIONS, ids=range(len(CONFIGURATIONS)))
def test_a_configuration_that_is_shown_is_valid(diff):
    """What a diff adds to a section comes at the section's end, where its anchors are known."""
    lines = (ROOT / "config/config.yaml").read_text().splitlines(keepends=True)
    for name, text in sections(diff).items():
        starts = [k for k, line in enumerate(lines) if line.startswith(f"    {name}:")]
        if starts:
            end = next((k for k in range(starts[0] + 1, len(lines)) if re.match(r" {0,4}\S", lines[k])), len(lines))
            lines.insert(end, text)
        else:
            at = next(k for k, line in enumerate(lines) if line.startswith("    methods:"))
            lines.insert(at, f"    {name}:\n{text}")
    config = yaml.safe_load("".join(lines))
    classes = "class" in diff
    before = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    assert config != before
    for each in (config, before):
        each["datasets"]["digits"]["class_conditional"] = classes
    assert resolve(config) != resolve(copy.deepcopy(before))


def test_the_solver_that_is_shown_is_of_second_order_and_known_by_its_line(monkeypatch):
    diffs = blocks(ROOT / "docs/extending.md", "diff")
    added = ["\n".join(line[1:] for line in each.splitlines() if line.startswith("+")) for each in diffs]
    (function,), (line,) = ([each for each in added if word in each] for word in ("def harmonic", "Solver("))
    names = dict(vars(singlestep))
    exec(function, names)
    monkeypatch.setattr(singlestep, "harmonic", names["harmonic"], raising=False)
    for name, entry in eval(f"{{{line}}}", {"Solver": Solver}).items():
        monkeypatch.setitem(SOLVERS, name, entry)
    path = unequal_path()
    model, z = gaussian(path), torch.ones(1, 1, SIDE, SIDE, dtype=torch.float64)
    grids = [uniform(path, steps + 1, append_zero=False) for steps in (64, 128, 256)]
    step = SOLVERS["harmonic"].with_order()
    errors = [float((solve(model, z, grid, step) - solution(model, z, grid)).norm()) for grid in grids]
    assert (measured_orders(errors) > 1.9).all()


def run(code: str, folder: Path, *before: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"}
    ran = subprocess.run(
        [sys.executable, "-c", "\n".join([*before, code])], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-2000:]


@pytest.fixture
def clone(tmp_path) -> Path:
    """A folder like a fresh clone's root after a demo: the base network in the place of the run's."""
    (tmp_path / "config").symlink_to(ROOT / "config")
    made = tmp_path / "results/digits/runs/ani"
    made.mkdir(parents=True)
    (made / "network.safetensors").symlink_to(ROOT / BASE)
    save = "from anisodiff.paths.noise_path import edm_path; from anisodiff.storage import checkpoints"
    run(f"checkpoints.save_path('{made}/path.safetensors', edm_path(8))", tmp_path, save)
    (tmp_path / "cifar10.safetensors").symlink_to(ROOT / "config/checkpoints/cifar10-small/base.safetensors")
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_that_is_shown_runs(page, clone):
    for block in blocks(page, "python"):
        run(block, clone)


def test_the_tour_runs(clone):
    cells = json.loads((ROOT / "docs/tour.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    run(code + "\nassert 0 < distances['midpoint'] < distances['euler']", clone)


def test_every_page_is_in_the_menu():
    menu = re.findall(r"^  - ([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    assert sorted(menu) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def build(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The pages as `make docs` builds them."""
    folder = tmp_path_factory.mktemp("site")
    built = build(ROOT, "--site-dir", folder)
    assert built.returncode == 0, built.stderr
    return folder


class Tags(HTMLParser):
    """The tags of a page that begin, with their attributes, and those that end."""

    def __init__(self, page: Path):
        super().__init__()
        self.begin, self.end = [], []
        self.feed(page.read_text())

    def handle_starttag(self, tag, attrs):
        self.begin.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        self.end.append(tag)


@pytest.fixture(scope="module")
def tags(site) -> dict[Path, Tags]:
    return {page: Tags(page) for page in site.rglob("*.html")}


def test_links_of_the_built_site_lead_somewhere_inside_it(site, tags):
    names = {page: {attributes.get("id") for _, attributes in found.begin} for page, found in tags.items()}
    followed = 0
    for page, found in tags.items():
        links = [attributes.get(key) for _, attributes in found.begin for key in ("href", "src")]
        for link in filter(None, links):
            where = urlsplit(link)
            if where.scheme:
                continue
            base = site if where.path.startswith("/") else page.parent
            target = (base / unquote(where.path).lstrip("/")).resolve() if where.path else page
            assert target.is_file(), (page.name, link)
            assert target.is_relative_to(site), (page.name, link)
            assert not where.fragment or unquote(where.fragment) in names[target], (page.name, link)
            followed += 1
    assert followed > 1000


def test_the_built_site_needs_no_network(site, tags):
    """A reader may follow a link of the text to another host; a browser by itself asks none."""
    loading = ("href", "src", "srcset", "data", "poster")
    loaded = [attributes for found in tags.values() for tag, attributes in found.begin if tag != "a"]
    asked = {attributes[key] for attributes in loaded for key in loading if attributes.get(key)}
    for style in site.rglob("*.css"):
        asked |= set(re.findall(r"""(?:url\(|@import)\s*["']?([^"')]+)""", style.read_text()))
    assert any(each.endswith(".css") for each in asked)
    assert not [each for each in asked if re.match(r"(\w+:)?//", each)]


def test_every_formula_of_the_built_site_is_mathml(tags):
    for page, found in tags.items():
        formulas = [tag for tag, attributes in found.begin if attributes.get("class") == "arithmatex"]
        assert len(formulas) == sum(tag == "math" for tag, _ in found.begin)
        assert (len(formulas) > 30) == (page.name == "method.html")


def test_a_placeholder_in_angle_brackets_is_text(tags):
    """Else a browser takes `<name>` for the beginning of a tag that it does not know, and shows nothing."""
    without_end = {"br", "hr", "img", "input", "link", "meta", "path"}
    for page, found in tags.items():
        begun = Counter(tag for tag, _ in found.begin if tag not in without_end)
        assert begun == Counter(tag for tag in found.end if tag not in without_end), page.name


@pytest.mark.parametrize(
    ("text", "leads_somewhere"),
    [
        ("[heading](../beside.md#here), [text](../beside.yaml)", True),
        ("[no such heading](../beside.md#gone)", False),
        ("[no such file](../gone.yaml)", False),
        ("[outside the clone](../../above.yaml)", False),
        ("[a folder, which is no page](../folder/)", False),
    ],
)
def test_a_link_to_nothing_stops_the_build(text, leads_somewhere, tmp_path):
    clone = tmp_path / "clone"
    for folder in ("docs", "folder"):
        (clone / folder).mkdir(parents=True)
    (tmp_path / "above.yaml").write_text("key: value")
    (clone / "beside.yaml").write_text("key: value")
    (clone / "beside.md").write_text("# Here\n\n[back](docs/index.md)")
    (clone / "docs/index.md").write_text(text)
    (clone / "docs/hooks.py").write_text((ROOT / "docs/hooks.py").read_text())
    settings = {"INHERIT": str(ROOT / "mkdocs.yml"), "nav": ["index.md"], "plugins": []}
    (clone / "mkdocs.yml").write_text(yaml.safe_dump(settings))
    assert (build(clone).returncode == 0) == leads_somewhere
