"""Run every (method, benchmark, seed) of a study, on this machine or on a Slurm cluster.

Each run is a script started as a process with flags. Its folder is named after benchmark, script,
flags and seed, so that studies share the runs they have in common. A run is complete when its
folder's output.txt, or a results.csv in --results, has its scores. Each start of a sweep skips what
is complete and resumes what was stopped from its last checkpoint.

    python benchmark/sweep.py benchmark/studies/experiment1_mt5_mtppo.toml --jobs 2
"""

import csv
import fcntl
import hashlib
import importlib
import io
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import submitit
import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark" / "results"
# Keep freed memory instead of giving it back to the system after each update
MALLOC = dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "4294967296")
OWN_FLAGS = {"benchmark", "seed", "run-dir", "resume", "num-threads"}  # not a method's to give
MAX_ARRAY = 1000  # jobs of a Slurm array, by Slurm's own default


@dataclass
class Args:
    """Run every (method, benchmark, seed) of a study."""

    study: tyro.conf.Positional[Path]  # study file, like benchmark/studies/table1.toml
    executor: Literal["local", "slurm"] = "local"  # this machine, or job arrays of a Slurm cluster
    jobs: int = 1  # runs at once (Slurm: of an array)
    num_threads: int = 1  # torch threads of a run
    gpus: int = 0  # GPUs of a run (0: it runs on the CPU; local runs share the first ones)
    runs_dir: Path = Path("runs/sweep")  # folder of the run folders (Slurm: one that all nodes see)
    # folder of folders with a results.csv, whose runs are complete
    results: Path | None = RESULTS

    # Slurm
    partition: str | None = None  # partition (default: the cluster's)
    time: int = 1440  # minutes a run may take; one that needs longer is resumed by the next start
    cpus: int | None = None  # CPUs of a run (default: one per thread)


class Run(NamedTuple):
    """One training run of a study."""

    method: str
    against: str  # the method that it is compared with, "" for the first of its architecture
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

    A study is TOML: `benchmarks`, `seeds`, and for each method a `[[methods]]` table of name,
    script, flags and maybe `seeds`, if it has not all, and `against`, the method that a report
    compares it with. Ends with exit code 2 if it is anything else.
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

    parts = study.keys() == {"methods", "benchmarks", "seeds"}
    check(parts, "must hold methods, benchmarks and seeds")
    methods, benchmarks, seeds = study["methods"], study["benchmarks"], study["seeds"]
    check(distinct(benchmarks, str), "benchmarks must be a list of names, each once")
    check(distinct(seeds, int), "seeds must be a list of integers, each once")
    check(isinstance(methods, list) and bool(methods), "must hold at least one [[methods]] table")
    slugs, words = {}, {}  # method -> script and flags in its run folders' names; its flags
    for method in methods:
        form = isinstance(method, dict)
        form = form and method.keys() - {"flags", "seeds", "against"} == {"name", "script"}
        form = form and isinstance(method["name"], str) and isinstance(method["script"], str)
        check(form, f"a method has name, script and maybe flags, seeds and against, not {method}")
        name, script = method["name"], ROOT / method["script"]
        flags, own = method.setdefault("flags", {}), method.setdefault("seeds", seeds)
        right = re.fullmatch(r"[^\W_]([\w .,:;%+=/()\[\]<>-]*[^ ])?", name)
        check(bool(right), f"{name!r}: a name must be letters, digits, spaces and .,:;%+=/()[]<>-_")
        right = distinct(own, int) and {*own} <= {*seeds}
        check(right, f"{name}: seeds must be some of the study's, each once")
        check(script.is_file() and script.suffix == ".py", f"{name}: {script} is not a script")
        check(isinstance(flags, dict), f"{name}: flags must be a table")
        given, words[name] = [], []
        for flag, value in sorted(flags.items()):
            check(flag not in OWN_FLAGS, f"{name}: --{flag} is not a method's to give")
            check("_" not in flag, f"{name}: --{flag} must be written with hyphens")
            right = type(value) in (bool, int, float, str) or distinct(value, str)
            allowed = "number, true, false, text without /, or a list of texts"
            check(right and "/" not in str(value), f"{name}: --{flag} {value}: must be {allowed}")
            if isinstance(value, list):
                given.append(f"{flag}={'+'.join(value)}")
                words[name] += [f"--{flag}", *value]
            else:
                switch = {True: flag, False: f"no-{flag}"}
                given.append(switch[value] if type(value) is bool else f"{flag}={value}")
                words[name].append(f"--{given[-1]}")
        what = ",".join(given) or "default"
        if len(what) > 180:  # a file's name has its limits; output.txt begins with the flags
            what = hashlib.sha256(what.encode()).hexdigest()[:16]
        slug = f"{script.stem}__{what}"
        check(name not in slugs, f"two methods are called {name}")
        check(slug not in slugs.values(), f"{name}: another method has the same script and flags")
        slugs[name] = slug
    for method in methods:
        others = [name for name in ("", *slugs) if name != method["name"]]
        right = method.setdefault("against", "") in others
        check(right, f"{method['name']}: against must be the name of another method")

    runs = []
    for seed in seeds:
        for benchmark in benchmarks:
            for method in (method for method in methods if seed in method["seeds"]):
                name, against, script = method["name"], method["against"], ROOT / method["script"]
                folder = runs_dir.resolve() / f"{benchmark}__{slugs[name]}__{seed}"
                flags = ["--benchmark", benchmark, "--seed", str(seed), *words[name]]
                runs.append(Run(name, against, benchmark, seed, script, flags, folder))
    return runs


