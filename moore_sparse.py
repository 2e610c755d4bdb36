# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["torch==2.13.0", "gymnasium==1.4.0", "minigrid==3.2.0", "numpy==2.4.6",
#                 "tyro>=1.0", "tensorboard>=2.20", "tqdm>=4.67", "filelock>=3.20"]
# ///
"""Multi-task PPO with a mixture of orthogonal experts (MOORE), sparsified by GMP or SET.

The networks and the training of moe_sparse.py. What differs: the experts' features are made
orthonormal for each sample, by the Gram-Schmidt process, before they are mixed (arXiv 2508.06871,
section 4, MOORE; networks and training loop of arXiv 2311.11385).

    python moore_sparse.py --benchmark MT5 --sparsifier gmp --seed 1
"""

import argparse
import math
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from filelock import FileLock
from minigrid.minigrid_env import MiniGridEnv
from minigrid.wrappers import ImgObsWrapper
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.optim import Adam
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import plasticity_metrics as plasticity


@dataclass
class Args:
    """Multi-task PPO with a sparse mixture of orthogonal experts on MiniGrid."""

    # Tasks
    benchmark: Literal["MT3", "MT5", "MT7"] = "MT5"  # the first 3, 5 or 7 tasks of MT7
    env_ids: tuple[str, ...] = ()  # Gymnasium ids instead
    seed: int = 1  # random seed
    total_timesteps: int = 400_000  # environment steps per task

    # PPO
    num_steps: int = 2000  # timesteps of a rollout
    actor_lr: float = 1e-3  # learning rate of the actor
    critic_lr: float = 1e-3  # learning rate of the critic
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of GAE
    clip_coef: float = 0.2  # clipping range of the ratio
    ent_coef: float = 0.01  # coefficient of the entropy bonus
    update_epochs: int = 8  # epochs of the actor over a rollout
    minibatch_size: int = 256  # samples per task in a minibatch
    critic_epochs: int = 1  # epochs of the critic over a rollout
    critic_minibatch_size: int = 2000  # samples per task in a critic's minibatch
    weight_decay: float = 0.0  # L2 coefficient of Adam
    layer_norm: bool = False  # LayerNorm before each nonlinearity

    # Experts
    num_experts: int = 0  # experts (0: 2, 3, 4 on MT3, MT5, MT7)
    orthogonal_mix: float = 1.0  # 0: MoE's features, 1: MOORE's

    # Gradual magnitude pruning and sparse evolutionary training
    sparsifier: Literal["none", "gmp", "set"] = "gmp"  # none: dense
    sparsity: float = 0.95  # share of pruned weights (0: dense)
    prune_start: float = 0.05  # share of training after which pruning begins
    prune_end: float = 0.80  # share of training after which sparsity is full
    prune_frequency: int = 500  # timesteps between mask updates
    prune_scope: Literal["layer", "global"] = "global"  # rank within a layer or network
    set_zeta: float = 0.3  # share of a layer's active weights replaced at each SET update
    set_frequency: int = 2000  # timesteps between SET updates (0: masks stay)
    set_epsilon: float | None = None  # density is this times (1/in + 1/out), unless --sparsity is 0
    set_regrow: Literal["random", "gradient"] = "random"  # gradient: by RigL's rule
    set_grow: Literal["zero", "init"] = "zero"  # what grown weights start at

    # Evaluation and plasticity metrics
    eval_frequency: int = 10_000  # timesteps between evaluations (0: at the end)
    eval_episodes: int = 25  # episodes per task in an evaluation
    plasticity_frequency: int = 10_000  # timesteps between measurements (0: at the end)
    plasticity_batch_size: int = 1024  # observations of a measurement, over all tasks
    plasticity_buffer_size: int = 100_000  # latest observations kept
    dormant_tau: float = 0.001  # neurons scoring at most this are dormant
    srank_delta: float = 0.01  # share of singular value mass left out

    # Run
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda if there is one
    run_dir: str | None = None  # the run's folder (none: a new one in runs/)
    checkpoint_frequency: int = 10_000  # timesteps between checkpoints (0: at the end)
    resume: str | None = None  # run to go on with; on the command line its flags are defaults
    num_threads: int = 1  # torch threads

    def __post_init__(self):
        check_run(self)
        check = partial(require, self)
        check("num_steps update_epochs minibatch_size", lambda x: x >= 1, "at least 1")
        check("critic_epochs critic_minibatch_size prune_frequency", lambda x: x >= 1, "at least 1")
        check("gamma gae_lambda set_zeta prune_end", lambda x: x <= 1, "at most 1")
        check("prune_start", lambda x: x < self.prune_end, "below --prune-end")
        check("total_timesteps", lambda x: x >= self.num_steps, "at least --num-steps")
        least = self.num_steps if self.sparsifier == "set" else 0
        check("set_frequency", lambda x: x == 0 or x >= least, "0 or at least --num-steps")
        check("num_experts", lambda x: x <= 1024, "at most 1024, the features")
        check("orthogonal_mix", lambda x: x <= 1, "in [0, 1]")
        needs_number = self.env_ids and self.num_experts == 0
        check("num_experts", lambda _: not needs_number, "at least 1 with --env-ids")
        check_tasks(self)


# Networks


class BatchedLinear(nn.Module):
    """One linear layer per task: (task, batch, in) -> (task, batch, out)."""

    def __init__(self, num_tasks: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_tasks, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_tasks, 1, out_features))
        self.bound = in_features**-0.5  # as nn.Linear's
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -self.bound, self.bound)

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight.mT)


