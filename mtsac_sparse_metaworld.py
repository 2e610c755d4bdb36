# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "gymnasium==1.4.0",
#     "metaworld==3.1.1",
#     "mujoco==3.3.0",
#     "numpy==2.4.6",
#     "tyro>=1.0",
#     "tensorboard>=2.20",
#     "tqdm>=4.67",
# ]
# ///
"""Multi-task multi-head SAC on Meta-World with a pruned actor, pruned critics or both.

One shared trunk of three layers and one head per task, for the actor and for the twin critics,
made sparse by gradual magnitude pruning or by sparse evolutionary training (arXiv 2508.06871,
section 4, MTMH-SAC; setting of McLean et al. 2025). Tensors are (task, batch, ...) throughout;
a timestep is one environment step of one task.

    python mtsac_sparse_metaworld.py --benchmark MT10 --prune actor --seed 1
"""

import atexit
import copy
import math
import os
import signal
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import gymnasium as gym
import metaworld
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from gymnasium.vector.async_vector_env import _async_worker
from metaworld.env_dict import ALL_V3_ENVIRONMENTS, MT10_V3, MT50_V3
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Adam
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from plasticity_metrics import dormant_ratio, effective_rank, fisher_trace


@dataclass
class Args:
    """Multi-task multi-head SAC with sparse networks on Meta-World."""

    # Tasks
    benchmark: Literal["MT10", "MT50"] = "MT10"
    """set of tasks to train on"""
    env_names: tuple[str, ...] = ()
    """Meta-World names to train on instead of a benchmark (one name: single-task SAC)"""
    seed: int = 1
    """seed of the networks, the environments and every draw"""
    total_timesteps: int = 20_000_000
    """environment steps over all tasks"""
    vectorization: Literal["async", "sync"] = "async"
    """step the environments in one process each (async) or in this one (sync)"""

    # SAC
    batch_size: int = 1280
    """transitions of a batch over all tasks, the same number of each"""
    buffer_size: int = 1_000_000
    """transitions that the replay buffer holds, over all tasks"""
    learning_starts: int = 40_000
    """timesteps of uniformly random actions before the first update"""
    updates_per_step: int = 1
    """updates after each step of all environments"""
    actor_lr: float = 3e-4
    """learning rate of the actor's Adam"""
    critic_lr: float = 3e-4
    """learning rate of the critic's Adam"""
    alpha_lr: float = 3e-4
    """learning rate of the temperatures' Adam"""
    adam_eps: float = 1e-5
    """epsilon of every Adam"""
    max_grad_norm: float = 1.0
    """largest norm of the actor's gradient and of the critics' (pruned weights do not count)"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """step of the target critics towards the critics at each update"""
    max_q: float = 5000.0
    """largest absolute value of a critic's target (0: no limit)"""
    bootstrap_at_truncation: bool = True
    """go on with the critics' value where an episode ends by its time limit"""

    # Sparsity
    prune: Literal["actor", "critic", "both", "none"] = "actor"
    """networks that are sparse (none: the dense baseline)"""
    sparsifier: Literal["gmp", "set"] = "gmp"
    """gradual magnitude pruning, or sparse evolutionary training"""
    sparsity: float = 0.95
    """share of pruned weights (0: the dense baseline)"""
    prune_start: float = 0.05
    """share of training after which pruning begins"""
    prune_end: float = 0.80
    """share of training after which the final sparsity holds"""
    prune_frequency: int = 5000
    """timesteps between two renewals of the masks"""
    prune_scope: Literal["layer", "global"] = "layer"
    """rank magnitudes in each layer (each head, expert and twin apart) or over a whole network"""
    set_zeta: float = 0.3
    """share of a layer's active weights replaced at each evolution"""
    set_frequency: int = 2000
    """timesteps between two evolutions"""
    set_epsilon: float | None = None
    """use SET's own density epsilon * (in + out) / (in * out) instead of the asked sparsity"""
    set_regrow: Literal["random", "gradient"] = "random"
    """grow at random (SET) or where the last minibatch's gradient is largest (RigL)"""

    # Comparison arms
    weight_decay: float = 0.0
    """L2 coefficient of Adam"""
    layer_norm: bool = False
    """normalise each hidden layer before its nonlinearity (no learned gain or bias)"""

    # Evaluation and plasticity metrics
    eval_frequency: int = 200_000
    """timesteps between two evaluations"""
    eval_episodes: int = 50
    """episodes per task in an evaluation"""
    plasticity_frequency: int = 200_000
    """timesteps between two measurements of plasticity"""
    plasticity_batch_size: int = 1024
    """observations they are computed on (the same number per task, rounded up)"""
    dormant_tau: float = 0.001
    """score up to which a neuron counts as dormant"""
    srank_delta: float = 0.01
    """share of the singular values that the effective rank leaves out"""

    # Run
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where networks and training data live (auto: cuda if there is one)"""
    run_dir: str | None = None
    """folder of logs and checkpoint (default: runs/<benchmark>__<script>__<seed>__<time>)"""
    checkpoint_frequency: int = 200_000
    """timesteps between two checkpoints"""
    resume: str | None = None
    """run folder to go on with, with the run's own flags"""
    num_threads: int = 0
    """torch threads (0: torch's choice)"""


