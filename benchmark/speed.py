"""Seconds per iteration of every script, by phase; with --against those of another checkout too.

Each script runs as a process with its defaults, but for evaluation and metrics, which are not
counted; the first iteration of a run, which warms up, is not counted either. Two checkouts take
turns, run by run. A further run in this process says which share of an iteration the
environments' own steps and the matrix products (with the convolutions) take.

    python benchmark/speed.py --against ../before
"""

import importlib
import io
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parent.parent
PHASES = ("env", "inference", "update", "sparsify")
PRODUCTS = re.compile(r"aten::(mm|addmm|bmm|baddbmm|.*convolution.*)$")
NEVER = 10**9

# name -> script, flags that are not its defaults, timesteps of an iteration
ARMS = {
    "MTPPO dense": ("mtppo_gmp", {"sparsity": 0.0}, 2000),
    "MTPPO GMP": ("mtppo_gmp", {"prune_start": 0.0}, 2000),
    "MTPPO SET": ("mtppo_set", {}, 2000),
    "MoE GMP": ("moe_sparse", {"prune_start": 0.0}, 2000),
    "MOORE GMP": ("moore_sparse", {"prune_start": 0.0}, 2000),
    "MT-SAC GMP": (
        "mtsac_sparse_metaworld",
        {"prune_start": 0.0, "learning_starts": 5000, "vectorization": "sync"},
        5000,
    ),
}


@dataclass
class Args:
    """Seconds per iteration of every script, by phase."""

    arms: tuple[str, ...] = tuple(ARMS)  # which of them
    against: Path | None = None  # another checkout to compare with
    rounds: int = 3  # runs of each arm (and checkout)
    iterations: int = 5  # counted iterations of a run (MT-SAC, with 500 updates in one: 1)
    device: Literal["cpu", "cuda"] = "cpu"  # where the scripts compute


def fail(message: str):
    """End with one line on standard error and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def flags_of(arm: str, iterations: int, device: str, run_dir: str) -> dict:
    """All flags of a run of this many iterations, after one that warms up."""
    script, flags, stride = ARMS[arm]
    iterations = 1 if script.startswith("mtsac") else iterations
    common = dict(eval_frequency=NEVER, plasticity_frequency=NEVER, checkpoint_frequency=NEVER)
    common |= dict(num_threads=1, eval_episodes=1, device=device, run_dir=run_dir)
    return common | dict(total_timesteps=(1 + iterations) * stride) | flags


def measure(checkout: Path, arm: str, args: Args) -> dict[str, float]:
    """phase -> median seconds of an iteration, of one run of a checkout's script."""
    with tempfile.TemporaryDirectory() as run_dir:
        words = [sys.executable, f"{ARMS[arm][0]}.py"]
        for name, value in flags_of(arm, args.iterations, args.device, run_dir).items():
            words += [f"--{name.replace('_', '-')}", str(value)]
        ended = subprocess.run(words, cwd=checkout, capture_output=True, text=True)
        if ended.returncode:
            fail(f"{checkout}: {ended.stderr.strip().splitlines()[-1]}")
        log = EventAccumulator(run_dir, size_guidance={"scalars": 0}).Reload()
        seconds = {p: np.diff([e.value for e in log.Scalars(f"time/{p}")]) for p in PHASES}
    return {phase: float(np.median(values)) for phase, values in seconds.items()}


