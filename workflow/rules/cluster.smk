# needs: CONFIG.   makes: what jobs ask for, and a check before anything is submitted.   next: the rules
import functools
import shlex
import shutil
import subprocess

CLUSTER = CONFIG["cluster"]
USES_GPU = (
    "reference",
    "pretrain",
    "finetune",
    "warp",
    "search",
    "sample",
    "trajectory",
    "throughput",
    "geometry",
    "convergence",
)
SAVES = ("pretrain", "finetune", "warp")  # told to stop before their time limit, they save
LAUNCHES = ("pretrain", "finetune")  # a process on each GPU


@functools.cache
def job(stage, dataset):
    """What a job asks for, by the dataset, or else by its kind, or else by default."""
    asked = CLUSTER["jobs"]["default"] | CLUSTER["jobs"].get(stage, {}) | DATASETS[dataset]["jobs"].get(stage, {})
    if asked["gpus"] is None:
        asked["gpus"] = int(stage in USES_GPU and CONFIG["device"].startswith("cuda"))
    if asked["machines"] > 1 and stage not in LAUNCHES:
        raise WorkflowError(f"cluster.jobs.{stage}.machines: only {' and '.join(LAUNCHES)} run on several: set it to 1")
    if stage in SAVES and asked["minutes"] * 60 < CLUSTER["warning"] + 60:
        raise WorkflowError(
            f"cluster.jobs.{stage}.minutes: {asked['minutes']} end before the warning, which Slurm may give a minute "
            f"early: give {CLUSTER['warning'] // 60 + 2} or more, or lower cluster.warning"
        )
    return asked


def cpus(stage):
    """Threads of a stage's jobs."""
    return lambda wildcards: job(stage, wildcards.dataset)["cpus"] or CONFIG["threads"]


def asks(stage):
    """Resources of a stage's jobs. A value of None is left out."""

    def of(value):
        return lambda wildcards: value(job(stage, wildcards.dataset))

    def growing(key, most):
        def value(wildcards, attempt):
            first = job(stage, wildcards.dataset)[key]
            return min(round(first * CLUSTER["growth"] ** (attempt - 1)), max(most, first))

        return value

    warning = [f"--signal=TERM@{CLUSTER['warning']}"] if stage in SAVES else []
    several = lambda asked, value: value if asked["machines"] > 1 else None
    return {
        "mem_mb": growing("memory", CLUSTER["max_memory"]),
        "runtime": growing("minutes", CLUSTER["max_minutes"]),
        "slurm_account": CLUSTER["account"] or "",
        "slurm_partition": of(lambda asked: CLUSTER["gpu_partition" if asked["gpus"] else "partition"] or ""),
        "slurm_extra": shlex.join([*shlex.split(CLUSTER["options"]), *warning]),
        "gpu": of(lambda asked: asked["gpus"] * asked["machines"] or None),
        "gpu_model": of(lambda asked: CLUSTER["gpu_type"] if asked["gpus"] else None),
        # a job on several machines starts its own job step: torchrun, once on each
        "mpi": of(lambda asked: several(asked, "srun")),
        "nodes": of(lambda asked: several(asked, asked["machines"])),
        "tasks": of(lambda asked: several(asked, asked["machines"])),
        "tasks_per_gpu": of(lambda asked: several(asked, 0)),
        # read by the rules, and by the profile for one machine
        "processes": of(lambda asked: max(1, asked["gpus"])),
        "machines": of(lambda asked: asked["machines"]),
        "gpu_job": of(lambda asked: int(asked["gpus"] > 0)),
    }


def answer(*command):
    """What a Slurm command prints, by line; one line of its trouble if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise WorkflowError(
            f"slurm: there is no {command[0]} on this machine: run on a login node, or with --profile local"
        )
    except subprocess.TimeoutExpired:
        raise WorkflowError(f"slurm: {command[0]} does not answer: is the controller up?")
    if done.returncode:
        raise WorkflowError(f"slurm: {' '.join(done.stderr.split()) or command[0] + ' failed'}: is the controller up?")
    return done.stdout.splitlines()


def check_cluster():
    """Before anything is submitted: the partitions exist, and one of them has the GPUs that jobs ask for.

    Without it each job fails by itself, as often as it is retried, or waits for ever.
    """
    answer("sbatch", "--version")
    if any("AccountingStorageType" in line and "none" in line for line in answer("scontrol", "show", "config")):
        # while the controller does not answer, the executor asks sacct if there is one: on a cluster that keeps no accounts
        # its silence counts as jobs that are gone, and Snakemake waits for them for ever
        import snakemake_executor_plugin_slurm as executor

        executor.is_query_tool_available = lambda tool: tool != "sacct" and shutil.which(tool) is not None
    rows = [line.split("|") for line in answer("sinfo", "--noheader", "--format=%R|%G|%P")]
    partitions = sorted({name for name, _, _ in rows})
    for key in ("partition", "gpu_partition"):
        if CLUSTER[key] is not None and CLUSTER[key] not in partitions:
            raise WorkflowError(
                f"cluster.{key}: {CLUSTER[key]!r} is no partition here: use one of {', '.join(partitions)}"
            )
    if not any(job(stage, dataset)["gpus"] for stage in USES_GPU for dataset in DATASETS):
        return
    default = next((name for name, _, shown in rows if shown.endswith("*")), None)
    inside = [gres for name, gres, _ in rows if name == (CLUSTER["gpu_partition"] or default)]
    # as gpu:a100:4(S:0-1) or gpu:4, several by commas
    offered = [each.split("(")[0].split(":") for gres in inside for each in gres.split(",") if each.startswith("gpu")]
    types = sorted({each[1] for each in offered if len(each) > 2})
    if not offered:
        raise WorkflowError(
            f"cluster.gpu_partition: {CLUSTER['gpu_partition'] or default!r} has no GPUs: name one that has"
        )
    if CLUSTER["gpu_type"] is not None and CLUSTER["gpu_type"] not in types:
        raise WorkflowError(
            f"cluster.gpu_type: nobody in the partition has {CLUSTER['gpu_type']!r}: use {' or '.join([*types, 'null'])}"
        )
