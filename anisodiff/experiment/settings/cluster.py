"""Settings of Slurm: what jobs ask for."""

from typing import Annotated

from pydantic import Field, StringConstraints

from anisodiff.experiment.settings.base import OneOf, Section, Whole, key, section

STAGES = (
    "convert", "images", "reference", "pretrain", "train_features", "basis", "path", "finetune", "warp", "search",
    "pairs", "tune", "sample", "trajectory", "distance", "geometry", "likelihood", "convergence", "toy", "throughput",
)  # fmt: skip
Account = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.@+,-]*$")]
Partition = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+,-]*$")]


class JobSettings(Section):
    """What the jobs of a rule ask for."""

    cpus: Annotated[Whole, Field(ge=1)] | None = key(
        "CPUs on a machine; null is the number of threads.", None, unit="CPUs"
    )
    memory: Whole = key("On a machine. Snakemake itself needs 150 MB of it.", 8000, unit="MB", ge=200)
    minutes: Whole = key("Time limit.", 60, unit="minutes", ge=1)
    gpus: Annotated[Whole, Field(ge=0)] | None = key(
        "On a machine; null is one where device is cuda, for rules that use it. pretrain and finetune run a process on "
        "each.",
        None,
        unit="GPUs",
    )
    machines: Whole = key("Machines of one job (pretrain and finetune; under Slurm only).", 1, unit="machines", ge=1)

    def over(self, other: "JobSettings") -> "JobSettings":
        """What is given here, and the other's for what is not."""
        return other.model_copy(update=self.model_dump(exclude_unset=True))


class ClusterSettings(Section):
    """What jobs ask of Slurm; config/cluster.yaml sets it. A run on one machine takes only cpus and gpus from it."""

    account: Account | None = key("Who pays for the jobs; null is your default account.", None)
    partition: Partition | None = key("Of jobs without GPUs; null is the cluster's default partition.", None)
    gpu_partition: Partition | None = key("Of jobs with GPUs; null is the cluster's default partition.", None)
    gpu_type: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.]+$")] | None = key(
        "Model that jobs with GPUs ask for, as `sinfo --format=%G` names it; null takes any.", None
    )
    options: str = key("More options of sbatch, as --reservation=NAME, with quotes as in a shell.", "")
    growth: float = key(
        "Factor on the memory of a job that ran out of it, and on the minutes of one that ran out of time, at its next "
        "attempt.",
        1.5,
        ge=1,
    )
    max_memory: Whole = key(
        "Most memory that a retried job asks for; what its partition's largest machine has is a limit too.",
        256_000,
        unit="MB",
        ge=200,
    )
    max_minutes: Whole = key(
        "Longest time that a retried job asks for; what its partition allows is a limit too.",
        1440,
        unit="minutes",
        ge=1,
    )
    warning: Whole = key(
        "How long before its time limit a training job is told to save and stop.", 180, unit="seconds", ge=1
    )
    jobs: dict[Annotated[str, OneOf(("default", *STAGES))], JobSettings] = section(
        "What the jobs of a rule ask for, by its name; `default` is for what a rule leaves out."
    )

    def job(self, stage: str, own: JobSettings | None) -> JobSettings:
        """What a stage's job asks for: by its dataset (`own`), or else by its kind, or else by default."""
        asked = JobSettings()
        for each in (self.jobs.get("default"), self.jobs.get(stage), own):
            asked = asked if each is None else each.over(asked)
        return asked
