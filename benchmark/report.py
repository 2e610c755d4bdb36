"""Tables and figures of finished runs, read from their TensorBoard logs alone.

A run's score is its mean over the tasks; the figure is the interquartile mean (IQM) of runs' scores
with a 95 % bootstrap interval (Agarwal et al. 2021), next to the paper's. Writes results.csv (a row
per run, task and evaluation), report.md and PNG figures. Incomplete runs and runs with NaN are
named and left out.

An arm is called what the study file calls it. Given run folders instead, it is called by the
logged arguments, as in the paper's tables (MTPPO GMP), with any other argument in which such runs
differ.

    python benchmark/report.py benchmark/studies/experiment1_mt5_mtppo.toml --out report
    python benchmark/report.py runs/some_run runs/folder_of_runs
"""

import csv
import itertools
import logging
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import tyro
from matplotlib.ticker import EngFormatter, MaxNLocator
from scipy.stats import DegenerateDataWarning, bootstrap, norm, rankdata, t, trim_mean, ttest_1samp
from sweep import fail, read_study
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

RESAMPLES = 50_000
BAND_RESAMPLES = 2000  # of the bands in figures
ARCHITECTURES = ("MTPPO", "MoE", "MOORE", "MT-SAC")
# Arguments that do not make another arm
NEUTRAL = {"benchmark", "seed", "run_dir", "resume", "num_threads", "device"}
NEUTRAL |= {"checkpoint_frequency", "vectorization", "env_ids", "env_names"}
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
CURVES = {
    "actor_dormant_ratio": "dormant share, actor",
    "critic_dormant_ratio": "dormant share, critic",
    "actor_effective_rank": "effective rank, actor",
    "fisher_trace": "Fisher trace, actor",
}
# Okabe and Ito's colours, told apart with any colour vision; markers for print in grey
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
MARKERS = "osD^vPX*"
WIDTH = 7  # inches: a page's, so that a figure is printed in its own size
FONT_SIZE = 8
TEXT = """# Report

{runs} runs. A run's score is its mean over the tasks. IQM: the mean of the middle half of the runs'
scores, with its 95 % bootstrap interval over runs ({resamples} resamples, percentiles expanded for
few seeds, Hesterberg 2015). Overlap: whether this interval and the paper's do, a weak test.

{table}

![](learning_curves.png)
![](final_returns.png)
![](performance_profile.png)
![](plasticity.png)

## Behind the IQM

Late: the IQM of the last five evaluations averaged (or as many as there are). Gain, late gain: the
last evaluation's IQM and the late one above those of the arm in the column against. Probability of
improvement: that a run scores higher than one of that arm; 0.5 is chance. All of the seeds that
both arms have, with a 95 % bootstrap interval that draws seeds, each with the runs of both arms,
which share layouts and initial weights. Seeds to tell 0.1: how many tell a gain of 0.1 from 0 in
four of five studies, a rough estimate by drawing from these. Score of each seed: the mean of its
tasks. Plasticity: means over the seeds, actor / critic, at the last measurement (the figure: IQM);
a neuron without an unmasked incoming weight is left out of dormancy, a masked weight of the Fisher
trace.

{details}

Plasticity above that of the other arm, difference of means over the seeds that both have with
Student's paired 95 % interval:

{plasticity}

## Dormancy and return

Over all runs of a panel, whatever their arm: share of dormant neurons and mean score of the tasks.

{correlations}

![](dormancy_return.png)

## Left out

{left_out}

## Arguments that all runs share

{shared}
"""