def fail(message: str) -> NoReturn:
    """End with one line on standard error and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


COUNTS = """batch_size buffer_size updates_per_step prune_frequency set_frequency eval_frequency
eval_episodes plasticity_frequency plasticity_batch_size checkpoint_frequency"""
POSITIVE = "actor_lr critic_lr alpha_lr adam_eps max_grad_norm"
WINDOW = "0 <= start < end <= 1 (--prune-end {prune_end})"
EPISODE = "at least one episode of every task (500 timesteps each)"
TASKS = "tasks of Meta-World (like reach-v3), each named once"
SPLIT = "a multiple of the number of tasks"

# Flags, what they may be given all arguments, and the same in words
LIMITS = [
    (COUNTS, lambda x, args: x >= 1, "at least 1"),
    ("seed", lambda x, args: 0 <= x < 2**63, "in [0, 2^63)"),
    ("num_threads learning_starts", lambda x, args: x >= 0, "at least 0"),
    (POSITIVE, lambda x, args: 0 < x < math.inf, "positive and finite"),
    ("max_q weight_decay dormant_tau", lambda x, args: 0 <= x < math.inf, "at least 0, finite"),
    ("gamma", lambda x, args: 0 <= x <= 1, "in [0, 1]"),
    ("tau", lambda x, args: 0 < x <= 1, "in (0, 1]"),
    ("sparsity srank_delta", lambda x, args: 0 <= x < 1, "in [0, 1)"),
    ("prune_start", lambda x, args: 0 <= x < args.prune_end <= 1, WINDOW),
    ("set_zeta", lambda x, args: 0 < x < 1, "in (0, 1)"),
    ("set_epsilon", lambda x, args: x is None or 0 < x < math.inf, "positive and finite"),
    ("env_names", lambda x, args: len({*x} & {*ALL_V3_ENVIRONMENTS}) == len(x), TASKS),
    ("total_timesteps", lambda x, args: x >= len(task_names(args)) * EPISODE_STEPS, EPISODE),
    (
        "learning_starts",
        lambda x, args: x < args.total_timesteps,
        "less than --total-timesteps {total_timesteps}",
    ),
    ("batch_size", lambda x, args: x % len(task_names(args)) == 0, SPLIT),
    (
        "buffer_size",
        lambda x, args: x >= args.batch_size,
        "at least one batch (--batch-size {batch_size})",
    ),
    (
        "device",
        lambda x, args: x != "cuda" or torch.cuda.is_available(),
        "cpu or auto: no CUDA here",
    ),
    ("buffer_size", lambda x, args: check_memory(args), "what fits in memory"),
]


def check_args(args: Args) -> None:
    """Refuse values that no run can have, before anything is made."""
    for names, allowed, what in LIMITS:
        for name in names.split():
            value = getattr(args, name)
            if not allowed(value, args):
                flag = "--" + name.replace("_", "-")
                shown = " ".join(value) if isinstance(value, tuple) else value
                fail(f"{flag} {shown}: must be {what.format(**vars(args))}")


def check_memory(args: Args) -> bool:
    """End with an error where the replay buffer does not fit in the memory of --device."""
    needed = args.buffer_size * 4 * (2 * OBS_SIZE + ACTION_SIZE + 2)
    free = available_bytes(args.device)
    if needed > free:
        fail(
            f"--buffer-size {args.buffer_size}: needs {needed:,} bytes, must fit in the {free:,} "
            "bytes of memory that are available"
        )
    return True


def available_bytes(device: str) -> int:
    """Memory that a new tensor on --device may take."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        rows = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(rows["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# Tasks and environments

OBS_SIZE, ACTION_SIZE, EPISODE_STEPS, NUM_GOALS = 39, 4, 500, 50


def task_names(args: Args) -> list[str]:
    """Meta-World names of the run's tasks."""
    benchmark = {"MT10": MT10_V3, "MT50": MT50_V3}[args.benchmark]
    return list(args.env_names or benchmark)


class GoalEnv(gym.Wrapper):
    """A Meta-World task that each reset sets to one of its goals and initial states.

    An episode follows from its goal and its actions alone, whatever was played before it.
    """

    def __init__(self, name: str, goals: list):
        super().__init__(ALL_V3_ENVIRONMENTS[name]())
        self.goals = goals
        self.unwrapped.set_task(goals[0])  # makes the goal part of the observation

    def reset(self, *, seed: int, options=None):
        self.unwrapped.set_task(self.goals[seed % len(self.goals)])
        return self.env.reset()