def gram_schmidt(features: Tensor, tolerance: float = 1e-6) -> Tensor:
    """Orthonormalise features (..., k, D) over k, in order. Source: MOORE, arXiv 2311.11385.

    What is left of a feature that depends on those before it (not more than the share tolerance of
    its length, or 1e-12) becomes zero, with a zero gradient: to divide it by its length, or by an
    epsilon, would train on amplified rounding.
    Raises ValueError if k > D, or for half precision, in which tolerance is lost."""
    if features.shape[-2] > features.shape[-1] or features.dtype.itemsize < 4:
        what = f"{features.dtype} {tuple(features.shape)}"
        raise ValueError(f"features: float32 or float64 (..., k, D), k at most D, not {what}")
    basis = []
    for feature in features.unbind(-2):  # (..., D)
        rest = feature
        for _ in range(2):  # once is not enough for nearly dependent ones
            for direction in basis:
                rest = rest - (rest * direction).sum(-1, keepdim=True) * direction
        squared_norm = rest.square().sum(-1, keepdim=True)
        floor = tolerance**2 * feature.detach().square().sum(-1, keepdim=True)
        independent = squared_norm > floor.clamp_min(1e-24)
        inverse_length = torch.where(independent, squared_norm, 1.0).rsqrt() * independent
        basis.append(rest * inverse_length)
    return torch.stack(basis, dim=-2)


class MixtureOfOrthogonalExperts(nn.Module):
    """Convolutional expert trunks, mixed by a task encoder, and one head per task (MOORE, section
    4), with its masks."""

    def __init__(self, obs_shape, num_tasks: int, num_outputs: int, args: Args):
        super().__init__()
        height, width, channels = obs_shape
        self.num_experts = k = args.num_experts or NUM_EXPERTS[args.benchmark]
        self.conv1 = nn.Conv2d(channels, k * 16, 2)
        self.conv2 = nn.Conv2d(k * 16, k * 32, 2, groups=k)
        self.conv3 = nn.Conv2d(k * 32, k * 64, 2, groups=k)
        self.task_encoder = nn.Linear(num_tasks, k, bias=False)  # stays dense
        self.head_hidden = BatchedLinear(num_tasks, (height - 3) * (width - 3) * 64, 128)
        self.head_output = BatchedLinear(num_tasks, 128, num_outputs)
        self.layer_norm = args.layer_norm
        self.orthogonal_mix = args.orthogonal_mix
        # Each layer, in order, and how many layers of one shape it batches
        self.layers = dict(conv1=k, conv2=k, conv3=k, head_hidden=num_tasks, head_output=num_tasks)
        self.masks = {}  # layer -> zeros and ones like its weight; empty: dense

    def activations(self, obs: Tensor, counts: list[int]):
        """obs (N, h, w, c), counts[i] of them task i's, task by task -> what each hidden layer puts
        out, the convolutions' (N, k * C, h', w') and the heads' (task, max(counts), 128), padded
        behind each task's rows; the mixed features (N, D); the output (N, output). The last
        convolution's are before Tanh, which follows the mixing, so they are hardly ever dormant."""
        x = obs.permute(0, 3, 1, 2).float().contiguous()  # (N, c, h, w), for speed
        conv1 = F.relu(self.normalise(self.conv1(x)))
        conv2 = F.relu(self.normalise(self.conv2(conv1)))
        conv3 = self.normalise(self.conv3(conv2))
        experts = conv3.reshape(len(obs), self.num_experts, -1)  # (N, k, D)
        experts = experts.lerp(gram_schmidt(experts), self.orthogonal_mix)
        one_hot = torch.eye(len(counts), device=obs.device)
        one_hot = torch.cat([row.expand(n, -1) for row, n in zip(one_hot, counts, strict=True)])
        weights = self.task_encoder(one_hot)  # (N, k)
        features = F.tanh((weights[:, None] @ experts)[:, 0])  # (N, D)
        by_task = pad_sequence(features.split(counts), batch_first=True)
        hidden = self.head_hidden(by_task)  # (task, max(counts), 128)
        if self.layer_norm:
            hidden = F.layer_norm(hidden, hidden.shape[-1:])
        hidden = F.tanh(hidden)
        output = self.head_output(hidden)
        output = torch.cat([rows[:n] for rows, n in zip(output, counts, strict=True)])
        return [conv1, conv2, conv3, hidden], features, output

    def normalise(self, x: Tensor) -> Tensor:  # each expert's channels apart
        return F.group_norm(x, self.num_experts) if self.layer_norm else x

    def forward(self, obs: Tensor, counts: list[int]) -> Tensor:
        return self.activations(obs, counts)[-1]

    def get_extra_state(self) -> dict:  # makes the masks part of state_dict
        return self.masks

    def set_extra_state(self, state: dict):
        device = next(self.parameters()).device
        self.masks = {layer: mask.to(device) for layer, mask in state.items()}


# Gradual magnitude pruning and sparse evolutionary training


def gmp_sparsity(progress: float, start: float, end: float, final: float) -> float:
    """Cubic schedule: the sparsity at a share of training (Zhu & Gupta 2017, equation 1)."""
    done = min(max((progress - start) / (end - start), 0.0), 1.0)
    return final * (1 - (1 - done) ** 3)


def keep_largest(scores: Tensor, keep: int) -> Tensor:
    """scores (rows, n) -> mask of the same shape with exactly keep ones in each row."""
    kept = scores.topk(keep, dim=1, sorted=False).indices
    return torch.zeros_like(scores).scatter_(1, kept, 1.0)