@dataclass
class Args:
    """Tables and figures of finished runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """study files, run folders, folders that hold run folders"""
    out: Path = Path("report")
    """folder to write to"""
    timestep: int | None = None
    """evaluation that the table and the figures of final values show (default: the last)"""
    runs_dir: Path = Path("runs/sweep")
    """folder of the run folders of a study file"""


@dataclass
class Run:
    """What the log of one run says."""

    folder: Path
    problem: str = ""  # why it is left out
    arm: str = ""
    against: str = ""  # the arm that it is compared with, if not the first of its architecture
    row: str = ""  # the arm of the paper that it is a run of
    architecture: str = ""
    benchmark: str = ""
    seed: int = 0
    args: dict[str, str] = field(default_factory=dict)
    measure: str = ""  # what the scores are: normalized_return or success_rate
    scores: dict[str, dict[int, float]] = field(default_factory=dict)  # task -> timestep -> score
    metrics: dict[str, dict[int, float]] = field(default_factory=dict)  # name -> timestep -> value
    at: int = 0  # the evaluation that the table and the figures of final values show
    style: dict[str, str] = field(default_factory=dict)  # in figures


# Reading


def paper_arm(args: dict[str, str]) -> tuple[str, str]:
    """Architecture, and the arm's name in the paper's table, of a run's logged arguments.

    The log does not name the script, but each script has arguments that only it has.
    """
    markers = dict(MOORE="orthogonal_mix", MoE="num_experts") | {"MT-SAC": "prune"}
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


def read_run(folder: Path) -> Run:
    """Read a run's log; its problem is set if it has not reached its end or holds NaN."""
    run = Run(folder)
    if not any(folder.glob("events.out.tfevents.*")):
        run.problem = "not started"
        return run
    # Reload drops what a killed process logged after the checkpoint that its successor began from
    log = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    if "args/text_summary" not in log.Tags()["tensors"]:
        run.problem = "not started (its log holds no arguments)"
        return run
    text = log.Tensors("args/text_summary")[0].tensor_proto.string_val[0].decode()
    rows = [line.strip("|").split("|", 1) for line in text.splitlines()[2:]]
    run.args = args = dict(rows)
    run.architecture, run.row = paper_arm(args)
    if not {"GMP", "SET"} & set(run.row.split()):  # dense: they have no effect
        run.args = {k: v for k, v in args.items() if not k.startswith(("prune_", "set_"))}
    run.benchmark, run.seed = args["benchmark"], int(args["seed"])

    reached = 0
    for tag in log.Tags()["scalars"]:
        kind, name, *rest = tag.split("/")
        values = {event.step: event.value for event in log.Scalars(tag)}
        if kind == "eval" and name in ("normalized_return", "success_rate") and rest:
            run.measure, run.scores[rest[0]] = name, values
        elif kind == "plasticity":
            run.metrics[name] = values
        elif kind == "sparsity" and not rest:
            run.metrics[name if name.endswith("_kept") else f"{name}_sparsity"] = values
            if name == "actor":  # logged in every iteration
                iteration, reached = min(values), max(values)
        # Explained variance alone may be undefined: where a rollout's returns do not vary
        if kind in ("eval", "plasticity", "losses") and name != "explained_variance":
            bad = [step for step, value in values.items() if not math.isfinite(value)]
            if bad and not run.problem:
                run.problem = f"NaN or infinity in {tag} from timestep {bad[0]}"
    if {args.get("env_ids", "()"), args.get("env_names", "()")} != {"()"}:
        run.benchmark = ", ".join(run.scores)
    if run.problem:
        return run
    total = int(args["total_timesteps"])
    evaluated = min((max(values) for values in run.scores.values()), default=0)
    if not evaluated or min(reached, evaluated) + iteration <= total:
        run.problem = f"incomplete: at timestep {reached} of {total}, evaluated at {evaluated}"
    return run


def differing_args(runs: list[Run]) -> list[str]:
    """The arguments in which runs differ, but for those that do not make another arm."""
    names = {name for run in runs for name in run.args} - NEUTRAL
    return sorted(n for n in names if len({run.args.get(n) for run in runs}) > 1)


