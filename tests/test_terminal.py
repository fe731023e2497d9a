"""What a user sees in the terminal: how far jobs are, and the way out of a killed run's locks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from anisodiff.report import progress

ROOT = Path(__file__).parents[1]
BARS = (
    "\rnetwork:   0%|          | 0.00/128k [00:00<?, ?img/s]"
    "\rnetwork:  43%|████▎     | 55.0k/128k [00:30<00:40, 1.8kimg/s]"
)


def log(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path.relative_to(folder)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_one_line_says_how_far_jobs_are(folder):
    logs = [
        log(folder, "results/digits/logs/finetune/ani.log", BARS),
        log(folder, "results/digits/logs/sample/edm/0-63.log", "edm:  12%|█▏  | 8/64 [00:10<1:01:10, 2.00img/s]\n"),
        log(
            folder, "results/digits/logs/images.log", "images: 100%|██████████| 1.80k/1.80k [00:00<00:00, 29.3kimg/s]\n"
        ),
        log(folder, "results/digits/logs/table.log", "nothing is drawn here\n"),
        Path("results/digits/logs/reference.log"),
    ]
    assert progress.line(logs, since=0.0) == (
        "digits sample edm 0-63 12 % (1:01:10 left), digits finetune ani 43 % (0:40 left)"
    )
    assert progress.line(logs[2:], since=0.0) == ""


def test_the_last_state_of_a_long_log_counts(folder):
    many = "".join(f"\rb:  {n}%|██ | {n}/100 [00:10<00:{99 - n:02d}, 1.00img/s]" for n in range(10, 90)) * 50
    assert progress.state(folder / log(folder, "results/a/logs/x.log", many)) == (89, "0:10")


def test_a_bar_that_cannot_tell_yet_and_a_download(folder):
    logs = [
        log(folder, "results/digits/logs/warp/iso.log", "network:   0%|          | 0.00/128k [00:00<?, ?img/s]"),
        log(folder, "results/fetched/logs/example.org/files/edm.pkl.log",
            "edm.pkl:  50%|█████     | 5.00M/10.0M [00:05<00:05, 1.00MB/s]"),
    ]  # fmt: skip
    assert progress.line(logs, since=0.0) == "download edm.pkl 50 % (0:05 left), digits warp iso 0 %"


def test_two_hundred_jobs_are_five_and_a_count(folder):
    logs = [
        log(folder, f"results/d/logs/sample/m/{n}.log", f"m:  10%|█ | 1/10 [00:10<{n}:00:00, 1img/s]")
        for n in range(1, 201)
    ]
    found = progress.line(logs, since=0.0)
    assert found.startswith("d sample m 200 10 % (200:00:00 left), d sample m 199 ")
    assert found.endswith(", 195 more")
    assert found.count("left") == 5


def test_an_earlier_runs_log_is_not_shown(folder):
    old = log(folder, "results/digits/logs/finetune/ani.log", BARS)
    os.utime(old, (1000, 1000))
    assert progress.line([old], since=1001.0) == ""


def test_a_killed_runs_locks_name_the_way_out(tmp_path):
    """As `kill -9` leaves them."""
    pytest.importorskip("snakemake", reason="the workflow needs snakemake (extra `workflow`)")
    (tmp_path / "config").symlink_to(ROOT / "config")
    lock = tmp_path / ".snakemake/locks/0.output.lock"
    lock.parent.mkdir(parents=True)
    target = "results/fetched/local/config/checkpoints/digits/features.safetensors"
    lock.write_text(f"{target}\n")
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "workflow/Snakefile"), "--cores", "1"]
    configured = ["--configfile", str(ROOT / "tests/workflow/short.yaml")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    refused = subprocess.run(
        [*command, target, *configured], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert refused.returncode != 0
    (said,) = [line for line in refused.stderr.splitlines() if line.startswith("anisodiff: ")]
    assert "if no other run is going on: make unlock" in said
