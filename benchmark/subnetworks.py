"""Which connections serve which task: what the heads read of the trunk, from the masks of runs.

The heads of a MiniGrid network share a trunk of D features. A task's head reads a feature if
unmasked connections lead from the observation to the feature's channel, and on to a hidden neuron
of the head that has an unmasked connection to an output: a hidden neuron without one carries
nothing. Weights, biases and normalisation between layers (LayerNorm, Gram-Schmidt) are left aside.

Overlap of two heads: Jaccard, the share of the features that either reads that both read. Alone:
the share of the features that a head reads that no other head reads. Heads that read
nearly all features can hardly differ by either.

Chance: each head reads as many features as it does, drawn without replacement and apart from the
other heads out of the features that the observation reaches. What a dead channel rules out for
all heads is thus no agreement. (The features that any head reads would be the wrong pool: it comes
of the very sets in question, and two heads alone would have no choice but their overlap.) The
features that both read are then hypergeometric; chance and its 95 % range, of a mean over seeds
too, are those of 10,000 draws. Beyond chance means that heads choose alike or apart, not why.

Reads runs' checkpoints and prints tables; with --out it writes subnetworks.md and subnetworks.png.

    python benchmark/subnetworks.py runs/sweep --out report
"""

import importlib
import itertools
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from report import FONT_SIZE, call_by_arguments, group, paper_method, table
from sweep import ROOT, fail

DRAWS = 10_000
TEXT = """# Subnetworks

What the tasks' heads read of the trunk's features; benchmark/subnetworks.py says how it is counted.
Overlap of two heads: of the features that either reads, the share that both read. Alone: of the
features that a head reads, the share that no other head reads. In brackets: chance, if each head
drew as many features at random. *: the mean over the seeds is outside the 95 % range of chance, as
one in twenty is by chance. Heads that read nearly all features can hardly differ.
"""
EXPERTS = """
Experts: their shares in the absolute weights that the task encoder gives a task. Means over the
seeds of the largest share and of exp(entropy), the effective number of experts.

"""
CAPTION = """Of the trunk's features that either of two tasks' heads reads, the share that both read
(in brackets: by chance, if each head drew as many features at random), means over the seeds.
Colour: the difference. *: the mean is outside the 95 % range of chance."""


@dataclass
class Args:
    """Overlap of what the tasks' heads read, from the masks of sparse MiniGrid runs."""

    runs: tyro.conf.Positional[tuple[Path, ...]]  # run folders, folders that hold run folders
    out: Path | None = None  # folder to write subnetworks.md and subnetworks.png to


@dataclass
class Network:
    """What the masks of an actor or a critic say."""

    reads: np.ndarray  # (task, D) whether a task's head reads a feature
    connected: np.ndarray  # (task,) features with any unmasked connection to the head
    hidden: np.ndarray  # (task,) its hidden neurons with an unmasked connection to an output
    reached: int  # features that the observation reaches
    shares: np.ndarray | None = None  # (task, k) of the experts' absolute weights, they add up to 1


@dataclass
class Run:
    """One run and its networks."""

    folder: Path
    row: str  # method, as report.py calls it, and benchmark
    args: dict[str, str]
    tasks: tuple[str, ...]
    networks: dict[str, Network]
    seed: int
    method: str = ""  # row, and the arguments in which its runs differ


# Reading


def reached_features(layers: dict[str, np.ndarray]) -> np.ndarray:
    """(D,) whether unmasked connections lead from the observation to each feature of the trunk, of
    any expert; layers: the masks by name, and the task encoder where there are experts."""
    num_features = layers["head_hidden"].shape[-1]
    if "conv1" not in layers:  # SET leaves convolutions dense
        return np.ones(num_features, bool)
    experts = len(layers["task_encoder"]) if "task_encoder" in layers else 1
    channels = np.ones((experts, layers["conv1"].shape[1]), bool)
    for name in ("conv1", "conv2", "conv3"):  # mask (expert * out, in, h, w)
        mask = layers[name].any((2, 3)).reshape(experts, -1, channels.shape[1])
        channels = (mask & channels[:, None]).any(2)  # (expert, out)
    channels = channels.any(0)
    places = num_features // len(channels)
    # MTPPO's features lie place by place, those of experts channel by channel
    return channels.repeat(places) if "task_encoder" in layers else np.tile(channels, places)