def read_runs(args: Args) -> tuple[list[Run], list[Run]]:
    """Complete runs, in the order of benchmarks and arms, and those left out."""
    found = {}  # (folder, arm's name in a study) -> run
    planned = set()  # folders
    for path in sorted(args.runs, key=lambda path: path.suffix != ".toml"):  # studies first
        if path.suffix == ".toml":
            for plan in read_study(path, args.runs_dir):
                run = read_run(plan.folder)
                run.arm, run.against = plan.arm, plan.against
                found.setdefault((plan.folder, plan.arm), run)
                planned.add(plan.folder)
        else:
            marks = ("events.out.tfevents.*", "checkpoint.pt", "output.txt")
            folders = {file.parent.resolve() for mark in marks for file in path.rglob(mark)}
            if not folders:
                fail(f"{path}: must be a study file, a run folder or a folder of run folders")
            for folder in sorted(folders - planned):
                found.setdefault((folder, ""), read_run(folder))
    left_out = [run for run in found.values() if run.problem]
    runs = [run for run in found.values() if not run.problem]
    if not found:
        fail("no runs given, must be study files, run folders or folders of run folders")
    if not runs:
        fail(f"none of {len(left_out)} runs is complete, the first is {left_out[0].problem}")

    for alike in group([run for run in runs if not run.arm], "row").values():  # of no study
        for run in alike:
            own = [f", {n.replace('_', ' ')} {run.args.get(n)}" for n in differing_args(alike)]
            run.arm = run.row + "".join(own)
    for own in group(runs, "arm").values():
        if names := differing_args(own):
            fail(f"{own[0].arm}: its runs must have the same arguments, they differ in {names}")
    rows = list(dict.fromkeys(arm for _, arm in read_paper()))
    order = {arm: i for i, arm in enumerate(dict.fromkeys(run.arm for run in runs))}
    if not any(path.suffix == ".toml" for path in args.runs):  # the paper's order
        ranks = {run.arm: rows.index(run.row) if run.row in rows else len(rows) for run in runs}
        order = {arm: (rank, arm) for arm, rank in ranks.items()}

    def place(run):
        architecture = ARCHITECTURES.index(run.architecture)
        return len(run.benchmark), run.benchmark, architecture, order[run.arm], run.seed

    runs.sort(key=place)
    for a, b in itertools.pairwise(sorted(runs, key=lambda r: (r.arm, r.benchmark, r.seed))):
        if (a.arm, a.benchmark, a.seed) == (b.arm, b.benchmark, b.seed):
            fail(f"{a.folder} and {b.folder}: both {a.arm} on {a.benchmark} with seed {a.seed}")
    return runs, left_out


def is_papers(run: Run) -> bool:
    """Whether a run has the arguments that the paper's table holds for."""
    usual = PAPER_ARGS | (SAC_ARGS if run.architecture == "MT-SAC" else PPO_ARGS)
    return all(run.args.get(name, value) == value for name, value in usual.items())


def read_paper() -> dict[tuple[str, str], tuple[float, float, float]]:
    """(benchmark, arm) -> IQM and interval of the paper's table."""
    with open(Path(__file__).parent / "paper.csv") as file:
        _, *rows = csv.reader(file)
    return {(benchmark, arm): tuple(map(float, row)) for benchmark, arm, *row in rows}


# Statistics


def iqm(scores: np.ndarray) -> np.ndarray:
    """Interquartile mean of runs' scores (..., run): (...), as aggregate_iqm of rliable."""
    return trim_mean(scores, 0.25, axis=-1)


def difference_of_iqms(scores: np.ndarray, base: np.ndarray) -> np.ndarray:
    """The IQM of scores (..., run) above that of other runs, base."""
    return iqm(scores) - iqm(base)


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
    return np.quantile(np.concatenate(values, axis=-1), (tail, 1 - tail), axis=-1)


