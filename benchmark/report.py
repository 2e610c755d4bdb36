"""Tables and figures of finished runs, from results.csv files and run folders.

A run's score is its mean over the tasks, a method's the interquartile mean (IQM) of its runs'
scores with a 95 % bootstrap interval (Agarwal et al. 2021), next to the paper's. Writes report.md,
figures, results.csv (a row per run and evaluation) and arguments.json (those of each method). These
two hold all that is read of a run, so that its folder need not be kept. Incomplete runs and runs
with NaN are named and left out.

Of a study, runs are read from the results.csv files in --results and, where these have none, from
run folders; its methods have the names that it gives. Runs in folders are called by their logged
arguments, as in the paper's tables (MTPPO GMP), with any other argument in which they differ.

    python benchmark/report.py benchmark/studies/experiment1_mt5_mtppo.toml --out report
    python benchmark/report.py runs/some_run runs/folder_of_runs
"""

import csv
import itertools
import json
import logging
import math
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator
from scipy.stats import chi2, norm, rankdata, t, trim_mean
from sweep import RESULTS, fail, read_study
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

RESAMPLES = 50_000
BAND_RESAMPLES = 2000  # of the bands in figures
SWAPS = 100_000  # of the swap test with more than MAX_EXACT seeds
MAX_EXACT = 15
ARCHITECTURES = ("MTPPO", "MoE", "MOORE", "MT-SAC")
# Arguments that do not make another method
NEUTRAL = {"benchmark", "seed", "run_dir", "resume", "num_threads", "device"}
NEUTRAL |= {"checkpoint_frequency", "vectorization", "env_ids", "env_names"}
COLUMNS = ("method", "run", "benchmark", "seed", "timestep")  # then measure/task, and metrics
# The paper's table holds for these arguments, where a run has them, at the end of its budget
PAPER_ARGS = dict(gamma="0.99", gae_lambda="0.95", clip_coef="0.2", ent_coef="0.01")
PAPER_ARGS |= dict(num_steps="2000", update_epochs="8", minibatch_size="256")
PAPER_ARGS |= dict(critic_epochs="1", critic_minibatch_size="2000", num_experts="0")
PAPER_ARGS |= dict(orthogonal_mix="1.0", redo_tau="0.001", max_resets="2")
PAPER_ARGS |= dict(prune_start="0.05", prune_end="0.8", set_zeta="0.3", set_frequency="2000")
PAPER_ARGS |= dict(set_epsilon="None", set_regrow="random", set_grow="zero", updates_per_step="1")
PAPER_ARGS |= dict(batch_size="128", buffer_size="1000000", learning_starts="40000")
PAPER_ARGS |= dict(alpha_lr="0.0003", tau="0.005", max_grad_norm="1.0", max_q="5000.0")
PPO_ARGS = dict(actor_lr="0.001", critic_lr="0.001", prune_frequency="500")
SAC_ARGS = dict(actor_lr="0.0003", critic_lr="0.0003", prune_frequency="5000", adam_eps="1e-05")
PAPER_TIMESTEPS = {"MT3": 400_000, "MT5": 400_000, "MT7": 400_000, "MT10": 20_000_000}
METRICS = {
    "actor_dormant_ratio": "dormant, actor",
    "critic_dormant_ratio": "dormant, critic",
    "actor_effective_rank": "effective rank, actor",
    "critic_effective_rank": "effective rank, critic",
    "fisher_trace": "Fisher trace, actor",
    "critic_error": "NMSE of Q",  # of MT-SAC alone
}
# Okabe and Ito's colours, which differ with any colour vision; markers for print in grey
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
COLOURS += ("#999999",)
MARKERS = "osD^vPX*p"
PERCENT = FuncFormatter(lambda share, _: f"{100 * share:.3g} %")
WIDTH = 7  # inches: a page's, so that a figure is printed in its own size
FONT_SIZE = 8
plt.rcParams.update({"font.size": FONT_SIZE, "axes.titlesize": "medium"})
TEXT = """# Report

{answer}

Runs: {runs}. A run's score is the mean over its tasks, IQM the mean of the middle half of the runs'
scores. Gain: the IQM less that of the method in the column against, over the seeds that both have.
Intervals are 95 % bootstrap intervals over seeds ({resamples:,} resamples, percentiles expanded for
few seeds, Hesterberg 2015), too narrow with fewer than six. p is that of the two-sided test that
swaps the two methods' scores within seeds: all swaps up to {max_exact} seeds, {swaps:,} random ones
above. Interval and p come from different methods and may disagree; the verdict follows p.
Significant: p below 0.05, not corrected for the number of comparisons; five seeds or fewer cannot
reach it. Methods whose runs end at different timesteps are not compared.

The arguments in which two compared methods differ, of those that both have:

{differences}

![](learning_curves.png)
![](final_returns.png)
![](plasticity.png)

## More on the scores

Late: means of the last five evaluations. Probability of improvement: that a run scores higher than
one of the other method, by chance 0.5. Seeds needed: to show a gain of 0.1 in four of five studies,
estimated by the spread of these runs, with the 95 % interval of this estimate (6: six or fewer).

{details}

## Plasticity

Means over seeds, actor / critic, at the timestep of the first table. Neurons without an unmasked
incoming weight are left out of dormancy, masked weights out of the Fisher trace.

{plasticity}

Differences to the other method, with Student's paired 95 % interval and p of the swap test:

{plasticity_differences}

Dormancy and score over all runs, whatever their method (these intervals draw runs, not seeds):

{correlations}

![](dormancy_return.png)

## Runs left out

{left_out}
"""


