# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "gymnasium==1.4.0",
#     "minigrid==3.2.0",
#     "numpy==2.4.6",
#     "tyro>=1.0",
#     "tensorboard>=2.20",
#     "tqdm>=4.67",
# ]
# ///
"""Multi-task PPO with a mixture of orthogonal experts (MOORE), sparsified by GMP or SET.

Convolutional expert trunks, whose features are made orthonormal for each sample before a task
encoder mixes them, and one head per task, for the actor and for the critic (arXiv 2508.06871,
section 4, MOORE; networks and training loop of arXiv 2311.11385). Pruned during training (GMP) or
sparse from the first step to the last and rewired (SET). Tensors are (task, batch, ...) throughout.

    python moore_sparse.py --benchmark MT5 --sparsifier gmp --seed 1
"""

import math
import os
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple, NoReturn

import gymnasium as gym
import minigrid  # noqa: F401 (registers the tasks)
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from minigrid.wrappers import ImgObsWrapper
from torch import Tensor
from torch.optim import Adam
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from plasticity_metrics import ObservationBuffer, dormant_ratio, effective_rank, fisher_trace


@dataclass
class Args:
    """Multi-task PPO with a sparse mixture of orthogonal experts on MiniGrid."""

    # Tasks
    benchmark: Literal["MT3", "MT5", "MT7"] = "MT5"
    """set of tasks to train on"""
    env_ids: tuple[str, ...] = ()
    """MiniGrid ids to train on instead of a benchmark (one id: single-task PPO)"""
    seed: int = 1
    """seed of the networks, the environments and every draw"""
    total_timesteps: int = 400_000
    """environment steps per task"""

    # PPO
    num_steps: int = 2000
    """timesteps of a rollout, per task and iteration"""
    actor_lr: float = 1e-3
    """learning rate of the actor's Adam"""
    critic_lr: float = 1e-3
    """learning rate of the critic's Adam"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation"""
    clip_coef: float = 0.2
    """clipping range of the probability ratio"""
    ent_coef: float = 0.01
    """coefficient of the entropy bonus"""
    update_epochs: int = 8
    """epochs of the actor over each rollout"""
    minibatch_size: int = 256
    """samples per task in a minibatch of the actor"""
    critic_epochs: int = 1
    """epochs of the critic over each rollout"""
    critic_minibatch_size: int = 2000
    """samples per task in a minibatch of the critic"""

    # Experts
    num_experts: int = 0
    """expert trunks (0: the benchmark's own number)"""
    orthogonal_mix: float = 1.0
    """share of orthonormal features in what is mixed, the rest are the experts' own"""

    # Gradual magnitude pruning and sparse evolutionary training
    sparsifier: Literal["none", "gmp", "set"] = "gmp"
    """prune gradually (gmp, prune flags), rewire from the start (set, set flags) or neither"""
    sparsity: float = 0.95
    """share of pruned weights (0: the dense baseline)"""
    prune_start: float = 0.05
    """share of training after which pruning begins"""
    prune_end: float = 0.80
    """share of training after which the final sparsity holds"""
    prune_frequency: int = 500
    """timesteps between two renewals of the masks"""
    prune_scope: Literal["layer", "global"] = "global"
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
    eval_frequency: int = 10_000
    """timesteps between two evaluations"""
    eval_episodes: int = 25
    """episodes per task in an evaluation"""
    plasticity_frequency: int = 10_000
    """timesteps between two measurements of plasticity"""
    plasticity_batch_size: int = 1024
    """observations they are computed on (the same number per task, rounded up)"""
    plasticity_buffer_size: int = 100_000
    """latest training observations to draw them from, over all tasks"""
    dormant_tau: float = 0.001
    """score up to which a neuron counts as dormant"""
    srank_delta: float = 0.01
    """share of the singular values that the effective rank leaves out"""

    # Run
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where networks and training data live (auto: cuda if there is one)"""
    run_dir: str | None = None
    """folder of logs and checkpoint (default: runs/<benchmark>__<script>__<seed>__<time>)"""
    checkpoint_frequency: int = 10_000
    """timesteps between two checkpoints"""
    resume: str | None = None
    """run folder to go on with, with the run's own flags"""
    num_threads: int = 0
    """torch threads (0: torch's choice)"""