def kept_counts(network: nn.Module, sparsity: float, scope: str) -> list[int]:
    """How many weights prune keeps, with scope "layer" of one layer of each name in network.layers,
    with "global" of the whole network. Raises ValueError if a layer must be left without any."""
    weights = [network.get_submodule(name).weight for name in network.layers]
    stacks = network.layers.values()
    if scope == "layer":
        least, sizes = 1, [w.numel() // n for w, n in zip(weights, stacks, strict=True)]
    elif scope == "global":
        least, sizes = sum(stacks), [sum(w.numel() for w in weights)]
    else:
        raise ValueError(f"scope: layer or global, not {scope}")
    counts = [size - round(sparsity * size) for size in sizes]
    if min(counts) < least:
        raise ValueError(f"sparsity {sparsity}: leaves {min(counts)} weights, needs {least}")
    return counts


@torch.no_grad()
def prune(network: nn.Module, sparsity: float, scope: str):
    """Update the network's masks to the asked sparsity by magnitude, and apply them.

    scope "layer" ranks the weights of each layer apart, "global" those of the whole network. What
    was pruned stays so. Needs network.layers, {name: how many layers of one shape its weight
    stacks, 1 for a plain one}, and network.masks, {} at first, {name: zeros and ones in its
    weight's shape} then. apply_masks must follow every optimiser step."""
    weights = {name: network.get_submodule(name).weight for name in network.layers}
    scores = {name: weight.abs() for name, weight in weights.items()}
    for name, mask in network.masks.items():
        scores[name] = torch.where(mask > 0, scores[name], -1.0)
    if scope == "layer":  # (layer, its weights)
        ranked = [scores[name].reshape(stack, -1) for name, stack in network.layers.items()]
    else:  # (1, all weights)
        ranked = [torch.cat([score.flatten() for score in scores.values()])[None]]
    masks = []
    for rows, keep in zip(ranked, kept_counts(network, sparsity, scope), strict=True):
        masks.append((keep_largest(rows, keep) * (rows >= 0)).flatten())
    masks = torch.cat(masks).split([weight.numel() for weight in weights.values()])
    for (name, weight), mask in zip(weights.items(), masks, strict=True):
        network.masks[name] = mask.view_as(weight)
    apply_masks(network)


@torch.no_grad()
def apply_masks(network: nn.Module):
    """Set the pruned weights to zero. To be called after every optimiser step, which moves them."""
    for name, mask in network.masks.items():
        network.get_submodule(name).weight.mul_(mask)


def update_masks(networks: dict, args: Args, last_timestep: int, timestep: int) -> bool:
    """Prune the networks if their masks are due at this timestep; returns whether they were."""
    progress = timestep / last_timestep
    sparsity = gmp_sparsity(progress, args.prune_start, args.prune_end, args.sparsity)
    is_due = timestep % args.prune_frequency == 0 or timestep == last_timestep
    if sparsity == 0 or not is_due:
        return False
    for network in networks.values():
        prune(network, sparsity, args.prune_scope)
    return True


def clear_state(optimizer, parameter: Tensor, where: Tensor):
    """Zero the moments that the optimiser keeps of some of a parameter's entries. where: bool."""
    for moment in optimizer.state.get(parameter, {}).values():
        if isinstance(moment, Tensor) and moment.shape == parameter.shape:
            moment.masked_fill_(where, 0.0)


def erk_densities(shapes: list[tuple], sparsity: float) -> list[float]:
    """Erdős–Rényi(-Kernel) densities of weights of these shapes, (out, in) or (out, in, kh, kw): in
    proportion to the sum of a shape over its product, scaled so that 1 - sparsity of all weights
    are active; dense where that passes 1 (Mocanu et al. 2018, equation 3; Evci et al. 2020)."""
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


def set_densities(network: nn.Module, sparsity: float, epsilon: float | None) -> dict:
    """Density of each linear layer, {} at sparsity 0; with an epsilon SET's (Mocanu et al. 2018,
    equation 3). Needs network.layers, {name: how many layers of one shape its weight stacks}."""
    weights = {name: network.get_submodule(name).weight for name in network.layers}
    linear = {name: tuple(w.shape[-2:]) for name, w in weights.items() if w.dim() < 4}
    if sparsity == 0:
        return {}
    if epsilon is not None:
        return {name: min(1.0, epsilon * sum(s) / math.prod(s)) for name, s in linear.items()}
    shapes = [shape for name, shape in linear.items() for _ in range(network.layers[name])]
    densities = dict(zip(shapes, erk_densities(shapes, sparsity), strict=True))
    return {name: densities[shape] for name, shape in linear.items()}


def draw_masks(network: nn.Module, densities: dict):
    """Give each of these layers a mask with exactly round(density * n) active weights at random
    places, and apply it; apply_masks must follow every optimiser step. Needs network.layers and
    network.masks, {} at first; sets network.densities and each layer's grown, for evolve. Raises
    ValueError for a density that rounds to no weight."""
    network.densities = densities
    for name, density in densities.items():
        layer = network.get_submodule(name)
        scores = torch.rand_like(layer.weight).reshape(network.layers[name], -1)
        keep = round(density * scores.shape[1])
        if keep == 0:
            raise ValueError(f"density {density:.1e} by sparsity or epsilon: no weight of a {name}")
        network.masks[name] = keep_largest(scores, keep).view_as(layer.weight)
        layer.register_buffer("grown", torch.zeros_like(layer.weight))  # by the last update
    apply_masks(network)


@torch.no_grad()
def evolve(network: nn.Module, optimizer, zeta: float, regrow: str, grow: str) -> Tensor:
    """In each layer, drop the share zeta of the active weights that is smallest in magnitude, and
    grow as many of the places inactive before (all if fewer). Source: Mocanu et al. 2018.

    regrow: places at "random", or where the last minibatch's "gradient" is largest (RigL, Evci et
    al. 2020). grow: weights start at "zero", or uniform in [-bound, bound] ("init": layer.bound, by
    default nn.Linear's). Their moments are cleared; Adam's step count is not. Returns the share of
    what the last update grew that this one keeps (NaN at first). Needs draw_masks before."""
    grown_before, kept_of_it = [], []
    for name, density in network.densities.items():
        layer = network.get_submodule(name)
        magnitudes = layer.weight.abs().reshape(network.layers[name], -1)  # (layer, its weights)
        active = network.masks[name].reshape(magnitudes.shape) > 0
        count = round(density * magnitudes.shape[1])
        moved = min(round(zeta * count), magnitudes.shape[1] - count)
        if regrow == "random":
            scores = torch.rand_like(magnitudes)
        elif layer.weight.grad is None:
            raise ValueError(f"{name}: has no gradient to grow by, evolve must follow an update")
        else:
            scores = layer.weight.grad.abs().reshape(magnitudes.shape)
        magnitudes = magnitudes.masked_fill(~active, -1.0)
        scores = scores.masked_fill(active, -1.0)
        kept = (keep_largest(magnitudes, count - moved) * active).view_as(layer.weight)
        grown = (keep_largest(scores, moved) * ~active).view_as(layer.weight)
        grown_before.append(layer.grown.sum())
        kept_of_it.append((layer.grown * kept).sum())
        if grow == "init":
            bound = getattr(layer, "bound", layer.weight.shape[-1] ** -0.5)
            drawn = torch.empty_like(layer.weight).uniform_(-bound, bound)
            layer.weight.copy_(torch.where(grown > 0, drawn, layer.weight))
        clear_state(optimizer, layer.weight, grown > 0)
        network.masks[name] = kept + grown
        layer.grown.copy_(grown)
    apply_masks(network)
    return sum(kept_of_it) / sum(grown_before) if grown_before else torch.tensor(math.nan)


# PPO


def to_device(array: np.ndarray, device: str) -> Tensor:
    """The array on the device, without waiting for it; on the CPU in the same memory."""
    return torch.from_numpy(array).to(device, non_blocking=True)


@dataclass
class PolicyTable:
    """The policy's log-probs on the host, computed once for each key: (task, bytes of a view)."""

    actor: nn.Module
    space: gym.spaces.Box  # of one view, (h, w, c)
    num_tasks: int
    device: str
    log_probs: dict = field(default_factory=dict)  # key -> (action,)

    def to_batch(self, keys: list) -> tuple:
        """The views (N, h, w, c) of sorted keys, so task by task, and how many are each task's."""
        tasks, views = zip(*keys, strict=True)
        counts = np.bincount(tasks, minlength=self.num_tasks).tolist()
        views = np.frombuffer(bytearray().join(views), self.space.dtype)  # writable
        return to_device(views.reshape(-1, *self.space.shape), self.device), counts

    @torch.no_grad()
    def look_up(self, keys: list) -> np.ndarray:
        """Log-probs (len(keys), action); the actor is run on what is new."""
        if new := sorted({*keys} - self.log_probs.keys()):
            rows = F.log_softmax(self.actor(*self.to_batch(new)), dim=-1)
            self.log_probs.update(zip(new, rows.cpu().numpy(), strict=True))  # all that is fetched
        return np.array([self.log_probs[key] for key in keys])

    def refresh(self, latest=()):
        """Run the actor, which has changed, on the known views and latest, (task, n, h, w, c)."""
        keys = [(i, view.tobytes()) for i, own in enumerate(latest) for view in own]
        keys = [*keys, *self.log_probs]
        self.log_probs = {}
        self.look_up(keys)


class Rollout(NamedTuple):
    """The transitions of one iteration."""

    views: Tensor  # (N, h, w, c), the distinct views, task by task
    counts: list[int]  # how many are each task's
    index: np.ndarray  # int64 (task, num_steps) on the host: the view each step began with
    next_index: np.ndarray  # the view it led to, also where the episode ended there
    action: Tensor  # int64 (task, num_steps) on the device, as are those below
    log_prob: Tensor  # of the behaviour policy
    reward: Tensor
    terminated: Tensor  # bool
    done: Tensor  # bool, terminated or truncated


def collect(envs: list, policy: PolicyTable, seeds, num_steps: int, timestep=0, after_step=None):
    """Play num_steps steps in each of envs, one per task, from a reset with its seed on. Returns
    the rollout and (return, length) of each task's episodes that ended. after_step(timestep), if
    given, follows each step but the last, and is True if it changed the actor."""
    shape = len(envs), num_steps
    noise = np.random.gumbel(size=(num_steps, len(envs), envs[0].action_space.n))
    action = np.zeros(shape, np.int64)
    log_prob = np.zeros(shape, np.float32)
    reward = np.zeros(shape, np.float32)
    terminated = np.zeros(shape, bool)
    done = np.zeros(shape, bool)
    before = [[] for _ in envs]  # each task's keys
    after = [[] for _ in envs]
    episodes = [[] for _ in envs]
    now = [(i, env.reset(seed=seeds[i])[0].tobytes()) for i, env in enumerate(envs)]
    for step in range(num_steps):
        log_probs = policy.look_up(now)  # (task, action)
        # Gumbel-max: the argmax of log p + Gumbel noise is a draw from p
        action[:, step] = (log_probs + noise[step]).argmax(1)
        for i, (env, a) in enumerate(zip(envs, action[:, step].tolist(), strict=True)):
            obs, reward[i, step], terminated[i, step], truncated, info = env.step(a)
            done[i, step] = terminated[i, step] or truncated
            log_prob[i, step] = log_probs[i, a]
            before[i].append(now[i])
            after[i].append((i, obs.tobytes()))
            now[i] = after[i][-1]
            if done[i, step]:
                episodes[i].append((info["episode"]["r"], info["episode"]["l"]))
                now[i] = (i, env.reset()[0].tobytes())
        if after_step is not None and step + 1 < num_steps:
            actor_changed = after_step(timestep + step + 1)
            if actor_changed:
                policy.refresh()
    keys = sorted({*chain(*before, *after)})  # each distinct one, task by task
    index_of = {key: n for n, key in enumerate(keys)}
    index = np.array([[index_of[key] for key in own] for own in before])
    next_index = np.array([[index_of[key] for key in own] for own in after])
    on_device = (to_device(x, policy.device) for x in (action, log_prob, reward, terminated, done))
    return Rollout(*policy.to_batch(keys), index, next_index, *on_device), episodes


def gae(rollout: Rollout, values: Tensor, next_values, gamma: float, gae_lambda: float) -> Tensor:
    """Generalised advantage estimates (Schulman et al. 2016, equation 16); all (task, num_steps).
    A termination does not bootstrap from next_values, a truncation and the rollout's end do."""
    deltas = rollout.reward + gamma * next_values * ~rollout.terminated - values
    decay = gamma * gae_lambda * ~rollout.done
    advantages, running = torch.empty_like(deltas), torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        running = deltas[:, t] + decay[:, t] * running
        advantages[:, t] = running
    return advantages


@torch.no_grad()
def estimate_advantages(critic: nn.Module, rollout: Rollout, args: Args):
    """Advantages, standardised per task, and returns, (task, num_steps); explained variance."""
    table = critic(rollout.views, rollout.counts).squeeze(-1)  # (N,), each view's
    values = table[to_device(rollout.index, table.device)]
    next_values = table[to_device(rollout.next_index, table.device)]
    advantages = gae(rollout, values, next_values, args.gamma, args.gae_lambda)
    returns = advantages + values
    explained = 1 - advantages.var() / returns.var()
    advantages = advantages - advantages.mean(1, keepdim=True)
    advantages /= advantages.std(1, correction=0, keepdim=True) + 1e-8
    return advantages, returns, explained


def minibatches(rollout: Rollout, size: int):
    """Minibatches of at most size steps per task, each task's in an order of its own: the steps
    (task, batch), the distinct views they began with (n, h, w, c), how many are each task's, which
    each step began with (task, batch). Worked out on the host, so nothing waits for the device."""
    device, num_tasks = rollout.views.device, len(rollout.counts)
    task_of_view = np.repeat(np.arange(num_tasks), rollout.counts)
    order = np.random.random(rollout.index.shape).argsort(1)
    for start in range(0, order.shape[1], size):
        steps = order[:, start : start + size]
        index = np.take_along_axis(rollout.index, steps, 1)
        distinct, row = np.unique(index, return_inverse=True)  # in order, so task by task
        counts = np.bincount(task_of_view[distinct], minlength=num_tasks).tolist()
        steps, distinct, row = (to_device(x, device) for x in (steps, distinct, row))
        yield steps, rollout.views[distinct], counts, row.view_as(steps)


def actor_losses(logits, actions, old_log_probs, advantages, clip_coef: float, ent_coef: float):
    """Clipped surrogate with entropy bonus (Schulman et al. 2017, equations 7 and 9): logits (task,
    batch, action), the rest (task, batch) -> the losses (task,) and what to log."""
    log_probs = F.log_softmax(logits, dim=-1)
    log_ratio = log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1) - old_log_probs
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    losses = -(surrogate + ent_coef * entropy).mean(1)
    with torch.no_grad():
        logged = {
            "policy_loss": -surrogate.mean(),
            "entropy": entropy.mean(),
            "approx_kl": (ratio - 1 - log_ratio).mean(),
            "clipfrac": ((ratio - 1).abs() > clip_coef).float().mean(),
        }
    return losses, logged


