"""The workflow on a real Slurm: jobs that die in every way, and tables that do not show it.

The cluster lives on loopback for as long as these tests run (see `cluster.py`). A scenario starts from a finished run,
made on this machine alone, with the training and all that follows it taken away: what Slurm makes again must equal it
to the last digit.
"""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import cluster as slurm
import pandas as pd
import pytest
import yaml

from anisodiff.storage import checkpoints

ROOT = Path(__file__).parents[2]
CONFIG = "tests/slurm/digits.yaml"
TABLE = "results/digits/table.csv"
LATER = ("runs/ani", "samples/ani", "trajectories", "distances.csv", "table.csv", "table.md", "table.tex", "cost.csv",
         "cost.md", "plots")  # fmt: skip
FAST = ("--slurm-init-seconds-before-status-checks", "1", "--max-status-checks-per-second", "10")


def pytest_generate_tests(metafunc):
    """In the short version a training job is cancelled; in the long one each death has a run of its own."""
    if "death" in metafunc.fixturenames:
        every = metafunc.config.getoption("--slurm") == "all"
        names = [name for name in DEATHS if every or name == "cancelled"]
        metafunc.parametrize("death", [DEATHS[name] for name in names], ids=names)


@pytest.fixture(scope="session")
def wanted(request) -> str:
    if (wanted := request.config.getoption("--slurm")) is None:
        pytest.skip("a real Slurm: asked for with --slurm short, or --slurm all (make test-slurm)")
    slurm.install()
    if reason := slurm.missing():
        pytest.skip(reason)
    return wanted


@pytest.fixture(scope="session")
def cluster(wanted, tmp_path_factory):
    with slurm.running(tmp_path_factory.mktemp("slurm")) as found:
        yield found


def checkout(folder: Path) -> Path:
    """The repository as a clone has it, by links."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("anisodiff", "config", "envs", "local", "slurm", "tests", "workflow"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def snakemake(folder: Path, *arguments: str, environment: dict | None = None) -> subprocess.CompletedProcess:
    with (folder / "snakemake.txt").open("a") as said:
        done = subprocess.run(
            ["snakemake", *arguments], cwd=folder, env=environment, stdout=said, stderr=said, text=True, timeout=900
        )
    return subprocess.CompletedProcess(done.args, done.returncode, (folder / "snakemake.txt").read_text())


class Run:
    """Snakemake at work on the cluster, in a folder of its own."""

    def __init__(self, cluster: slurm.Cluster, folder: Path, *arguments: str):
        self.cluster, self.folder = cluster, folder
        self.command = ["snakemake", "--profile", "slurm", TABLE, *FAST, "--configfile", CONFIG, *arguments]
        self.start()

    def start(self) -> None:
        self.said = (self.folder / "snakemake.txt").open("a")
        self.process = subprocess.Popen(
            self.command, cwd=self.folder, env=self.cluster.environment, stdout=self.said, stderr=self.said,
            start_new_session=True,
        )  # fmt: skip

    def training_job(self) -> str:
        """The number of the training job, once it has saved a state."""
        end = time.monotonic() + 180
        while time.monotonic() < end and self.process.poll() is None:
            found = [
                number for number, (comment, _) in self.cluster.jobs().items() if comment.startswith("rule_finetune")
            ]
            if found and list(self.folder.glob("results/digits/runs/ani/.state/network/*/step-*")):
                return found[0]
            time.sleep(0.2)
        raise TimeoutError(f"no training job saved a state\n{self.text()[-3000:]}")

    def close(self) -> None:
        """Leave nothing behind for the next test, whatever became of this one."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.said.close()
        self.cluster.ask("scancel", "--user=root")
        while self.cluster.jobs("PD,R,CG"):
            time.sleep(0.2)

    def text(self) -> str:
        return (self.folder / "snakemake.txt").read_text()

    def finish(self) -> None:
        code = self.process.wait(600)
        assert code == 0, self.text()[-6000:]


@pytest.fixture
def begin(cluster, undisturbed, tmp_path):
    """Function that starts Snakemake on a copy of the finished run, without the training and what follows it."""
    runs = []

    def start(*arguments: str, changes: dict | None = None, keep: tuple[str, ...] = ()) -> Run:
        folder = begun(undisturbed, tmp_path / "clone", keep)
        runs.append(Run(cluster, folder, *(configured(folder, changes) if changes else ()), *arguments))
        return runs[-1]

    yield start
    for run in runs:
        run.close()