def fail(message: str) -> NoReturn:
    """End with one line on standard error and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


COUNTS = """num_steps update_epochs minibatch_size critic_epochs critic_minibatch_size eval_episodes
eval_frequency plasticity_frequency plasticity_batch_size checkpoint_frequency prune_frequency
set_frequency"""
BATCH = "at least one observation per task"
WINDOW = "0 <= start < end <= 1 (--prune-end {prune_end})"
EXPERTS = "1 to 1024 (the number of features), or 0 for a benchmark's own number"
EVOLUTION = "at least --num-steps {num_steps}, for an update between two evolutions"
ITERATION = "at least one iteration (--num-steps {num_steps})"
TASKS = "registered MiniGrid tasks (like MiniGrid-DoorKey-6x6-v0), each named once"

# Flags, what they may be given all arguments, and the same in words
LIMITS = [
    (COUNTS, lambda x, args: x >= 1, "at least 1"),
    ("seed", lambda x, args: 0 <= x < 2**63, "in [0, 2^63)"),
    ("num_threads", lambda x, args: x >= 0, "at least 0"),
    ("actor_lr critic_lr clip_coef", lambda x, args: 0 < x < math.inf, "positive and finite"),
    ("ent_coef weight_decay dormant_tau", lambda x, args: 0 <= x < math.inf, "at least 0, finite"),
    ("gamma gae_lambda", lambda x, args: 0 <= x <= 1, "in [0, 1]"),
    ("sparsity srank_delta", lambda x, args: 0 <= x < 1, "in [0, 1)"),
    ("num_experts", lambda x, args: (1 if args.env_ids else 0) <= x <= 1024, EXPERTS),
    ("orthogonal_mix", lambda x, args: 0 <= x <= 1, "in [0, 1]"),
    ("prune_start", lambda x, args: 0 <= x < args.prune_end <= 1, WINDOW),
    ("set_frequency", lambda x, args: args.sparsifier != "set" or x >= args.num_steps, EVOLUTION),
    ("set_zeta", lambda x, args: 0 < x < 1, "in (0, 1)"),
    ("set_epsilon", lambda x, args: x is None or 0 < x < math.inf, "positive and finite"),
    ("total_timesteps", lambda x, args: x >= args.num_steps, ITERATION),
    ("env_ids", lambda ids, args: len({*ids} & {*minigrid_ids()}) == len(ids), TASKS),
    ("plasticity_buffer_size", lambda x, args: x >= len(task_ids(args)), BATCH),
    (
        "device",
        lambda x, args: x != "cuda" or torch.cuda.is_available(),
        "cpu or auto: no CUDA here",
    ),
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


# Tasks and environments

BENCHMARKS = {"MT3": ("LavaGapS7", "RedBlueDoors-6x6", "MemoryS11")}
BENCHMARKS["MT5"] = BENCHMARKS["MT3"] + ("DoorKey-6x6", "DistShift1")
BENCHMARKS["MT7"] = BENCHMARKS["MT5"] + ("SimpleCrossingS9N2", "MultiRoom-N2-S4")

NUM_EXPERTS = {"MT3": 2, "MT5": 3, "MT7": 4}

# Return of the shortest path, 1 - 0.9 * optimal steps / max steps
BEST_RETURN = {
    "DoorKey-6x6": 1 - 0.9 * 11 / 360,
    "DistShift1": 1 - 0.9 * 11 / 252,
    "RedBlueDoors-6x6": 1 - 0.9 * 8 / 720,
    "LavaGapS7": 1 - 0.9 * 8 / 196,
    "MemoryS11": 1 - 0.9 * 15 / 605,
    "SimpleCrossingS9N2": 1 - 0.9 * 15 / 324,
    "MultiRoom-N2-S4": 1 - 0.9 * 5 / 40,
}


def minigrid_ids() -> list[str]:
    """Every registered MiniGrid task."""
    return [env_id for env_id in gym.registry if env_id.startswith("MiniGrid-")]


def task_ids(args: Args) -> list[str]:
    """Gymnasium ids of the run's tasks."""
    return list(args.env_ids) or [f"MiniGrid-{name}-v0" for name in BENCHMARKS[args.benchmark]]


def task_name(env_id: str) -> str:
    """The name of a task in logs and tables."""
    return env_id.removeprefix("MiniGrid-").removesuffix("-v0")


