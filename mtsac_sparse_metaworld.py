# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["torch==2.13.0", "gymnasium==1.4.0", "metaworld==3.1.1", "mujoco==3.3.0",
#                 "numpy==2.4.6", "tyro>=1.0", "tensorboard>=2.20", "tqdm>=4.67",
#                 "filelock>=3.20"]
# ///
"""Multi-task multi-head SAC on Meta-World with a pruned actor, pruned critics or both.

One shared trunk of three layers and one head per task, for the actor and for the twin critics,
made sparse by gradual magnitude pruning or by sparse evolutionary training (arXiv 2508.06871,
section 4, MTMH-SAC; setting of McLean et al. 2025). What differs from the MiniGrid scripts: the
agent; a timestep is one environment step of one task. Tensors are (task, batch, ...).

    python mtsac_sparse_metaworld.py --benchmark MT10 --prune actor --seed 1
"""

import argparse
import copy
import math
import sys
import time
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple, get_args, get_origin

import gymnasium as gym
import metaworld
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from filelock import FileLock
from metaworld.env_dict import ALL_V3_ENVIRONMENTS, MT10_V3, MT50_V3
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Adam
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import plasticity_metrics as plasticity

OBS_SIZE, ACTION_SIZE, EPISODE_STEPS, NUM_GOALS = 39, 4, 500, 50  # of Meta-World


@dataclass
class Args:
    """Multi-task multi-head SAC with sparse networks on Meta-World."""

    # Tasks
    benchmark: Literal["MT10", "MT50"] = "MT10"  # tasks to train on
    env_names: tuple[str, ...] = ()  # Meta-World names instead (one: single-task SAC)
    seed: int = 1  # random seed
    total_timesteps: int = 20_000_000  # environment steps over all tasks
    vectorization: Literal["async", "sync"] = "async"  # a process per environment, or none

    # SAC
    batch_size: int = 128  # transitions per task in a batch
    buffer_size: int = 1_000_000  # transitions kept, over all tasks
    learning_starts: int = 40_000  # timesteps of random actions, without updates, at first
    updates_per_step: int = 1  # updates after each step of all environments
    actor_lr: float = 3e-4  # learning rate of the actor
    critic_lr: float = 3e-4  # learning rate of the critic
    alpha_lr: float = 3e-4  # learning rate of the temperatures
    adam_eps: float = 1e-5  # epsilon of every Adam
    max_grad_norm: float = 1.0  # largest norm of a network's gradient
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # step of the target critics towards the critics
    max_q: float = 5000.0  # bound of a target's magnitude (0: none)
    bootstrap_at_truncation: bool = True  # bootstrap at the time limit
    weight_decay: float = 0.0  # L2 coefficient of Adam
    layer_norm: bool = False  # LayerNorm before each nonlinearity

    # Gradual magnitude pruning and sparse evolutionary training
    prune: Literal["actor", "critic", "both", "none"] = "actor"  # what is sparse (none: dense)
    sparsifier: Literal["gmp", "set"] = "gmp"  # gmp: gradually, set: sparse evolution
    sparsity: float = 0.95  # share of pruned weights (0: dense)
    prune_start: float = 0.05  # share of training after which pruning begins
    prune_end: float = 0.80  # share of training after which sparsity is full
    prune_frequency: int = 5000  # timesteps between mask updates
    prune_scope: Literal["layer", "global"] = "layer"  # rank within a layer or network
    set_zeta: float = 0.3  # share of a layer's active weights replaced at each SET update
    set_frequency: int = 2000  # timesteps between SET updates (0: masks stay)
    set_epsilon: float | None = None  # density is this times (1/in + 1/out), unless --sparsity is 0
    set_regrow: Literal["random", "gradient"] = "random"  # gradient: by RigL's rule
    set_grow: Literal["zero", "init"] = "zero"  # what grown weights start at

    # Evaluation and plasticity metrics
    eval_frequency: int = 200_000  # timesteps between evaluations (0: at the end)
    eval_episodes: int = 50  # episodes per task in an evaluation
    plasticity_frequency: int = 200_000  # timesteps between measurements (0: at the end)
    plasticity_batch_size: int = 1024  # observations of a measurement, over all tasks
    dormant_tau: float = 0.001  # neurons scoring at most this are dormant
    srank_delta: float = 0.01  # share of singular value mass left out

    # Run
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda if there is one
    run_dir: str | None = None  # the run's folder (none: a new one in runs/)
    checkpoint_frequency: int = 20_000  # timesteps between checkpoints (0: at the end)
    resume: str | None = None  # run to go on with; on the command line its flags are defaults
    num_threads: int = torch.get_num_threads()  # torch threads

    def __post_init__(self):
        check_run(self)
        check = partial(require, self)
        check("batch_size updates_per_step prune_frequency", lambda x: x >= 1, "at least 1")
        check("max_grad_norm", lambda x: x > 0, "positive")
        check("gamma tau prune_end set_zeta", lambda x: x <= 1, "at most 1")
        check("prune_start", lambda x: x < self.prune_end, "below --prune-end")
        known = {*self.env_names} & {*ALL_V3_ENVIRONMENTS}
        right = len(known) == len(self.env_names)
        check("env_names", lambda _: right, "different tasks of Meta-World, like reach-v3")
        num_tasks = len(task_ids(self))
        least, text = num_tasks * EPISODE_STEPS, "at least an episode of every task"
        check("total_timesteps", lambda x: x >= least, text)
        last = self.total_timesteps // least * least
        check("learning_starts", lambda x: x < last, f"below {last}, the last timestep")
        batch = num_tasks * self.batch_size
        check("buffer_size", lambda x: x >= batch, f"at least a batch, {batch}")