def quiet_worker(*args) -> None:
    """gymnasium's process of one environment, that leaves Ctrl-C and SIGTERM to the run, and ends
    without a word when the run is killed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with suppress(EOFError, ConnectionError):
        _async_worker(*args)


def make_envs(names: list[str], goals: dict[str, list], vectorization: str) -> gym.vector.VectorEnv:
    """One environment per task; their episodes end together and are reset by hand."""
    makers = [partial(GoalEnv, name, goals[name]) for name in names]
    by_hand = gym.vector.AutoresetMode.DISABLED
    if vectorization == "sync":
        return gym.vector.SyncVectorEnv(makers, autoreset_mode=by_hand)
    envs = gym.vector.AsyncVectorEnv(makers, autoreset_mode=by_hand, worker=quiet_worker)
    atexit.register(envs.close)  # after an error too
    return envs


TRAINING, EVALUATION, METRICS, GOALS = range(4)


def derive_seeds(seed: int, purpose: int, timestep: int, number: int) -> list[int]:
    """Independent seeds for one purpose at one timestep.

    Every draw comes from generators seeded here, so that neither evaluation nor metrics disturb
    training, and a resumed run needs no generator's state to be exact.
    """
    return np.random.SeedSequence((seed, purpose, timestep)).generate_state(number).tolist()


# Networks


class StackedLinear(nn.Module):
    """Linear layers side by side: (stack, batch, in) -> (stack, batch, out).

    He-uniform weights and zero biases.
    """

    def __init__(self, stack: int, in_features: int, out_features: int):
        super().__init__()
        bound = math.sqrt(6 / in_features)
        weight = torch.empty(stack, out_features, in_features).uniform_(-bound, bound)
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(stack, 1, out_features))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight.mT)


class MultiHeadMLP(nn.Module):
    """Copies of a network side by side (an actor: 1, twin critics: 2), with their masks.

    Each copy is a shared trunk of three layers and one head per task; the one-hot task is part of
    its input.
    """

    def __init__(self, copies: int, num_tasks: int, in_size: int, out_size: int, layer_norm: bool):
        super().__init__()
        self.hidden1 = StackedLinear(copies, in_size + num_tasks, 400)
        self.hidden2 = StackedLinear(copies, 400, 400)
        self.hidden3 = StackedLinear(copies, 400, 400)
        self.head = StackedLinear(copies * num_tasks, 400, out_size)
        self.register_buffer("one_hot", torch.eye(num_tasks)[:, None], persistent=False)
        self.layer_norm = layer_norm
        # Each layer, in order, and how many layers of one shape it batches
        self.layers = dict(hidden1=copies, hidden2=copies, hidden3=copies, head=copies * num_tasks)
        self.masks = {}  # layer -> zeros and ones in its weight's shape; empty: dense

    def activations(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """x (task, batch, in) -> what each hidden layer puts out, (copy, task * batch, 400); the
        output (copy, task, batch, out)."""
        num_tasks, batch = x.shape[:2]
        copies = self.layers["hidden1"]
        x = torch.cat([x, self.one_hot.expand(-1, batch, -1)], dim=-1)
        x = x.flatten(0, 1).expand(copies, -1, -1)
        hidden = []
        for layer in (self.hidden1, self.hidden2, self.hidden3):
            x = layer(x)
            x = F.relu(F.layer_norm(x, x.shape[-1:]) if self.layer_norm else x)
            hidden.append(x)
        output = self.head(x.view(copies * num_tasks, batch, -1))
        return hidden, output.view(copies, num_tasks, batch, -1)

    def forward(self, x: Tensor) -> Tensor:
        return self.activations(x)[-1]


def policy(actor: nn.Module, obs: Tensor) -> tuple[Tensor, Tensor]:
    """obs (task, batch, 39) -> mean and log standard deviation before tanh, (task, batch, 4)."""
    mean, log_std = actor(obs)[0].chunk(2, dim=-1)
    return mean, log_std.clamp(-20, 2)


def draw_actions(mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
    """Draw from the squashed Gaussian: actions (..., 4) and their log-probs (...).

    Source: Haarnoja et al. 2018, appendix C; log(1 - tanh(u)^2) in a form that cannot overflow.
    """
    noise = torch.randn_like(mean)
    u = mean + log_std.exp() * noise
    gaussian = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    squash = 2 * (math.log(2) - u - F.softplus(-2 * u))
    return u.tanh(), (gaussian - squash).sum(-1)


def q_values(critic: nn.Module, obs: Tensor, actions: Tensor) -> Tensor:
    """obs (task, batch, 39), actions (task, batch, 4) -> both critics' values (2, task, batch)."""
    return critic(torch.cat([obs, actions], dim=-1)).squeeze(-1)


# Gradual magnitude pruning


def gmp_sparsity(progress: float, start: float, end: float, final: float) -> float:
    """Cubic schedule: the sparsity at a share of training (Zhu & Gupta 2017, equation 1)."""
    done = min(max((progress - start) / (end - start), 0.0), 1.0)
    return final * (1 - (1 - done) ** 3)


def keep_largest(scores: Tensor, keep: int) -> Tensor:
    """scores (rows, n) -> mask of the same shape with exactly keep ones in each row."""
    kept = scores.topk(keep, dim=1, sorted=False).indices
    return torch.zeros_like(scores).scatter_(1, kept, 1.0)


@torch.no_grad()
def prune(network: nn.Module, sparsity: float, scope: str) -> None:
    """Renew the network's masks to the asked sparsity by magnitude, and apply them.

    scope "layer" ranks within each layer, each head, expert and twin apart; "global" ranks over
    the whole network. What was pruned ranks last, so that it never comes back.
    """
    weights = {name: network.get_submodule(name).weight for name in network.layers}
    scores = {name: w.abs() for name, w in weights.items()}
    for name, mask in network.masks.items():
        scores[name] = torch.where(mask > 0, scores[name], -1.0)
    if scope == "global":
        rows = [torch.cat([s.flatten() for s in scores.values()])[None]]
    else:
        rows = [s.view(network.layers[name], -1) for name, s in scores.items()]
    masks = [keep_largest(row, row.shape[1] - round(sparsity * row.shape[1])) for row in rows]
    if scope == "global":
        masks = masks[0][0].split([w.numel() for w in weights.values()])
    for (name, w), mask in zip(weights.items(), masks, strict=True):
        network.masks[name] = mask.view_as(w)
    apply_masks(network)


@torch.no_grad()
def apply_masks(network: nn.Module) -> None:
    """Set the pruned weights to zero."""
    for name, mask in network.masks.items():
        network.get_submodule(name).weight.mul_(mask)


def alive_neurons(network: nn.Module) -> list[Tensor]:
    """Which neurons of each hidden layer have an unmasked incoming weight: (C,) or (task, H)."""
    *hidden, _ = ((name, network.get_submodule(name).weight) for name in network.layers)
    masks = [network.masks.get(name, torch.ones_like(weight)) for name, weight in hidden]
    return [m.any(-1) if m.dim() == 3 else m.flatten(1).any(-1) for m in masks]


def measure_sparsity(network: nn.Module) -> dict[str, float]:
    """Share of masked weights: "/<layer>" in each layer, "" in all of them together."""
    sizes = {name: network.get_submodule(name).weight.numel() for name in network.layers}
    masked = {name: (mask == 0).sum().item() for name, mask in network.masks.items()}
    shares = {f"/{name}": masked.get(name, 0) / size for name, size in sizes.items()}
    return {"": sum(masked.values()) / sum(sizes.values()), **shares}