def seeds_to_tell(scores: np.ndarray, base: np.ndarray, gain: float = 0.1) -> str:
    """How many seeds tell a gain in IQM from 0 in 80 % of studies, as text: from draws of so many
    of the seeds of scores and base, both (run,), their difference shifted to the gain,
    against 1.96 of its standard deviations, which are corrected for the few seeds drawn from."""
    rng, few = np.random.default_rng(0), len(scores)
    if few < 3:
        return "-"
    for seeds in range(5, 205, 5):
        drawn = rng.integers(few, size=(2000, seeds))
        errors = difference_of_iqms(scores[drawn], base[drawn])
        errors = (errors - errors.mean()) * math.sqrt(few / (few - 1))
        if (errors + gain > 1.96 * errors.std()).mean() >= 0.8:
            return str(seeds)
    return "more than 200"


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
    with warnings.catch_warnings(category=DegenerateDataWarning, action="ignore"):
        result = bootstrap(
            (x, y),
            spearman,
            **dict(n_resamples=RESAMPLES, batch=1000, method="percentile", paired=True),
            rng=np.random.default_rng(0),
        )
    # Resamples in which a side does not vary, with their warning, have no correlation
    low, high = np.nanquantile(result.bootstrap_distribution, (0.025, 0.975))
    return f"Spearman {spearman(x, y):.2f} ({low:.2f}, {high:.2f}), {len(x)} runs"


# Groups of runs


def group(runs: list[Run], *names: str) -> dict[tuple, list[Run]]:
    """Runs by these attributes, in the order of the runs."""
    groups = {}
    for run in runs:
        groups.setdefault(tuple(getattr(run, name) for name in names), []).append(run)
    return groups


def common_timesteps(series: list[dict[int, float]]) -> list[int]:
    """The timesteps at which all series have a value."""
    return sorted(set.intersection(*map(set, series)))


def last_value(series: dict[int, float], timestep: int) -> float | None:
    """The latest value up to a timestep."""
    return series.get(max((t for t in series if t <= timestep), default=None))


def choose_timestep(runs: list[Run], timestep: int | None) -> None:
    """Set the asked evaluation, or the last, of an arm's runs on a benchmark.

    Plasticity must have been measured by then.
    """
    evaluated = common_timesteps([scores for run in runs for scores in run.scores.values()])
    measured = max(min(run.metrics[metric]) for run in runs for metric in CURVES)
    evaluated = [t for t in evaluated if t >= measured]
    if timestep is not None and timestep not in evaluated:
        fail(f"--timestep {timestep}: must be an evaluation of {runs[0].arm}, one of {evaluated}")
    for run in runs:
        run.at = evaluated[-1] if timestep is None else timestep


def final_scores(runs: list[Run], evaluations: int = 1) -> np.ndarray:
    """Each run's scores at its chosen evaluation, averaged with those just before it if more
    evaluations are asked for: (run, task)."""
    means = []
    for run in runs:
        last = [t for t in common_timesteps(list(run.scores.values())) if t <= run.at]
        last = last[-evaluations:]
        means.append([np.mean([task[t] for t in last]) for task in run.scores.values()])
    return np.array(means)


def run_scores(runs: list[Run], evaluations: int = 1) -> np.ndarray:
    """Each run's mean over its tasks: (run,)."""
    return final_scores(runs, evaluations).mean(-1)


# Tables


def write_results(runs: list[Run], path: Path) -> None:
    """One row per run, task and evaluation, with the latest value of every metric by then."""
    metrics = sorted({name for run in runs for name in run.metrics})
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        measure = "/".join(sorted({run.measure for run in runs}))
        writer.writerow(["arm", "benchmark", "seed", "timestep", "task", measure, *metrics])
        for run in runs:
            for timestep in common_timesteps(list(run.scores.values())):
                values = [last_value(run.metrics.get(name, {}), timestep) for name in metrics]
                shown = ["" if value is None else f"{value:.5g}" for value in values]
                for task, scores in run.scores.items():
                    row = [run.arm, run.benchmark, run.seed, timestep, task]
                    writer.writerow([*row, f"{scores[timestep]:.5g}", *shown])