@pytest.fixture(scope="session")
def undisturbed(wanted, tmp_path_factory) -> Path:
    """A whole run on this machine alone."""
    folder = checkout(tmp_path_factory.mktemp("undisturbed") / "clone")
    done = snakemake(folder, "--profile", "local", "--configfile", CONFIG)
    assert done.returncode == 0, done.stdout[-3000:]
    return folder


def begun(undisturbed: Path, folder: Path, keep: tuple[str, ...] = ()) -> Path:
    """A copy of the finished run, without the training and what follows it but for what is kept."""
    checkout(folder)
    for name in ("results", ".snakemake"):
        shutil.copytree(undisturbed / name, folder / name)
    for name in set(LATER) - set(keep):
        path = folder / "results/digits" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder


def same_table(folder: Path, undisturbed: Path) -> bool:
    return (folder / TABLE).read_bytes() == (undisturbed / TABLE).read_bytes()


def log_of_training(folder: Path) -> str:
    return (folder / "results/digits/logs/finetune/ani.log").read_text()


def cancelled(run: Run) -> None:
    """The training job is cancelled, as by preemption."""
    run.cluster.ask("scancel", run.training_job())


def killed(run: Run) -> None:
    """The training job's processes are killed without a word."""
    run.cluster.ask("scancel", "--signal=KILL", run.training_job())


def node_dies(run: Run) -> None:
    """The machine of the training job: its daemon and everything on it."""
    job = run.training_job()
    node = run.cluster.jobs()[job][1]
    run.cluster.kill_node(node)
    run.finish()
    run.cluster.start_node(node)


def controller_restarts(run: Run) -> None:
    """The controller is away while jobs run and Snakemake asks for them; this cluster keeps no accounts."""
    run.training_job()
    run.cluster.kill("slurmctld")
    time.sleep(25)
    run.cluster.start_controller()


def snakemake_dies(run: Run) -> None:
    """Snakemake is killed; its jobs are cancelled, the folder unlocked, the same command given again."""
    job = run.training_job()
    run.process.kill()
    run.process.wait()
    run.cluster.ask("scancel", job)
    while run.cluster.jobs("R,CG"):
        time.sleep(0.2)
    assert snakemake(run.folder, "--profile", "slurm", "--configfile", CONFIG, "--unlock").returncode == 0
    run.start()


def snakemake_dies_alone(run: Run) -> None:
    """Snakemake is killed, and its jobs end before it is started again: their work is not lost."""
    job = run.training_job()
    run.process.kill()
    run.process.wait()
    while job in run.cluster.jobs("R,CG"):
        time.sleep(0.2)
    made = (run.folder / "results/digits/runs/ani/network.safetensors").stat()
    assert snakemake(run.folder, "--profile", "slurm", "--configfile", CONFIG, "--unlock").returncode == 0
    run.start()
    run.finish()
    assert (run.folder / "results/digits/runs/ani/network.safetensors").stat().st_mtime_ns == made.st_mtime_ns


DEATHS = {
    each.__name__: each
    for each in (cancelled, killed, node_dies, controller_restarts, snakemake_dies, snakemake_dies_alone)
}


def test_a_death_in_the_middle_does_not_show_in_the_table(begin, undisturbed, death):
    run = begin()
    death(run)
    run.finish()
    assert same_table(run.folder, undisturbed)
    network = checkpoints.header(run.folder / "results/digits/runs/ani/network.safetensors")
    assert network["kimg"] == 12.032


def configured(folder: Path, changes: dict) -> tuple[str, ...]:
    """Arguments that add these changes to the configuration of the tests."""
    path = folder / "changes.yaml"
    path.write_text(yaml.safe_dump(changes))
    return ("--configfile", CONFIG, str(path))


def test_a_job_out_of_memory_gets_more(begin, undisturbed, wanted):
    if wanted == "short":
        pytest.skip("only with --slurm all")
    run = begin(changes={"cluster": {"jobs": {"finetune": {"memory": 420}}}})
    run.finish()
    assert "Trying to restart job" in run.text()
    assert "mem_mb=840" in run.text()
    assert "runtime=10," not in run.text()  # twice the minutes, which it did not run out of
    assert same_table(run.folder, undisturbed)


