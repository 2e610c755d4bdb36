"""Run every (arm, benchmark, seed) of a study, on this machine or on a Slurm cluster.

Each run is a script started as a process with flags. Its folder is named after benchmark, script,
flags and seed, so that studies share the runs they have in common. A second start skips what is
complete, resumes what was cut off, and runs nothing twice; Ctrl-C stops in good order.

    python benchmark/sweep.py benchmark/studies/experiment1_mt5_mtppo.toml --jobs 2
"""

import fcntl
import hashlib
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import submitit
import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
# Keep freed memory instead of giving it back to the system after each update
MALLOC = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "4294967296")
OWN_FLAGS = {"benchmark", "seed", "run-dir", "resume", "num-threads"}  # not an arm's to give
MAX_ARRAY = 1000  # jobs of a Slurm array, by Slurm's own default
TEN_YEARS = 10 * 365 * 24 * 60  # minutes: submitit limits a local job to two otherwise


@dataclass
class Args:
    """Run every (arm, benchmark, seed) of a study."""

    study: tyro.conf.Positional[Path]
    """study file, like benchmark/studies/experiment1_mt5_mtppo.toml"""
    executor: Literal["local", "slurm"] = "local"
    """run on this machine, or as job arrays of a Slurm cluster"""
    jobs: int = 1
    """runs at once (Slurm: of an array)"""
    num_threads: int = 1
    """torch threads of a run"""
    gpus: int = 0
    """GPUs of a run (0: it runs on the CPU; local runs share the first ones)"""
    runs_dir: Path = Path("runs/sweep")
    """folder of the run folders (Slurm: one that all nodes see)"""

    # Slurm
    partition: str | None = None
    """partition (default: the cluster's)"""
    time: int = 1440
    """minutes a run may take; one that needs longer is resumed by the next start"""
    cpus: int | None = None
    """CPUs of a run (default: one per thread)"""


class Run(NamedTuple):
    """One training run of a study."""

    arm: str
    against: str  # the arm that it is compared with, "" for the first of its architecture
    benchmark: str
    seed: int
    script: Path
    flags: list[str]
    folder: Path