def results_table(runs: list[Run]) -> list[str]:
    """IQM and interval per arm and benchmark, as lines of markdown, next to the paper's unless an
    argument of PAPER_ARGS or the timestep is not the paper's."""
    paper = read_paper()
    lines = ["| benchmark | arm | seeds | timestep | IQM (95 % interval) | paper | overlap |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for (benchmark, arm), own in group(runs, "benchmark", "arm").items():
        same = is_papers(own[0]) and own[0].at == PAPER_TIMESTEPS.get(benchmark)
        theirs = paper.get((benchmark, own[0].row)) if same else None
        scores = run_scores(own)
        limits = interval(iqm, scores)
        shown, expected, overlap = "no interval: 1 seed", "-", "-"
        if limits is not None:
            shown = "{:.2f}, {:.2f}".format(*limits)
        if theirs:
            expected = "{:.2f} ({:.2f}, {:.2f})".format(*theirs)
        if theirs and limits is not None:
            overlap = "yes" if limits[0] <= theirs[2] and theirs[1] <= limits[1] else "no"
        ours = f"{iqm(scores):.2f} ({shown})"
        cells = [benchmark, arm, len(own), own[0].at, ours, expected, overlap]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def matched(runs: list[Run]) -> dict[tuple[str, str], tuple[list[Run], list[Run]]]:
    """(benchmark, arm) -> its runs and those of the arm that it is compared with, of the seeds that
    both have, if there are two."""
    first, arms, found = {}, group(runs, "benchmark", "arm"), {}
    for (benchmark, arm), own in arms.items():
        base = first.setdefault((benchmark, own[0].architecture), own)
        if against := own[0].against:
            base = arms.get((benchmark, against), own)
        seeds = {run.seed for run in own} & {run.seed for run in base}
        if base is not own and len(seeds) > 1:
            own, base = ([run for run in side if run.seed in seeds] for side in (own, base))
            found[benchmark, arm] = own, base
    return found


def details_table(runs: list[Run]) -> list[str]:
    """Per arm and benchmark, as lines of markdown: what the IQM hides, and plasticity then."""
    columns = "benchmark, arm, against, gain, late gain, probability of improvement"
    columns += ", seeds to tell 0.1, late, score of each seed, their mean, dormant"
    columns += ", effective rank, Fisher trace"
    columns = columns.split(", ")
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    pairs = matched(runs)
    for (benchmark, arm), own in group(runs, "benchmark", "arm").items():
        names = ("actor_dormant_ratio", "critic_dormant_ratio", "actor_effective_rank")
        names += ("critic_effective_rank", "fisher_trace")
        last = [[last_value(run.metrics[name], run.at) for run in own] for name in names]
        actor_dormant, critic_dormant, actor_rank, critic_rank, trace = np.mean(last, axis=1)
        against = ["-"] * 5
        if pair := pairs.get((benchmark, arm)):
            ends, tails = ([run_scores(side, n) for side in pair] for n in (1, 5))
            against = [pair[1][0].arm]
            for statistic, sides in (
                (difference_of_iqms, ends),
                (difference_of_iqms, tails),
                (probability_of_improvement, ends),
            ):
                values = statistic(*sides), *interval(statistic, *sides)
                against.append("{:.2f} ({:.2f}, {:.2f})".format(*values))
            against.append(seeds_to_tell(*ends))
        seeds, late = run_scores(own), iqm(run_scores(own, 5))
        cells = [benchmark, arm, *against, f"{late:.2f}"]
        cells += [", ".join(f"{seed:.2f}" for seed in seeds), f"{seeds.mean():.2f}"]
        cells.append(f"{100 * actor_dormant:.1f} / {100 * critic_dormant:.1f} %")
        cells += [f"{actor_rank:.0f} / {critic_rank:.0f}", f"{trace:.4g}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def plasticity_table(runs: list[Run]) -> list[str]:
    """Per arm and benchmark, as lines of markdown: every metric less that of the arm it is compared
    with, means over the seeds that both have, and Student's paired 95 % interval."""
    names = ["actor_dormant_ratio", "critic_dormant_ratio", "actor_effective_rank"]
    names += ["critic_effective_rank", "fisher_trace"]
    columns = ["benchmark", "arm", "against", "dormant, actor", "dormant, critic"]
    columns += ["effective rank, actor", "effective rank, critic", "Fisher trace"]
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for (benchmark, arm), pair in matched(runs).items():
        cells = [benchmark, arm, pair[1][0].arm]
        for name in names:
            sides = [[last_value(run.metrics[name], run.at) for run in side] for side in pair]
            differences = np.subtract(*sides)
            shown = np.array([differences.mean()] * 3)
            if np.ptp(differences):
                shown[1:] = ttest_1samp(differences, 0).confidence_interval()
            if name.endswith("dormant_ratio"):
                cells.append("{:.2f} ({:.2f}, {:.2f}) %".format(*(100 * shown)))
            else:
                cells.append("{:.0f} ({:.0f}, {:.0f})".format(*shown))
        lines.append(f"| {' | '.join(cells)} |")
    return lines if len(lines) > 2 else ["No two arms of two seeds."]


# Figures


def choose_styles(runs: list[Run]) -> None:
    """Set colour and marker of every arm, the same in all figures of all reports for the paper's
    dense, GMP and SET, or what is closest to them; its label is the arm's name without the
    architecture, which titles the panel."""
    places = {}  # label -> colour; the paper's own arms first
    first = dict(dense=0, GMP=1, SET=2)
    for run in sorted(runs, key=lambda run: not is_papers(run)):
        label = run.arm.removeprefix(f"{run.architecture} ")
        if label not in places:
            place = first.get(label.replace(",", " ").split()[0])
            if place is None or place in places.values():
                place = next(i for i in itertools.count(3) if i not in places.values())
            places[label] = place
        again, i = divmod(places[label], len(COLOURS))  # no pair twice
        marker = MARKERS[(i + again) % len(MARKERS)]
        run.style = dict(color=COLOURS[i], marker=marker, label=label)


def panels(rows: int, columns: int, width: float, height: float, sharey):
    """A figure of this width and its axes (row, column) of this height, in inches."""
    size = (width, height * rows + 0.4)
    return plt.subplots(
        rows, columns, figsize=size, sharey=sharey, squeeze=False, layout="constrained"
    )


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


def draw_curve(axes, runs: list[Run], series_of) -> None:
    """IQM over time, with its band, of the mean of a run's series (timestep -> value)."""
    series = [list(series_of(run)) for run in runs]
    timesteps = common_timesteps([values for seed in series for values in seed])
    values = np.array([[np.mean([task[t] for task in seed]) for seed in series] for t in timesteps])
    marks = dict(markevery=0.2, markersize=3, linewidth=1.2)
    axes.plot(timesteps, iqm(values), **runs[0].style, **marks)
    limits = interval(iqm, values, resamples=BAND_RESAMPLES)
    if limits is not None:
        band = dict(color=runs[0].style["color"], alpha=0.2, linewidth=0)
        axes.fill_between(timesteps, *limits, **band)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 4, 5, 10]))