def test_a_job_out_of_time_saves_and_goes_on(begin, undisturbed, wanted, tmp_path):
    """Slurm's warning comes 30 to 60 s after the start of a job of two minutes, and this training takes longer."""
    if wanted == "short":
        pytest.skip("only with --slurm all")
    longer = {"datasets": {"digits": {"runs": {"ani": {"kimg": 100}}}}}
    alone = begun(undisturbed, tmp_path / "alone")
    done = snakemake(alone, "--profile", "local", TABLE, *configured(alone, longer))
    assert done.returncode == 0, done.stdout[-3000:]
    limits = {"cluster": {"warning": 60, "growth": 40, "jobs": {"finetune": {"minutes": 2}}}}
    run = begin(changes=longer | limits)
    run.training_job()
    while "state saved; start again to go on" not in log_of_training(run.folder):
        assert run.process.poll() is None, "the training ended before its warning"
        time.sleep(0.05)
    run.finish()
    assert "Trying to restart job" in run.text()
    assert "runtime=60," in run.text()  # the partition's limit, not forty times two
    assert "mem_mb=8000," not in run.text()  # what a machine has, which it did not run out of
    assert same_table(run.folder, alone)


def test_two_machines_train_as_one(cluster, undisturbed, wanted, tmp_path):
    if wanted == "short":
        pytest.skip("only with --slurm all")
    folder = begun(undisturbed, tmp_path / "clone")
    network = "results/digits/runs/ani/network.safetensors"
    two = configured(folder, {"cluster": {"jobs": {"finetune": {"machines": 2}}}})
    done = snakemake(folder, "--profile", "slurm", network, *FAST, *two, environment=cluster.environment)
    assert done.returncode == 0, done.stdout[-3000:]
    about = checkpoints.header(folder / network)
    assert about["processes"] == 2
    for file in (network, network.replace("network.", "path.")):
        found, expected = checkpoints.read(folder / file)[0], checkpoints.read(undisturbed / file)[0]
        assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < 1e-4


def test_jobs_ask_for_what_is_configured(cluster, begin):
    """The sampling job waits for the only node that has a GPU."""
    cluster.ask("scontrol", "update", "nodename=g1", "state=drain", "reason=test")
    try:
        begin("--rerun-triggers", "mtime", keep=("runs/ani",))
        end, waiting = time.monotonic() + 60, []
        while not waiting and time.monotonic() < end:
            waiting = [
                number for number, (comment, _) in cluster.jobs("PD").items() if comment.startswith("rule_sample")
            ]
            time.sleep(0.2)
        shown = cluster.ask("scontrol", "show", "job", waiting[0])
        assert "Partition=gpu" in shown
        assert "gres:gpu:a100:1" in shown
        assert "mem=1500M" in shown
        assert "TimeLimit=00:05:00" in shown
    finally:
        cluster.ask("scontrol", "update", "nodename=g1", "state=resume")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"partition": "cpus"}, "cluster.partition: 'cpus' is no partition here: use one of cpu, gpu"),
        ({"gpu_type": "h900"}, "cluster.gpu_type: nobody in the partition has 'h900': use a100 or null"),
        ({"gpu_partition": "cpu"}, "cluster.gpu_partition: 'cpu' has no GPUs: name one that has"),
        (
            {"jobs": {"finetune": {"minutes": 90}}},
            "cluster.jobs.finetune.minutes: 90 are more than the 60 that the partition 'cpu' allows: "
            "give 60 or less, or another partition",
        ),
        (
            {"jobs": {"finetune": {"memory": 9000}}},
            "cluster.jobs.finetune.memory: 9000 MB are more than the 8000 of the largest machine of the partition "
            "'cpu': give 8000 or less, or another partition",
        ),
    ],
    ids=["partition", "gpu_type", "gpu_partition", "minutes", "memory"],
)
def test_what_the_cluster_does_not_have_is_one_line(cluster, undisturbed, tmp_path, changes, words):
    folder = begun(undisturbed, tmp_path / "clone")
    arguments = configured(folder, {"cluster": changes})
    done = snakemake(folder, "--profile", "slurm", *FAST, *arguments, environment=cluster.environment)
    assert done.returncode != 0
    assert words in done.stdout.splitlines()
    assert not cluster.jobs("PD,R")


def test_two_runs_on_the_same_results(cluster, begin, wanted):
    if wanted == "short":
        pytest.skip("only with --slurm all")
    run = begin()
    run.training_job()
    second = subprocess.run(run.command, cwd=run.folder, env=cluster.environment, capture_output=True, text=True)
    assert second.returncode != 0
    assert "Directory cannot be locked" in second.stderr
    os.killpg(run.process.pid, signal.SIGINT)
    run.process.wait(120)
    assert not cluster.jobs("PD,R")
    assert list(run.folder.glob("results/digits/runs/ani/.state/network/*/step-*"))


def test_tables_are_of_numbers(undisturbed):
    """That the comparisons above compare something."""
    table = pd.read_csv(undisturbed / TABLE)
    assert len(table) == 4
    assert table["mean"].between(1, 1000).all()