def read_network(layers: dict[str, np.ndarray]) -> Network:
    """Masks by layer, and the task encoder's weights (k, task) where there are experts."""
    mask, useful = layers["head_hidden"], layers["head_output"].any(1)  # (task, H, D), (task, H)
    reached = reached_features(layers)
    reads = (mask & useful[:, :, None]).any(1) & reached
    counts = mask.any(1).sum(1), useful.sum(1), int(reached.sum())
    network = Network(reads, *counts)
    if "task_encoder" in layers:
        weights = np.abs(layers["task_encoder"].T)
        network.shares = weights / weights.sum(1, keepdims=True)
    return network


def load_checkpoint(folder: Path) -> dict:
    """What a run's checkpoint.pt holds."""
    try:
        return torch.load(folder / "checkpoint.pt", "cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load raises nearly anything on a damaged file
        fail(f"{folder}: checkpoint.pt is damaged ({type(error).__name__})")


def read_layers(state: dict) -> dict[str, np.ndarray]:
    """The masks of a network's state, as bool, and the weights of its task encoder, as float."""
    layers = {name: mask.numpy() > 0 for name, mask in state["_extra_state"].items()}
    if layers and "task_encoder.weight" in state:
        layers["task_encoder"] = state["task_encoder.weight"].numpy()
    return layers


def read_run(folder: Path) -> Run | str:
    """A run, or why it is left out."""
    state = load_checkpoint(folder)
    layers, args = {name: read_layers(state[name]) for name in ("actor", "critic")}, state["args"]
    if not layers["actor"]:
        return "dense, it has no masks"
    if "head_hidden" not in layers["actor"]:
        return f"{state['script']}, must be a run on MiniGrid"
    if state["timestep"] + args["num_steps"] <= args["total_timesteps"]:
        return f"incomplete: at timestep {state['timestep']} of {args['total_timesteps']}"
    networks = {name: read_network(own) for name, own in layers.items()}
    script = importlib.import_module(state["script"])
    if args.keys() != script.Args.__dataclass_fields__.keys():
        return f"of another version of {state['script']}"
    ids = script.task_ids(script.Args(**args))
    tasks = tuple(name.removeprefix("MiniGrid-").removesuffix("-v0") for name in ids)
    if len(tasks) == 1:
        return "a single task"
    benchmark = ", ".join(tasks) if args["env_ids"] else args["benchmark"]
    shown = {name: str(value) for name, value in args.items()}
    row = f"{paper_method(shown)[1]} on {benchmark}"
    return Run(folder, row, shown, tasks, networks, args["seed"])


def read_runs(paths: tuple[Path, ...]) -> tuple[list[list[Run]], list[str]]:
    """The runs of each method, by seed, and a line for each run that is left out."""
    sys.path.insert(0, str(ROOT))
    folders = set()
    for path in paths:
        found = {file.parent.resolve() for file in path.rglob("checkpoint.pt")}
        if not found:
            fail(f"{path}: must be a run folder or a folder of run folders")
        folders |= found
    if not folders:
        fail("no runs given, must be run folders or folders of run folders")
    read = {folder: read_run(folder) for folder in sorted(folders)}
    left_out = [f"{folder.name}: {why}" for folder, why in read.items() if isinstance(why, str)]
    runs = [run for run in read.values() if isinstance(run, Run)]
    if not runs:
        fail(f"none of {len(left_out)} runs has masks to compare, the first: {left_out[0]}")
    call_by_arguments(runs)
    methods = [sorted(own, key=lambda run: run.seed) for own in group(runs, "method").values()]
    for a, b in itertools.chain.from_iterable(map(itertools.pairwise, methods)):
        if a.seed == b.seed:
            fail(f"{a.folder} and {b.folder}: both {a.method} with seed {a.seed}")
    return methods, left_out


# Overlap and chance


def overlap(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Jaccard overlap of two sets (D,), 0 of two empty ones."""
    return (ours & theirs).sum() / max((ours | theirs).sum(), 1)


def overlap_by_chance(ours: int, theirs: int, pool: int, rng) -> np.ndarray:
    """(DRAWS,) overlaps of two sets of these sizes, each drawn out of pool features."""
    both = rng.hypergeometric(ours, pool - ours, theirs, DRAWS)
    return both / np.maximum(ours + theirs - both, 1)


def alone(reads: np.ndarray, task: int) -> float:
    """Share of the features that a head reads (task, D) that no other head reads."""
    others = np.delete(reads, task, axis=0).any(0)
    return (reads[task] & ~others).sum() / max(reads[task].sum(), 1)


def alone_by_chance(sizes: np.ndarray, task: int, pool: int, rng) -> np.ndarray:
    """(DRAWS,) such shares, of sets of these sizes, each drawn out of pool features."""
    left = np.full(DRAWS, sizes[task])  # of the head's features, those in no set so far
    for size in np.delete(sizes, task):
        left = left - rng.hypergeometric(left, pool - left, size)
    return left / max(sizes[task], 1)


class Comparison(NamedTuple):
    """What is observed, by seed, and what chance gives."""

    observed: np.ndarray  # (seed,)
    chance: np.ndarray  # (seed,) means
    low: float  # 95 % range of chance, of the mean over the seeds
    high: float

    @property
    def mark(self) -> str:
        return "" if self.low - 1e-9 <= self.observed.mean() <= self.high + 1e-9 else "*"

    def cells(self) -> list[str]:
        """Of a table: mean, chance, its range, and each seed's own."""
        mean, chance = self.observed.mean(), self.chance.mean()
        own = [f"{x:.3f} ({y:.3f})" for x, y in zip(self.observed, self.chance, strict=True)]
        seen = f"{mean:.3f}{self.mark}"
        return [seen, f"{chance:.3f}", f"{self.low:.3f} to {self.high:.3f}", *own]


def compare(observed: np.ndarray, draws: np.ndarray) -> Comparison:
    """observed (seed,), draws (seed, DRAWS)."""
    return Comparison(observed, draws.mean(1), *np.quantile(draws.mean(0), (0.025, 0.975)))


def compare_pairs(networks: list[Network]) -> dict[tuple[int, int], Comparison]:
    """Overlap of every two tasks' heads, of a method's networks, one a seed."""
    pairs = {}
    for i, j in itertools.combinations(range(len(networks[0].reads)), 2):
        rng = np.random.default_rng([i, j])
        observed = np.array([overlap(n.reads[i], n.reads[j]) for n in networks])
        sizes = [(*n.reads[[i, j]].sum(1), n.reached) for n in networks]
        pairs[i, j] = compare(observed, np.array([overlap_by_chance(*own, rng) for own in sizes]))
    return pairs


def compare_alone(networks: list[Network]) -> list[Comparison]:
    """The share that only the one head reads, for each task, of a method's networks, one a seed."""
    rng, heads = np.random.default_rng(0), []
    for task in range(len(networks[0].reads)):
        observed = np.array([alone(n.reads, task) for n in networks])
        draws = [alone_by_chance(n.reads.sum(1), task, n.reached, rng) for n in networks]
        heads.append(compare(observed, np.array(draws)))
    return heads


# Tables and figure


def title(runs: list[Run], name: str) -> str:
    """Of a method's actors or critics."""
    return f"{runs[0].method}: {name}, {len(runs)} seed{'s' * (len(runs) > 1)}"


def describe(runs: list[Run], name: str) -> str:
    """The tables of a method's actors or critics."""
    tasks, networks = runs[0].tasks, [run.networks[name] for run in runs]
    seeds = [f"seed {run.seed}" for run in runs]
    titles = ["mean", "chance", "95 % of chance", *seeds]
    pairs = compare_pairs(networks)
    rows = [[f"{tasks[i]}, {tasks[j]}", *own.cells()] for (i, j), own in pairs.items()]
    text = f"\n## {title(runs, name)}\n\n" + table(["overlap of", *titles], rows) + "\n"
    marked = sum(own.mark == "*" for own in pairs.values())
    text += f"\n{marked} of {len(pairs)} pairs are outside the 95 % range of chance. "
    reached = ", ".join(str(n.reached) for n in networks)
    text += f"The observation reaches {reached} of {networks[0].reads.shape[1]} features.\n\n"
    rows = []
    for task, own in enumerate(compare_alone(networks)):
        counts = [(n.hidden[task], n.connected[task], n.reads[task].sum()) for n in networks]
        counts = [f"{count:.0f}" for count in np.mean(counts, axis=0)]
        rows.append([tasks[task], *counts, *own.cells()])
    counted = ["hidden neurons with an output", "features connected", "features read"]
    text += table(["head", *counted, "alone: mean", *titles[1:]], rows) + "\n"
    if networks[0].shares is not None:
        text += describe_experts(tasks, np.array([n.shares for n in networks]), seeds)
    return text


def describe_experts(tasks: tuple[str, ...], shares: np.ndarray, seeds: list[str]) -> str:
    """Table of the experts' shares (seed, task, k) of each task's absolute encoder weights."""
    initial = np.random.default_rng(0).random((DRAWS, 1, shares.shape[2]))  # uniform, as at first
    initial /= initial.sum(2, keepdims=True)
    rows = []
    for each, names in ((shares, tasks), (initial, ["at random, as before training"])):
        largest = each.max(2).mean(0)
        effective = np.exp(-(each * np.log(np.maximum(each, 1e-12))).sum(2)).mean(0)
        for task, name in enumerate(names):
            own = [" ".join(f"{share:.2f}" for share in seed[task]) for seed in shares]
            own = own if each is shares else [""] * len(own)
            rows.append([name, f"{largest[task]:.2f}", f"{effective[task]:.2f}", *own])
    return EXPERTS + table(["task", "largest share", "effective number", *seeds], rows) + "\n"


def plot(methods: list[list[Run]], path: Path) -> None:
    """A heat map for each method's actors and critics, in which every pair of tasks is a cell."""
    side = max(len(runs[0].tasks) for runs in methods) - 1
    abreast = 2 if len(methods) > 2 else 1  # methods
    rows = math.ceil(len(methods) / abreast)
    size = 2 * abreast * (0.55 * side + 1.3) + 0.8, rows * (0.45 * side + 1.3) + 0.6  # inches
    figure, axes = plt.subplots(
        rows, 2 * abreast, figsize=size, squeeze=False, layout="constrained"
    )
    font = dict(fontsize=FONT_SIZE)
    panels = list(itertools.product(methods, ("actor", "critic")))
    compared = [compare_pairs([run.networks[name] for run in runs]) for runs, name in panels]
    limit = max(abs((p.observed - p.chance).mean()) for pairs in compared for p in pairs.values())
    limit = max(limit, 0.05)  # lest noise looks like much
    for panel in axes.flat[len(panels) :]:
        panel.set_visible(False)
    cells = axes.flat[: len(panels)]
    for panel, (runs, name), pairs in zip(cells, panels, compared, strict=True):
        tasks = runs[0].tasks
        differences = np.full((len(tasks) - 1, len(tasks) - 1), np.nan)
        for (i, j), own in pairs.items():  # the second task's row, the first one's column
            differences[j - 1, i] = difference = (own.observed - own.chance).mean()
            text = f"{own.observed.mean():.2f}{own.mark}\n({own.chance.mean():.2f})"
            colour = "white" if abs(difference) > 0.6 * limit else "black"
            style = dict(ha="center", va="center", fontsize=FONT_SIZE - 1)
            panel.text(i, j - 1, text, color=colour, **style)
        image = panel.imshow(differences, "RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        panel.set_xticks(range(len(tasks) - 1), tasks[:-1], rotation=40, ha="right", **font)
        panel.set_yticks(range(len(tasks) - 1), tasks[1:], **font)
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_title(title(runs, name).replace(": ", "\n"), **font)
    bar = figure.colorbar(image, ax=axes, shrink=0.6)
    bar.set_label("overlap less chance", **font)
    bar.ax.tick_params(labelsize=FONT_SIZE)
    figure.suptitle(CAPTION, **font)
    figure.savefig(path, dpi=200, bbox_inches="tight")
    plt.close(figure)


def subnetworks(args: Args) -> None:
    """Print the tables of all methods, and write them with a figure."""
    methods, left_out = read_runs(args.runs)
    text = TEXT + "".join(describe(runs, name) for runs in methods for name in runs[0].networks)
    if left_out:
        text += "\n## Left out\n\n" + "".join(f"- {line}\n" for line in left_out)
    if args.out:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "subnetworks.md").write_text(text + "\n![](subnetworks.png)\n")
        except OSError as error:
            fail(f"--out {args.out}: must be a folder to write to ({error.strerror})")
        plot(methods, args.out / "subnetworks.png")
    print(text, end="")


if __name__ == "__main__":
    subnetworks(tyro.cli(Args))