def shares(arm: str, args: Args) -> tuple[float, float]:
    """The shares of an iteration that the environments' own steps and the matrix products take."""
    sys.path.insert(0, str(ROOT))
    script = importlib.import_module(ARMS[arm][0])
    runs, spent, before = [], [0.0], []
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (args.device == "cuda")
    profiler = profile(activities=activities)

    class Watched(script.Run):
        def end_iteration(self, *args):
            super().end_iteration(*args)
            if not before:  # what follows is counted
                before.append((spent[0], sum(self.seconds[phase] for phase in PHASES)))
                profiler.start()
            runs.append(self)

    def timed(step):
        def run_timed(*args, **others):
            start = time.perf_counter()
            result = step(*args, **others)
            spent[0] += time.perf_counter() - start
            return result

        return run_timed

    if ARMS[arm][0].startswith("mtsac"):
        from metaworld.sawyer_xyz_env import SawyerXYZEnv as Env

        nothing = SimpleNamespace(successes=np.zeros((10, 1)), rewards=torch.zeros(10, 1, 1))
        replaced = dict(evaluate_mode=lambda *_: nothing, critic_error=lambda *_: 0.0)
        replaced |= dict(measure_networks=lambda *_: {})
    else:
        from minigrid.minigrid_env import MiniGridEnv as Env

        replaced = dict(evaluate=lambda *_: [[(0.0, 1)]] * 5, measure_plasticity=lambda *_: {})
    own = {name: getattr(script, name) for name in (*replaced, "Run")}, Env.step
    for name, value in (replaced | dict(Run=Watched)).items():
        setattr(script, name, value)
    Env.step = timed(Env.step)
    with tempfile.TemporaryDirectory() as run_dir, redirect_stdout(io.StringIO()):
        script.train(script.Args(**flags_of(arm, 2, args.device, run_dir)))
        profiler.stop()
    for name, value in own[0].items():
        setattr(script, name, value)
    Env.step = own[1]
    time_of = "self_device_time_total" if args.device == "cuda" else "self_cpu_time_total"
    events = [event for event in profiler.key_averages() if PRODUCTS.match(event.key)]
    products = sum(getattr(event, time_of) for event in events) / 1e6
    [(spent_before, seconds_before)] = before
    total = sum(runs[0].seconds[phase] for phase in PHASES) - seconds_before
    return (spent[0] - spent_before) / total, products / total


def row(name: str, seconds: list[dict[str, float]]) -> str:
    """Medians over the rounds, as a row of a table."""
    cells = [statistics.median(s[phase] for s in seconds) for phase in PHASES]
    cells.append(statistics.median(sum(s.values()) for s in seconds))
    return " | ".join([f"| {name}", *(f"{cell:.2f}" for cell in cells)])


def speed(args: Args) -> None:
    """Print a table of the arms."""
    for arm in args.arms:
        if arm not in ARMS:
            fail(f"--arms {arm}: must be of {', '.join(ARMS)}")
    for name in ("rounds", "iterations"):
        if getattr(args, name) < 1:
            fail(f"--{name} {getattr(args, name)}: must be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: must be cpu, no CUDA here")
    checkouts = {"this": ROOT} | ({"other": args.against.resolve()} if args.against else {})
    for checkout in checkouts.values():
        for arm in args.arms:
            if not (checkout / f"{ARMS[arm][0]}.py").is_file():
                fail(f"--against {checkout}: holds no {ARMS[arm][0]}.py, must be a checkout")
    print(f"seconds per iteration, medians of {args.rounds} runs, one thread, {args.device}\n")
    titles = [*PHASES, "sum", "own steps", "products", *(["ratio"] if args.against else [])]
    print(" | ".join(["| ", *titles]), "|\n" + "|-" * (len(titles) + 1) + "|")
    for arm in args.arms:
        seconds = {name: [] for name in checkouts}
        for _ in range(args.rounds):
            for name, checkout in checkouts.items():
                seconds[name].append(measure(checkout, arm, args))
        own_steps, products = shares(arm, args)
        cells = [row(arm, seconds["this"]), f"{own_steps:.0%}", f"{products:.0%}"]
        if args.against:
            pairs = zip(seconds["this"], seconds["other"], strict=True)
            ratios = [sum(ours.values()) / sum(theirs.values()) for ours, theirs in pairs]
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            print(" | ".join([*cells, spread]), "|")
            cells = [row(f"{arm}, other", seconds["other"]), "", "", ""]
        print(" | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    speed(tyro.cli(Args))