# Sparse evolutionary training


def erk_densities(shapes: list[tuple[int, ...]], sparsity: float) -> list[float]:
    """Erdős–Rényi(-Kernel) densities: the share of active weights of each layer.

    shapes: of the layers' weights, (out, in) or (out, in, kh, kw). A layer's density is in
    proportion to the sum of its shape over their product, and at most 1; one scale makes the
    active weights of all layers the share 1 - sparsity of all weights.
    Source: Mocanu et al. 2018, equation 3; with kernels Evci et al. 2020, section 3.
    """
    sizes = [math.prod(shape) for shape in shapes]
    raw = [sum(shape) / size for shape, size in zip(shapes, sizes, strict=True)]
    dense = set()
    while True:
        rest = [i for i in range(len(shapes)) if i not in dense]
        active = (1 - sparsity) * sum(sizes) - sum(sizes[i] for i in dense)
        scale = active / sum(raw[i] * sizes[i] for i in rest)
        saturated = {i for i in rest if scale * raw[i] > 1}
        if not saturated:
            return [1.0 if i in dense else scale * raw[i] for i in range(len(shapes))]
        dense |= saturated


def set_densities(network: nn.Module, sparsity: float, epsilon: float | None) -> dict[str, float]:
    """Density of each linear layer: solved for the sparsity, or SET's own where epsilon is given.

    No layer at sparsity 0. Source: Mocanu et al. 2018, equation 3.
    """
    weights = {name: network.get_submodule(name).weight for name in network.layers}
    linear = {name: tuple(w.shape[-2:]) for name, w in weights.items() if w.dim() < 4}
    if sparsity == 0:
        return {}
    if epsilon is not None:
        return {name: min(1.0, epsilon * sum(s) / math.prod(s)) for name, s in linear.items()}
    shapes = [shape for name, shape in linear.items() for _ in range(network.layers[name])]
    densities = dict(zip(shapes, erk_densities(shapes, sparsity), strict=True))
    return {name: densities[shape] for name, shape in linear.items()}


def draw_masks(network: nn.Module, densities: dict[str, float]) -> None:
    """Give the network masks with exactly round(density * n) active weights at random places."""
    for name, density in densities.items():
        weight = network.get_submodule(name).weight
        scores = torch.rand_like(weight).view(network.layers[name], -1)
        network.masks[name] = keep_largest(scores, round(density * scores.shape[1])).view_as(weight)
    apply_masks(network)


@torch.no_grad()
def evolve(network: nn.Module, optimizer, densities: dict, zeta: float, regrow: str) -> None:
    """In each layer, drop the share zeta of the active weights that is smallest in magnitude, and
    grow as many of the places that were inactive (all of them if they are fewer).

    regrow "random" draws the places (Mocanu et al. 2018, algorithm 1); "gradient" takes those where
    the last minibatch's gradient is largest (RigL, Evci et al. 2020), and draws them as long as
    there was none. Grown weights start at zero with cleared Adam moments.
    """
    for name, density in densities.items():
        weight, mask = network.get_submodule(name).weight, network.masks[name]
        magnitudes = weight.abs().view(network.layers[name], -1)
        active = mask.view_as(magnitudes) > 0
        count = round(density * active.shape[1])
        moved = min(round(zeta * count), active.shape[1] - count)
        if regrow == "gradient" and weight.grad is not None:
            scores = weight.grad.abs().view_as(magnitudes)
        else:
            scores = torch.rand_like(magnitudes)
        kept = keep_largest(magnitudes.masked_fill(~active, -1.0), count - moved)
        grown = keep_largest(scores.masked_fill(active, -1.0), moved)
        network.masks[name] = (kept + grown).view_as(weight)
        for moment in ("exp_avg", "exp_avg_sq"):
            if weight in optimizer.state:
                optimizer.state[weight][moment].mul_(1 - grown.view_as(weight))
    apply_masks(network)


# Replay


class Transitions(NamedTuple):
    """Transitions of every task, float32."""

    obs: Tensor  # (task, batch, 39)
    actions: Tensor  # (task, batch, 4)
    rewards: Tensor  # (task, batch)
    next_obs: Tensor  # (task, batch, 39)
    bootstrap: Tensor  # (task, batch), 0 where no value follows, else 1


class ReplayBuffer:
    """The latest transitions of each task, on one device; the oldest make room for new ones."""

    def __init__(self, capacity: int, num_tasks: int, device):
        """capacity: transitions of all tasks together; num_tasks shares of equal size."""
        self.capacity = capacity // num_tasks
        shapes = (OBS_SIZE,), (ACTION_SIZE,), (), (OBS_SIZE,), ()
        self.fields = Transitions(
            *(torch.zeros(num_tasks, self.capacity, *shape, device=device) for shape in shapes)
        )
        self.added = 0  # transitions per task so far

    def filled(self) -> Transitions:
        """What the buffer holds."""
        return Transitions(*(field[:, : self.added] for field in self.fields))

    def add(self, *transition) -> None:
        """Store one transition of every task, in the order of Transitions: arrays (task, ...)."""
        for field, value in zip(self.fields, transition, strict=True):
            value = torch.as_tensor(value, dtype=torch.float32, device=field.device)
            field[:, self.added % self.capacity] = value
        self.added += 1

    def sample(self, size: int) -> Transitions:
        """Draw size transitions per task, with replacement."""
        num_tasks, device = len(self.fields.obs), self.fields.obs.device
        slot = torch.randint(min(self.added, self.capacity), (num_tasks, size), device=device)
        task = torch.arange(num_tasks, device=device)[:, None]
        return Transitions(*(field[task, slot] for field in self.fields))