def plot_learning_curves(runs: list[Run], path: Path) -> None:
    """IQM over training: a benchmark per row, an architecture per column."""
    rows, columns = group(runs, "benchmark"), group(runs, "architecture")
    width = WIDTH if len(columns) > 1 else WIDTH / 2
    figure, axes = panels(len(rows), len(columns), width, 2.4, sharey=True)
    cells = itertools.product(rows, columns)
    for panel, ((benchmark,), (architecture,)) in zip(axes.flat, cells, strict=True):
        own = [run for run in rows[(benchmark,)] if run.architecture == architecture]
        panel.set_visible(bool(own))
        for arm in group(own, "arm").values():
            draw_curve(panel, arm, lambda run: run.scores.values())
            panel.set_ylabel(f"{arm[0].measure.replace('_', ' ')} (IQM)")
        panel.set(title=f"{architecture}, {benchmark}", xlabel="timesteps")
        panel.tick_params(labelleft=True)
    finish(figure, path)


def percent(share: float, position=None) -> str:
    """A tick's label."""
    return f"{100 * share:.3g} %"


def plot_plasticity(runs: list[Run], path: Path) -> None:
    """The four plasticity metrics over training, a row per architecture and benchmark."""
    rows = group(runs, "architecture", "benchmark")
    figure, axes = panels(len(rows), len(CURVES), WIDTH, 1.7, sharey=False)
    for (title, own), row in zip(rows.items(), axes, strict=True):
        for panel, metric in zip(row, CURVES, strict=True):
            for arm in group(own, "arm").values():
                draw_curve(panel, arm, lambda run, metric=metric: [run.metrics[metric]])
            panel.set_ylim(bottom=0)
            if metric.endswith("dormant_ratio"):
                panel.yaxis.set_major_formatter(percent)
        row[0].set_ylabel(", ".join(title))
    for top, bottom, name in zip(axes[0], axes[-1], CURVES.values(), strict=True):
        top.set_title(name)
        bottom.set_xlabel("timesteps")
    finish(figure, path)