def descend(losses: Tensor, network: nn.Module, optimizer, backward=None):
    """One step down the gradient of the mean of losses (task,), or what backward makes of them."""
    optimizer.zero_grad()
    if backward is None:
        losses.mean().backward()
    else:
        backward(losses, network)
    optimizer.step()
    apply_masks(network)


def update_actor(actor, optimizer, rollout, advantages, args: Args, backward=None) -> dict:
    """Epochs of PPO on the actor; the means of what actor_losses logs."""
    logged = []
    for _ in range(args.update_epochs):
        for steps, views, counts, row in minibatches(rollout, args.minibatch_size):
            logits = actor(views, counts)[row]  # (task, batch, action)
            samples = (x.gather(1, steps) for x in (rollout.action, rollout.log_prob, advantages))
            losses, to_log = actor_losses(logits, *samples, args.clip_coef, args.ent_coef)
            descend(losses, actor, optimizer, backward)
            logged.append(to_log)
    return {name: torch.stack([x[name] for x in logged]).mean() for name in logged[0]}


def update_critic(critic, optimizer, rollout, returns, args: Args, backward=None) -> dict:
    """Epochs of regression of the critic on the returns; its mean squared error."""
    logged = []
    for _ in range(args.critic_epochs):
        for steps, views, counts, row in minibatches(rollout, args.critic_minibatch_size):
            values = critic(views, counts).squeeze(-1)[row]  # (task, batch)
            losses = (values - returns.gather(1, steps)).square().mean(1)  # (task,)
            descend(losses, critic, optimizer, backward)
            logged.append(losses.detach())
    return {"value_loss": torch.stack(logged).mean()}