def make_env(env_id: str) -> gym.Env:
    """A MiniGrid task seen as its partial (h, w, 3) view of integer codes."""
    return ImgObsWrapper(gym.make(env_id, disable_env_checker=True))


def make_training_envs(env_ids: list[str]) -> gym.vector.SyncVectorEnv:
    """One environment per task, reset in the step that ends an episode."""
    envs = [make_env(env_id) for env_id in env_ids]
    for env_id, env in zip(env_ids, envs, strict=True):
        for space in ("observation_space", "action_space"):
            given, first = getattr(env, space), getattr(envs[0], space)
            if given != first:
                fail(f"--env-ids {env_id}: {space} {given} must equal {env_ids[0]}'s {first}")
    return gym.vector.SyncVectorEnv(
        [lambda env=env: env for env in envs],
        autoreset_mode=gym.vector.AutoresetMode.SAME_STEP,
    )


TRAINING, EVALUATION, METRICS = range(3)


def derive_seeds(seed: int, purpose: int, timestep: int, number: int) -> list[int]:
    """Independent seeds for one purpose at one timestep.

    Every draw comes from generators seeded here, so that neither evaluation nor metrics disturb
    training, and a resumed run needs no generator's state to be exact.
    """
    return np.random.SeedSequence((seed, purpose, timestep)).generate_state(number).tolist()


# Networks


class BatchedLinear(nn.Module):
    """One linear layer per task: (task, batch, in) -> (task, batch, out)."""

    def __init__(self, num_tasks: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_tasks, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_tasks, 1, out_features))
        draw_parameters(self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight.mT)


@torch.no_grad()
def draw_parameters(weight: Tensor, bias: Tensor) -> None:
    """Fill a layer's weight and bias with draws from torch's default distribution for it."""
    fan_in = weight[0].numel() if weight.dim() == 4 else weight.shape[-1]
    for tensor in (weight, bias):
        tensor.uniform_(-(fan_in**-0.5), fan_in**-0.5)


def gram_schmidt(features: Tensor, tolerance: float = 1e-6) -> Tensor:
    """Orthonormalise features (..., k, D) over k, in order. Source: MOORE, arXiv 2311.11385.

    What is left of a feature that depends on those before it (not more than the share tolerance of
    its length, or 1e-12) becomes zero, with a zero gradient: to divide it by its length, or by an
    epsilon, would train on amplified rounding.
    Raises ValueError if k > D.
    """
    if features.shape[-2] > features.shape[-1]:
        raise ValueError(f"features: at most D of (..., k, D), not {tuple(features.shape)}")
    basis = []
    for feature in features.unbind(-2):  # (..., D)
        rest = feature
        for _ in range(2):  # once is not orthogonal to rounding when features are nearly dependent
            for direction in basis:
                rest = rest - (rest * direction).sum(-1, keepdim=True) * direction
        squared_norm = rest.square().sum(-1, keepdim=True)
        floor = tolerance**2 * feature.detach().square().sum(-1, keepdim=True)
        independent = squared_norm > floor.clamp_min(1e-24)
        basis.append(rest * (torch.where(independent, squared_norm, 1.0).rsqrt() * independent))
    return torch.stack(basis, dim=-2)