# Networks


class StackedLinear(nn.Module):
    """Linear layers side by side: (stack, batch, in) -> (stack, batch, out). He-uniform weights and
    zero biases; with a bound, both uniform in [-bound, bound]."""

    def __init__(self, stack: int, in_features: int, out_features: int, bound=None):
        super().__init__()
        self.bound = bound or math.sqrt(6 / in_features)  # of the initial weights
        self.weight = nn.Parameter(torch.empty(stack, out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(stack, 1, out_features))
        nn.init.uniform_(self.weight, -self.bound, self.bound)
        if bound is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight.mT)


class MultiHeadMLP(nn.Module):
    """Copies of a network side by side (an actor: 1, twin critics: 2), with their masks: each a
    shared trunk of three layers and one head per task, with weights and biases uniform within
    head_bound at first; the one-hot task is part of its input."""

    def __init__(self, copies, num_tasks, in_size, out_size, head_bound: float, args: Args):
        super().__init__()
        self.hidden1 = StackedLinear(copies, in_size + num_tasks, 400)
        self.hidden2 = StackedLinear(copies, 400, 400)
        self.hidden3 = StackedLinear(copies, 400, 400)
        self.head = StackedLinear(copies * num_tasks, 400, out_size, head_bound)
        one_hot = torch.eye(num_tasks)[:, None]  # (task, 1, task)
        self.register_buffer("one_hot", one_hot, persistent=False)
        self.layer_norm = args.layer_norm
        # Each layer, in order, and how many layers of one shape it batches
        self.layers = dict(hidden1=copies, hidden2=copies, hidden3=copies)
        self.layers["head"] = copies * num_tasks
        self.masks = {}  # layer -> zeros and ones like its weight; empty: dense

    def activations(self, x: Tensor):
        """x (task, batch, in) -> what each hidden layer puts out, (copy, task * batch, 400); the
        output (copy, task, batch, out)."""
        num_tasks, batch = x.shape[:2]
        copies = self.layers["hidden1"]
        x = torch.cat([x, self.one_hot.expand(-1, batch, -1)], dim=-1)
        x = x.flatten(0, 1).expand(copies, -1, -1)
        hidden = []
        for layer in (self.hidden1, self.hidden2, self.hidden3):
            x = layer(x)
            if self.layer_norm:
                x = F.layer_norm(x, x.shape[-1:])
            x = F.relu(x)
            hidden.append(x)
        output = self.head(x.view(copies * num_tasks, batch, -1))
        return hidden, output.view(copies, num_tasks, batch, -1)

    def forward(self, x: Tensor) -> Tensor:
        return self.activations(x)[-1]

    def get_extra_state(self) -> dict:  # makes the masks part of state_dict
        return self.masks

    def set_extra_state(self, state: dict):
        device = next(self.parameters()).device
        self.masks = {layer: mask.to(device) for layer, mask in state.items()}


