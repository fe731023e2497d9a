# needs: CONFIG.   makes: what jobs ask for, and a check before anything is submitted.   next: the rules
import functools
import shlex
import shutil
import subprocess

from snakemake.exceptions import WorkflowError

from anisodiff.experiment import slurm

CLUSTER = CONFIG.cluster
USES_GPU = (
    "reference",
    "pretrain",
    "finetune",
    "warp",
    "search",
    "pairs",
    "tune",
    "sample",
    "trajectory",
    "throughput",
    "geometry",
    "likelihood",
    "convergence",
    "toy",
)
SAVES = ("pretrain", "finetune", "warp", "tune")  # told to stop before their time limit, they save
LAUNCHES = ("pretrain", "finetune")  # a process on each GPU


@functools.cache
def job(stage, dataset=None):
    """What a job asks for, by the dataset, where it has one, or else by its kind, or else by default."""
    asked = CLUSTER.job(stage, DATASETS[dataset].jobs.get(stage) if dataset else None)
    if asked.gpus is None:
        asked = asked.changed(gpus=int(stage in USES_GPU and CONFIG.device.startswith("cuda")))
    if asked.machines > 1 and stage not in LAUNCHES:
        raise WorkflowError(f"cluster.jobs.{stage}.machines: only {' and '.join(LAUNCHES)} run on several: set it to 1")
    if stage in SAVES and asked.minutes * 60 < CLUSTER.warning + 60:
        raise WorkflowError(
            f"cluster.jobs.{stage}.minutes: {asked.minutes} end before the warning, which Slurm may give a minute "
            f"early: give {CLUSTER.warning // 60 + 2} or more, or lower cluster.warning"
        )
    return asked


def cpus(stage):
    """Threads of a stage's jobs."""
    return lambda wildcards: job(stage, wildcards.get("dataset")).cpus or CONFIG.threads


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


UNKNOWN = (None, 0, "")  # of a partition: limit in minutes, MB of its largest machine, GPUs as Slurm writes them


@functools.cache
def partitions():
    """Name -> what `UNKNOWN` lists, of every partition; and the name of the one that is taken by default."""
    found, default = {}, None
    for line in answer("sinfo", "--noheader", "--exact", "--format=%R|%l|%m|%G|%P"):
        name, limit, memory, gres, shown = line.split("|")
        _, most, offered = found.get(name, UNKNOWN)
        memory = int(memory) if memory.isdigit() else 0
        found[name] = (slurm.minutes(limit), max(most, memory), f"{offered},{gres}")
        default = name if shown.endswith("*") else default
    return found, default


def partition_asked(asked):
    return CLUSTER.gpu_partition if asked.gpus else CLUSTER.partition


def partition_of(asked):
    """Name of the partition that a job goes to, its limit in minutes and the MB of its largest machine, where known."""
    found, default = partitions()
    name = partition_asked(asked) or default
    limit, memory, _ = found.get(name, UNKNOWN)
    return name, limit, memory


@functools.cache
def logs_before(folder):
    """Slurm's logs of a job that were there when it was first asked for."""
    return set(folder.glob("*.log"))


def logs_of_attempts(rule, wildcards, attempt):
    """Slurm's logs of a job's attempts before this one, in order; none where another executor runs it."""
    if workflow.executor_plugin is None or workflow.executor_plugin.name != "slurm":
        return []
    folder = Path(workflow.executor_settings.logdir or ".snakemake/slurm_logs")
    folders = slurm.log_folders(folder, rule, wildcards)
    new = [log for folder in folders for log in set(folder.glob("*.log")) - logs_before(folder)]
    return sorted(new, key=lambda log: log.stat().st_mtime)[-(attempt - 1) :] if attempt > 1 else []