def train(args: Args) -> Path:
    """Train, evaluate and measure one run. Returns the folder of its log and checkpoint."""
    torch.set_num_threads(args.num_threads)
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    env_ids, num_tasks = task_ids(args), len(task_ids(args))
    tasks = [env_id.removeprefix("MiniGrid-").removesuffix("-v0") for env_id in env_ids]
    envs = [make_env(env_id) for env_id in env_ids]
    eval_envs = [[make_env(env_id) for _ in range(args.eval_episodes)] for env_id in env_ids]

    seed_all(args.seed, NETWORKS, 0)
    networks = make_networks(args, device)
    actor, critic = networks["actor"], networks["critic"]
    adam = partial(Adam, weight_decay=args.weight_decay, fused=True)
    optimizers = {
        "actor": adam(actor.parameters(), args.actor_lr),
        "critic": adam(critic.parameters(), args.critic_lr),
    }
    space = envs[0].observation_space
    capacity = args.plasticity_buffer_size
    buffer = plasticity.ObservationBuffer(capacity, num_tasks, space.sample(), device)
    label = "custom" if args.env_ids else args.benchmark
    parts = networks | {f"{name}_optimizer": o for name, o in optimizers.items()}
    run = Run(args, label, device, args.num_steps, parts | {"buffer": buffer})
    prune_at = None
    if args.sparsifier == "gmp":
        prune_at = partial(update_masks, networks, args, run.last_timestep)

    while run.timestep < run.last_timestep:
        # Collect, with masks updated on the way
        seeds = seed_all(args.seed, TRAINING, run.timestep, num_tasks)
        policy = PolicyTable(actor, space, num_tasks, device)
        policy.refresh(buffer.latest(args.num_steps).cpu().numpy())  # most come again
        rollout, episodes = collect(envs, policy, seeds, args.num_steps, run.timestep, prune_at)
        buffer.add(rollout.views[to_device(rollout.index, device)])
        run.timestep += args.num_steps

        # Update
        advantages, returns, explained = estimate_advantages(critic, rollout, args)
        losses = update_critic(critic, optimizers["critic"], rollout, returns, args)
        losses |= update_actor(actor, optimizers["actor"], rollout, advantages, args)
        losses["explained_variance"] = explained
        scalars = {f"losses/{name}": value.item() for name, value in losses.items()}
        if not all(p.isfinite().all() for p in chain(actor.parameters(), critic.parameters())):
            raise FloatingPointError(f"{run.folder}: diverged at timestep {run.timestep}")
        if prune_at is not None:
            prune_at(run.timestep)

        # Measure and evaluate
        scalars |= plasticity.measure_sparsity(networks)
        routing = actor.task_encoder.weight.T.tolist()  # (task, expert)
        for task, weights in zip(tasks, routing, strict=True):
            scalars |= {f"routing/{task}/expert_{i}": w for i, w in enumerate(weights)}
        scalars |= summarize("charts", tasks, episodes)
        if run.is_due(args.plasticity_frequency):
            seed_all(args.seed, METRICS, run.timestep)
            obs = buffer.sample(args.plasticity_batch_size)
            scalars |= measure_plasticity(networks, obs, args)
        if run.is_due(args.eval_frequency):
            num_episodes = num_tasks * args.eval_episodes
            seeds = seed_all(args.seed, EVALUATION, run.timestep, num_episodes)
            policy.refresh()
            scalars |= summarize("eval", tasks, evaluate(policy, eval_envs, seeds))
            scores = [scalars[f"eval/normalized_return/{task}"] for task in tasks]
            scalars["eval/normalized_return"] = sum(scores) / num_tasks

        # SET's update: after the evaluation of what was trained, before the next acting
        evolves = args.sparsifier == "set" and run.is_due(args.set_frequency)
        if evolves and run.timestep < run.last_timestep:
            seed_all(args.seed, INTERVENTIONS, run.timestep)
            rule = args.set_zeta, args.set_regrow, args.set_grow
            for name, network in networks.items():
                kept = evolve(network, optimizers[name], *rule)
                if kept.isfinite():
                    scalars[f"sparsity/{name}_grown_kept"] = kept.item()

        run.end_iteration(scalars)
    print(f"finished: {run.folder}")
    return run.folder


