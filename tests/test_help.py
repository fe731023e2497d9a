"""What the command line says of itself: stages in order, kinds from the schema, the version."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from anisodiff import cli
from anisodiff.grids.registry import GRIDS
from anisodiff.solvers.registry import SOLVERS
from anisodiff.storage.files import version

ROOT = Path(__file__).parents[1]
COMMANDS = [command.name or command.callback.__name__ for command in cli.app.registered_commands]


def words(text: str) -> str:
    """The text without the frame and the line breaks of a terminal."""
    return " ".join(text.replace("│", " ").split())


def test_help_lists_the_kinds_of_the_schema_and_needs_no_torch():
    code = (
        "import sys\nfrom anisodiff import cli\n"
        "try:\n    cli.app(['--help'])\nexcept SystemExit:\n    sys.exit('torch' in sys.modules)"
    )
    environment = os.environ | {"COLUMNS": "150", "PYTHONPATH": str(ROOT)}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert shown.returncode == 0, shown.stderr
    said = words(shown.stdout)
    for kinds in (SOLVERS, GRIDS):
        assert f": {', '.join(kinds)} " in said
    assert "config/README.md" in said
    assert "workflow/schemas/config.schema.json" in said
    places = [said.index(f" {name} ") for name in ("download", "finetune", "sample", "table", "report", "inspect")]
    assert places == sorted(places)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_stage_describes_itself(command):
    shown = CliRunner().invoke(cli.app, [command, "--help"])
    assert shown.exit_code == 0
    assert "config/README.md" in words(shown.output)
    assert "{datasets" not in shown.output  # what the schema was to fill


def test_a_method_lists_its_solvers():
    assert "dpmpp, exp-ab, unipc" in words(CliRunner().invoke(cli.app, ["sample", "--help"]).output)


def test_the_version_by_option_and_by_command():
    assert CliRunner().invoke(cli.app, ["--version"]).output == f"{version()}\n"
    assert CliRunner().invoke(cli.app, ["version"]).output == f"{version()}\n"
