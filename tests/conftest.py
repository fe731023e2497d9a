"""Shape annotations are checked in every test; what several test files start from."""

from pathlib import Path

import pytest
from jaxtyping import install_import_hook

install_import_hook("anisodiff", "beartype.beartype")

import torch  # noqa: E402 - after the hook

torch.set_num_threads(1)  # the tensors are small

from runs import EDM, NETWORK, RUN, SPACE  # noqa: E402

from anisodiff.data import sources  # noqa: E402
from anisodiff.experiment.settings import PretrainSettings, TrainingSettings  # noqa: E402
from anisodiff.stages import finetuning, initial_paths  # noqa: E402
from anisodiff.storage import checkpoints  # noqa: E402


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """The digits as a folder of images."""
    folder = tmp_path_factory.mktemp("data") / "digits"
    sources.make_images("digits", folder)
    return folder


@pytest.fixture(scope="session")
def start(tmp_path_factory, digits) -> tuple[Path, Path, Path]:
    """A base network, EDM's path, and the images."""
    folder = tmp_path_factory.mktemp("start")
    shared = RUN.model_dump(include=set(TrainingSettings.model_fields))
    settings = PretrainSettings(**shared | {"kimg": 0.32, "network": NETWORK})
    finetuning.pretrain(SPACE, settings, digits, folder / "base.safetensors")
    path = initial_paths.initial_path(SPACE, EDM, digits)
    checkpoints.save_path(folder / "edm.safetensors", path)
    return folder / "base.safetensors", folder / "edm.safetensors", digits


LONGEST = ["test_workflow.py", "test_paper.py", "test_parallel.py", "test_training.py"]
MATHEMATICS = [
    f"test_{name}.py"
    for name in (
        "class_paths", "closed_forms", "denoiser", "edm", "generation", "geometry", "gits", "losses", "models",
        "flexible_process", "likelihood", "moving_path", "multistep", "path_gradient", "rotated_bases", "schedules",
        "solvers", "stochastic", "subspaces", "toys", "tuned", "turned",
    )
]  # fmt: skip


def pytest_collection_modifyitems(items):
    """The longest files first, so that they do not end alone; those of the mathematics are marked `fast`."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    for item in items:
        if item.path.name in MATHEMATICS:
            item.add_marker("fast")


def pytest_addoption(parser):
    parser.addoption(
        "--slurm",
        choices=["short", "all"],
        help="run the tests on a real Slurm, some of them or all; as root, they install Debian's packages",
    )
