"""Registries: names with code behind them, known to settings and schema, and no torch before it is used."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from anisodiff.experiment.config import choices
from anisodiff.grids.registry import GRIDS
from anisodiff.metrics.registry import FEATURES
from anisodiff.networks.registry import NETWORKS
from anisodiff.networks.unets import RawNetwork
from anisodiff.objectives.registry import LOSSES
from anisodiff.paths.registry import PATHS
from anisodiff.registry import Entry
from anisodiff.solvers.registry import SOLVERS

ROOT = Path(__file__).parents[1]
SET = "datasets.<name>"
REGISTRIES = {  # the arguments that an entry's code begins with, and the key of the configuration that takes its name
    "networks": (NETWORKS, [], f"{SET}.pretrain.network.model_type"),
    "paths": (PATHS, ["request"], f"{SET}.paths.<name>.kind"),
    "grids": (GRIDS, ["request"], f"{SET}.methods.<name>.grid"),
    "solvers": (SOLVERS, ["problem", "state", "k", "levels"], f"{SET}.methods.<name>.solver"),
    "losses": (LOSSES, ["denoiser"], f"{SET}.runs.<name>.loss"),
    "features": (FEATURES, ["file", "device"], f"{SET}.features.kind"),
}
ENTRIES = [(kind, name) for kind, (registry, _, _) in REGISTRIES.items() for name in registry]


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_an_entry_is_code_of_the_promised_kind(kind, name):
    registry, arguments, _ = REGISTRIES[kind]
    code = registry[name].load()
    if kind == "networks":
        assert issubclass(code, RawNetwork)
    found = list(inspect.signature(code).parameters)
    if kind == "solvers" and SOLVERS[name].tuned:
        found = list(inspect.signature(code.__call__).parameters)[1:]
    assert found[: len(arguments)] == arguments


@pytest.mark.parametrize("kind", REGISTRIES)
def test_the_configuration_takes_the_names_of_a_registry(kind):
    registry, _, key = REGISTRIES[kind]
    assert choices(key) == ", ".join(registry)


@pytest.mark.parametrize("name", [name for name, solver in SOLVERS.items() if solver.max_order])
def test_multistep_solvers_take_an_order(name):
    assert "order" in inspect.signature(SOLVERS[name].step).parameters


def test_what_snakemake_imports_needs_no_torch():
    code = (
        "import sys; from anisodiff.experiment import config, files, planning, slurm; "
        "from anisodiff.report import progress; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_an_entry_without_code_is_an_error_of_python():
    with pytest.raises(AttributeError):
        Entry("solvers.singlestep:nobody").load()