# ======== Support: tasks, seeds, evaluation, metrics, arguments, checkpoints, logs ========


# What MOORE's code divides a return by, 1 - 0.9 * steps / max steps, for each task of MT7
BEST_RETURN = {
    "LavaGapS7": 1 - 0.9 * 8 / 196,
    "RedBlueDoors-6x6": 1 - 0.9 * 8 / 720,
    "MemoryS11": 1 - 0.9 * 15 / 605,
    "DoorKey-6x6": 1 - 0.9 * 11 / 360,
    "DistShift1": 1 - 0.9 * 11 / 252,
    "SimpleCrossingS9N2": 1 - 0.9 * 15 / 324,
    "MultiRoom-N2-S4": 1 - 0.9 * 5 / 40,
}
NUM_EXPERTS = {"MT3": 2, "MT5": 3, "MT7": 4}
VIEWS = {}  # (task, state of its grid) -> view, of all environments
NETWORKS, TRAINING, EVALUATION, METRICS, INTERVENTIONS = range(5)  # purposes of a seed


def task_ids(args: Args) -> list[str]:
    """Gymnasium ids of the run's tasks: MT3 is the first three of MT7, MT5 the first five."""
    tasks = list(BEST_RETURN)[: int(args.benchmark.removeprefix("MT"))]
    return list(args.env_ids) or [f"MiniGrid-{task}-v0" for task in tasks]


def make_env(env_id: str) -> gym.Env:
    """A task seen as its partial (h, w, c) view of integer codes. To draw a view takes most of
    MiniGrid's step: it is drawn once for each state of the grid, for all environments of a task."""
    env = gym.make(env_id, disable_env_checker=True)
    game = env.unwrapped
    own = [getattr(type(game), name, None) for name in ("gen_obs", "gen_obs_grid")]
    if own == [MiniGridEnv.gen_obs, MiniGridEnv.gen_obs_grid]:  # no views of another kind
        draw = game.gen_obs

        def gen_obs():
            cells = [(0,) if cell is None else cell.encode() for cell in game.grid.grid]
            position = game.grid.width, *game.agent_pos, game.agent_dir
            carried = game.carrying and game.carrying.encode()
            state = env_id, position, carried, bytes(chain.from_iterable(cells))
            if state not in VIEWS:
                if len(VIEWS) >= 50_000:  # about 50 MB
                    VIEWS.clear()
                VIEWS[state] = draw()["image"]
            view = VIEWS[state].copy()
            return {"image": view, "direction": game.agent_dir, "mission": game.mission}

        game.gen_obs = gen_obs
    return gym.wrappers.RecordEpisodeStatistics(ImgObsWrapper(env))