def plot_final_scores(runs: list[Run], path: Path) -> None:
    """Each task's score: a small mark per seed, a large one for their IQM with its interval."""
    rows = group(runs, "architecture", "benchmark")
    figure, axes = panels(len(rows), 1, WIDTH, 2.4, sharey=True)
    for (title, own), panel in zip(rows.items(), axes.flat, strict=True):
        tasks, arms = [*own[0].scores, "mean of tasks"], group(own, "arm").values()
        for number, arm in enumerate(arms):
            scores, style = final_scores(arm), arm[0].style
            places = np.arange(len(tasks)) + (number - (len(arms) - 1) / 2) * 0.8 / len(arms)
            samples = [*scores.T, scores.mean(1)]
            for place, sample in zip(places, samples, strict=True):
                small = style | dict(s=6, alpha=0.5, linewidths=0, label="_")
                panel.scatter(np.full(len(sample), place), sample, **small)
            for place, sample in zip(places, samples, strict=True):
                limits = interval(iqm, sample)
                if limits is not None:
                    panel.vlines(place, *limits, color=style["color"], linewidth=1.2)
                panel.plot(place, iqm(sample), **style, linestyle="", markersize=5)
        panel.axvline(len(tasks) - 1.5, color="#999999", linewidth=0.8)
        turned = dict(rotation=30, ha="right", rotation_mode="anchor") if len(tasks) > 6 else {}
        panel.set_xticks(range(len(tasks)), tasks, **turned)
        panel.set(title=", ".join(title), ylabel=own[0].measure.replace("_", " "))
    finish(figure, path)


def plot_profile(runs: list[Run], path: Path) -> None:
    """Performance profile: the share of runs that score above each level, with its band, a panel
    per architecture and benchmark (Agarwal et al. 2021, section 4.2)."""
    rows = group(runs, "architecture", "benchmark")
    columns = min(len(rows), 3)
    lines = math.ceil(len(rows) / columns)
    width = WIDTH if columns > 1 else WIDTH / 2
    figure, axes = panels(lines, columns, width, 2.4, sharey=True)
    levels = np.linspace(0, 1, 101)

    def share(above):
        return above.mean(-1)

    for panel in axes.flat[len(rows) :]:
        panel.set_visible(False)
    for (title, own), panel in zip(rows.items(), axes.flat, strict=False):
        for arm in group(own, "arm").values():
            above = (run_scores(arm) > levels[:, None]).astype(float)  # (level, run)
            panel.plot(levels, share(above), **arm[0].style, markevery=20, markersize=3)
            limits = interval(share, above, resamples=BAND_RESAMPLES)
            if limits is not None:
                band = dict(color=arm[0].style["color"], alpha=0.15, linewidth=0)
                panel.fill_between(levels, *limits, **band)
        measure = own[0].measure.replace("_", " ")
        panel.set(title=", ".join(title), xlabel=f"{measure} above", ylim=(0, 1))
        panel.set_ylabel("share of runs")
        panel.tick_params(labelleft=True)
        panel.yaxis.set_major_formatter(percent)
    finish(figure, path)


