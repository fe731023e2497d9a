"""What an installation outside of a checkout has."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A wheel of the package, unpacked."""
    pytest.importorskip("setuptools", minversion="77", reason="wheels are built by setuptools")
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT / "anisodiff", source / "anisodiff", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    made = tmp_path_factory.mktemp("wheel")
    build = f"import setuptools.build_meta as backend; backend.build_wheel({str(made)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = made.glob("anisodiff-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(made / "site")
    return made / "site"


def test_every_module_and_the_marker_of_types_is_in_it(site):
    shipped = {each.relative_to(site) for each in (site / "anisodiff").rglob("*") if each.is_file()}
    written = {each.relative_to(ROOT) for each in (ROOT / "anisodiff").rglob("*.py")}
    assert shipped == written | {Path("anisodiff/py.typed")}


def test_it_samples_in_an_empty_folder(site, tmp_path):
    code = f"""
import anisodiff
model = anisodiff.load({str(ROOT / "config/checkpoints/digits/base.safetensors")!r})
print(anisodiff.__file__, tuple(anisodiff.sample(model, nfe=3, seeds=range(2)).shape))
"""
    environment = os.environ | {"PYTHONPATH": str(site)}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert found.stdout.split(maxsplit=1) == [str(site / "anisodiff/__init__.py"), "(2, 1, 8, 8)\n"]
    said = subprocess.run(
        [sys.executable, "-m", "anisodiff", "--version"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert said.stdout.startswith("0.1.0+")
    assert list(tmp_path.iterdir()) == []