def make_networks(args: Args, device="cpu") -> dict:
    """Actor and critic of the run's tasks, drawn anew, with their first masks."""
    env, num_tasks = make_env(task_ids(args)[0]), len(task_ids(args))
    outputs = {"actor": int(env.action_space.n), "critic": 1}
    make = partial(MixtureOfOrthogonalExperts, env.observation_space.shape, num_tasks)
    networks = {name: make(size, args).to(device) for name, size in outputs.items()}
    for network in networks.values():
        if args.sparsifier == "set":
            draw_masks(network, set_densities(network, args.sparsity, args.set_epsilon))
        elif args.sparsifier == "gmp":
            kept_counts(network, args.sparsity, args.prune_scope)  # refuses too high a sparsity
    return networks


def seed_all(seed: int, purpose: int, timestep: int, num_envs: int = 0) -> list[int]:
    """Seed torch and NumPy for a purpose at a timestep; returns seeds for environments. So neither
    evaluation nor metrics disturb training, and a resumed run needs no generator's state."""
    sequence = np.random.SeedSequence((seed, purpose, timestep))
    seeds = sequence.generate_state(1 + num_envs).tolist()
    torch.manual_seed(seeds[0])
    np.random.seed(seeds[0])
    return seeds[1:]


def evaluate(policy: PolicyTable, envs: list, seeds: list) -> list:
    """Play one episode in each of envs[task][episode]: (return, length) of each task's."""
    episodes = [[] for _ in envs]
    running = {}  # (task, episode) -> the key of its view
    for (i, j), seed in zip(np.ndindex(len(envs), len(envs[0])), seeds, strict=True):
        running[i, j] = (i, envs[i][j].reset(seed=seed)[0].tobytes())
    while running:
        log_probs = policy.look_up(list(running.values()))
        actions = (log_probs + np.random.gumbel(size=log_probs.shape)).argmax(1).tolist()
        for (i, j), action in zip(list(running), actions, strict=True):
            obs, _, terminated, truncated, info = envs[i][j].step(action)
            running[i, j] = (i, obs.tobytes())
            if terminated or truncated:
                episodes[i].append((info["episode"]["r"], info["episode"]["l"]))
                del running[i, j]
    return episodes


def summarize(group: str, tasks: list, episodes: list) -> dict:
    """What to log: means over the (return, length) of each task's episodes, if there are any."""
    scalars = {}
    for task, played in zip(tasks, episodes, strict=True):
        if played:
            mean_return, mean_length = np.mean(played, axis=0).tolist()
            best = BEST_RETURN.get(task, 1.0)
            scalars[f"{group}/normalized_return/{task}"] = mean_return / best
            scalars[f"{group}/episodic_return/{task}"] = mean_return
            scalars[f"{group}/episodic_length/{task}"] = mean_length
    return scalars


def measure_plasticity(networks: dict, obs: Tensor, args: Args) -> dict:
    """Dormant ratio and effective rank of actor and critic, Fisher trace of the actor, for obs
    (task, batch, h, w, c). A head's neurons see their own task's observations alone."""
    actor, metrics = networks["actor"], {}
    counts, obs = [obs.shape[1]] * len(obs), obs.flatten(0, 1)
    for name, network in networks.items():
        with torch.no_grad():
            hidden, features, _ = network.activations(obs, counts)
        alive = plasticity.alive_neurons(network)
        dormant = plasticity.dormant_ratio(hidden, args.dormant_tau, alive)
        metrics[f"plasticity/{name}_dormant_ratio"] = dormant
        rank = plasticity.effective_rank(features, args.srank_delta)
        metrics[f"plasticity/{name}_effective_rank"] = rank
    fisher_trace = plasticity.fisher_trace(
        actor, lambda: F.log_softmax(actor(obs, counts), dim=-1), actor.masks
    )
    return metrics | {"plasticity/fisher_trace": fisher_trace}


def require(args: Args, names: str, allowed, what: str):
    """Raise ValueError for the first of these arguments that is not allowed."""
    for name in names.split():
        value = getattr(args, name)
        if not allowed(value):
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be {what}")


def check_tasks(args: Args):
    """Raise ValueError for a task that cannot be played, or not by the first one's networks, and
    for a buffer too small for all."""
    require(args, "env_ids", lambda ids: len({*ids}) == len(ids), "different tasks")
    least = len(task_ids(args))
    require(args, "plasticity_buffer_size", lambda x: x >= least, f"at least one a task, {least}")
    spaces = {}
    for env_id in args.env_ids:
        try:
            env = make_env(env_id)
            env.reset(seed=0)  # some fail here alone
            make_networks(args)
        except Exception as error:  # it may raise anything
            raise ValueError(f"--env-ids {env_id}: {type(error).__name__}: {error}") from error
        spaces[env_id] = f"{env.observation_space}, {env.action_space}"
    equal = len({*spaces.values()}) < 2
    require(args, "env_ids", lambda _: equal, f"of equal spaces, not {spaces}")