@dataclass
class Args:
    """Tables and figures of finished runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]]  # study files, run folders, folders that hold them
    out: Path = Path("report")  # folder to write to
    against: str = ""  # method to compare all others with (default: as the study says)
    timestep: int | None = None  # evaluation that the tables show (default: the last)
    runs_dir: Path = Path("runs/sweep")  # folder of a study's run folders
    # folder of folders with a results.csv, whose runs a study may use
    results: Path | None = RESULTS


@dataclass
class Run:
    """One run, as its log or a results.csv has it."""

    name: str  # of its folder
    problem: str = ""  # why it is left out
    method: str = ""
    against: str = ""  # the method that it is compared with, if not the first of its architecture
    row: str = ""  # the method of the paper's table that it is a run of
    architecture: str = ""
    benchmark: str = ""
    seed: int = 0
    args: dict[str, str] = field(default_factory=dict)
    rows: list[dict[str, str]] = field(default_factory=list)  # of results.csv
    measure: str = ""  # what the scores are: normalized_return or success_rate
    tasks: list[str] = field(default_factory=list)
    timesteps: list[int] = field(default_factory=list)  # of the evaluations
    scores: np.ndarray | None = None  # (evaluation, task)
    metrics: dict[str, np.ndarray] = field(default_factory=dict)  # latest values (evaluation,)
    at: int = 0  # the timestep that tables show
    style: dict[str, str] = field(default_factory=dict)  # in figures

    def score(self, evaluations: int = 1) -> np.ndarray:
        """Of each task (task,), a mean of so many evaluations up to the one shown."""
        end = self.timesteps.index(self.at) + 1
        return self.scores[max(end - evaluations, 0) : end].mean(0)

    def metric(self, name: str) -> float:
        return self.metrics[name][self.timesteps.index(self.at)]


# Reading


def paper_method(args: dict[str, str]) -> tuple[str, str]:
    """Architecture, and the method's name in the paper's table, of a run's logged arguments.

    The log does not name the script, but each script has arguments that only it has.
    """
    markers = {"MOORE": "orthogonal_mix", "MoE": "num_experts", "MT-SAC": "prune"}
    architecture = next((a for a, marker in markers.items() if marker in args), "MTPPO")
    sparsifier = args.get("sparsifier", "set" if "set_zeta" in args else "gmp")
    parts = []
    if sparsifier != "none" and float(args["sparsity"]) and args.get("prune") != "none":
        share = "" if float(args["sparsity"]) == 0.95 else f" {float(args['sparsity']):.4g}"
        pruned = {"actor": " on the actor", "critic": " on the critic", "both": " on both"}
        parts.append(sparsifier.upper() + share + pruned.get(args.get("prune"), ""))
    for name, label in {"layer_norm": "LayerNorm", "pcgrad": "PCGrad"}.items():
        parts += [label] * (args.get(name) == "True")
    usual = dict(weight_decay="1e-06", redo_frequency="5000", reset_frequency="100000")
    for (name, value), label in zip(usual.items(), ("weight decay", "ReDo", "Reset"), strict=True):
        if float(own := args.get(name, "0")):
            parts.append(label if own == value else f"{label} {own}")
    return architecture, f"{architecture} {' + '.join(parts) or 'dense'}"


def read_log(folder: Path) -> Run:
    """Read a run's log; its problem is set if it has not reached its end or holds NaN."""
    if not any(folder.glob("events.out.tfevents.*")):
        return Run(folder.name, "not started")
    # Reload drops what a killed process logged after the checkpoint that its successor began from
    log = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    if "args/text_summary" not in log.Tags()["tensors"]:
        return Run(folder.name, "not started (its log holds no arguments)")
    latest = log.Tensors("args/text_summary")[-1]  # a resumed run may have other flags
    text = latest.tensor_proto.string_val[0].decode()
    args = dict(line.strip("|").split("|", 1) for line in text.splitlines()[2:])
    scores, metrics = {}, {}  # measure/task, metric -> timestep -> value
    for tag in log.Tags()["scalars"]:
        kind, name, *rest = tag.split("/")
        values = {event.step: event.value for event in log.Scalars(tag)}
        if kind == "eval" and name in ("normalized_return", "success_rate") and rest:
            scores[f"{name}/{rest[0]}"] = values
        elif kind == "plasticity":
            metrics[name] = values
        elif kind == "sparsity" and not rest:
            metrics[name if name.endswith("_kept") else f"{name}_sparsity"] = values
        bad = [step for step, value in values.items() if not math.isfinite(value)]
        if kind in ("eval", "plasticity") and bad:
            return Run(folder.name, f"NaN or infinity in {tag} from timestep {bad[0]}")
    timesteps = sorted(set.intersection(*map(set, scores.values()))) if scores else []
    evaluated, total = max(timesteps, default=0), int(args["total_timesteps"])
    iteration = min(metrics.get("actor_sparsity", [0]))  # logged in each
    if not evaluated or evaluated + iteration <= total:
        return Run(folder.name, f"incomplete: evaluated until timestep {evaluated} of {total}")
    own_tasks = {args.get("env_ids", "()"), args.get("env_names", "()")} != {"()"}
    benchmark = ", ".join(task.split("/")[1] for task in scores) if own_tasks else args["benchmark"]
    rows = []
    for timestep in timesteps:
        row = dict(run=folder.name, benchmark=benchmark, seed=args["seed"], timestep=str(timestep))
        row |= {task: f"{values[timestep]:.5g}" for task, values in scores.items()}
        for name, values in metrics.items():  # the latest by then
            if before := [step for step in values if step <= timestep]:
                row[name] = f"{values[max(before)]:.5g}"
        rows.append(row)
    return make_run(rows, args)