class MixtureOfOrthogonalExperts(nn.Module):
    """Convolutional expert trunks, mixed by a task encoder, and one head per task (MOORE, section
    4), with its masks."""

    def __init__(self, obs_shape, num_tasks: int, num_outputs: int, args: Args):
        super().__init__()
        height, width, channels = obs_shape
        self.num_experts = k = args.num_experts or NUM_EXPERTS[args.benchmark]
        self.conv1 = nn.Conv2d(channels, k * 16, 2)  # all experts see the observation
        self.conv2 = nn.Conv2d(k * 16, k * 32, 2, groups=k)
        self.conv3 = nn.Conv2d(k * 32, k * 64, 2, groups=k)
        self.task_encoder = nn.Linear(num_tasks, k, bias=False)  # stays dense
        self.head_hidden = BatchedLinear(num_tasks, (height - 3) * (width - 3) * 64, 128)
        self.head_output = BatchedLinear(num_tasks, 128, num_outputs)
        self.layer_norm = args.layer_norm
        self.orthogonal_mix = args.orthogonal_mix
        # Each layer, in order, and how many layers of one shape it batches
        self.layers = dict(conv1=k, conv2=k, conv3=k, head_hidden=num_tasks, head_output=num_tasks)
        self.masks = {}  # layer -> zeros and ones in its weight's shape; empty: dense

    def activations(self, obs: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """obs (task, batch, h, w, c) -> what each hidden layer puts out, the convolutions' (N, k *
        C, h', w') with N = task * batch and the heads' (task, batch, 128); the mixed features
        (task, batch, D); the output (task, batch, output). The last convolution's are before Tanh,
        which follows the mixing, so that they are hardly ever dormant."""

        def normalise(x):  # each expert's channels apart
            return F.group_norm(x, self.num_experts) if self.layer_norm else x

        x = obs.flatten(0, 1).permute(0, 3, 1, 2).float().contiguous()  # (N, c, h, w)
        conv1 = F.relu(normalise(self.conv1(x)))
        conv2 = F.relu(normalise(self.conv2(conv1)))
        conv3 = normalise(self.conv3(conv2))
        experts = conv3.reshape(*obs.shape[:2], self.num_experts, -1)  # (task, batch, k, D)
        experts = experts.lerp(gram_schmidt(experts), self.orthogonal_mix)
        one_hot = torch.eye(len(obs), device=obs.device)[:, None].expand(*obs.shape[:2], -1)
        weights = self.task_encoder(one_hot)  # (task, batch, k)
        features = F.tanh((weights.unsqueeze(-2) @ experts).squeeze(-2))
        hidden = self.head_hidden(features)
        hidden = F.tanh(F.layer_norm(hidden, hidden.shape[-1:]) if self.layer_norm else hidden)
        return [conv1, conv2, conv3, hidden], features, self.head_output(hidden)

    def forward(self, obs: Tensor) -> Tensor:
        return self.activations(obs)[-1]


def act(actor: nn.Module, obs: Tensor) -> tuple[Tensor, Tensor]:
    """Draw actions for obs (task, batch, ...): actions and their log-probs, (task, batch)."""
    log_probs = F.log_softmax(actor(obs), dim=-1)
    # Gumbel-max: the argmax of log p + Gumbel noise is a draw from p
    actions = (log_probs - torch.empty_like(log_probs).exponential_().log()).argmax(-1)
    return actions, log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)


# Gradual magnitude pruning and sparse evolutionary training


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


def dense_gradients(network: nn.Module) -> dict[str, Tensor]:
    """The last minibatch's gradient of each masked layer's weight, pruned places included."""
    weights = {name: network.get_submodule(name).weight for name in network.masks}
    return {name: weight.grad for name, weight in weights.items() if weight.grad is not None}


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


# PPO


class Rollout(NamedTuple):
    """The transitions of one iteration, all on --device."""

    obs: Tensor  # uint8 (task, num_steps, h, w, c)
    actions: Tensor  # int64 (task, num_steps), as are the shapes below
    log_probs: Tensor  # of the behaviour policy, when it acted
    rewards: Tensor
    terminated: Tensor  # bool
    done: Tensor  # bool, terminated or truncated


def empty_rollout(num_tasks: int, num_steps: int, obs_shape, device) -> Rollout:
    """Storage for num_steps transitions of each task."""

    def zeros(dtype, shape=()):
        return torch.zeros(num_tasks, num_steps, *shape, dtype=dtype, device=device)

    obs, actions, log_probs = zeros(torch.uint8, obs_shape), zeros(torch.int64), zeros(torch.float)
    return Rollout(obs, actions, log_probs, zeros(torch.float), zeros(bool), zeros(bool))