def check_run(args: Args):
    """Raise ValueError for an argument that is wrong in any script."""
    check = partial(require, args)
    for option in fields(args):
        if get_origin(option.type) is Literal:
            allowed = get_args(option.type)
            check(option.name, allowed.__contains__, f"one of {', '.join(allowed)}")
    numbers = [name for name, x in vars(args).items() if isinstance(x, int | float)]
    check(" ".join(numbers), lambda x: 0 <= x < math.inf, "finite and at least 0")
    check("eval_episodes plasticity_batch_size num_threads", lambda x: x > 0, "positive")
    check("sparsity srank_delta", lambda x: x < 1, "below 1")
    check("device", lambda x: x != "cuda" or torch.cuda.is_available(), "auto or cpu here")
    taken = args.run_dir and (args.resume or Path(args.run_dir, "checkpoint.pt").exists())
    check("run_dir", lambda _: not taken, "a folder without a run, not beside --resume")


def load_checkpoint(run_dir: str) -> dict:
    """The checkpoint of a run of this script. Raises ValueError for any other folder."""
    path, script = Path(run_dir, "checkpoint.pt"), Path(__file__).stem
    state = torch.load(path, "cpu", weights_only=True) if path.is_file() else {"script": None}
    if state.get("script") != script or state["args"].keys() != Args.__dataclass_fields__.keys():
        raise ValueError(f"--resume {run_dir}: must be a run of this version of {script}")
    return state


def load_agent(run_dir: str) -> tuple:
    """The actor of a run, on the CPU and without gradients, its arguments and its tasks."""
    checkpoint = load_checkpoint(run_dir)
    args = Args(**checkpoint["args"] | {"device": "cpu"})
    actor = make_networks(args)["actor"]
    actor.load_state_dict(checkpoint["actor"])
    return actor.eval().requires_grad_(False), args, task_ids(args)


class Run:
    """A run's folder with log and checkpoint, its timestep and its bar. stride: timesteps of an
    iteration; parts: what a checkpoint holds, by name, each with state_dict and load_state_dict."""

    def __init__(self, args: Args, label: str, device: str, stride: int, parts: dict):
        self.args, self.stride, self.parts = args, stride, parts
        name = f"{label}__{Path(__file__).stem}__{args.seed}__{time.time_ns() // 10**6}"
        self.folder = Path(args.resume or args.run_dir or f"runs/{name}")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.folder / "lock", timeout=0).acquire()  # freed with the process
        check_run(args)  # again, behind the lock
        state = load_checkpoint(args.resume) if args.resume else {"timestep": 0}
        self.timestep = state["timestep"]
        for name, part in parts.items() if args.resume else ():
            groups = {k: v for k, v in part.state_dict().items() if k == "param_groups"}
            try:
                part.load_state_dict(state[name] | groups)  # but the learning rates of now
            except (RuntimeError, ValueError) as error:
                raise ValueError(f"--resume {args.resume}: its {name} differs: {error}") from error
        left = max(0, args.total_timesteps - self.timestep) // stride * stride
        self.last_timestep = self.timestep + left
        self.start = self.timestep, time.monotonic()
        # Logs are read in the order of their names, which begin with the clock's time
        for i, file in enumerate(sorted(self.folder.glob("events.*"))):
            file.rename(self.folder / f"events.out.tfevents.{i:010d}")
        self.writer = SummaryWriter(str(self.folder), purge_step=self.timestep + 1)
        if left:  # a finished run keeps its flags
            self.save()
            rows = "".join(f"|{name}|{value}|\n" for name, value in asdict(args).items())
            self.writer.add_text("args", "|argument|value|\n|-|-|\n" + rows, self.timestep)
        print(f"{self.folder}: timesteps {self.timestep} to {self.last_timestep} on {device}")
        print(f"to go on: python {Path(__file__).name} --resume {self.folder}", flush=True)
        self.bar = tqdm(total=self.last_timestep, initial=self.timestep, unit=" timesteps")

    def is_due(self, frequency: int) -> bool:
        """Whether this iteration came to a multiple of frequency (0: never) or is the last one."""
        came = frequency > 0 and self.timestep % frequency < self.stride
        return came or self.timestep == self.last_timestep

    def end_iteration(self, scalars: dict):
        """Log, show how the run goes, and save a checkpoint if it is time to."""
        timestep, now = self.start
        scalars["charts/SPS"] = (self.timestep - timestep) / (time.monotonic() - now)
        is_last = self.timestep == self.last_timestep
        for tag, value in scalars.items():
            self.writer.add_scalar(tag, value, self.timestep)
            if tag.startswith("eval/") and (is_last or tag.count("/") == 1):
                self.bar.write(f"timestep {self.timestep}: {tag} {value:.3f}", sys.stderr)
        returns = [x for tag, x in scalars.items() if tag.startswith("charts/episodic_return/")]
        self.bar.set_postfix_str(f"training return {np.mean(returns or math.nan):.3f}", False)
        self.bar.update(self.stride)
        if self.is_due(self.args.checkpoint_frequency):
            self.writer.flush()  # first, so that the log never lags
            self.save()
        if is_last:
            self.bar.close()
            self.writer.close()

    def save(self):
        """Write the checkpoint atomically: a reader finds the old one or the new one, whole."""
        device = self.args.device.replace("cuda", "auto")  # it may go on elsewhere
        args = asdict(self.args) | {"resume": None, "run_dir": None, "device": device}
        state = {"script": Path(__file__).stem, "args": args, "timestep": self.timestep}
        state |= {name: part.state_dict() for name, part in self.parts.items()}
        partial_file = self.folder / "checkpoint.partial"
        torch.save(state, partial_file)
        partial_file.replace(self.folder / "checkpoint.pt")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume")  # a run, whose arguments are the defaults
    run_dir = parser.parse_known_args()[0].resume
    try:
        own = Args(**load_checkpoint(run_dir)["args"] if run_dir else {})
    except ValueError as error:
        parser.error(str(error))
    try:
        train(tyro.cli(Args, default=own))
    except FloatingPointError as error:
        sys.exit(f"error: {error}")