def plot_dormancy(runs: list[Run], path: Path) -> list[str]:
    """Dormancy against score over runs, a row per architecture and benchmark; the correlations as
    lines of markdown."""
    rows, lines = group(runs, "architecture", "benchmark"), []
    figure, axes = panels(len(rows), 2, WIDTH, 2.6, sharey=True)
    for (title, own), row in zip(rows.items(), axes, strict=True):
        own = list({run.folder: run for run in own}.values())  # two studies may share a run
        for panel, network in zip(row, ("actor", "critic"), strict=True):
            x, y = [], run_scores(own)
            for run, score in zip(own, y, strict=True):
                x.append(last_value(run.metrics[f"{network}_dormant_ratio"], run.at))
                panel.plot(x[-1], score, **run.style, linestyle="", markersize=5)
            correlation = describe_correlation(np.array(x), y)
            lines.append(f"- {', '.join(title)}, {network}: {correlation}")
            panel.set_title(f"{', '.join(title)}\n{correlation}")
            panel.xaxis.set_major_locator(MaxNLocator(5))
            panel.xaxis.set_major_formatter(percent)
            panel.set_xlabel(f"dormant share of the {network}'s neurons")
            panel.set_ylabel(f"{own[0].measure.replace('_', ' ')}, mean of tasks")
    finish(figure, path)
    return lines


def report(args: Args) -> None:
    """Write the whole report."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it warns of every resumed run
    matplotlib.use("Agg")
    plt.rcParams.update({"font.size": FONT_SIZE, "axes.titlesize": "medium"})
    runs, left_out = read_runs(args)
    for own in group(runs, "benchmark", "arm").values():
        choose_timestep(own, args.timestep)
    choose_styles(runs)
    table = results_table(runs)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "results.csv").touch()
    except OSError as error:
        fail(f"--out {args.out}: must be a folder to write to ({error.strerror})")
    write_results(runs, args.out / "results.csv")
    plot_learning_curves(runs, args.out / "learning_curves.png")
    plot_plasticity(runs, args.out / "plasticity.png")
    plot_final_scores(runs, args.out / "final_returns.png")
    plot_profile(runs, args.out / "performance_profile.png")
    correlations = plot_dormancy(runs, args.out / "dormancy_return.png")
    shared = [
        f"`{k}` {v}"
        for k, v in runs[0].args.items()
        if k not in NEUTRAL and all(run.args.get(k) == v for run in runs)
    ]
    named = [f"{run.folder.name}: {run.problem}" for run in left_out]
    text = TEXT.format(
        runs=len({run.folder for run in runs}),
        resamples=RESAMPLES,
        table="\n".join(table),
        details="\n".join(details_table(runs)),
        plasticity="\n".join(plasticity_table(runs)),
        correlations="\n".join(correlations),
        left_out="\n".join(f"- {line}" for line in named) or "Nothing.",
        shared=", ".join(shared),
    )
    (args.out / "report.md").write_text(text)
    print(f"wrote {args.out}", *table, sep="\n")
    print("\n".join(f"left out {line}" for line in named), end="\n" * bool(named))


if __name__ == "__main__":
    report(tyro.cli(Args))