def asks(stage):
    """Resources of a stage's jobs. A value of None is left out."""

    def of(value):
        return lambda wildcards: value(job(stage, wildcards.get("dataset")))

    def growing(key):
        def value(wildcards, attempt, rulename):
            first = job(stage, wildcards.get("dataset"))
            logs = [log.read_text(errors="replace") for log in logs_of_attempts(rulename, wildcards, attempt)]
            if not logs:
                return getattr(first, key)
            _, limit, memory = partition_of(first)
            most = {
                "memory": min(CLUSTER.max_memory, memory or CLUSTER.max_memory),
                "minutes": min(CLUSTER.max_minutes, limit or CLUSTER.max_minutes),
            }
            told = CLUSTER.warning if stage in SAVES else None
            return slurm.asked({"memory": first.memory, "minutes": first.minutes}, logs, CLUSTER.growth, most, told)[
                key
            ]

        return value

    warning = [f"--signal=TERM@{CLUSTER.warning}"] if stage in SAVES else []
    several = lambda asked, value: value if asked.machines > 1 else None
    return {
        "mem_mb": growing("memory"),
        "runtime": growing("minutes"),
        "slurm_account": CLUSTER.account or "",
        "slurm_partition": of(lambda asked: partition_asked(asked) or ""),
        "slurm_extra": shlex.join([*shlex.split(CLUSTER.options), *warning]),
        "gpu": of(lambda asked: asked.gpus * asked.machines or None),
        "gpu_model": of(lambda asked: CLUSTER.gpu_type if asked.gpus else None),
        # a job on several machines starts its own job step: torchrun, once on each
        "mpi": of(lambda asked: several(asked, "srun")),
        "nodes": of(lambda asked: several(asked, asked.machines)),
        "tasks": of(lambda asked: several(asked, asked.machines)),
        "tasks_per_gpu": of(lambda asked: several(asked, 0)),
        # read by the rules, and by the profile for one machine
        "processes": of(lambda asked: max(1, asked.gpus)),
        "machines": of(lambda asked: asked.machines),
        "gpu_job": of(lambda asked: int(asked.gpus > 0)),
    }


RULES_OF = {"warp_per_nfe": "warp", "throughput_of": "throughput"}  # rules with another name than their stage


def check_limits():
    """That Slurm can ever start what will be submitted: a job beyond its partition's limit would wait without a word."""
    dag = workflow.dag
    for each in dict.fromkeys(dag.get_job_group(needed) or needed for needed in dag.needrun_jobs()):
        if each.is_local:
            continue
        members = list(each.jobs) if each.is_group() else [each]
        stage = RULES_OF.get(members[0].rule.name, members[0].rule.name)
        dataset = members[0].wildcards.get("dataset")
        name, limit, memory = partition_of(job(stage, dataset))
        own = dataset is not None and stage in DATASETS[dataset].jobs
        key = f"datasets.{dataset}.jobs.{stage}" if own else f"cluster.jobs.{stage}"
        shared = f" for {len(members)} jobs in one" if len(members) > 1 else ""
        minutes, asked = each.resources.get("runtime") or 0, each.resources.get("mem_mb") or 0
        if limit is not None and minutes > limit:
            raise WorkflowError(
                f"{key}.minutes: {minutes}{shared} are more than the {limit} that the partition {name!r} allows: "
                f"give {limit // len(members)} or less, or another partition"
            )
        if memory and asked > memory:
            raise WorkflowError(
                f"{key}.memory: {asked} MB are more than the {memory} of the largest machine of the partition {name!r}: "
                f"give {memory} or less, or another partition"
            )


def check_cluster():
    """Before anything is submitted: the partitions exist, allow what jobs ask for, and one of them has their GPUs.

    Without it each job fails by itself, as often as it is retried, or waits for ever.
    """
    answer("sbatch", "--version")
    if any("AccountingStorageType" in line and "none" in line for line in answer("scontrol", "show", "config")):
        # while the controller does not answer, the executor asks sacct if there is one: on a cluster that keeps no accounts
        # its silence counts as jobs that are gone, and Snakemake waits for them for ever
        import snakemake_executor_plugin_slurm as executor

        executor.is_query_tool_available = lambda tool: tool != "sacct" and shutil.which(tool) is not None
    found, default = partitions()
    for key in ("partition", "gpu_partition"):
        if getattr(CLUSTER, key) is not None and getattr(CLUSTER, key) not in found:
            raise WorkflowError(
                f"cluster.{key}: {getattr(CLUSTER, key)!r} is no partition here: use one of {', '.join(sorted(found))}"
            )
    check_gpus(found, default)
    check_limits()


def check_gpus(found, default):
    """That the partition of the jobs with GPUs has them, of the type asked for."""
    if not any(job(stage, dataset).gpus for stage in USES_GPU for dataset in DATASETS):
        return
    _, _, inside = found.get(CLUSTER.gpu_partition or default, UNKNOWN)
    # as gpu:a100:4(S:0-1) or gpu:4, several by commas
    offered = [each.split("(")[0].split(":") for each in inside.split(",") if each.startswith("gpu")]
    types = sorted({each[1] for each in offered if len(each) > 2})
    if not offered:
        raise WorkflowError(
            f"cluster.gpu_partition: {CLUSTER.gpu_partition or default!r} has no GPUs: name one that has"
        )
    if CLUSTER.gpu_type is not None and CLUSTER.gpu_type not in types:
        raise WorkflowError(
            f"cluster.gpu_type: nobody in the partition has {CLUSTER.gpu_type!r}: use {' or '.join([*types, 'null'])}"
        )
