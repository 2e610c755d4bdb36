"""Tables behind the results page: tasks solved and lost, Fisher trace, grown weights, neurons.

The first three are of results.csv files, the last of run folders (of MiniGrid, by checkpoint.pt).

    python benchmark/analyses.py benchmark/results/experiment1_mt5_mtppo/results.csv
    python benchmark/analyses.py runs/sweep
    python benchmark/analyses.py benchmark/results/{experiment1_mt5_mtppo,stress}/results.csv \
        --learning-rates benchmark/results/stress/learning_rates.png
"""

import importlib
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from report import (
    COLOURS,
    MARKERS,
    Run,
    call_by_arguments,
    differing_args,
    finish,
    group,
    interval,
    iqm,
    paper_method,
    read_results,
    refuse_equal,
    subplots,
    table,
)
from scipy.stats import t
from subnetworks import load_checkpoint
from sweep import ROOT, fail

SOLVED = 0.1  # solved: the last score is higher
LEARNED = 0.5  # learned: some score is higher; lost: learned, but not solved


@dataclass
class Args:
    """Tables behind the results page."""

    paths: tyro.conf.Positional[tuple[Path, ...]]  # results.csv files, folders of run folders
    learning_rates: Path | None = None  # picture of score, rank and dormancy by learning rate


def solved_tasks(runs: list[Run]) -> str:
    """Per method and task: runs that solve it at the end, their mean score, runs that learned it at
    some time, seeds that lost it."""
    rows = []
    for (benchmark, method), own in group(runs, "benchmark", "method").items():
        for i, task in enumerate(own[0].tasks):
            scores = {run.seed: run.scores[:, i] for run in own}
            solved = [x[-1] for x in scores.values() if x[-1] > SOLVED]
            mean = f"{np.mean(solved):.2f}" if solved else "-"
            learned = {n: x[-1] for n, x in scores.items() if x.max() > LEARNED}
            lost = ", ".join(str(n) for n, last in learned.items() if last <= SOLVED)
            shown = [f"{len(solved)} of {len(own)}", mean, len(learned), lost or "-"]
            rows.append([benchmark, method, task, *shown])
    columns = "benchmark, method, task, solved, mean score of these, learned, seeds that lost it"
    return table(columns.split(", "), rows)


def fisher_traces(runs: list[Run]) -> str:
    """Per method: peak and end of the mean over seeds, and runs whose own falls far."""
    rows = []
    for (benchmark, method), own in group(runs, "benchmark", "method").items():
        traces = np.array([run.metrics["fisher_trace"] for run in own])  # (run, evaluation)
        mean, falls = traces.mean(0), traces[:, -1] < 0.6 * traces.max(1)
        peak = [f"{mean.max():.0f}", own[0].timesteps[mean.argmax()], f"{mean[-1]:.0f}"]
        rows.append([benchmark, method, *peak, f"{falls.sum()} of {len(own)}"])
    columns = "benchmark, method, peak, its timestep, end, runs that end below 0.6 of their peak"
    return table(columns.split(", "), rows)


def grown_kept(runs: list[Run]) -> str:
    """Per method with SET: share of the weights that one update of the masks grew and the next one
    kept, means over seeds and measurements of the first eighth and the last quarter of training."""
    rows = []
    for (benchmark, method), own in group(runs, "benchmark", "method").items():
        if np.isnan(own[0].metrics.get("actor_grown_kept", math.nan)).all():
            continue
        times, cells = np.array(own[0].timesteps), []
        for network in ("actor", "critic"):
            kept = np.array([run.metrics[f"{network}_grown_kept"] for run in own])
            for when in (times <= times[-1] / 8, times > times[-1] * 3 / 4):
                cells.append(f"{100 * np.nanmean(kept[:, when]):.1f} %")
        rows.append([benchmark, method, *cells])
    columns = "benchmark, method, actor early, actor late, critic early, critic late"
    return table(columns.split(", "), rows)


def plot_learning_rates(runs: list[Run], path: Path) -> None:
    """Score (IQM with interval), rank and dormancy of the actor (means with Student's interval) at
    the end, by learning rate, for dense, GMP and SET: a small mark per run."""
    runs = [run for run in runs if run.row in ("MTPPO dense", "MTPPO GMP", "MTPPO SET")]
    others = set().union(*map(differing_args, group(runs, "row").values()))
    if len(group(runs, "benchmark")) != 1 or others - {"actor_lr", "critic_lr"}:
        fail("--learning-rates: must be given runs of one benchmark, equal but for learning rates")
    rates = sorted({float(run.args["actor_lr"]) for run in runs})
    figure, axes = subplots(1, 3, 2.4, sharey=False)
    shown = {
        "normalized return": lambda run: run.scores[-1].mean(),
        "effective rank, actor": lambda run: run.metrics["actor_effective_rank"][-1],
        "dormant, actor (%)": lambda run: 100 * run.metrics["actor_dormant_ratio"][-1],
    }
    for panel, (title, value) in zip(axes.flat, shown.items(), strict=True):
        for number, (method, own) in enumerate(group(runs, "row").items()):
            style = dict(color=COLOURS[number], marker=MARKERS[number])
            centres = []
            for i, rate in enumerate(rates):
                x = np.array([value(run) for run in own if float(run.args["actor_lr"]) == rate])
                if not len(x):
                    continue
                place = i + 0.15 * (number - 1)
                panel.scatter(np.full(len(x), place), x, s=6, alpha=0.5, linewidths=0, **style)
                if title == "normalized return":
                    centre, limits = iqm(x), interval(iqm, x)
                else:  # NaN of one run
                    half = t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))
                    centre, limits = x.mean(), (x.mean() - half, x.mean() + half)
                if limits is not None:
                    panel.vlines(place, *limits, color=style["color"], linewidth=1.2)
                centres.append((place, centre))
            label = method[0].removeprefix("MTPPO ")
            panel.plot(*zip(*centres, strict=True), **style, markersize=5, linewidth=1, label=label)
        panel.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates])
        panel.set(title=title, xlabel="learning rate", ylim=(0, None))
    finish(figure, path)