# SAC

TARGET_ENTROPY = -ACTION_SIZE


@torch.no_grad()
def critic_targets(actor, target, log_alpha: Tensor, batch: Transitions, gamma, max_q) -> Tensor:
    """Soft Bellman targets (task, batch) of both critics (Haarnoja et al. 2018, equation 6)."""
    actions, log_probs = draw_actions(*policy(actor, batch.next_obs))
    q = q_values(target, batch.next_obs, actions).amin(0)
    soft_values = q - log_alpha.exp()[:, None] * log_probs
    targets = batch.rewards + gamma * batch.bootstrap * soft_values
    return targets.clamp(-max_q, max_q) if max_q else targets


def descend(loss: Tensor, network: nn.Module, optimizer, max_grad_norm: float) -> None:
    """One step of the network, and of nothing else, down the clipped gradient of the loss."""
    parameters = dict(network.named_parameters())
    optimizer.zero_grad()
    loss.backward(inputs=list(parameters.values()))
    # Pruned weights have a gradient (SET may grow by it), but take no part in its norm
    masks = {f"{layer}.weight": mask for layer, mask in network.masks.items()}
    active = [p.grad * masks[name] if name in masks else p.grad for name, p in parameters.items()]
    clip_grads_with_norm_(parameters.values(), max_grad_norm, get_total_norm(active))
    optimizer.step()
    apply_masks(network)


def update(networks: dict, log_alpha: Tensor, optimizers: dict, batch: Transitions, args: Args):
    """One SAC update of critics, actor, temperatures and target critics, in this order.

    Returns (3,): the losses of critics, actor and temperatures.
    """
    actor, critic, target = (networks[name] for name in ("actor", "critic", "target"))
    alpha = log_alpha.detach().exp()[:, None]  # (task, 1)

    targets = critic_targets(actor, target, log_alpha, batch, args.gamma, args.max_q)
    qf_loss = (q_values(critic, batch.obs, batch.actions) - targets).square().mean()
    descend(qf_loss, critic, optimizers["critic"], args.max_grad_norm)

    actions, log_probs = draw_actions(*policy(actor, batch.obs))
    actor_loss = (alpha * log_probs - q_values(critic, batch.obs, actions).amin(0)).mean()
    descend(actor_loss, actor, optimizers["actor"], args.max_grad_norm)

    alpha_loss = -(log_alpha[:, None] * (log_probs.detach() + TARGET_ENTROPY)).mean()
    optimizers["alpha"].zero_grad()
    alpha_loss.backward()
    optimizers["alpha"].step()

    with torch.no_grad():
        for old, new in zip(target.parameters(), critic.parameters(), strict=True):
            old.lerp_(new, args.tau)
    return torch.stack([qf_loss, actor_loss, alpha_loss]).detach()


# Evaluation and plasticity

CRITIC_ERROR_STRIDE = 10  # steps between two states that the critics are compared on


class Evaluation(NamedTuple):
    """Whole episodes that followed the mode of the policy."""

    successes: np.ndarray  # bool (task, episode), at any step
    rewards: Tensor  # (task, episode, step)
    log_probs: Tensor  # (task, episode, step), of an action drawn where the mode was played
    obs: Tensor  # (task, episode, step / CRITIC_ERROR_STRIDE, 39)
    actions: Tensor  # (task, episode, step / CRITIC_ERROR_STRIDE, 4)
    last_obs: Tensor  # (task, episode, 39), after the last step


def draw_goals(seed: int, num_tasks: int, num_episodes: int) -> np.ndarray:
    """Goals (task, episode) in an order of each task's own; none comes twice before all came."""
    rounds = math.ceil(num_episodes / NUM_GOALS)
    order = np.tile(np.arange(NUM_GOALS), (rounds, num_tasks, 1))
    order = np.random.default_rng(seed).permuted(order, axis=2)  # (round, task, goal)
    return order.swapaxes(0, 1).reshape(num_tasks, -1)[:, :num_episodes]


@torch.no_grad()
def evaluate_mode(actor: nn.Module, envs: gym.vector.VectorEnv, goals: np.ndarray, device):
    """Play an episode for each of goals (task, episode) with the mode of the policy."""
    num_tasks, num_episodes = goals.shape
    successes = np.zeros(goals.shape, bool)
    rewards = np.zeros((num_tasks, num_episodes, EPISODE_STEPS), np.float32)
    log_probs = torch.zeros(rewards.shape, device=device)
    visited = [[] for _ in range(num_episodes)]
    last_obs = []
    for episode in range(num_episodes):
        obs, _ = envs.reset(seed=goals[:, episode].tolist())
        for step in range(EPISODE_STEPS):
            obs_t = torch.as_tensor(obs, dtype=torch.float32, device=device)  # (task, 39)
            mean, log_std = (x[:, 0] for x in policy(actor, obs_t[:, None]))
            log_probs[:, episode, step] = draw_actions(mean, log_std)[1]
            actions = mean.tanh()  # (task, 4)
            if step % CRITIC_ERROR_STRIDE == 0:
                visited[episode].append((obs_t, actions))
            obs, rewards[:, episode, step], _, _, info = envs.step(actions.cpu().numpy())
            successes[:, episode] |= info["success"] > 0
        last_obs.append(torch.as_tensor(obs, dtype=torch.float32, device=device))
    visited_obs, visited_actions = (
        torch.stack([torch.stack([pair[i] for pair in pairs], 1) for pairs in visited], 1)
        for i in range(2)
    )
    return Evaluation(
        successes,
        torch.as_tensor(rewards, device=device),
        log_probs,
        visited_obs,
        visited_actions,
        torch.stack(last_obs, 1),
    )