def check_flags(runs: list[Run]) -> None:
    """End with exit code 2, and the script's own message, if a script refuses a run's flags."""
    sys.path.insert(0, str(ROOT))
    for run in {(run.method, run.benchmark): run for run in runs}.values():
        script, printed = importlib.import_module(run.script.stem), io.StringIO()
        try:
            with redirect_stdout(printed), redirect_stderr(printed):
                tyro.cli(script.Args, prog=run.script.name, args=run.flags)
        except SystemExit:
            fail(f"{run.method}: {run.script.name} refuses its flags\n{printed.getvalue().strip()}")


# Runs


def printed_score(folder: Path) -> str | None:
    """The score of the last evaluation that a run printed, None if it is not complete."""
    try:
        text = (folder / "output.txt").read_text(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
    scores = re.findall(r": eval/(?:normalized_return|success_rate) (\S+)$", text, re.M)
    return scores[-1] if re.search("^finished: ", text, re.M) else None


def archived_runs(results: Path | None) -> set[str]:
    """The names of the runs in results.csv files."""
    names = set()
    for path in results.glob("*/results.csv") if results else ():
        with open(path, newline="") as file:
            names |= {row["run"] for row in csv.DictReader(file)}
    return names


def execute(script: Path, flags: list[str], folder: Path, stopped=lambda: False) -> None:
    """Start or resume a run, and wait until it has ended or is to be stopped.

    The script inherits the lock on output.txt and keeps it as long as it lives, whatever kills its
    parents, so that two processes never write to one run folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "output.txt", "a") as output:
        while not stopped():
            try:
                fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.2)
        if stopped() or printed_score(folder):
            return
        how = "--resume" if (folder / "checkpoint.pt").exists() else "--run-dir"
        words = [*flags, how, str(folder)]
        print("$", shlex.join([script.name, *words]), file=output, flush=True)
        process = subprocess.Popen(
            [sys.executable, str(script), *words],
            **dict(stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT),
            **dict(env=os.environ | MALLOC, start_new_session=True),
        )
        while process.poll() is None and not stopped():
            time.sleep(0.1)
        process.terminate()  # does nothing to one that has ended
        if process.wait():
            print(f"{script.name} ended with exit code {process.returncode}", file=output)


def ended_jobs(jobs: list) -> list:
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
    """Submitit's executor of Slurm jobs, with a folder of its own."""
    logs = args.runs_dir.resolve() / ".submitit" / f"{int(time.time())}_{os.getpid()}" / "%j"
    executor = submitit.AutoExecutor(logs, cluster="slurm")
    executor.update_parameters(
        timeout_min=args.time,
        gpus_per_node=args.gpus,
        cpus_per_task=args.cpus or args.num_threads,
        slurm_job_name=args.study.stem,
        slurm_partition=args.partition,
        slurm_array_parallelism=args.jobs,
    )
    return executor


def error_lines(text: str) -> str:
    """What a run printed from its error on, or its last lines, since it was last started."""
    lines = re.split(r"^\$ .*\n", text, flags=re.M)[-1].splitlines()
    errors = [i for i, line in enumerate(lines) if re.search("error|traceback", line, re.I)]
    start = errors[0] if errors else -3
    return "\n".join(f"    {line}" for line in lines[start:][-60:])


def report_ended(run: Run, job, seconds: float) -> bool:
    """Print how a run ended, with its error if it is not complete; whether it is."""
    score = printed_score(run.folder)
    what = f"finished, final score {score}"
    if score is None:
        log = run.folder / "output.txt"
        text = log.read_text(errors="replace") if log.exists() else str(job.exception())
        what = f"NOT COMPLETE\n{error_lines(text)}"
    tqdm.write(f"{run.folder.name} ({seconds:.0f} s): {what}", file=sys.stdout)
    sys.stdout.flush()
    return score is not None


def sweep(args: Args) -> None:
    """Run what is not complete. Exit code 1 if a run failed, 130 if Ctrl-C stopped the sweep."""
    for name, least in dict(jobs=1, num_threads=1, gpus=0, time=1, cpus=1).items():
        if getattr(args, name) is not None and getattr(args, name) < least:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {least}")
    slurm = args.executor == "slurm"
    if slurm and not (shutil.which("sbatch") and shutil.which("srun")):
        fail("--executor slurm: finds no sbatch and srun here, must be started where Slurm is")
    runs, archived = read_study(args.study, args.runs_dir), archived_runs(args.results)
    todo = [r for r in runs if r.folder.name not in archived and not printed_score(r.folder)]
    complete, failed = len(runs) - len(todo), 0
    check_flags(todo)
    try:
        args.runs_dir.mkdir(parents=True, exist_ok=True)
        executor = make_executor(args) if slurm else ThreadPoolExecutor(args.jobs)
    except OSError as error:
        fail(f"--runs-dir {args.runs_dir}: must be a folder to write to ({error.strerror})")
    print(
        f"{len(runs)} runs: {complete} complete, {len(todo)} to run in {args.runs_dir}", flush=True
    )

    logging.getLogger("submitit").setLevel(logging.ERROR)  # it warns of a missing sacct each time
    if not slurm:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(args.gpus)))
    stop, room, pause = threading.Event(), args.jobs, 0.2  # seconds
    if slurm:
        room, pause = MAX_ARRAY, 10
    running = []  # runs, each with its job and when it was submitted
    bar = tqdm(total=len(runs), initial=complete, unit="run", disable=None, smoothing=0)
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background job ignores SIGINT
        signal.signal(number, signal.default_int_handler)
    try:
        while todo or running:
            free = room - len(running) if not (slurm and running) else 0  # one array at a time
            batch, todo = todo[:free], todo[free:]
            columns = [
                (r.script, [*r.flags, "--num-threads", str(args.num_threads)], r.folder)
                for r in batch
            ]
            if slurm and batch:
                try:
                    jobs = executor.map_array(execute, *zip(*columns, strict=True))
                except (submitit.core.utils.FailedJobError, RuntimeError) as error:
                    fail(f"--executor slurm: {str(error).strip().splitlines()[-1]}")
            else:
                jobs = [executor.submit(execute, *own, stop.is_set) for own in columns]
            running += [(run, job, time.monotonic()) for run, job in zip(batch, jobs, strict=True)]
            done = ended_jobs([job for _, job, _ in running])
            for run, job, started in running:
                if job in done:
                    failed += not report_ended(run, job, time.monotonic() - started)
                    bar.update()
            running = [entry for entry in running if entry[1] not in done]
            bar.refresh()
            time.sleep(pause)
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        bar.close()
        jobs = [job for _, job, _ in running]
        stop.set()
        for job in jobs if slurm else []:
            job.cancel()
        while len(ended_jobs(jobs)) < len(jobs):
            time.sleep(pause)
        print("stopped; the same command goes on from the last checkpoints")
        raise SystemExit(130) from None
    bar.close()
    if failed:
        print(f"{failed} of {len(runs)} runs are not complete; the same command tries them again")
        raise SystemExit(1)


if __name__ == "__main__":
    sweep(tyro.cli(Args))