def count_neurons(
    network, obs: torch.Tensor, tau: float
) -> tuple[dict[str, np.ndarray], list[int]]:
    """On obs (task, batch, h, w, c), by hidden layer: neurons that are dormant, of those with an
    unmasked incoming weight; these; all. And of heads: those whose weights are all masked, those
    whose output weights are, all."""
    plasticity = importlib.import_module("plasticity_metrics")
    with torch.no_grad():
        hidden, *_ = network.activations(obs.flatten(0, 1), [obs.shape[1]] * len(obs))
    *names, output = network.layers
    counts = {}
    for name, h, alive in zip(names, hidden, plasticity.alive_neurons(network), strict=True):
        dormant = alive & (plasticity.dormant_scores(h, alive) <= tau)
        counts[name] = np.array([int(dormant.sum()), int(alive.sum()), alive.numel()])
    dense = torch.ones(len(obs), 1)
    ins, outs = (network.masks.get(n, dense).flatten(1).any(1) for n in ("head_hidden", output))
    return counts, [int((~(ins | outs)).sum()), int((~outs).sum()), len(obs)]


def read_neurons(folder: Path) -> tuple[Run, dict] | None:
    """A complete MiniGrid run, and by network its neurons on observations of its buffer."""
    state = load_checkpoint(folder)
    given, timestep = state["args"], state["timestep"]
    if "num_steps" not in given or timestep + given["num_steps"] <= given["total_timesteps"]:
        return None
    script = importlib.import_module(state["script"])
    if given.keys() != script.Args.__dataclass_fields__.keys():
        return None
    args, buffer = script.Args(**given), state["buffer"]
    tasks, capacity = buffer["observations"].shape[:2]
    filled, batch = min(buffer["added"], capacity), math.ceil(args.plasticity_batch_size / tasks)
    slots = torch.randint(filled, (batch,), generator=torch.Generator().manual_seed(0))
    obs, found = buffer["observations"][:, slots], {}
    for name, network in script.make_networks(args).items():
        network.load_state_dict(state[name])
        found[name] = count_neurons(network, obs, args.dormant_tau)
    shown = {name: str(value) for name, value in given.items()}
    own = dict(benchmark=", ".join(args.env_ids) or args.benchmark, seed=args.seed, args=shown)
    return Run(str(folder), row=paper_method(shown)[1], **own), found


def neurons(found: list[tuple[Run, dict]]) -> str:
    """Per method and network, means over seeds: dormant neurons of each layer and of all, without
    and with those that have no weight left; and the heads without weights."""
    runs, rows = [run for run, _ in found], []
    by_name = {run.name: networks for run, networks in found}
    call_by_arguments(runs)
    refuse_equal(runs)
    for (benchmark, method), own in group(runs, "benchmark", "method").items():
        for name in ("actor", "critic"):
            layers, heads = zip(*(by_name[run.name][name] for run in own), strict=True)
            counts = np.array([list(each.values()) for each in layers])  # (run, layer, 3)
            counts = np.concatenate([counts, counts.sum(1, keepdims=True)], axis=1)
            dormant, alive, every = np.moveaxis(counts, 2, 0)  # (run, layer), the last of all
            left_out = 100 * (dormant / np.maximum(alive, 1)).mean(0)
            counted = 100 * ((dormant + every - alive) / every).mean(0)
            cells = [f"{x:.2f} / {y:.2f} %" for x, y in zip(left_out, counted, strict=True)]
            empty, silent, total = np.sum(heads, axis=0)
            cells += [f"{empty} of {total}", f"{silent} of {total}"]
            rows.append([benchmark, method, len(own), name, *cells])
    columns = ["benchmark", "method", "seeds", "network", *layers[0], "all"]
    return table([*columns, "heads without a weight", "heads without an output weight"], rows)


def analyses(args: Args) -> None:
    """Print the tables."""
    sys.path.insert(0, str(ROOT))
    files = {path: read_results(path) for path in args.paths if path.suffix == ".csv"}
    for path, runs in files.items():
        print(f"## {path.parent.name}\n", "Tasks at the end:\n", solved_tasks(runs), "", sep="\n")
        print("Fisher trace, mean over seeds:\n", fisher_traces(runs), "", sep="\n")
        print(
            "Share of grown weights that the next update keeps:\n", grown_kept(runs), "", sep="\n"
        )
    if args.learning_rates:
        every = {run.name: run for runs in files.values() for run in runs}
        plot_learning_rates([*every.values()], args.learning_rates)
    others = set(args.paths) - files.keys()
    folders = {file.parent.resolve() for path in others for file in path.rglob("checkpoint.pt")}
    found = [read for folder in sorted(folders) if (read := read_neurons(folder))]
    if not files and not found:
        fail("must be given results.csv files, or folders of complete MiniGrid runs")
    if found:
        counted = neurons(found)
        print("Dormant neurons, those without a weight left out / counted as dormant:\n")
        print(counted)
        print(f"\n{len(folders) - len(found)} runs left out: not complete, of Meta-World, or old.")


if __name__ == "__main__":
    analyses(tyro.cli(Args))