def soft_returns(rewards: Tensor, bonuses: Tensor, tail: Tensor, gamma: float) -> Tensor:
    """Discounted soft return from each step on (..., step).

    rewards (..., step); bonuses (..., step): the entropy bonus of each step's state, which counts
    for the steps before it; tail (...): the soft value of the state after the last step.
    """
    returns, running = torch.empty_like(rewards), tail
    for step in reversed(range(rewards.shape[-1])):
        returns[..., step] = rewards[..., step] + gamma * running
        running = returns[..., step] + bonuses[..., step]
    return returns


@torch.no_grad()
def critic_error(networks: dict, log_alpha: Tensor, played: Evaluation, args: Args) -> float:
    """Mean squared difference between the smaller Q and the soft return that followed.

    On every CRITIC_ERROR_STRIDE-th state and action of the evaluation episodes. The soft return
    adds, for each later state, the temperature times minus the log-prob of an action drawn there,
    and with --bootstrap-at-truncation the critics' soft value of the last observation.
    """
    actor, critic = networks["actor"], networks["critic"]
    alpha = log_alpha.exp()[:, None]
    actions, log_probs = draw_actions(*policy(actor, played.last_obs))
    tail = q_values(critic, played.last_obs, actions).amin(0) - alpha * log_probs
    tail = tail * args.bootstrap_at_truncation
    bonuses = -alpha[:, None] * played.log_probs
    returns = soft_returns(played.rewards, bonuses, tail, args.gamma)[..., ::CRITIC_ERROR_STRIDE]
    pairs = zip(played.obs.unbind(1), played.actions.unbind(1), strict=True)  # one episode at once
    values = torch.stack([q_values(critic, *pair).amin(0) for pair in pairs], 1)
    return (values - returns).square().mean().item()


def squashed_fisher_trace(actor: nn.Module, obs: Tensor) -> float:
    """Fisher trace of the squashed-Gaussian policy, exact over the actions; obs (task, batch, 39).

    Tanh has no parameters, so the scores are the Gaussian's: independent over dimensions, with
    variance 1 / std^2 for the mean and 2 for the log-std. The trace is the sum of squared gradient
    norms of these outputs, weighted with the variances. fisher_trace weights its entries' squared
    gradient norms with their exponential; so the entries' values are the log variances, and their
    gradients those of mean and log-std.
    """

    def entries():
        mean, log_std = policy(actor, obs)
        mean_entries = mean - mean.detach() - 2 * log_std.detach()
        return torch.cat([mean_entries, log_std - log_std.detach() + math.log(2)], dim=-1)

    return fisher_trace(actor, entries, actor.masks)


def measure_networks(networks: dict, batch: Transitions, args: Args) -> dict[str, float]:
    """Dormant ratio and effective rank of actor and critics, Fisher trace of the actor.

    Effective rank: of the last hidden layer, the mean of the twin critics'. Dormancy: over all
    hidden layers, the twins' neurons pooled.
    """
    metrics = {}
    inputs = {"actor": batch.obs, "critic": torch.cat([batch.obs, batch.actions], dim=-1)}
    for name, x in inputs.items():
        with torch.no_grad():
            hidden, _ = networks[name].activations(x)
        activations = [one for layer in hidden for one in layer]
        alive = [one for layer in alive_neurons(networks[name]) for one in layer]
        metrics[f"{name}_dormant_ratio"] = dormant_ratio(activations, args.dormant_tau, alive)
        ranks = [effective_rank(features, args.srank_delta) for features in hidden[-1]]
        metrics[f"{name}_effective_rank"] = sum(ranks) / len(ranks)
    metrics["fisher_trace"] = squashed_fisher_trace(networks["actor"], batch.obs)
    return metrics


# Run folder


