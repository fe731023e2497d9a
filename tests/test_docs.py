"""The pages: short enough, links that lead somewhere, commands that are there, and code and configurations that run."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from exact import SIDE, gaussian, measured_orders, solution, unequal_path

from anisodiff.experiment.config import resolve
from anisodiff.grids.fixed import uniform
from anisodiff.solvers import singlestep
from anisodiff.solvers.loop import solve

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


CONFIGURATIONS = [each for each in blocks(ROOT / "docs/extending.md", "diff") if "def " not in each]


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


def test_the_solver_that_is_shown_is_of_second_order():
    (diff,) = (each for each in blocks(ROOT / "docs/extending.md", "diff") if "def harmonic" in each)
    names = dict(vars(singlestep))
    exec("".join(line[1:] + "\n" for line in diff.splitlines()), names)
    path = unequal_path()
    model, z = gaussian(path), torch.ones(1, 1, SIDE, SIDE, dtype=torch.float64)
    grids = [uniform(path, steps + 1, append_zero=False) for steps in (64, 128, 256)]
    errors = [float((solve(model, z, grid, names["harmonic"]) - solution(model, z, grid)).norm()) for grid in grids]
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