def policy(actor: nn.Module, obs: Tensor) -> tuple[Tensor, Tensor]:
    """obs (task, batch, 39) -> mean and log standard deviation before tanh, (task, batch, 4)."""
    mean, log_std = actor(obs)[0].chunk(2, dim=-1)
    return mean, log_std.clamp(-20, 2)


def draw_actions(mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
    """Draw from the squashed Gaussian: actions (..., 4) and their log-probs (...).

    Source: arXiv 1812.05905, appendix C; log(1 - tanh(u)^2) in a form that cannot overflow.
    """
    noise = torch.randn_like(mean)
    u = mean + log_std.exp() * noise
    gaussian = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    squash = 2 * (math.log(2) - u - F.softplus(-2 * u))
    return u.tanh(), (gaussian - squash).sum(-1)


def q_values(critic: nn.Module, obs: Tensor, actions: Tensor) -> Tensor:
    """obs (task, batch, 39), actions (task, batch, 4) -> both critics' values (2, task, batch)."""
    return critic(torch.cat([obs, actions], dim=-1)).squeeze(-1)


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


def sparse_networks(args: Args) -> tuple[str, ...]:
    """The networks that --prune names."""
    if args.prune == "both":
        return ("actor", "critic")
    return () if args.prune == "none" else (args.prune,)


def sparsify(networks: dict, optimizers: dict, args: Args, progress=0.0) -> dict:
    """SET's update, or GMP's at a share of training, of the networks that are to be sparse, and of
    the target critics, which have the critics' masks. Returns what to log."""
    scalars = {}
    sparsity = gmp_sparsity(progress, args.prune_start, args.prune_end, args.sparsity)
    rule = args.set_zeta, args.set_regrow, args.set_grow
    for name in sparse_networks(args):
        if args.sparsifier == "set":
            kept = evolve(networks[name], optimizers[name], *rule)
            if kept.isfinite():
                scalars[f"sparsity/{name}_grown_kept"] = kept.item()
        elif sparsity > 0:
            prune(networks[name], sparsity, args.prune_scope)
    networks["target"].masks = networks["critic"].masks
    apply_masks(networks["target"])
    return scalars


# SAC

TARGET_ENTROPY = -ACTION_SIZE


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
        zeros = partial(torch.zeros, num_tasks, self.capacity, device=device)
        self.fields = Transitions(
            obs=zeros(OBS_SIZE),
            actions=zeros(ACTION_SIZE),
            rewards=zeros(),
            next_obs=zeros(OBS_SIZE),
            bootstrap=zeros(),
        )
        self.added = 0  # transitions per task so far

    def state_dict(self) -> dict:
        """The filled part alone, in memory of its own."""
        filled = [field[:, : self.added].clone() for field in self.fields]
        return {"added": self.added, "fields": filled}

    def load_state_dict(self, state: dict):
        self.added = state["added"]
        for field, saved in zip(self.fields, state["fields"], strict=True):
            field[:, : self.added] = saved

    def add(self, *transition):
        """Store one transition of every task, in the order of Transitions: arrays (task, ...)."""
        for field, value in zip(self.fields, transition, strict=True):
            value = torch.as_tensor(value, dtype=torch.float32, device=field.device)
            field[:, self.added % self.capacity] = value
        self.added += 1

    def sample(self, size: int) -> Transitions:
        """Draw size transitions per task, with replacement."""
        num_tasks = len(self.fields.obs)
        device = self.fields.obs.device
        filled = min(self.added, self.capacity)
        slot = torch.randint(filled, (num_tasks, size), device=device)
        task = torch.arange(num_tasks, device=device)[:, None]
        return Transitions(*(field[task, slot] for field in self.fields))


@torch.no_grad()
def choose_actions(actor: nn.Module, obs: np.ndarray, learning: bool) -> np.ndarray:
    """Draw actions (task, 4) for obs (task, 39), uniform ones before the policy learns."""
    obs = torch.as_tensor(obs, dtype=torch.float32, device=actor.one_hot.device)
    if learning:
        actions, _ = draw_actions(*policy(actor, obs[:, None]))  # (task, 1, 4)
        actions = actions.squeeze(1)
    else:
        actions = torch.empty(len(obs), ACTION_SIZE, device=obs.device)
        actions.uniform_(-1, 1)
    return actions.cpu().numpy()  # all that leaves the device


@torch.no_grad()
def critic_targets(actor, target, alpha: Tensor, batch: Transitions, gamma, max_q) -> Tensor:
    """Soft Bellman targets (task, batch) of both critics, for temperatures alpha (task, 1) (arXiv
    1812.05905, equation 6)."""
    actions, log_probs = draw_actions(*policy(actor, batch.next_obs))
    q = q_values(target, batch.next_obs, actions).amin(0)
    soft_values = q - alpha * log_probs
    targets = batch.rewards + gamma * batch.bootstrap * soft_values
    return targets.clamp(-max_q, max_q) if max_q else targets


def descend_clipped(loss: Tensor, network: nn.Module, optimizer, max_grad_norm: float):
    """One step of the network, and of nothing else, down the clipped gradient of the loss."""
    parameters = dict(network.named_parameters())
    optimizer.zero_grad()
    loss.backward(inputs=list(parameters.values()))
    # Pruned weights have a gradient (SET may grow by it), but take no part in its norm
    masks = {f"{layer}.weight": mask for layer, mask in network.masks.items()}
    active = [p.grad * masks[name] if name in masks else p.grad for name, p in parameters.items()]
    norm = get_total_norm(active)
    clip_grads_with_norm_(parameters.values(), max_grad_norm, norm)
    optimizer.step()
    apply_masks(network)


def update(networks: dict, log_alpha: Tensor, optimizers: dict, batch, args: Args) -> dict:
    """One SAC update of critics, actor, temperatures and target critics, in this order. Returns the
    losses of the first three."""
    actor = networks["actor"]
    critic = networks["critic"]
    target = networks["target"]
    alpha = log_alpha.detach().exp()[:, None]  # (task, 1)

    targets = critic_targets(actor, target, alpha, batch, args.gamma, args.max_q)
    q = q_values(critic, batch.obs, batch.actions)  # (2, task, batch)
    qf_loss = (q - targets).square().mean()
    descend_clipped(qf_loss, critic, optimizers["critic"], args.max_grad_norm)

    actions, log_probs = draw_actions(*policy(actor, batch.obs))
    q = q_values(critic, batch.obs, actions).amin(0)  # (task, batch)
    actor_loss = (alpha * log_probs - q).mean()
    descend_clipped(actor_loss, actor, optimizers["actor"], args.max_grad_norm)

    missing_entropy = log_probs.detach() + TARGET_ENTROPY
    alpha_loss = -(log_alpha[:, None] * missing_entropy).mean()
    optimizers["alpha"].zero_grad()
    alpha_loss.backward()
    optimizers["alpha"].step()

    with torch.no_grad():
        for old, new in zip(target.parameters(), critic.parameters(), strict=True):
            old.lerp_(new, args.tau)
    return {
        "qf_loss": qf_loss.detach(),
        "actor_loss": actor_loss.detach(),
        "alpha_loss": alpha_loss.detach(),
    }


def train(args: Args) -> Path:
    """Train, evaluate and measure one run. Returns the folder of its log and checkpoint."""
    torch.set_num_threads(args.num_threads)
    torch.set_flush_denormal(True)  # slow, and what Adam's moments of idle weights decay to
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    tasks = [name.removesuffix("-v3") for name in task_ids(args)]
    num_tasks = len(tasks)
    envs = make_vector_env(args)
    eval_envs = make_vector_env(args)

    seed_all(args.seed, NETWORKS, 0)
    networks = make_networks(args, device)
    actor, critic = networks["actor"], networks["critic"]
    networks["target"] = copy.deepcopy(critic).requires_grad_(False)
    temperatures = nn.ParameterDict({"log_alpha": torch.zeros(num_tasks)}).to(device)
    log_alpha = temperatures["log_alpha"]
    adam = partial(Adam, eps=args.adam_eps, fused=True)
    decay = args.weight_decay
    optimizers = {
        "actor": adam(actor.parameters(), args.actor_lr, weight_decay=decay),
        "critic": adam(critic.parameters(), args.critic_lr, weight_decay=decay),
        "alpha": adam([log_alpha], args.alpha_lr),
    }
    buffer = ReplayBuffer(args.buffer_size, num_tasks, device)
    metrics_size = math.ceil(args.plasticity_batch_size / num_tasks)  # per task
    label = "custom" if args.env_names else args.benchmark
    parts = networks | {f"{name}_optimizer": o for name, o in optimizers.items()}
    parts |= {"temperatures": temperatures, "buffer": buffer}
    run = Run(args, label, device, num_tasks * EPISODE_STEPS, parts)

    learning_steps = (run.last_timestep - args.learning_starts) // num_tasks
    num_updates = learning_steps * args.updates_per_step
    text = f"{num_updates:,} updates in all; the bar says how long, once they have begun"
    print(text, flush=True)

    while run.timestep < run.last_timestep:
        # One episode of every task, with an update after each step
        goals = seed_all(args.seed, TRAINING, run.timestep, num_tasks)
        returns = np.zeros(num_tasks)
        successes = np.zeros(num_tasks, bool)
        losses = []
        obs, _ = envs.reset(options={"goals": goals})
        for _ in range(EPISODE_STEPS):
            learning = run.timestep >= args.learning_starts
            actions = choose_actions(actor, obs, learning)
            next_obs, rewards, terminated, truncated, info = envs.step(actions)
            ended = terminated | (truncated & (not args.bootstrap_at_truncation))
            buffer.add(obs, actions, rewards, next_obs, ~ended)
            obs = next_obs
            returns += rewards
            successes |= info["success"] > 0
            run.timestep += num_tasks
            for _ in range(args.updates_per_step if learning else 0):
                batch = buffer.sample(args.batch_size)
                losses.append(update(networks, log_alpha, optimizers, batch, args))
            progress = run.timestep / run.last_timestep
            prunes = run.timestep % args.prune_frequency < num_tasks or progress == 1
            if args.sparsifier == "gmp" and prunes:
                sparsify(networks, optimizers, args, progress)
        if not all(p.isfinite().all() for p in chain(actor.parameters(), critic.parameters())):
            raise FloatingPointError(f"{run.folder}: diverged at timestep {run.timestep}")

        # Measure and evaluate
        scalars = {}
        if losses:
            for name in losses[0]:
                own = torch.stack([each[name] for each in losses])
                scalars[f"losses/{name}"] = own.mean().item()
            scalars |= by_task("losses/alpha", tasks, log_alpha.exp())
        scalars |= by_task("charts/episodic_return", tasks, returns)
        scalars |= by_task("charts/success", tasks, successes)
        scalars |= plasticity.measure_sparsity({"actor": actor, "critic": critic})
        if run.is_due(args.plasticity_frequency):
            seed_all(args.seed, METRICS, run.timestep)
            scalars |= measure_networks(networks, buffer.sample(metrics_size), args)
        if run.is_due(args.eval_frequency):
            [goal_seed] = seed_all(args.seed, EVALUATION, run.timestep, 1)
            eval_goals = draw_goals(goal_seed, num_tasks, args.eval_episodes)
            played = play(actor, eval_envs, eval_goals, device, draw=False)
            rates = played.successes.mean(1)  # (task,)
            scalars |= by_task("eval/success_rate", tasks, rates)
            eval_returns = played.rewards.sum(2).mean(1)
            scalars |= by_task("eval/episodic_return", tasks, eval_returns)
            scalars["eval/success_rate"] = rates.mean().item()
            error_goals = eval_goals[:, :CRITIC_ERROR_EPISODES]
            drawn = play(actor, eval_envs, error_goals, device, draw=True)
            error = critic_error(networks, log_alpha, drawn, args)
            scalars["plasticity/critic_error"] = error

        # SET's update: after the evaluation of what was trained, before the next acting
        evolves = run.is_due(args.set_frequency) and run.timestep < run.last_timestep
        if args.sparsifier == "set" and losses and evolves:
            seed_all(args.seed, INTERVENTIONS, run.timestep)
            scalars |= sparsify(networks, optimizers, args)

        run.end_iteration(scalars)
    envs.close()
    eval_envs.close()
    print(f"finished: {run.folder}")
    return run.folder


# ======== Support: tasks, seeds, evaluation, metrics, arguments, checkpoints, logs ========


NETWORKS, TRAINING, EVALUATION, METRICS, INTERVENTIONS, GOALS = range(6)  # purposes of a seed
CRITIC_ERROR_EPISODES = 5  # per task, on which critics and returns are compared
CRITIC_ERROR_STRIDE = 10  # steps between two states of the comparison


def task_ids(args: Args) -> list[str]:
    """Meta-World names of the run's tasks."""
    benchmarks = {"MT10": MT10_V3, "MT50": MT50_V3}
    return list(args.env_names or benchmarks[args.benchmark])


class GoalEnv(gym.Wrapper):
    """A Meta-World task that each reset sets to one of its goals and initial states; an episode
    follows from its goal and its actions alone, whatever was played before it."""

    def __init__(self, name: str, goals: list, task: int):
        """task: its place in the goals (task,) that a reset is given, numbers into goals."""
        super().__init__(ALL_V3_ENVIRONMENTS[name]())
        self.goals, self.task = goals, task
        self.unwrapped.set_task(goals[0])  # makes the goal part of the observation

    def reset(self, *, seed=None, options: dict):
        number = options["goals"][self.task] % len(self.goals)
        self.unwrapped.set_task(self.goals[number])
        return self.env.reset()


@cache
def draw_tasks(name: str, seed: int) -> list:
    """A task's 50 goals with their initial states, as Meta-World draws them, in a second."""
    return metaworld.MT1(name, seed).train_tasks


def make_vector_env(args: Args) -> gym.vector.VectorEnv:
    """One environment per task, with the run's goals; episodes end together, are reset by hand."""
    names = task_ids(args)
    goal_seeds = seed_all(args.seed, GOALS, 0, len(names))
    makers = []
    for i, (name, goal_seed) in enumerate(zip(names, goal_seeds, strict=True)):
        makers.append(partial(GoalEnv, name, draw_tasks(name, goal_seed), i))
    is_async = args.vectorization == "async"
    make = gym.vector.AsyncVectorEnv if is_async else gym.vector.SyncVectorEnv
    return make(makers, autoreset_mode=gym.vector.AutoresetMode.DISABLED)


def make_networks(args: Args, device="cpu") -> dict:
    """Actor and twin critics of the run's tasks, drawn anew, with their first masks."""
    num_tasks = len(task_ids(args))
    actor = MultiHeadMLP(1, num_tasks, OBS_SIZE, 2 * ACTION_SIZE, 1e-3, args)
    critic = MultiHeadMLP(2, num_tasks, OBS_SIZE + ACTION_SIZE, 1, 3e-3, args)
    networks = {"actor": actor.to(device), "critic": critic.to(device)}
    for name in sparse_networks(args):
        if args.sparsifier == "set":
            densities = set_densities(networks[name], args.sparsity, args.set_epsilon)
            draw_masks(networks[name], densities)
        else:
            kept_counts(networks[name], args.sparsity, args.prune_scope)  # raises if too high
    return networks


def seed_all(seed: int, purpose: int, timestep: int, num_envs: int = 0) -> list[int]:
    """Seed torch and NumPy for a purpose at a timestep; returns seeds for environments. So neither
    evaluation nor metrics disturb training, and a resumed run needs no generator's state."""
    sequence = np.random.SeedSequence((seed, purpose, timestep))
    seeds = sequence.generate_state(1 + num_envs).tolist()
    torch.manual_seed(seeds[0])
    np.random.seed(seeds[0])
    return seeds[1:]


class Episodes(NamedTuple):
    """Whole episodes of every task."""

    obs: Tensor  # (task, episode, 501, 39), that of the end too
    actions: Tensor  # (task, episode, 500, 4)
    log_probs: Tensor  # (task, episode, 500), of actions drawn from the policy
    rewards: Tensor  # (task, episode, 500)
    successes: Tensor  # (task, episode), 1 where there was one at any step


def draw_goals(seed: int, num_tasks: int, num_episodes: int) -> np.ndarray:
    """Goals (task, episode) in an order of each task's own; none comes twice before all came."""
    rounds = math.ceil(num_episodes / NUM_GOALS)
    order = np.tile(np.arange(NUM_GOALS), (rounds, num_tasks, 1))
    order = np.random.default_rng(seed).permuted(order, axis=2)  # (round, task, goal)
    return order.swapaxes(0, 1).reshape(num_tasks, -1)[:, :num_episodes]


@torch.no_grad()
def play(actor: nn.Module, envs, goals: np.ndarray, device: str, draw: bool) -> Episodes:
    """Play an episode for each of goals (task, episode), with the actions drawn from the policy or
    with its mode."""
    to_tensor = partial(torch.as_tensor, dtype=torch.float32, device=device)
    episodes = []
    for own_goals in goals.T:
        steps = []
        obs, _ = envs.reset(options={"goals": own_goals})
        obs = to_tensor(obs)  # (task, 39)
        for _ in range(EPISODE_STEPS):
            mean, log_std = (x.squeeze(1) for x in policy(actor, obs[:, None]))
            drawn, log_probs = draw_actions(mean, log_std)
            actions = drawn if draw else mean.tanh()
            next_obs, rewards, _, _, info = envs.step(actions.cpu().numpy())
            rewards = to_tensor(rewards)
            success = to_tensor(info["success"] > 0)
            steps.append((obs, actions, log_probs, rewards, success))
            obs = to_tensor(next_obs)
        # (task, step, ...)
        fields = [torch.stack(field, 1) for field in zip(*steps, strict=True)]
        fields[0] = torch.cat([fields[0], obs[:, None]], 1)
        episodes.append(fields)
    fields = [torch.stack(field, 1) for field in zip(*episodes, strict=True)]
    fields[-1] = fields[-1].amax(2)  # whether any step was a success
    return Episodes(*fields)


def by_task(tag: str, tasks: list[str], values) -> dict:
    """What to log of an array or a tensor (task,)."""
    return {f"{tag}/{task}": x for task, x in zip(tasks, values.tolist(), strict=True)}


def soft_returns(rewards: Tensor, bonuses: Tensor, tail: Tensor, gamma: float) -> Tensor:
    """Discounted soft return from each step on (..., step), of rewards (..., step); bonuses (...,
    step): the entropy bonus of each step's state, which counts for the steps before it; tail (...):
    the soft value of the state after the last step."""
    returns, running = torch.empty_like(rewards), tail
    for step in reversed(range(rewards.shape[-1])):
        returns[..., step] = rewards[..., step] + gamma * running
        running = returns[..., step] + bonuses[..., step]
    return returns


@torch.no_grad()
def critic_error(networks: dict, log_alpha: Tensor, drawn: Episodes, args: Args) -> float:
    """Normalized MSE of the smaller Q: its squared error against the soft return that followed over
    the squared return (1: Q is zero), the mean over tasks, on every CRITIC_ERROR_STRIDE-th state
    and action of episodes with drawn actions. The soft return adds, for each later state, the
    temperature times minus the log-prob of its action, and with --bootstrap-at-truncation the
    critics' soft value of the last observation, which makes the last steps' errors smaller. An
    exact critic's is not zero, as returns vary with the actions drawn."""
    actor = networks["actor"]
    critic = networks["critic"]
    alpha = log_alpha.exp()[:, None]  # (task, 1)
    last_obs = drawn.obs[:, :, -1]  # (task, episode, 39)
    actions, log_probs = draw_actions(*policy(actor, last_obs))
    tail = q_values(critic, last_obs, actions).amin(0) - alpha * log_probs
    tail = tail * args.bootstrap_at_truncation
    bonuses = -alpha[:, None] * drawn.log_probs
    returns = soft_returns(drawn.rewards, bonuses, tail, args.gamma)
    chosen = slice(0, EPISODE_STEPS, CRITIC_ERROR_STRIDE)
    obs = drawn.obs[:, :, chosen].flatten(1, 2)  # (task, episode * step, 39)
    actions = drawn.actions[:, :, chosen].flatten(1, 2)
    returns = returns[:, :, chosen].flatten(1, 2)
    values = q_values(critic, obs, actions).amin(0)  # (task, episode * step)
    errors = (values - returns).square().mean(1) / returns.square().mean(1)  # (task,)
    return errors.mean().item()


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
        log_std_entries = log_std - log_std.detach() + math.log(2)
        return torch.cat([mean_entries, log_std_entries], dim=-1)

    return plasticity.fisher_trace(actor, entries, actor.masks)


def measure_networks(networks: dict, batch: Transitions, args: Args) -> dict:
    """Dormant ratio (over all hidden layers, the twins pooled) and effective rank (of the last one,
    the twins' mean) of actor and critics, Fisher trace of the actor."""
    metrics = {}
    pairs = torch.cat([batch.obs, batch.actions], dim=-1)
    inputs = {"actor": batch.obs, "critic": pairs}
    for name, x in inputs.items():
        with torch.no_grad():
            hidden, _ = networks[name].activations(x)
        alive = plasticity.alive_neurons(networks[name])
        dormant = plasticity.dormant_ratio(hidden, args.dormant_tau, alive)
        metrics[f"plasticity/{name}_dormant_ratio"] = dormant
        last = hidden[-1]  # (copy, task * batch, 400)
        ranks = [plasticity.effective_rank(x, args.srank_delta) for x in last]
        metrics[f"plasticity/{name}_effective_rank"] = sum(ranks) / len(ranks)
    fisher_trace = squashed_fisher_trace(networks["actor"], batch.obs)
    return metrics | {"plasticity/fisher_trace": fisher_trace}


def require(args: Args, names: str, allowed, what: str):
    """Raise ValueError for the first of these arguments that is not allowed."""
    for name in names.split():
        value = getattr(args, name)
        if not allowed(value):
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be {what}")


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
