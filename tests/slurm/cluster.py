"""A real Slurm on loopback, in a folder: nodes `n1` and `n2` in the partition cpu, `g1` with a stand-in GPU in gpu.

Needs root and Debian's packages, which `install` gets. Nothing is written outside the folder, and what was started is
stopped by its process id.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("slurm-wlm", "slurmctld", "slurmd", "munge")
NODES = ("n1", "n2", "g1")
CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=20
InactiveLimit=0
KillWait=5
MinJobAge=300
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
GresTypes=gpu
NodeName=n[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{first}-{second}] CPUs=2 RealMemory=8000 State=UNKNOWN
NodeName=g1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={third} CPUs=2 RealMemory=8000 Gres=gpu:a100:1 State=UNKNOWN
PartitionName=cpu Nodes=n[1-2] Default=YES DefaultTime=10 MaxTime=60 DefMemPerCPU=200 OverTimeLimit=0 State=UP
PartitionName=gpu Nodes=g1 DefaultTime=10 MaxTime=60 DefMemPerCPU=200 State=UP
"""


def missing() -> str | None:
    """Why no cluster can be started here, if none can."""
    if os.geteuid():
        return "Slurm's daemons need root"
    wanted = ("slurmctld", "slurmd", "munged", "sbatch")
    lacking = [name for name in wanted if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
    return f"no {', '.join(lacking)} here: apt-get install {' '.join(PACKAGES)}" if lacking else None


def install() -> None:
    """Debian's packages, if they are not here. Nothing starts by itself."""
    if missing() is None or os.geteuid() or shutil.which("apt-get") is None:
        return
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    # no daemon of the system's own: an exit status of 101 forbids it
    policy = Path("/usr/sbin/policy-rc.d")
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        for command in (
            ["apt-get", "update", "-qq"],
            ["apt-get", "install", "-yqq", "--no-install-recommends", *PACKAGES],
        ):
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    finally:
        if ours:
            policy.unlink()


class Cluster:
    """A running cluster.

    Args:
        folder: for everything it writes.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.processes: dict[str, subprocess.Popen] = {}
        self.environment = os.environ | {
            "SLURM_CONF": f"{folder}/slurm.conf",
            # the executor drops SLURM_CONF from a job's own srun
            "PATH": f"{folder}/bin:{os.environ['PATH']}:/usr/sbin",
        }

    def start(self) -> None:
        for name in ("state", "bin", *(f"spool/{node}" for node in NODES)):
            (self.folder / name).mkdir(parents=True)
        base = 20000 + os.getpid() % 4000 * 8
        ports = {"port": base, "first": base + 1, "second": base + 2, "third": base + 3}
        self._file("slurm.conf", CONF.format(folder=self.folder, **ports))
        self._file("gres.conf", "NodeName=g1 Name=gpu Type=a100 File=/dev/null\n")
        self._file("munge.key", secrets.token_bytes(128), 0o600)
        real = shutil.which("srun")
        self._file("bin/srun", f'#!/bin/sh\nSLURM_CONF={self.folder}/slurm.conf exec {real} "$@"\n', 0o755)
        places = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        places[-1] = f"--seed-file={self.folder}/munge.seed"
        self._run("munged", "munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *places)
        self._until(lambda: (self.folder / "munge.socket").exists(), "munged")
        self.start_controller()
        for node in NODES:
            self.start_node(node)
        self._until(lambda: self.ask("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * 3, "the nodes")

    def start_controller(self) -> None:
        self._run("slurmctld", "slurmctld", "-D", "-i")
        self._until(lambda: self.ask("scontrol", "ping").strip().endswith("is UP"), "slurmctld")

    def start_node(self, node: str) -> None:
        self._run(f"slurmd.{node}", "slurmd", "-D", "-N", node)

    def kill(self, name: str) -> None:
        """kill -9 of a daemon."""
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def kill_node(self, node: str) -> None:
        """A node's death: its daemon, and whatever it runs."""
        mine = descendants_of_steps(node, self.folder)
        self.kill(f"slurmd.{node}")
        for pid in mine:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def ask(self, *command: str) -> str:
        """What a Slurm command prints; empty if it fails."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True).stdout

    def jobs(self, states: str = "R") -> dict[str, tuple[str, str]]:
        """Number -> comment (rule and wildcards) and node of the jobs in these states."""
        rows = [row.split("|") for row in self.ask("squeue", "-h", "-t", states, "-o", "%A|%k|%N").splitlines()]
        return {number: (comment, node) for number, comment, node in rows}

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.out"
        return path.read_text() if path.exists() else ""

    def stop(self) -> None:
        self.ask("scancel", "--user=root")
        pids = [pid for node in NODES for pid in descendants_of_steps(node, self.folder)]
        for name in ("slurmctld", *(f"slurmd.{node}" for node in NODES), "munged"):
            if process := self.processes.pop(name, None):
                process.terminate()
                try:
                    process.wait(15)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _file(self, name: str, content: str | bytes, mode: int = 0o644) -> None:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        path.chmod(mode)

    def _run(self, name: str, *command: str) -> None:
        output = (self.folder / f"{name}.out").open("ab")
        self.processes[name] = subprocess.Popen(
            command,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )

    def _until(self, ready, what: str, seconds: float = 30) -> None:
        end = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > end:
                logs = "\n".join(f"{path.name}: {path.read_text()[-500:]}" for path in self.folder.glob("*.out"))
                raise TimeoutError(f"{what} did not come up in {seconds} s\n{logs}")
            time.sleep(0.1)


def descendants_of_steps(node: str, folder: Path) -> list[int]:
    """Processes of the jobs on a node: children of the step managers that its daemon started."""
    children: dict[int, list[int]] = {}
    managers = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            environment = (entry / "environ").read_bytes()
            name = (entry / "comm").read_text().strip()
        except OSError:
            continue
        children.setdefault(parent, []).append(int(entry.name))
        if name == "slurmstepd" and f"SLURM_CONF={folder}/".encode() in environment:
            managers.append(int(entry.name))
    found = []
    for manager in managers:
        tree, at = [manager], [manager]
        while at:
            at = [child for pid in at for child in children.get(pid, [])]
            tree += at
        if any(_runs_on(pid, node) for pid in tree):
            found += tree
    return found


def _runs_on(pid: int, node: str) -> bool:
    try:
        return f"SLURMD_NODENAME={node}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """A cluster, stopped at the end of the block."""
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