def collect(envs, actor, rollout: Rollout, buffer, seeds: list[int], seconds: dict, after_step):
    """Fill the rollout with fresh episodes, whose environments are seeded with seeds (task,).

    after_step(n) is called when n steps of every task are done. Returns two lists for each task:
    (step, observation) of every truncation and of the rollout's end, to bootstrap from, and
    (return, length) of the episodes that ended.
    """
    num_tasks, num_steps = rollout.actions.shape
    rewards = np.zeros((num_tasks, num_steps), np.float32)
    terminated, done = np.zeros((2, num_tasks, num_steps), bool)
    final, episodes = [[] for _ in seeds], [[] for _ in seeds]
    episode_return, episode_length = np.zeros((2, num_tasks))
    obs, _ = envs.reset(seed=seeds)
    for step in range(num_steps):
        with timed(seconds, "inference"), torch.no_grad():
            obs_t = torch.as_tensor(obs, device=rollout.obs.device)[:, None]  # (task, 1, h, w, c)
            actions, log_probs = act(actor, obs_t)
            for field, value in zip(rollout, (obs_t, actions, log_probs), strict=False):
                field[:, step : step + 1] = value
            buffer.add(obs_t[:, 0])
            actions = actions[:, 0].cpu().numpy()  # all that leaves the device
        with timed(seconds, "env"):
            obs, reward, terminal, truncated, info = envs.step(actions)
            rewards[:, step], terminated[:, step] = reward, terminal
            done[:, step] = terminal | truncated
            episode_return += reward
            episode_length += 1
            for i in done[:, step].nonzero()[0]:
                episodes[i].append((episode_return[i], episode_length[i]))
                episode_return[i] = episode_length[i] = 0
            for i in truncated.nonzero()[0]:
                final[i].append((step, info["final_obs"][i]))
        after_step(step + 1)
    for i in (~truncated).nonzero()[0]:
        final[i].append((step, obs[i]))
    for field, array in zip(rollout[3:], (rewards, terminated, done), strict=True):
        field.copy_(torch.as_tensor(array))
    return final, episodes


def bootstrap_values(critic: nn.Module, values: Tensor, final: list[list]) -> Tensor:
    """Values of the observation after each step, from values (task, num_steps) of that before.

    final: collect's first list; there the next stored observation is another episode's.
    """
    width = max(len(task) for task in final)
    final = [task + [task[-1]] * (width - len(task)) for task in final]
    steps = torch.tensor([[step for step, _ in task] for task in final], device=values.device)
    obs = np.stack([np.stack([obs for _, obs in task]) for task in final])
    next_values = values.roll(-1, dims=1)
    final_values = critic(torch.as_tensor(obs, device=values.device)).squeeze(-1)
    return next_values.scatter(1, steps, final_values)


def gae(rewards, values, next_values, terminated, done, gamma: float, gae_lambda: float) -> Tensor:
    """Generalised advantage estimates (Schulman et al. 2016, equation 16); all (task, steps).

    A termination does not bootstrap from next_values; a truncation and the end of the rollout
    do. No estimate reaches over the end of an episode.
    """
    deltas = rewards + gamma * next_values * ~terminated - values
    decay = gamma * gae_lambda * ~done
    advantages = torch.empty_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        running = deltas[:, t] + decay[:, t] * running
        advantages[:, t] = running
    return advantages


@torch.no_grad()
def estimate_advantages(critic, rollout: Rollout, final: list[list], args: Args):
    """Advantages, standardised per task, and returns, (task, num_steps); explained variance."""
    parts = rollout.obs.split(args.minibatch_size, dim=1)  # to stay in the cache
    values = torch.cat([critic(obs).squeeze(-1) for obs in parts], dim=1)
    next_values = bootstrap_values(critic, values, final)
    ends = rollout.terminated, rollout.done
    advantages = gae(rollout.rewards, values, next_values, *ends, args.gamma, args.gae_lambda)
    returns = advantages + values
    explained_variance = 1 - advantages.var() / returns.var()
    advantages = advantages - advantages.mean(1, keepdim=True)
    advantages /= advantages.std(1, correction=0, keepdim=True) + 1e-8
    return advantages, returns, explained_variance


def minibatches(num_tasks: int, num_steps: int, size: int, device):
    """Cut each task's steps, in an order of its own, into indices (task, 1) and (task, size)."""
    order = torch.rand(num_tasks, num_steps, device=device).argsort(1)
    task = torch.arange(num_tasks, device=device)[:, None]
    for steps in order.split(size, dim=1):
        yield task, steps


def actor_losses(logits, actions, old_log_probs, advantages, clip_coef: float, ent_coef: float):
    """Clipped surrogate with entropy bonus (Schulman et al. 2017, equations 7 and 9).

    logits (task, batch, action), the rest (task, batch). Returns the loss of each task (task,)
    and (4,): policy loss, entropy, approximate KL divergence, clipped share.
    """
    log_probs = F.log_softmax(logits, dim=-1)
    log_ratio = log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1) - old_log_probs
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    with torch.no_grad():
        approx_kl = (ratio - 1 - log_ratio).mean()
        clipfrac = ((ratio - 1).abs() > clip_coef).float().mean()
        stats = torch.stack([-surrogate.mean(), entropy.mean(), approx_kl, clipfrac])
    return -(surrogate + ent_coef * entropy).mean(1), stats


