"""What Slurm writes about limits and ends of jobs, as it writes it (22.05 here, other versions from their sources)."""

from pathlib import Path

import pytest

from anisodiff.experiment import slurm

STARTED = """\
Building DAG of jobs...
[Wed Nov 25 04:41:33 2026]
localrule finetune:
    resources: mem_mb=1500, runtime=240
"""
OVER_TIME = """\
slurmstepd-n2: error: *** STEP 3.0 ON n2 CANCELLED AT 2026-11-25T08:41:21 DUE TO TIME LIMIT ***
slurmstepd-n2: error: *** JOB 3 ON n2 CANCELLED AT 2026-11-25T08:41:21 DUE TO TIME LIMIT ***
srun: Job step aborted: Waiting up to 7 seconds for job step to finish.
srun: error: n2: task 0: Terminated
"""
WARNED = (
    "slurmstepd-n1: error: *** STEP 7.0 ON n1 CANCELLED AT {} ***\nsrun: error: n1: task 0: Exited with exit code 1\n"
)
CANCELLED = """\
srun: got SIGCONT
slurmstepd-n2: error: *** JOB 4 ON n2 CANCELLED AT 2026-11-25T08:38:50 ***
slurmstepd-n2: error: *** STEP 4.0 ON n2 CANCELLED AT 2026-11-25T08:38:50 ***
srun: error: n2: task 0: Terminated
"""
OUT_OF_MEMORY = """\
slurmstepd-n1: error: StepId=1.0 exceeded memory limit (541216768 > 314572800), being killed
slurmstepd-n1: error: Exceeded job memory limit
srun: Job step aborted: Waiting up to 7 seconds for job step to finish.
slurmstepd-n1: error: *** STEP 1.0 ON n1 CANCELLED AT 2026-11-25T08:40:04 ***
srun: error: n1: task 0: Killed
"""


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("infinite", None),
        ("n/a", None),
        ("1:00:00", 60),
        ("30:00", 30),
        ("0:30", 0),
        ("2-00:00:00", 2880),
        ("7-12:30:15", 7 * 1440 + 750),
        ("", None),
    ],
)
def test_a_partitions_limit_is_read(text, minutes):
    assert slurm.minutes(text) == minutes


WORDS = {
    "slurmstepd: error: Detected 1 oom_kill event in StepId=9.0. Some of the step tasks have been OOM "
    "Killed.": "memory",
    "slurmstepd: error: Detected 2 oom-kill event(s) in StepId=9.batch. Some of your processes may have been killed by "
    "the cgroup out-of-memory handler.": "memory",
    "srun: error: node17: task 0: Out Of Memory": "memory",
    "slurmstepd: error: Exceeded step memory limit at some point.": "memory",
    "slurmstepd: error: *** JOB 9 ON n1 CANCELLED AT 2026-11-25T08:38:50 DUE TO PREEMPTION ***": None,
    "slurmstepd: error: *** STEP 9.0 ON n1 CANCELLED AT 2026-11-25T08:38:50 DUE TO PREEMPTION ***": None,
    "slurmstepd: error: *** JOB 9 ON n1 CANCELLED AT 2026-11-25T08:38:50 DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR "
    "DETAILS ***": None,
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.": None,
    "anisodiff: somewhere: something is wrong: mend it": None,
    OVER_TIME: "time",
    WARNED.format("2026-11-25T08:38:31"): "time",
    WARNED.format("2026-11-25T08:37:40"): "time",  # Slurm may warn a minute early
    WARNED.format("2026-11-25T05:01:51"): None,  # long before the warning: somebody's signal
    CANCELLED: None,
    OUT_OF_MEMORY: "memory",
    "": None,
}


@pytest.mark.parametrize(("words", "why"), WORDS.items())
def test_why_a_job_ended_is_read_from_its_log(words, why):
    assert slurm.ended_by(STARTED + words, 240, 180) == why


def test_without_a_warning_only_the_limit_itself_is_one():
    assert slurm.ended_by(STARTED + WARNED.format("2026-11-25T08:38:31"), 240, None) is None
    assert slurm.ended_by(STARTED + OVER_TIME, 240, None) == "time"


def test_what_ran_out_grows_and_nothing_else():
    first, most = {"memory": 4000, "minutes": 240}, {"memory": 20000, "minutes": 600}

    def asked(*logs):
        return tuple(slurm.asked(first, [STARTED + log for log in logs], 1.5, most, 180).values())

    assert asked() == (4000, 240)
    assert asked(OVER_TIME) == (4000, 360)
    assert asked(OUT_OF_MEMORY) == (6000, 240)
    assert asked(CANCELLED, CANCELLED, CANCELLED) == (4000, 240)
    assert asked(OUT_OF_MEMORY, OVER_TIME, CANCELLED) == (6000, 360)


def test_growth_stops_at_the_limit_and_never_shrinks():
    first, most = {"memory": 4000, "minutes": 240}, {"memory": 5000, "minutes": 300}
    assert slurm.asked(first, [OVER_TIME] * 3, 1.5, most, None) == {"memory": 4000, "minutes": 300}
    assert slurm.asked(first, [OUT_OF_MEMORY] * 3, 1.5, most, None) == {"memory": 5000, "minutes": 240}
    above = {"memory": 100, "minutes": 100}
    assert slurm.asked(first, [OVER_TIME, OUT_OF_MEMORY], 1.5, above, None) == first


def test_logs_are_where_the_executor_puts_them():
    """`slurm_logdir / rule_NAME / WILDCARDS`, and `group_GROUP_RULES` for jobs that are one."""
    single, group = slurm.log_folders(Path("logs"), "sample", ["digits", "edm", "0", "a/b"])
    assert single == Path("logs/rule_sample/digits_edm_0_a_b")
    assert group == Path("logs/group_paths_sample")


def test_a_warning_is_measured_by_the_minutes_of_its_own_attempt():
    """The second attempt had 360 minutes: what stopped it after 237 was no warning."""
    early = STARTED + WARNED.format("2026-11-25T08:38:31")
    first, most = {"memory": 4000, "minutes": 240}, {"memory": 5000, "minutes": 1440}
    assert slurm.asked(first, [early, early], 1.5, most, 180)["minutes"] == 360