def save_checkpoint(path: Path, state: dict) -> None:
    """Write atomically: a reader finds the old checkpoint or the new one, never a part."""
    partial = path.with_suffix(".partial")
    with open(partial, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load_checkpoint(run_dir: str) -> dict:
    """The checkpoint of a run of this script."""
    path = Path(run_dir) / "checkpoint.pt"
    if not path.is_file():
        fail(f"--resume {run_dir}: holds no checkpoint.pt, must be the folder of a run")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises nearly anything on a damaged file
        fail(f"--resume {run_dir}: checkpoint.pt is damaged ({type(error).__name__})")
    if not isinstance(state, dict) or state.get("script") != Path(__file__).stem:
        fail(f"--resume {run_dir}: checkpoint.pt is of another script, must be one of this script")
    if state["args"].keys() != asdict(Args()).keys():
        fail(f"--resume {run_dir}: checkpoint.pt has the flags of another version of this script")
    return state


def open_run(args: Args, name: str) -> tuple[Args, dict | None]:
    """Check the arguments and make the run folder, by default runs/<name>__<script>__...; or load
    a run's own arguments and its checkpoint."""
    if args.resume is not None:
        if args != Args(resume=args.resume):
            fail(f"--resume {args.resume}: goes on with the run's own flags, must stand alone")
        checkpoint = load_checkpoint(args.resume)
        args = replace(Args(**checkpoint["args"]), run_dir=args.resume)
        check_args(args)
        return args, checkpoint
    check_args(args)
    default = f"runs/{name}__{Path(__file__).stem}__{args.seed}__{int(time.time())}"
    run_dir = Path(args.run_dir or default)
    if any(run_dir.glob("checkpoint.pt")) or any(run_dir.glob("events.out.tfevents.*")):
        fail(f"--run-dir {run_dir}: already holds a run, must be another folder (or --resume it)")
    try:
        run_dir.mkdir(parents=True, exist_ok=args.run_dir is not None)
        (run_dir / "checkpoint.partial").touch()
    except OSError as error:
        fail(f"--run-dir {run_dir}: must be a new or a writable folder ({error.strerror})")
    return replace(args, run_dir=str(run_dir)), None


def open_log(args: Args, timestep: int) -> SummaryWriter:
    """The run's TensorBoard log; readers drop what an earlier process logged after timestep."""
    if any(Path(args.run_dir).glob("events.out.tfevents.*")):
        time.sleep(1)  # they are read in the order of their names, which begin with the second
    writer = SummaryWriter(args.run_dir, purge_step=timestep + 1)
    if timestep == 0:
        rows = "".join(f"|{name}|{value}|\n" for name, value in asdict(args).items())
        writer.add_text("args", "|argument|value|\n|-|-|\n" + rows)
    return writer


def stop_on_signals() -> list[int]:
    """A list that SIGINT and SIGTERM fill from now on, to end in good order; a second one of the
    same kind ends the process at once."""
    stop = []

    def on_signal(number, frame):
        stop.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    return stop


@contextmanager
def timed(seconds: dict[str, float], what: str):
    """Add the wall-clock time of the block to seconds[what]."""
    start = time.perf_counter()
    yield
    seconds[what] += time.perf_counter() - start


def print_results(tasks: list[str], evaluation: dict, seconds: dict[str, float]) -> None:
    """Print the final evaluation per task, and where the time went."""
    means = [np.mean(values) for values in evaluation.values()]
    print(f"\n{'task':<26}{'success rate':>14}{'episodic return':>17}")
    for row in [*zip(tasks, *evaluation.values(), strict=True), ("mean", *means)]:
        print("{:<26}{:>14.3f}{:>17.1f}".format(*row))
    total = sum(seconds.values())
    print(f"\n{'time':<26}{'seconds':>14}{'share':>17}")
    for what, value in [*seconds.items(), ("sum", total)]:
        print(f"{what:<26}{value:>14.1f}{value / total:>17.1%}")


def train(args: Args) -> None:
    """Train, evaluate and measure one run."""
    args, checkpoint = open_run(args, "custom" if args.env_names else args.benchmark)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    use_cuda = args.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if use_cuda else "cpu")

    # Environments, networks, replay
    names = task_names(args)
    tasks, num_tasks = [name.removesuffix("-v3") for name in names], len(names)
    goal_seeds = derive_seeds(args.seed, GOALS, 0, num_tasks)
    goals = {
        name: metaworld.MT1(name, seed).train_tasks
        for name, seed in zip(names, goal_seeds, strict=True)
    }
    envs = make_envs(names, goals, args.vectorization)
    eval_envs = make_envs(names, goals, args.vectorization)
    torch.manual_seed(args.seed)
    sizes = {"actor": (1, num_tasks, OBS_SIZE, 2 * ACTION_SIZE)}
    sizes["critic"] = (2, num_tasks, OBS_SIZE + ACTION_SIZE, 1)
    networks = {name: MultiHeadMLP(*s, args.layer_norm).to(device) for name, s in sizes.items()}
    networks["target"] = copy.deepcopy(networks["critic"]).requires_grad_(False)
    log_alpha = torch.zeros(num_tasks, device=device, requires_grad=True)
    adam = partial(Adam, eps=args.adam_eps, fused=True)
    decay = args.weight_decay
    optimizers = {
        "actor": adam(networks["actor"].parameters(), args.actor_lr, weight_decay=decay),
        "critic": adam(networks["critic"].parameters(), args.critic_lr, weight_decay=decay),
        "alpha": adam([log_alpha], args.alpha_lr),
    }
    chosen = {"both": ("actor", "critic"), "none": ()}.get(args.prune, (args.prune,))
    sparse = {name: networks[name] for name in chosen}
    densities = {}
    if args.sparsifier == "set":
        for name, network in sparse.items():
            densities[name] = set_densities(network, args.sparsity, args.set_epsilon)
            draw_masks(network, densities[name])
    buffer = ReplayBuffer(args.buffer_size, num_tasks, device)
    metrics_size = math.ceil(args.plasticity_batch_size / num_tasks)  # per task
    seconds = dict.fromkeys(("env", "inference", "update", "sparsify", "metrics", "eval"), 0.0)
    block = num_tasks * EPISODE_STEPS  # timesteps of one episode of every task
    last_timestep = args.total_timesteps // block * block
    timestep, evaluation = 0, {}
    if checkpoint:
        for name, network in networks.items():
            network.load_state_dict(checkpoint["networks"][name])
            network.masks = {n: m.to(device) for n, m in checkpoint["masks"][name].items()}
        for name, optimizer in optimizers.items():
            optimizer.load_state_dict(checkpoint["optimizers"][name])
        log_alpha.data.copy_(checkpoint["log_alpha"])
        buffer.added = checkpoint["added"]
        for field, saved in zip(buffer.filled(), checkpoint["replay"], strict=True):
            field.copy_(saved)
        timestep = checkpoint["timestep"]
        seconds, evaluation = checkpoint["seconds"], checkpoint["evaluation"]

    def save():
        state = {
            "script": Path(__file__).stem,
            "args": asdict(args),
            "timestep": timestep,
            "networks": {name: network.state_dict() for name, network in networks.items()},
            "masks": {name: network.masks for name, network in networks.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
            "log_alpha": log_alpha.detach(),
            "replay": [field.clone() for field in buffer.filled()],  # the filled part alone
            "added": buffer.added,
            "seconds": seconds,
            "evaluation": evaluation,
        }
        save_checkpoint(Path(args.run_dir) / "checkpoint.pt", state)

    def due(frequency):  # in the episodes that reach a multiple of frequency, and in the last
        return timestep % frequency < block or timestep == last_timestep

    def mask_target():
        networks["target"].masks = networks["critic"].masks
        apply_masks(networks["target"])

    def sparsify(learning):
        renewal = timestep % args.prune_frequency < num_tasks or timestep == last_timestep
        if args.sparsifier == "gmp" and renewal:
            progress = timestep / last_timestep
            share = gmp_sparsity(progress, args.prune_start, args.prune_end, args.sparsity)
            for network in sparse.values() if share else ():
                prune(network, share, args.prune_scope)
            mask_target()
        # Before learning, evolutions would only replace the drawn weights by zeros
        elif learning and densities and timestep % args.set_frequency < num_tasks:
            for name, network in sparse.items():
                rule = args.set_zeta, args.set_regrow
                evolve(network, optimizers[name], densities[name], *rule)
            mask_target()

    if not checkpoint:
        mask_target()
        save()
    writer = open_log(args, timestep)
    stop, start_time, start_timestep = stop_on_signals(), time.perf_counter(), timestep
    bar = tqdm(total=last_timestep, initial=timestep, unit="timestep", disable=None)

    while timestep < last_timestep and not stop:
        # One episode of every task, with an update after each step
        torch_seed, *episode_goals = derive_seeds(args.seed, TRAINING, timestep, 1 + num_tasks)
        torch.manual_seed(torch_seed)
        returns, successes = np.zeros(num_tasks), np.zeros(num_tasks, bool)
        losses, updates = torch.zeros(3, device=device), 0
        with timed(seconds, "env"):
            obs, _ = envs.reset(seed=episode_goals)
        for _ in range(EPISODE_STEPS):
            learning = timestep >= args.learning_starts
            with timed(seconds, "inference"), torch.no_grad():
                if learning:
                    obs_t = torch.as_tensor(obs, dtype=torch.float32, device=device)[:, None]
                    actions = draw_actions(*policy(networks["actor"], obs_t))[0][:, 0]
                else:
                    actions = torch.empty(num_tasks, ACTION_SIZE, device=device).uniform_(-1, 1)
                actions = actions.cpu().numpy()  # all that leaves the device
            with timed(seconds, "env"):
                next_obs, rewards, terminated, truncated, info = envs.step(actions)
                ended = terminated | (truncated & (not args.bootstrap_at_truncation))
                buffer.add(obs, actions, rewards, next_obs, ~ended)
                obs = next_obs
                returns += rewards
                successes |= info["success"] > 0
            timestep += num_tasks
            with timed(seconds, "update"):
                for _ in range(args.updates_per_step if learning else 0):
                    batch = buffer.sample(args.batch_size // num_tasks)
                    losses += update(networks, log_alpha, optimizers, batch, args)
                    updates += 1
            with timed(seconds, "sparsify"):
                sparsify(learning)

        # Measure and evaluate
        scalars = {}
        if updates:
            loss_names = ("qf_loss", "actor_loss", "alpha_loss")
            for name, value in zip(loss_names, (losses / updates).tolist(), strict=True):
                scalars[f"losses/{name}"] = value
            for task, alpha in zip(tasks, log_alpha.exp().tolist(), strict=True):
                scalars[f"losses/alpha/{task}"] = alpha
        for name in ("actor", "critic"):
            for layer, value in measure_sparsity(networks[name]).items():
                scalars[f"sparsity/{name}{layer}"] = value
        if due(args.plasticity_frequency):
            with timed(seconds, "metrics"):
                torch.manual_seed(*derive_seeds(args.seed, METRICS, timestep, 1))
                metrics = measure_networks(networks, buffer.sample(metrics_size), args)
            scalars |= {f"plasticity/{name}": value for name, value in metrics.items()}
        if due(args.eval_frequency):  # the critics are judged by the evaluation's episodes
            with timed(seconds, "eval"):
                torch_seed, goal_seed = derive_seeds(args.seed, EVALUATION, timestep, 2)
                torch.manual_seed(torch_seed)
                eval_goals = draw_goals(goal_seed, num_tasks, args.eval_episodes)
                played = evaluate_mode(networks["actor"], eval_envs, eval_goals, device)
                error = critic_error(networks, log_alpha, played, args)
            evaluation = {
                "success_rate": played.successes.mean(1).tolist(),
                "episodic_return": played.rewards.sum(2).mean(1).tolist(),
            }
            scalars["plasticity/critic_error"] = error
            scalars["eval/success_rate"] = np.mean(evaluation["success_rate"])
            for name, per_task in evaluation.items():
                for task, value in zip(tasks, per_task, strict=True):
                    scalars[f"eval/{name}/{task}"] = value

        # Log and save
        for task, episodic_return, success in zip(tasks, returns, successes, strict=True):
            scalars[f"charts/episodic_return/{task}"] = episodic_return
            scalars[f"charts/success/{task}"] = success
        sps = (timestep - start_timestep) / (time.perf_counter() - start_time)
        scalars |= {"charts/SPS": sps} | {f"time/{what}": s for what, s in seconds.items()}
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, timestep)
        if due(args.checkpoint_frequency):
            writer.flush()  # before the checkpoint, so that the log never lags behind it
            save()
        shown, sparsity = returns.mean(), scalars["sparsity/actor"]
        bar.set_postfix_str(f"return={shown:.1f}, sparsity={sparsity:.3f}, SPS={sps:.0f}")
        bar.update(block)

    bar.close()
    writer.close()
    if stop:
        save()
    envs.close()
    eval_envs.close()
    size = (Path(args.run_dir) / "checkpoint.pt").stat().st_size
    print(f"checkpoint.pt: {size:,} bytes")
    if timestep < last_timestep:
        print(f"stopped at timestep {timestep}, to go on: --resume {args.run_dir}")
    else:
        print_results(tasks, evaluation, seconds)


if __name__ == "__main__":
    train(tyro.cli(Args))