PART = 64  # samples per task that go through a network at once: more would leave the cache


def fit_actor_in_parts(actor, optimizer, rollout: Rollout, advantages: Tensor, args: Args):
    """Epochs of PPO on the actor, the gradient of each minibatch added up over its parts.

    Returns the mean of actor_losses' second result.
    """
    stats = []
    for _ in range(args.update_epochs):
        for task, steps in minibatches(*advantages.shape, args.minibatch_size, advantages.device):
            optimizer.zero_grad()
            batch_stats = 0.0
            for part in steps.split(PART, dim=1):
                share = part.shape[1] / steps.shape[1]
                obs, actions, log_probs = (field[task, part] for field in rollout[:3])
                losses, part_stats = actor_losses(
                    *(actor(obs), actions, log_probs, advantages[task, part]),
                    *(args.clip_coef, args.ent_coef),
                )
                (share * losses.mean()).backward()
                batch_stats = batch_stats + share * part_stats
            optimizer.step()
            apply_masks(actor)
            stats.append(batch_stats)
    return torch.stack(stats).mean(0)


def fit_critic_in_parts(critic, optimizer, rollout: Rollout, returns: Tensor, args: Args) -> Tensor:
    """Epochs of regression of the critic on the returns, the gradient of each minibatch added up
    over its parts; its mean squared error."""
    stats = []
    for _ in range(args.critic_epochs):
        for task, steps in minibatches(*returns.shape, args.critic_minibatch_size, returns.device):
            optimizer.zero_grad()
            batch_loss = 0.0
            for part in steps.split(PART, dim=1):
                errors = critic(rollout.obs[task, part]).squeeze(-1) - returns[task, part]
                loss = errors.square().sum() / steps.numel()
                loss.backward()
                batch_loss = batch_loss + loss.detach()
            optimizer.step()
            apply_masks(critic)
            stats.append(batch_loss)
    return torch.stack(stats).mean()


# Evaluation and plasticity


@torch.no_grad()
def evaluate(actor: nn.Module, envs: list[list[gym.Env]], seeds: list[int], device):
    """Play one episode in each of envs[task][episode] with actions drawn from the policy.

    Returns undiscounted episodic returns and lengths, numpy (task, episode).
    """
    seeds = iter(seeds)
    obs = np.stack([[env.reset(seed=next(seeds))[0] for env in task] for task in envs])
    returns, lengths = np.zeros(obs.shape[:2]), np.zeros(obs.shape[:2])
    running = np.ones(obs.shape[:2], dtype=bool)
    while running.any():
        actions = act(actor, torch.as_tensor(obs, device=device))[0].tolist()
        for i, j in np.argwhere(running):
            obs[i, j], reward, terminated, truncated, _ = envs[i][j].step(actions[i][j])
            returns[i, j] += reward
            lengths[i, j] += 1
            running[i, j] = not (terminated or truncated)
    return returns, lengths


def measure_plasticity(networks: dict[str, nn.Module], obs: Tensor, args: Args) -> dict:
    """Dormant ratio and effective rank of actor and critic, Fisher trace of the actor.

    obs (task, batch, h, w, c). A head's neurons see their own task's observations alone.
    """
    metrics = {}
    for name, network in networks.items():
        with torch.no_grad():
            (*convs, hidden), features, _ = network.activations(obs)
        *alive, alive_hidden = alive_neurons(network)
        metrics[f"{name}_dormant_ratio"] = dormant_ratio(
            [*convs, *hidden], args.dormant_tau, [*alive, *alive_hidden]
        )
        metrics[f"{name}_effective_rank"] = effective_rank(features.flatten(0, 1), args.srank_delta)
    actor = networks["actor"]
    metrics["fisher_trace"] = fisher_trace(
        actor, lambda: F.log_softmax(actor(obs), dim=-1), actor.masks
    )
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


