# needs: the logs of running jobs.   makes: lines in the terminal, of progress and of what a killed run left.   next: the reader
import atexit
import threading
import time

from anisodiff.report import progress

EVERY = 20  # seconds between two lines of progress


def show_progress():
    """While jobs run, say every few seconds how far they are; the bars themselves are in the jobs' logs."""
    from snakemake.settings.enums import Quietness

    if {Quietness.ALL, Quietness.PROGRESS} & set(workflow.output_settings.quiet or ()):
        return
    began, ended = time.time(), threading.Event()

    def watch():
        said = ""
        while not ended.wait(EVERY):
            try:
                logs = [Path(log) for job in list(workflow.scheduler.running) for log in job.log]
                found = progress.line(logs, began)
            except Exception:
                continue  # what is only looked at must not end a run: a log vanishes, a set changes
            if found and found != said:
                print(f"anisodiff: {found}", file=sys.stderr, flush=True)
                said = found

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    # stopped before the interpreter takes its streams away
    atexit.register(lambda: (ended.set(), watcher.join(5)))


def say_how_to_unlock():
    """After a run that was refused because of another's locks."""
    try:
        refused = not workflow.dryrun and workflow.execution_settings.lock and workflow.persistence.locked
    except Exception:  # it ended before it came to its locks
        return
    if refused:
        print(
            "anisodiff: the folder is locked by another run, or by one that was killed; if no other run is going on: "
            "make unlock (or the same command with --unlock), and again",
            file=sys.stderr,
        )


if workflow.is_main_process:
    atexit.register(say_how_to_unlock)