def fail(message: str):
    """End with one line on standard error and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


# Studies


def read_study(path: Path, runs_dir: Path) -> list[Run]:
    """Every run of a study file, seed by seed, each with its folder in runs_dir.

    A study is TOML: `benchmarks`, `seeds`, and for each arm an `[[arms]]` table of name, script,
    flags and maybe `seeds`, if it has not all, and `against`, the arm that a report compares it
    with. Ends with exit code 2 if it is anything else.
    """
    try:
        study = tomllib.loads(path.read_text())
    except OSError as error:
        fail(f"{path}: must be a study file ({error.strerror})")
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        fail(f"{path}: must be TOML ({error})")

    def check(allowed: bool, what: str):
        if not allowed:
            fail(f"{path}: {what}")

    def distinct(values, kind):
        right = isinstance(values, list) and values and all(type(v) is kind for v in values)
        return right and len(set(values)) == len(values)

    check(study.keys() == {"arms", "benchmarks", "seeds"}, "must hold arms, benchmarks and seeds")
    arms, benchmarks, seeds = study["arms"], study["benchmarks"], study["seeds"]
    check(distinct(benchmarks, str), "benchmarks must be a list of names, each once")
    check(distinct(seeds, int), "seeds must be a list of integers, each once")
    check(isinstance(arms, list) and bool(arms), "must hold at least one [[arms]] table")
    slugs, words = {}, {}  # arm -> script and flags in its run folders' names; its flags
    for arm in arms:
        form = isinstance(arm, dict)
        form = form and arm.keys() - {"flags", "seeds", "against"} == {"name", "script"}
        form = form and isinstance(arm["name"], str) and isinstance(arm["script"], str)
        check(
            form, f"an arm must have name, script and maybe flags, seeds and against, given {arm}"
        )
        name, script, flags = arm["name"], ROOT / arm["script"], arm.setdefault("flags", {})
        own = arm.setdefault("seeds", seeds)
        right = distinct(own, int) and {*own} <= {*seeds}
        check(right, f"{name}: seeds must be some of the study's, each once")
        check(script.is_file() and script.suffix == ".py", f"{name}: {script} is not a script")
        check(isinstance(flags, dict), f"{name}: flags must be a table")
        text = script.read_text()
        given = []
        for flag, value in sorted(flags.items()):
            check(flag not in OWN_FLAGS, f"{name}: --{flag} is not an arm's to give")
            check("_" not in flag, f"{name}: --{flag} must be written with hyphens")
            right = type(value) in (bool, int, float, str) and "/" not in str(value)
            check(right, f"{name}: --{flag} {value}: must be number, true, false or text without /")
            known = re.search(rf"^    {re.escape(flag.replace('-', '_'))}: .+ = ", text, re.M)
            check(bool(known), f"{name}: {script.name} has no --{flag}")
            switch = flag if value else f"no-{flag}"
            given.append(switch if isinstance(value, bool) else f"{flag}={value}")
        for benchmark in benchmarks:
            check(f'"{benchmark}"' in text, f"{name}: {script.name} has no benchmark {benchmark}")
        what = ",".join(given) or "default"
        if len(what) > 180:  # a file's name has its limits; the folder's flags.txt says it
            what = hashlib.sha256(what.encode()).hexdigest()[:16]
        slug = f"{script.stem}__{what}"
        check(name not in slugs, f"two arms are called {name}")
        check(slug not in slugs.values(), f"{name}: another arm has the same script and flags")
        slugs[name], words[name] = slug, [f"--{word}" for word in given]
    for arm in arms:
        others = {"", *slugs} - {arm["name"]}
        right = arm.setdefault("against", "") in others
        check(right, f"{arm['name']}: against must be the name of another arm")

    runs = []
    for seed in seeds:
        for benchmark in benchmarks:
            for arm in (arm for arm in arms if seed in arm["seeds"]):
                folder = runs_dir.resolve() / f"{benchmark}__{slugs[arm['name']]}__{seed}"
                flags = ["--benchmark", benchmark, "--seed", str(seed), "--run-dir", str(folder)]
                flags += words[arm["name"]]
                script = ROOT / arm["script"]
                named = arm["name"], arm["against"]
                runs.append(Run(*named, benchmark, seed, script, flags, folder))
    return runs


# Runs


def printed_summary(folder: Path) -> str | None:
    """The score in the summary that a run prints as its last act, None if it is not complete."""
    try:
        text = (folder / "output.txt").read_text(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
    found = re.search(r"^mean +(\S+)(?s:.*)^sum ", text, re.M)
    return found and found[1]


def execute(script: Path, flags: list[str], folder: Path) -> None:
    """In the job: start or resume the run, and wait until it ends.

    The script inherits the lock on output.txt and keeps it as long as it lives, whatever kills its
    parents, so that two processes never write to one run folder. A second signal would end it at
    once: it has a session of its own, ignores Slurm's warning before the time limit (SIGUSR2), and
    gets one SIGTERM from here (from Slurm itself if the job is cancelled). A job that is stopped
    while it waits for the lock starts nothing.
    """
    stop = []
    numbers = [signal.SIGINT, signal.SIGUSR2]
    if os.environ["SUBMITIT_EXECUTOR"] == "local":
        numbers.append(signal.SIGTERM)
    for number in numbers:
        signal.signal(number, lambda number, frame: stop.append(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output.txt", "a") as output:
        while not stop:
            try:
                fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.2)
        if stop or printed_summary(folder):
            return
        (folder / "flags.txt").write_text(" ".join(flags) + "\n")
        words = ["--resume", str(folder)] if (folder / "checkpoint.pt").exists() else flags
        process = subprocess.Popen(
            [sys.executable, str(script), *words],
            **dict(stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT),
            env=os.environ | MALLOC,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN),
        )
        while process.poll() is None and not stop:
            time.sleep(0.1)
        process.terminate()  # does nothing to one that has ended
        if process.wait():
            print(f"{script.name} ended with exit code {process.returncode}", file=output)


def ended_jobs(jobs: list[submitit.Job]) -> list[submitit.Job]:
    """The jobs that have ended, also without a result (cancelled by hand, or a node failed).

    Those are in no queue any more, which submitit does not see on a cluster without accounting.
    """
    queued = None
    if jobs and isinstance(jobs[0], submitit.SlurmJob):
        words = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
        squeue = subprocess.run(words, capture_output=True, text=True)
        if squeue.returncode == 0:
            queued = squeue.stdout.split()
    return [job for job in jobs if job.done() or (queued is not None and job.job_id not in queued)]


def make_executor(args: Args) -> submitit.AutoExecutor:
    """Submitit's executor for this start, with a folder of its own (a local job's id can recur)."""
    logs = args.runs_dir.resolve() / ".submitit" / f"{int(time.time())}_{os.getpid()}" / "%j"
    executor = submitit.AutoExecutor(logs, cluster=args.executor)
    executor.update_parameters(
        timeout_min=args.time if args.executor == "slurm" else TEN_YEARS,
        gpus_per_node=args.gpus,
        cpus_per_task=args.cpus or args.num_threads,
        slurm_job_name=args.study.stem,
        slurm_partition=args.partition,
        slurm_array_parallelism=args.jobs,
    )
    return executor


def report_ended(run: Run, job: submitit.Job, seconds: float) -> bool:
    """Print how a run ended, with the end of its log if it is not complete; whether it is."""
    score = printed_summary(run.folder)
    if score:
        what = f"finished, final score {score}"
    else:
        log = run.folder / "output.txt"
        text = log.read_text(errors="replace") if log.exists() else job.stderr() or ""
        lines = [f"    {line}" for line in text.splitlines()[-8:]]
        what = "\n".join(["NOT COMPLETE, the end of its log:", *lines])
    tqdm.write(f"{run.folder.name} (job {job.job_id}, {seconds:.0f} s): {what}", file=sys.stdout)
    sys.stdout.flush()
    return bool(score)


def sweep(args: Args) -> None:
    """Run what is not complete. Exit code 1 if a run failed, 130 if Ctrl-C stopped the sweep."""
    for name, least in dict(jobs=1, num_threads=1, gpus=0, time=1, cpus=1).items():
        if getattr(args, name) is not None and getattr(args, name) < least:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}")
    if args.executor == "slurm" and not (shutil.which("sbatch") and shutil.which("srun")):
        fail("--executor slurm: finds no sbatch and srun here, must be started where Slurm is")
    runs = read_study(args.study, args.runs_dir)
    todo = deque(run for run in runs if not printed_summary(run.folder))
    complete, failed = len(runs) - len(todo), 0
    try:
        executor = make_executor(args) if todo else None
    except OSError as error:
        fail(f"--runs-dir {args.runs_dir}: must be a folder to write to ({error.strerror})")
    print(f"{len(runs)} runs: {complete} complete, {len(todo)} to run in {args.runs_dir}")
    if not todo:
        return

    logging.getLogger("submitit").setLevel(logging.ERROR)  # it warns of a missing sacct each time
    poll = 0.2 if args.executor == "local" else 10  # seconds
    running = []  # runs, each with its job and when it was submitted
    bar = tqdm(total=len(runs), initial=complete, unit="run", disable=None, smoothing=0)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background job ignores SIGINT
        signal.signal(number, signal.default_int_handler)
    try:
        while todo or running:
            # A local executor starts all it is given at once; Slurm queues, array by array
            room = args.jobs - len(running)
            if args.executor == "slurm":
                room = 0 if running else MAX_ARRAY
            if batch := [todo.popleft() for _ in range(min(room, len(todo)))]:
                threads = ["--num-threads", str(args.num_threads)]
                columns = [(r.script, [*r.flags, *threads], r.folder) for r in batch]
                # Submitit's own processes inherit the mask, and so outlive Ctrl-C
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
                try:
                    jobs = executor.map_array(execute, *zip(*columns, strict=True))
                except (submitit.core.utils.FailedJobError, RuntimeError) as error:
                    fail(f"--executor {args.executor}: {str(error).strip().splitlines()[-1]}")
                finally:
                    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
                running += [(r, j, time.monotonic()) for r, j in zip(batch, jobs, strict=True)]
            done = ended_jobs([job for _, job, _ in running])
            ended = [entry for entry in running if entry[1] in done]
            running = [entry for entry in running if entry not in ended]
            for run, job, started in ended:
                failed += not report_ended(run, job, time.monotonic() - started)
                bar.update()
            bar.refresh()
            time.sleep(poll)
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM):  # a second one leaves the runs to save alone
            signal.signal(number, signal.SIG_DFL)
        bar.close()
        print("stopping: every run saves its state first", flush=True)
        jobs = [job for _, job, _ in running]
        for job in jobs:
            if args.executor == "slurm":
                job.cancel()
            elif not job.done():  # the id is that of a process, which passes SIGTERM on
                os.kill(int(job.job_id), signal.SIGTERM)
        while len(ended_jobs(jobs)) < len(jobs):
            time.sleep(poll)
        print("stopped, to go on: the same command again")
        raise SystemExit(130) from None
    bar.close()
    if failed:
        print(f"{failed} of {len(runs)} runs are not complete, to go on: the same command again")
        raise SystemExit(1)


if __name__ == "__main__":
    sweep(tyro.cli(Args))