def make_run(rows: list[dict[str, str]], args: dict[str, str], method: str = "") -> Run:
    """A run from its rows of results.csv and its arguments."""
    first, run = rows[0], Run(rows[0]["run"], method=method, rows=rows)
    run.benchmark, run.seed = first["benchmark"], int(first["seed"])
    run.architecture, run.row = paper_method(args)
    dense = not {"GMP", "SET"} & set(run.row.split())  # prune_... and set_... have no effect
    idle = ("prune_", "set_") if dense else ()
    run.args = {k: v for k, v in args.items() if k not in NEUTRAL and not k.startswith(idle)}
    columns = [name for name in first if "/" in name and first[name]]
    run.measure, run.tasks = columns[0].split("/")[0], [name.split("/")[1] for name in columns]
    run.timesteps = [int(row["timestep"]) for row in rows]
    run.scores = np.array([[float(row[name]) for name in columns] for row in rows])
    metrics = {name for name in rows[-1] if "/" not in name} - {*COLUMNS}
    for name in metrics | set(METRICS):
        run.metrics[name] = np.array([float(row.get(name) or math.nan) for row in rows])
    return run


def read_results(path: Path) -> list[Run]:
    """The runs of a results.csv, with their arguments from the arguments.json beside it."""
    arguments, runs = json.loads((path.parent / "arguments.json").read_text()), {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            runs.setdefault((row.pop("method"), row["run"]), []).append(row)
    return [make_run(rows, arguments[method], method) for (method, _), rows in runs.items()]


def write_results(runs: list[Run], out: Path) -> None:
    """One row per run and evaluation, with the latest value of every metric by then, as
    results.csv; the arguments of each method as arguments.json."""
    arguments = {run.method: run.args for run in runs}
    (out / "arguments.json").write_text(json.dumps(arguments, indent=1) + "\n")
    names = {name: 0 for run in runs for name, value in run.rows[-1].items() if value}
    tasks = [name for name in names if "/" in name]
    with open(out / "partial.csv", "w", newline="") as file:
        columns = [*COLUMNS, *tasks, *sorted(names.keys() - {*COLUMNS, *tasks})]
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(dict(row, method=run.method) for run in runs for row in run.rows)
    os.replace(out / "partial.csv", out / "results.csv")


def differing_args(runs: list[Run]) -> list[str]:
    """The arguments in which runs differ, of those that all of them have."""
    names = set.intersection(*(set(run.args) for run in runs)) - NEUTRAL
    return sorted(name for name in names if len({run.args[name] for run in runs}) > 1)


def call_by_arguments(runs: list[Run]) -> None:
    """Set the method of runs of no study: the paper's name, and the arguments in which the runs of
    this name differ."""
    for alike in group(runs, "row").values():
        names = differing_args(alike)
        for run in alike:
            own = [f"{name.replace('_', ' ')} {run.args[name]}" for name in names]
            run.method = ", ".join([run.row, *own])


def read_runs(args: Args) -> tuple[list[Run], list[Run]]:
    """Complete runs, in the order of benchmarks and methods, and those left out."""
    if not args.runs:
        fail("no runs given, must be study files, run folders or folders of run folders")
    studies = [path for path in args.runs if path.suffix == ".toml"]
    plans = [plan for path in studies for plan in read_study(path, args.runs_dir)]
    files = sorted(args.results.glob("*/results.csv")) if studies and args.results else []
    known = {run.name: run for path in files for run in read_results(path)}
    found, folders = {}, set()  # (method, name of the folder) -> run
    for plan in plans:
        run = known.get(plan.folder.name) or read_log(plan.folder)
        run = replace(run, method=plan.method, against=plan.against, seed=plan.seed)
        run.benchmark = run.benchmark or plan.benchmark
        found[plan.method, plan.folder.name] = run
    for path in set(args.runs) - set(studies):
        marks = ("events.out.tfevents.*", "checkpoint.pt", "output.txt")
        own = {file.parent.resolve() for mark in marks for file in path.rglob(mark)}
        if not own:
            fail(f"{path}: must be a study file, a run folder or a folder of run folders")
        folders |= own
    planned = {plan.folder for plan in plans}
    others = [read_log(folder) for folder in sorted(folders - planned)]
    call_by_arguments([run for run in others if not run.problem])
    everything = [*found.values(), *others]
    left_out = [run for run in everything if run.problem]
    runs = [run for run in everything if not run.problem]
    if not runs:
        fail(f"none of {len(left_out)} runs is complete, the first is {left_out[0].problem}")
    for own in group(runs, "method").values():
        if names := differing_args(own):
            fail(f"{own[0].method}: its runs must have the same arguments, they differ in {names}")

    rows = list(dict.fromkeys(method for _, method in read_paper()))
    order = {method: i for i, (method,) in enumerate(group(runs, "method"))}
    if not studies:  # the paper's order
        ranks = {run.method: rows.index(run.row) if run.row in rows else len(rows) for run in runs}
        order = {method: (rank, method) for method, rank in ranks.items()}

    def place(run):
        architecture = ARCHITECTURES.index(run.architecture)
        return len(run.benchmark), run.benchmark, architecture, order[run.method], run.seed

    runs.sort(key=place)
    refuse_equal(runs)
    return runs, left_out


def refuse_equal(runs: list[Run]) -> None:
    """End if two runs have the same method, benchmark and seed."""
    for (method, benchmark, seed), own in group(runs, "method", "benchmark", "seed").items():
        if len(own) > 1:
            fail(f"{own[0].name} and {own[1].name}: both {method} on {benchmark} with seed {seed}")


def choose_timestep(runs: list[Run], timestep: int | None) -> None:
    """Set the asked evaluation, or the last, of a method's runs on a benchmark."""
    evaluated = sorted(set.intersection(*(set(run.timesteps) for run in runs)))
    if timestep is not None and timestep not in evaluated:
        fail(
            f"--timestep {timestep}: must be an evaluation of {runs[0].method}, one of {evaluated}"
        )
    for run in runs:
        run.at = evaluated[-1] if timestep is None else timestep


def group(runs: list[Run], *names: str) -> dict[tuple, list[Run]]:
    """Runs by these attributes, in the order of the runs."""
    groups = {}
    for run in runs:
        groups.setdefault(tuple(getattr(run, name) for name in names), []).append(run)
    return groups


def matched(runs: list[Run]) -> dict[tuple[str, str], tuple[list[Run], list[Run]]]:
    """(benchmark, method) -> its runs and those of the method that it is compared with, of the
    seeds that both have, if there are two, and if both are shown at the same timestep."""
    first, methods, found = {}, group(runs, "benchmark", "method"), {}
    for (benchmark, method), own in methods.items():
        base = first.setdefault((benchmark, own[0].architecture), own)
        if against := own[0].against:
            base = methods.get((benchmark, against), own)
        seeds = {run.seed for run in own} & {run.seed for run in base}
        if base is not own and len(seeds) > 1 and own[0].at == base[0].at:
            own, base = ([run for run in side if run.seed in seeds] for side in (own, base))
            found[benchmark, method] = own, base
    return found


def is_papers(run: Run) -> bool:
    """Whether a run has the arguments that the paper's table holds for."""
    usual = PAPER_ARGS | (SAC_ARGS if run.architecture == "MT-SAC" else PPO_ARGS)
    return all(run.args.get(name, value) == value for name, value in usual.items())


def read_paper() -> dict[tuple[str, str], tuple[float, float, float]]:
    """(benchmark, method) -> IQM and interval of the paper's table."""
    with open(Path(__file__).parent / "paper.csv") as file:
        _, *rows = csv.reader(file)
    return {(benchmark, method): tuple(map(float, row)) for benchmark, method, *row in rows}


# Statistics


def run_scores(runs: list[Run], evaluations: int = 1) -> np.ndarray:
    """Each run's mean over its tasks: (run,)."""
    return np.array([run.score(evaluations).mean() for run in runs])


def iqm(scores: np.ndarray) -> np.ndarray:
    """Interquartile mean of runs' scores (..., run): (...), as aggregate_iqm of rliable."""
    return trim_mean(scores, 0.25, axis=-1)


def difference_of_iqms(scores: np.ndarray, base: np.ndarray) -> np.ndarray:
    """The IQM of scores (..., run) above that of other runs, base."""
    return iqm(scores) - iqm(base)


def mean_over_runs(values: np.ndarray) -> np.ndarray:
    return values.mean(-1)


def difference_of_means(values: np.ndarray, base: np.ndarray) -> np.ndarray:
    return mean_over_runs(values) - mean_over_runs(base)


def probability_of_improvement(scores: np.ndarray, base: np.ndarray) -> np.ndarray:
    """The probability that a run scores higher than one of base, both (..., run), a tie counting
    half: (...). Source: Agarwal et al. 2021, section 4.3."""
    signs = np.sign(scores[..., :, None] - base[..., None, :])
    return (signs.mean((-2, -1)) + 1) / 2


def interval(statistic, *methods: np.ndarray, resamples: int = RESAMPLES) -> np.ndarray | None:
    """95 % bootstrap interval of a statistic of methods' scores, each (..., run) of the same seeds:
    (2, ...), or None with one seed.

    It draws seeds with replacement, each with the runs of all methods, as they share layouts and
    initial weights. Its percentiles are expanded for few seeds (Hesterberg 2015, The American
    Statistician 69.4).
    """
    seeds = methods[0].shape[-1]
    if seeds == 1:
        return None
    tail = norm.cdf(math.sqrt(seeds / (seeds - 1)) * t.ppf(0.025, seeds - 1))
    rng, batch, values = np.random.default_rng(0), 1000, []
    for _ in range(resamples // batch):
        drawn = rng.integers(seeds, size=(batch, seeds))
        values.append(statistic(*(scores[..., drawn] for scores in methods)))
    return np.nanquantile(np.concatenate(values, axis=-1), (tail, 1 - tail), axis=-1)


def swap_test(statistic, scores: np.ndarray, base: np.ndarray, chance: float = 0.0) -> float:
    """Two-sided p of a statistic of two methods' scores (seed,), against its value by chance: how
    often it is as extreme when the two scores of a seed are swapped or not, at random.

    Exact up to MAX_EXACT seeds, where all swaps are made; above, SWAPS random ones and the
    observed one.
    """
    seeds = len(scores)
    exact = seeds <= MAX_EXACT
    if exact:
        swapped = np.arange(2**seeds)[:, None] >> np.arange(seeds) & 1 == 1  # (swap, seed)
    else:
        swapped = np.random.default_rng(0).random((SWAPS, seeds)) < 0.5
    values = [
        statistic(np.where(swap, base, scores), np.where(swap, scores, base))
        for swap in np.array_split(swapped, math.ceil(len(swapped) / 1000))
    ]
    observed = abs(statistic(scores, base) - chance)
    extreme = np.abs(np.concatenate(values) - chance) >= observed - 1e-9
    return extreme.mean() if exact else (extreme.sum() + 1) / (SWAPS + 1)


def seeds_needed(scores: np.ndarray, base: np.ndarray, gain: float = 0.1) -> str:
    """How many seeds show a gain in IQM, by Student's t at 5 %, in 80 % of studies, as text: by the
    spread of the difference between two methods' scores (seed,), and by the ends of its 95 %
    interval (that of a normal variable's). At least six, which the swap test needs."""
    few = len(scores)
    drawn = np.random.default_rng(0).integers(few, size=(10_000, few))
    spread = difference_of_iqms(scores[drawn], base[drawn]).std() * few / math.sqrt(few - 1)
    tried = np.arange(6, 501)
    errors = (t.ppf(0.975, tried - 1) + t.ppf(0.8, tried - 1)) / np.sqrt(tried)
    limits = np.sqrt((few - 1) / chi2.ppf((0.975, 0.025), few - 1))

    def seeds(factor):
        if not (enough := tried[errors * spread * factor <= gain]).size:
            return "over 500"
        return str(enough[0] if enough[0] < 10 else math.ceil(enough[0] / 5) * 5)

    return "{} ({} to {})".format(*map(seeds, (1, *limits)))


def spearman(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
    """Rank correlation along an axis, NaN where either does not vary."""
    x, y = (rankdata(values, axis=axis) for values in (x, y))
    x, y = (ranks - ranks.mean(axis, keepdims=True) for ranks in (x, y))
    with np.errstate(invalid="ignore"):
        return (x * y).sum(axis) / np.sqrt((x * x).sum(axis) * (y * y).sum(axis))


def describe_correlation(x: np.ndarray, y: np.ndarray) -> str:
    """Spearman's correlation over runs, with its 95 % bootstrap interval, in words."""
    if len(x) < 5:
        return f"no correlation ({len(x)} of at least 5 runs)"
    if not (np.ptp(x) and np.ptp(y)):
        return "no correlation (equal in all runs)"
    return f"Spearman {with_interval(spearman(x, y), interval(spearman, x, y))}, {len(x)} runs"


# Tables


def table(columns: list[str], rows: list[list]) -> str:
    """In markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def with_interval(value: float, limits, decimals: int = 2) -> str:
    numbers = np.round([value, *(() if limits is None else limits)], decimals) + 0.0  # no -0.00
    value, *limits = [f"{number:.{decimals}f}" for number in numbers]
    return f"{value} ({', '.join(limits) or 'no interval: 1 seed'})"


def shown_p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def verdict(p: float, seeds: int) -> str:
    """In words; 2 of the 2^seeds swaps are always as extreme."""
    if 2 / 2**seeds > 0.05:
        return f"{seeds} seeds: p is at least {2 / 2**seeds:.1g}"
    return "significant" if p < 0.05 else "not significant"


def answer_table(runs: list[Run]) -> str:
    """IQM per method and benchmark next to the paper's, unless an argument of PAPER_ARGS or the
    timestep is not the paper's, and the gain over the method that it is compared with."""
    paper, pairs, rows = read_paper(), matched(runs), []
    for (benchmark, method), own in group(runs, "benchmark", "method").items():
        same = is_papers(own[0]) and own[0].at == PAPER_TIMESTEPS.get(benchmark)
        theirs = paper.get((benchmark, own[0].row)) if same else None
        scores, compared = run_scores(own), ["-"] * 4
        if pair := pairs.get((benchmark, method)):
            sides = [run_scores(side) for side in pair]
            gain = difference_of_iqms(*sides), interval(difference_of_iqms, *sides)
            p = swap_test(difference_of_iqms, *sides)
            compared = [pair[1][0].method, with_interval(*gain), shown_p(p)]
            compared.append(verdict(p, len(sides[0])))
        ours = with_interval(iqm(scores), interval(iqm, scores))
        expected = with_interval(theirs[0], theirs[1:]) if theirs else "-"
        rows.append([benchmark, method, len(own), own[0].at, ours, expected, *compared])
    columns = "benchmark, method, seeds, timestep, IQM (95 % interval), paper, against"
    return table([*columns.split(", "), "gain (95 % interval)", "p", "verdict"], rows)


def describe_differences(runs: list[Run]) -> str:
    """Of each pair of compared methods, the arguments in which they differ."""
    lines = {}
    for own, base in matched(runs).values():
        names = differing_args([own[0], base[0]])
        shown = [f"`{name}` {own[0].args[name]}, not {base[0].args[name]}" for name in names]
        lines[f"- {own[0].method} against {base[0].method}: {'; '.join(shown) or 'none'}"] = None
    return "\n".join(lines) or "- no methods are compared"


def details_table(runs: list[Run]) -> str:
    """What the IQM hides, per method and benchmark."""
    rows, pairs = [], matched(runs)
    for (benchmark, method), own in group(runs, "benchmark", "method").items():
        scores, cells = run_scores(own), ["-"] * 5
        if pair := pairs.get((benchmark, method)):
            ends, tails = ([run_scores(side, n) for side in pair] for n in (1, 5))
            cells = []
            for statistic, sides, chance in (
                (difference_of_iqms, tails, 0),
                (probability_of_improvement, ends, 0.5),
            ):
                cells.append(with_interval(statistic(*sides), interval(statistic, *sides)))
                cells.append(shown_p(swap_test(statistic, *sides, chance)))
            cells.append(seeds_needed(*ends))
        each = ", ".join(f"{score:.2f}" for score in scores)
        late = f"{iqm(run_scores(own, 5)):.2f}"
        rows.append([benchmark, method, each, f"{scores.mean():.2f}", late, *cells])
    columns = "benchmark, method, score of each seed, mean, late IQM, late gain, p"
    columns += ", probability of improvement, p, seeds needed"
    return table(columns.split(", "), rows)


def measured(runs: list[Run]) -> dict[str, str]:
    """METRICS that some of these runs have."""

    def has(name):
        return np.isfinite(np.concatenate([run.metrics[name] for run in runs])).any()

    return {name: label for name, label in METRICS.items() if has(name)}


def plasticity_table(runs: list[Run]) -> str:
    """Means over seeds of every metric, per method and benchmark."""
    rows, columns = [], ["benchmark", "method", "dormant", "effective rank", "Fisher trace"]
    errors = ["critic_error"] if "critic_error" in measured(runs) else []
    for (benchmark, method), own in group(runs, "benchmark", "method").items():
        means = {name: np.mean([run.metric(name) for run in own]) for name in METRICS}
        dormant = [100 * means[f"{name}_dormant_ratio"] for name in ("actor", "critic")]
        ranks = [means[f"{name}_effective_rank"] for name in ("actor", "critic")]
        cells = ["{:.1f} / {:.1f} %".format(*dormant), "{:.0f} / {:.0f}".format(*ranks)]
        for name in ["fisher_trace", *errors]:  # with four digits
            cells.append(np.format_float_positional(means[name], 4, fractional=False, trim="-"))
        rows.append([benchmark, method, *cells])
    return table(columns + [METRICS[name] for name in errors], rows)


def plasticity_differences(runs: list[Run]) -> str:
    """Every metric less that of the method compared with, means over the seeds that both have."""
    rows, metrics = [], measured(runs)
    for (benchmark, method), pair in matched(runs).items():
        cells = [benchmark, method, pair[1][0].method]
        for name in metrics:
            sides = [np.array([run.metric(name) for run in side]) for side in pair]
            difference = sides[0] - sides[1]
            if not np.isfinite(difference).all():  # of MT-SAC alone, or not measured by then
                cells.append("-")
                continue
            scale = 100 if name.endswith("dormant_ratio") else 1
            decimals = 2 if scale == 100 or name == "critic_error" else 0
            n, mean = len(difference), scale * difference.mean()
            half = scale * t.ppf(0.975, n - 1) * difference.std(ddof=1) / math.sqrt(n)
            shown = with_interval(mean, (mean - half, mean + half), decimals)
            p = shown_p(swap_test(difference_of_means, *sides))
            cells.append(f"{shown}{' %' * (scale == 100)}, p {p}")
        rows.append(cells)
    if not rows:
        return "No two methods have two seeds in common."
    return table(["benchmark", "method", "against", *metrics.values()], rows)


def describe_left_out(runs: list[Run]) -> str:
    """A line per problem of a method's runs, or of a run of no study."""
    lines = []
    for (method, benchmark, problem), own in group(runs, "method", "benchmark", "problem").items():
        seeds = sorted(run.seed for run in own)
        shown = ", ".join(map(str, seeds))
        if len(seeds) > 2 and seeds == list(range(seeds[0], seeds[-1] + 1)):
            shown = f"{seeds[0]} to {seeds[-1]}"
        several = f"{method} on {benchmark}, seed{'s' * (len(seeds) > 1)} {shown}: {problem}"
        lines += [several] if method else [f"{run.name}: {problem}" for run in own]
    return "\n".join(f"- {line}" for line in lines)


# Figures


def choose_styles(runs: list[Run]) -> None:
    """Set colour and marker of every method, the same in all figures of all reports for the paper's
    dense, GMP and SET, or what is closest to them; its label is the method's name without the
    architecture, which titles the panel."""
    places = {}  # label -> colour; the paper's own methods first
    first = dict(dense=0, gmp=1, set=2)
    for run in sorted(runs, key=lambda run: not is_papers(run)):
        label = run.method.removeprefix(f"{run.architecture} ")
        if label not in places:
            place = first.get(label.replace(",", " ").split()[0].lower())
            if place is None or place in places.values():
                place = next(i for i in itertools.count(3) if i not in places.values())
            places[label] = place
        again, i = divmod(places[label], len(COLOURS))  # no pair twice
        marker = MARKERS[(i + again) % len(MARKERS)]
        run.style = dict(color=COLOURS[i], marker=marker, label=label)


def group_panels(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs by what may stand in one panel, under its title: those of unequal length may not."""
    panels = group(runs, "architecture", "benchmark", "at")
    several = len(group(runs, "at")) > 1
    return {
        f"{architecture}, {benchmark}" + f", timestep {at}" * several: own
        for (architecture, benchmark, at), own in panels.items()
    }


def subplots(rows: int, columns: int, height: float, width: float = WIDTH, sharey: bool = True):
    """A figure of this width, in inches, and its axes (row, column) of this height."""
    form = dict(squeeze=False, layout="constrained", figsize=(width, height * rows + 0.4))
    return plt.subplots(rows, columns, sharey=sharey, **form)


def finish(figure, path: Path) -> None:
    """One legend below all panels, and save."""
    entries = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for columns in range(len(entries), 0, -1):  # as many as fit
        legend = figure.legend(entries.values(), entries, loc="outside lower center", ncols=columns)
        if columns == 1 or legend.get_window_extent().width < figure.bbox.width:
            break
        legend.remove()
    rows = math.ceil(len(entries) / columns)
    figure.set_figheight(figure.get_figheight() + 0.2 * (rows - 1))
    figure.savefig(path, dpi=200, bbox_inches="tight")
    plt.close(figure)


def draw_curve(axes, runs: list[Run], values_of, statistic) -> None:
    """A statistic over runs, with its band, of values_of(run), one for each of its evaluations,
    where all of them have one."""
    timesteps = np.array(sorted(set.intersection(*(set(run.timesteps) for run in runs))))
    series = [dict(zip(run.timesteps, values_of(run), strict=True)) for run in runs]
    values = np.array([[own[timestep] for own in series] for timestep in timesteps])
    measured_in_all = np.isfinite(values).all(1)
    if not measured_in_all.any():
        return
    timesteps, values = timesteps[measured_in_all], values[measured_in_all]
    every = 0.2 if len(timesteps) > 1 else 1
    marks = dict(markevery=every, markersize=3, linewidth=1.2)
    axes.plot(timesteps, statistic(values), **runs[0].style, **marks)
    limits = interval(statistic, values, resamples=BAND_RESAMPLES)
    if limits is not None:
        band = dict(color=runs[0].style["color"], alpha=0.2, linewidth=0)
        axes.fill_between(timesteps, *limits, **band)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 4, 5, 10]))


def plot_learning_curves(runs: list[Run], path: Path) -> None:
    """IQM over training: a benchmark per row; a column for each architecture, and for each method
    that a study compares others with."""
    rows, columns = group(runs, "benchmark"), group(runs, "architecture", "against")
    width = WIDTH if len(columns) > 1 else WIDTH / 2
    figure, axes = subplots(len(rows), len(columns), 2.4, width)
    cells = itertools.product(rows, columns)
    for panel, ((benchmark,), (architecture, against)) in zip(axes.flat, cells, strict=True):
        own = [run for run in rows[(benchmark,)] if run.architecture == architecture]
        own = [run for run in own if against in (run.against, run.method)]
        panel.set_visible(bool(own))
        for method in group(own, "method").values():
            draw_curve(panel, method, lambda run: run.scores.mean(1), iqm)
            panel.set_ylabel(f"{method[0].measure.replace('_', ' ')} (IQM)")
        compared = f", against {against}" if against else ""
        panel.set(title=f"{architecture}, {benchmark}{compared}", xlabel="timesteps")
        panel.tick_params(labelleft=True)
    finish(figure, path)


def plot_plasticity(runs: list[Run], path: Path) -> None:
    """Means of the plasticity metrics over training, a row per architecture and benchmark;
    a metric whose means differ more than a hundredfold on a log scale."""
    rows, shown = group(runs, "architecture", "benchmark"), measured(runs)
    shown.pop("critic_effective_rank", None)  # no more fit the page
    figure, axes = subplots(len(rows), len(shown), 1.7, sharey=False)
    for (title, own), row in zip(rows.items(), axes, strict=True):
        for panel, metric in zip(row, shown, strict=True):
            for method in group(own, "method").values():
                draw_curve(panel, method, lambda run, m=metric: run.metrics[m], mean_over_runs)
            panel.set_xlim(0)
            heights = [y for line in panel.lines for y in line.get_ydata()]
            if max(heights, default=0) > 100 * min(heights, default=0) > 0:
                panel.set_yscale("log")
            else:
                panel.set_ylim(0)
            panel.xaxis.set_major_locator(MaxNLocator(2, steps=[1, 2, 5, 10]))
            if metric.endswith("dormant_ratio"):
                panel.yaxis.set_major_formatter(PERCENT)
        row[0].set_ylabel(", ".join(title).replace(", ", ",\n"))
    for top, bottom, name in zip(axes[0], axes[-1], shown.values(), strict=True):
        top.set_title(name)
        bottom.set_xlabel("timesteps")
    finish(figure, path)


def plot_final_scores(runs: list[Run], path: Path) -> None:
    """Each task's score: a small mark per seed, a large one for their IQM with its interval."""
    rows = group_panels(runs)
    figure, axes = subplots(len(rows), 1, 2.4)
    for (title, own), panel in zip(rows.items(), axes.flat, strict=True):
        tasks, methods = [*own[0].tasks, "mean of tasks"], group(own, "method").values()
        for number, method in enumerate(methods):
            scores, style = np.array([run.score() for run in method]), method[0].style
            places = np.arange(len(tasks)) + (number - (len(methods) - 1) / 2) * 0.8 / len(methods)
            samples = [*scores.T, scores.mean(1)]
            for place, sample in zip(places, samples, strict=True):
                small = style | dict(s=6, alpha=0.5, linewidths=0, label="_")
                panel.scatter(np.full(len(sample), place), sample, **small)
                limits = interval(iqm, sample)
                if limits is not None:
                    panel.vlines(place, *limits, color=style["color"], linewidth=1.2)
                panel.plot(place, iqm(sample), **style, linestyle="", markersize=5)
        panel.axvline(len(tasks) - 1.5, color="#999999", linewidth=0.8)
        turned = dict(rotation=30, ha="right", rotation_mode="anchor") if len(tasks) > 6 else {}
        panel.set_xticks(range(len(tasks)), tasks, **turned)
        panel.set(title=title, ylabel=own[0].measure.replace("_", " "))
    finish(figure, path)


def plot_dormancy(runs: list[Run], path: Path) -> list[str]:
    """Dormancy against score over runs, a row per architecture and benchmark; the correlations as
    lines of markdown."""
    rows, lines = group_panels(runs), []
    figure, axes = subplots(len(rows), 2, 2.6)
    for (title, own), row in zip(rows.items(), axes, strict=True):
        own = list({run.name: run for run in own}.values())  # two studies may share a run
        row[0].set_ylabel(f"{own[0].measure.replace('_', ' ')}, mean of tasks")
        for panel, network in zip(row, ("actor", "critic"), strict=True):
            x, y = (
                np.array([run.metric(f"{network}_dormant_ratio") for run in own]),
                run_scores(own),
            )
            for run, dormant, score in zip(own, x, y, strict=True):
                panel.plot(dormant, score, **run.style, linestyle="", markersize=5)
            correlation = describe_correlation(x, y)
            lines.append(f"- {title}, {network}: {correlation}")
            panel.set_title(f"{title}\n{correlation}")
            panel.xaxis.set_major_locator(MaxNLocator(5))
            panel.xaxis.set_major_formatter(PERCENT)
            panel.set_xlabel(f"dormant neurons of the {network}")
    finish(figure, path)
    return lines


def report(args: Args) -> None:
    """Write the whole report."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of every resumed run
    matplotlib.use("Agg")
    runs, left_out = read_runs(args)
    if args.against not in {"", *(run.method for run in runs)}:
        fail(f"--against {args.against}: must be a method of the runs")
    for run in runs:
        run.against = args.against or run.against
    for own in group(runs, "benchmark", "method").values():
        choose_timestep(own, args.timestep)
    choose_styles(runs)
    results = args.out / "results.csv"
    held = {run.name for run in read_results(results)} if results.exists() else set()
    if lost := sorted(held - {run.name for run in runs}):
        fail(f"{results}: holds {lost[0]}, which is not in this report; give another --out")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "report.md").touch()
    except OSError as error:
        fail(f"--out {args.out}: must be a folder to write to ({error.strerror})")
    write_results(runs, args.out)
    plot_learning_curves(runs, args.out / "learning_curves.png")
    plot_plasticity(runs, args.out / "plasticity.png")
    plot_final_scores(runs, args.out / "final_returns.png")
    correlations = plot_dormancy(runs, args.out / "dormancy_return.png")
    answer, missing = answer_table(runs), describe_left_out(left_out)
    text = TEXT.format(
        **dict(runs=len({run.name for run in runs}), answer=answer, resamples=RESAMPLES),
        **dict(max_exact=MAX_EXACT, swaps=SWAPS, differences=describe_differences(runs)),
        **dict(details=details_table(runs), plasticity=plasticity_table(runs)),
        **dict(plasticity_differences=plasticity_differences(runs)),
        **dict(correlations="\n".join(correlations), left_out=missing or "None."),
    )
    (args.out / "report.md").write_text(text)
    print(f"wrote {args.out}", answer, sep="\n")
    print(f"left out:\n{missing}\n" * bool(missing), end="")


if __name__ == "__main__":
    report(tyro.cli(Args))
