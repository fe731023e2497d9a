"""Turn one command into several processes of it, under torchrun. No torch: what is replaced should start fast."""

import os
import socket
import sys

from anisodiff.errors import StageError

SHUTDOWN = 150  # seconds that processes have to save their state when they are asked to stop


def launch(processes: int, machines: int, threads: int) -> None:
    """Become torchrun of this same command line, if it asks for several processes and is not run by torchrun already.

    Args:
        processes: on each machine.
        machines: more than one are those of the Slurm job that this process is in.
        threads: CPU threads of all of them on a machine.

    Raises:
        StageError: several machines, but no Slurm job.
    """
    if processes * machines == 1 or "LOCAL_RANK" in os.environ:
        return
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    command += [f"--shutdown-timeout={SHUTDOWN}"]
    if machines == 1:
        command.append("--standalone")
    else:
        job = os.environ.get("SLURM_JOB_ID")
        if job is None:
            raise StageError(
                f"machines: {machines} need a Slurm job: run it with the slurm profile, or set machines to 1"
            )
        endpoint = f"{socket.gethostname()}:{20000 + int(job) % 10000}"
        command += [f"--nnodes={machines}", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", f"--rdzv-id={job}"]
        step = [f"--nodes={machines}", f"--ntasks={machines}", f"--cpus-per-task={threads}"]
        command = ["srun", *step, *command]
    sys.stdout.flush()
    os.environ["OMP_NUM_THREADS"] = str(max(1, threads // processes))
    os.execvp(command[0], [*command, "-m", "anisodiff", *sys.argv[1:]])