def print_summary(tasks: list[str], evaluation: dict, seconds: dict[str, float]) -> None:
    """Print the final evaluation per task, and where the time went."""
    means = [np.mean(values) for values in evaluation.values()]
    print(f"\n{'task':<20}{'normalized return':>18}{'episodic return':>17}{'length':>9}")
    for row in [*zip(tasks, *evaluation.values(), strict=True), ("mean", *means)]:
        print("{:<20}{:>18.3f}{:>17.3f}{:>9.1f}".format(*row))
    total = sum(seconds.values())
    print(f"\n{'time':<20}{'seconds':>18}{'share':>17}")
    for what, value in [*seconds.items(), ("sum", total)]:
        print(f"{what:<20}{value:>18.1f}{value / total:>17.1%}")


def train(args: Args) -> None:
    """Train, evaluate and measure one run."""
    args, checkpoint = open_run(args, "custom" if args.env_ids else args.benchmark)
    if args.num_threads:
        torch.set_num_threads(args.num_threads)
    use_cuda = args.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if use_cuda else "cpu")

    # Environments, networks, storage
    env_ids = task_ids(args)
    tasks, num_tasks = [task_name(env_id) for env_id in env_ids], len(env_ids)
    best_return = np.array([BEST_RETURN.get(task, 1.0) for task in tasks])
    envs = make_training_envs(env_ids)
    eval_envs = [[make_env(env_id) for _ in range(args.eval_episodes)] for env_id in env_ids]
    obs_shape, num_actions = envs.single_observation_space.shape, int(envs.single_action_space.n)
    torch.manual_seed(args.seed)
    actor = MixtureOfOrthogonalExperts(obs_shape, num_tasks, num_actions, args).to(device)
    critic = MixtureOfOrthogonalExperts(obs_shape, num_tasks, 1, args).to(device)
    networks = {"actor": actor, "critic": critic}
    decay = args.weight_decay
    optimizers = {
        "actor": Adam(actor.parameters(), args.actor_lr, weight_decay=decay, fused=True),
        "critic": Adam(critic.parameters(), args.critic_lr, weight_decay=decay, fused=True),
    }
    final_sparsity = args.sparsity if args.sparsifier == "gmp" else 0.0
    set_sparsity = args.sparsity if args.sparsifier == "set" else 0.0
    densities = {
        name: set_densities(network, set_sparsity, args.set_epsilon)
        for name, network in networks.items()
    }
    for name, network in networks.items():
        draw_masks(network, densities[name])
    rollout = empty_rollout(num_tasks, args.num_steps, obs_shape, device)
    buffer = ObservationBuffer(
        args.plasticity_buffer_size, num_tasks, obs_shape, torch.uint8, device
    )
    metrics_size = math.ceil(args.plasticity_batch_size / num_tasks)  # per task
    seconds = dict.fromkeys(("env", "inference", "update", "sparsify", "metrics", "eval"), 0.0)
    last_timestep = args.total_timesteps // args.num_steps * args.num_steps
    timestep, evaluation = 0, {}
    if checkpoint:
        for name, network in networks.items():
            network.load_state_dict(checkpoint["networks"][name])
            network.masks = {n: m.to(device) for n, m in checkpoint["masks"][name].items()}
            optimizers[name].load_state_dict(checkpoint["optimizers"][name])
            for layer, gradient in checkpoint["gradients"][name].items():
                network.get_submodule(layer).weight.grad = gradient.to(device)
        buffer.observations.copy_(checkpoint["observations"])
        buffer.added = timestep = checkpoint["timestep"]
        seconds, evaluation = checkpoint["seconds"], checkpoint["evaluation"]

    def save():
        state = {
            "script": Path(__file__).stem,
            "args": asdict(args),
            "timestep": timestep,
            "networks": {name: network.state_dict() for name, network in networks.items()},
            "masks": {name: network.masks for name, network in networks.items()},
            "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
            "gradients": {name: dense_gradients(network) for name, network in networks.items()},
            "observations": buffer.observations,
            "seconds": seconds,
            "evaluation": evaluation,
        }
        save_checkpoint(Path(args.run_dir) / "checkpoint.pt", state)

    def due(frequency):  # in the iteration that reaches a multiple of frequency, and in the last
        return timestep % frequency < args.num_steps or timestep == last_timestep

    def sparsify(steps):
        now = timestep + steps
        with timed(seconds, "sparsify"):
            progress = now / last_timestep
            target = gmp_sparsity(progress, args.prune_start, args.prune_end, final_sparsity)
            if target and (now % args.prune_frequency == 0 or now == last_timestep):
                for network in networks.values():
                    prune(network, target, args.prune_scope)
            if now % args.set_frequency == 0:
                for name, network in networks.items():
                    evolve(
                        network, optimizers[name], densities[name], args.set_zeta, args.set_regrow
                    )

    if not checkpoint:
        save()
    writer = open_log(args, timestep)
    stop, start_time, start_timestep = stop_on_signals(), time.perf_counter(), timestep
    bar = tqdm(total=last_timestep, initial=timestep, unit="timestep", disable=None)

    while timestep < last_timestep and not stop:
        # Collect fresh episodes
        torch_seed, *env_seeds = derive_seeds(args.seed, TRAINING, timestep, 1 + num_tasks)
        torch.manual_seed(torch_seed)
        torch.backends.mkldnn.enabled = False  # on the CPU, it slows a batch this small down
        final, episodes = collect(envs, actor, rollout, buffer, env_seeds, seconds, sparsify)
        torch.backends.mkldnn.enabled = True
        timestep += args.num_steps

        # Update
        with timed(seconds, "update"):
            advantages, returns, variance = estimate_advantages(critic, rollout, final, args)
            value_loss = fit_critic_in_parts(critic, optimizers["critic"], rollout, returns, args)
            actor_stats = fit_actor_in_parts(actor, optimizers["actor"], rollout, advantages, args)
            stats = torch.stack([value_loss, variance, *actor_stats]).tolist()
        names = "value_loss explained_variance policy_loss entropy approx_kl clipfrac".split()
        scalars = {f"losses/{name}": value for name, value in zip(names, stats, strict=True)}

        # Measure and evaluate
        for name, network in networks.items():
            for layer, value in measure_sparsity(network).items():
                scalars[f"sparsity/{name}{layer}"] = value
        for task, weights in zip(tasks, actor.task_encoder.weight.T.tolist(), strict=True):
            scalars |= {f"routing/{task}/expert_{i}": w for i, w in enumerate(weights)}
        if due(args.plasticity_frequency):
            with timed(seconds, "metrics"):
                torch.manual_seed(*derive_seeds(args.seed, METRICS, timestep, 1))
                metrics = measure_plasticity(networks, buffer.sample(metrics_size), args)
            scalars |= {f"plasticity/{name}": value for name, value in metrics.items()}
        if due(args.eval_frequency):
            with timed(seconds, "eval"):
                number = 1 + num_tasks * args.eval_episodes
                torch_seed, *env_seeds = derive_seeds(args.seed, EVALUATION, timestep, number)
                torch.manual_seed(torch_seed)
                eval_returns, lengths = evaluate(actor, eval_envs, env_seeds, device)
            evaluation = {
                "normalized_return": (eval_returns.mean(1) / best_return).tolist(),
                "episodic_return": eval_returns.mean(1).tolist(),
                "episodic_length": lengths.mean(1).tolist(),
            }
            scalars["eval/normalized_return"] = np.mean(evaluation["normalized_return"])
            for name, per_task in evaluation.items():
                for task, value in zip(tasks, per_task, strict=True):
                    scalars[f"eval/{name}/{task}"] = value

        # Log and save
        for task, ended, best in zip(tasks, episodes, best_return, strict=True):
            if ended:
                mean_return, mean_length = np.mean(ended, axis=0)
                scalars[f"charts/normalized_return/{task}"] = mean_return / best
                scalars[f"charts/episodic_length/{task}"] = mean_length
        sps = num_tasks * (timestep - start_timestep) / (time.perf_counter() - start_time)
        scalars |= {"charts/SPS": sps} | {f"time/{what}": s for what, s in seconds.items()}
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, timestep)
        if due(args.checkpoint_frequency):
            writer.flush()  # before the checkpoint, so that the log never lags behind it
            save()
        shown = [v for tag, v in scalars.items() if tag.startswith("charts/normalized_return")]
        score, sparsity = np.mean(shown or [math.nan]), scalars["sparsity/actor"]
        bar.set_postfix_str(f"return={score:.3f}, sparsity={sparsity:.3f}, SPS={sps:.0f}")
        bar.update(args.num_steps)

    bar.close()
    writer.close()
    if stop:
        save()
    if timestep < last_timestep:
        print(f"stopped at timestep {timestep}, to go on: --resume {args.run_dir}")
    else:
        print_summary(tasks, evaluation, seconds)


if __name__ == "__main__":
    train(tyro.cli(Args))
