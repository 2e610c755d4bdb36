"""Seconds of an iteration of every script, by phase; with --against, those of another checkout too.

A process of its own imports a script, puts timed functions in place of the script's own, and calls
train with its defaults, but for a short run with one measurement and one evaluation, at its end.
The first iteration warms up and is not counted. Two checkouts take turns, run by run.

    python benchmark/speed.py --against ../before
"""

import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
PHASES = {  # function of a script -> its phase
    "estimate_advantages": "update",
    "update_critic": "update",
    "update_actor": "update",
    "update": "update",
    "measure_plasticity": "metrics",
    "measure_networks": "metrics",
}
# Of an iteration (rest: choosing actions, masks, bookkeeping), and what is done once in a while
COLUMNS = ("environments", "update", "rest", "sum", "metrics", "evaluation")
NEVER = 10**9
MTSAC = dict(learning_starts=5000, vectorization="sync", eval_episodes=1, prune_start=0.0)
# name -> script, what is not its default, timesteps of an iteration
METHODS = {
    "MTPPO dense": ("mtppo_gmp", dict(sparsity=0.0), 2000),
    "MTPPO GMP": ("mtppo_gmp", dict(prune_start=0.0), 2000),
    "MTPPO SET": ("mtppo_set", {}, 2000),
    "MoE GMP": ("moe_sparse", dict(prune_start=0.0), 2000),
    "MOORE GMP": ("moore_sparse", dict(prune_start=0.0), 2000),
    "MT-SAC GMP": ("mtsac_sparse_metaworld", MTSAC, 5000),
}


@dataclass
class Args:
    """Seconds of an iteration of every script, by phase."""

    methods: tuple[Literal[*METHODS], ...] = tuple(METHODS)  # which of them
    against: Path | None = None  # another checkout to compare with
    rounds: int = 3  # runs of each method, in each checkout
    iterations: int = 5  # counted iterations of a run (MT-SAC, with 500 updates in one: 1)
    device: Literal["cpu", "cuda"] = "cpu"  # where the scripts compute

    def __post_init__(self):
        for name in ("rounds", "iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.against and not (self.against / "mtppo_gmp.py").is_file():
            raise ValueError(f"--against {self.against}: must be a checkout of this repository")


def time_train(script: str, flags: dict) -> None:
    """Train as the flags say and print {phase: seconds}, as JSON: medians over the iterations."""
    module, spans = importlib.import_module(script), []  # (phase, start, end) of each call

    def timed(phase, function):
        def call(*args, **others):
            start = time.perf_counter()
            result = function(*args, **others)
            if phase == "update" and flags["device"] == "cuda":
                torch.cuda.synchronize()  # a GPU is still at it
            spans.append((phase, start, time.perf_counter()))
            return result

        return call

    def timed_environments(make):
        def call(*args):
            env = make(*args)
            env.step, env.reset = (timed("environments", f) for f in (env.step, env.reset))
            return env

        return call

    for name in PHASES.keys() & vars(module).keys():
        setattr(module, name, timed(PHASES[name], getattr(module, name)))
    for name in {"make_env", "make_vector_env"} & vars(module).keys():
        setattr(module, name, timed_environments(getattr(module, name)))
    module.Run.end_iteration = timed("log", module.Run.end_iteration)
    module.train(module.Args(**flags))

    [(_, metrics_start, metrics_end)] = [span for span in spans if span[0] == "metrics"]
    logs = [span for span in spans if span[0] == "log"]  # each at the end of an iteration
    ends = [start for _, start, _ in logs[1:-1]] + [metrics_start]
    iterations = []
    for (_, _, start), end in zip(logs[:-1], ends, strict=True):
        seconds = dict(environments=0.0, update=0.0, sum=end - start)
        for phase, called, returned in spans:
            if phase in seconds and start <= called < end:
                seconds[phase] += returned - called
        seconds["rest"] = seconds["sum"] - seconds["environments"] - seconds["update"]
        iterations.append(seconds)
    medians = {phase: statistics.median(s[phase] for s in iterations) for phase in iterations[0]}
    medians |= dict(metrics=metrics_end - metrics_start, evaluation=logs[-1][1] - metrics_end)
    print(json.dumps(medians))


def measure(checkout: Path, method: str, args: Args) -> dict[str, float]:
    """{phase: seconds} of one run of a checkout's script, in a process of its own."""
    script, flags, stride = METHODS[method]
    iterations = 1 if script.startswith("mtsac") else args.iterations
    with tempfile.TemporaryDirectory() as run_dir:
        common = dict(total_timesteps=(1 + iterations) * stride, run_dir=run_dir, num_threads=1)
        common |= dict(eval_frequency=NEVER, plasticity_frequency=NEVER, device=args.device)
        flags = common | dict(checkpoint_frequency=NEVER) | flags
        code = f"import speed; speed.time_train({script!r}, {flags!r})"
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
        words = [sys.executable, "-c", code]  # which imports from its working folder first
        ended = subprocess.run(words, cwd=checkout, env=environment, capture_output=True, text=True)
    if ended.returncode:
        sys.exit(f"error: {method} in {checkout}\n{ended.stderr}")
    return json.loads(ended.stdout.splitlines()[-1])


def speed(args: Args) -> None:
    """Print a table of the methods."""
    checkouts = {"": ROOT} | ({", other": args.against} if args.against else {})
    ratios = ["ratio of sums (range)", "of evaluations (range)"] if args.against else []
    print(f"seconds of an iteration, medians of {args.rounds} runs, one thread, {args.device}\n")
    titles = ["", *COLUMNS, *ratios]
    print("|", " | ".join(titles), "|\n" + "|-" * len(titles) + "|")
    for method in args.methods:
        seconds = {name: [] for name in checkouts}
        for _ in range(args.rounds):
            for name, checkout in checkouts.items():
                seconds[name].append(measure(checkout, method, args))
        for name, runs in seconds.items():
            cells = [f"{statistics.median(s[column] for s in runs):.2f}" for column in COLUMNS]
            for column in ("sum", "evaluation") if args.against and name == "" else ():
                pairs = zip(runs, seconds[", other"], strict=True)
                ratio = [ours[column] / theirs[column] for ours, theirs in pairs]
                spread = f"{min(ratio):.2f} to {max(ratio):.2f}"
                cells.append(f"{statistics.median(ratio):.2f} ({spread})")
            print("|", " | ".join([method + name, *cells]), "|", flush=True)


if __name__ == "__main__":
    speed(tyro.cli(Args))
