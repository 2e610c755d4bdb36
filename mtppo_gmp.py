# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["torch==2.13.0", "gymnasium==1.4.0", "minigrid==3.2.0", "numpy==2.4.6",
#                 "tyro>=1.0", "tensorboard>=2.20", "tqdm>=4.67", "filelock>=3.20"]
# ///
"""Multi-task PPO with gradual magnitude pruning (GMP) on MiniGrid.

One shared convolutional trunk and one head per task, for the actor and for the critic, pruned
to 95 % during training (arXiv 2508.06871, section 4, MTPPO; networks and training loop of
MOORE, arXiv 2311.11385). A grid world's views repeat, and policy and value depend on the task
and the view alone: networks see each distinct view once, and samples look its output up.

    python mtppo_gmp.py --benchmark MT5 --seed 1

Read this script first. mtppo_set.py trains the same networks with SET instead; ReDo, Reset and
PCGrad are here alone.
"""

import argparse
import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from shlex import quote
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from filelock import FileLock
from gymnasium.wrappers import RecordEpisodeStatistics
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
    """Multi-task PPO with gradual magnitude pruning on MiniGrid."""

    # Tasks
    benchmark: Literal["MT3", "MT5", "MT7"] = "MT5"  # set of tasks to train on
    env_ids: tuple[str, ...] = ()  # Gymnasium ids instead of a benchmark (one: single-task PPO)
    seed: int = 1  # seed of the networks, the environments and every draw
    total_timesteps: int = 400_000  # environment steps per task

    # PPO
    num_steps: int = 2000  # timesteps of a rollout, per task and iteration
    actor_lr: float = 1e-3  # learning rate of the actor's Adam
    critic_lr: float = 1e-3  # learning rate of the critic's Adam
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # lambda of advantage estimation (Schulman et al. 2016)
    clip_coef: float = 0.2  # clipping range of the probability ratio
    ent_coef: float = 0.01  # coefficient of the entropy bonus
    update_epochs: int = 8  # epochs of the actor over each rollout
    minibatch_size: int = 256  # samples per task in a minibatch of the actor
    critic_epochs: int = 1  # epochs of the critic over each rollout
    critic_minibatch_size: int = 2000  # samples per task in a minibatch of the critic

    # Gradual magnitude pruning
    sparsity: float = 0.95  # share of pruned weights (0: the dense baseline)
    prune_start: float = 0.05  # share of training after which pruning begins
    prune_end: float = 0.80  # share of training after which the final sparsity holds
    prune_frequency: int = 500  # timesteps between two mask updates
    prune_scope: Literal["layer", "global"] = "global"  # rank weights per layer or per network

    # Methods to compare with
    weight_decay: float = 0.0  # L2 coefficient of Adam
    layer_norm: bool = False  # normalise each hidden layer before its nonlinearity, no gain or bias
    redo_frequency: int = 0  # timesteps between two uses of ReDo, Sokar et al. 2023 (0: off)
    redo_tau: float = 0.001  # score up to which ReDo recycles a neuron
    reset_frequency: int = 0  # timesteps between output resets, Nikishin et al. 2022 (0: off)
    max_resets: int = 2  # resets in a run at the most
    pcgrad: bool = False  # project conflicting task gradients (Yu et al. 2020)

    # Evaluation and plasticity metrics
    eval_frequency: int = 10_000  # timesteps between two evaluations
    eval_episodes: int = 25  # episodes per task in an evaluation
    plasticity_frequency: int = 10_000  # timesteps between two measurements of plasticity
    plasticity_batch_size: int = 1024  # observations they use, the same number per task, rounded up
    plasticity_buffer_size: int = 100_000  # latest observations to draw them from, over all tasks
    dormant_tau: float = 0.001  # score up to which a neuron is dormant (Sokar et al. 2023)
    srank_delta: float = 0.01  # singular values' share left out of the rank (Kumar et al. 2021)

    # Run
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where to compute (auto: cuda if there is one)
    run_dir: str | None = None  # log and checkpoint (default: runs/<benchmark>__<script>__...)
    checkpoint_frequency: int = 10_000  # timesteps between two checkpoints
    resume: str | None = None  # run folder to go on with; its flags are the defaults
    num_threads: int = 1  # torch threads

    def __post_init__(self):
        require(self, "actor_lr critic_lr clip_coef", lambda x: 0 < x < math.inf, "positive")
        require(self, "ent_coef weight_decay redo_tau max_resets", lambda x: x >= 0, "at least 0")
        require(self, "gamma gae_lambda", lambda x: 0 <= x <= 1, "in [0, 1]")
        require(self, "prune_end", lambda x: 0 < x <= 1, "in (0, 1]")
        below_end = f"in [0, --prune-end {self.prune_end})"
        require(self, "prune_start", lambda x: 0 <= x < self.prune_end, below_end)
        a_rollout = f"at least --num-steps {self.num_steps}"
        require(self, "total_timesteps", lambda x: x >= self.num_steps, a_rollout)
        periods = "redo_frequency reset_frequency"
        require(self, periods, lambda x: x == 0 or x >= self.num_steps, f"0 or {a_rollout}")
        num_tasks = len(task_ids(self))
        require(self, "plasticity_buffer_size", lambda x: x >= num_tasks, "at least 1 per task")
        counts = "num_steps update_epochs minibatch_size critic_epochs critic_minibatch_size"
        require(self, f"{counts} prune_frequency", lambda x: x >= 1, "at least 1")
        require(self, "env_ids", lambda x: len({*x}) == len(x), "different tasks")
        check_tasks(self.env_ids)
        check_run(self)


# Networks


class BatchedLinear(nn.Module):
    """One linear layer per task: (task, batch, in) -> (task, batch, out)."""

    def __init__(self, num_tasks: int, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_tasks, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_tasks, 1, out_features))
        self.bound = in_features**-0.5  # torch's own for a linear layer
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -self.bound, self.bound)

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight.mT)


class MultiHeadNetwork(nn.Module):
    """Shared convolutional trunk and one head per task (MTPPO, section 4), with its masks."""

    def __init__(self, obs_shape, num_tasks: int, num_outputs: int, args: Args):
        super().__init__()
        height, width, channels = obs_shape
        self.conv1 = nn.Conv2d(channels, 16, 2)
        self.conv2 = nn.Conv2d(16, 32, 2)
        self.conv3 = nn.Conv2d(32, 64, 2)
        self.head_hidden = BatchedLinear(num_tasks, (height - 3) * (width - 3) * 64, 128)
        self.head_output = BatchedLinear(num_tasks, 128, num_outputs)
        self.layer_norm = args.layer_norm
        # Each layer, in order, and how many layers of one shape it batches
        self.layers = dict(conv1=1, conv2=1, conv3=1, head_hidden=num_tasks, head_output=num_tasks)
        self.masks = {}  # layer -> zeros and ones in its weight's shape; empty: dense

    def activations(self, obs: Tensor, counts: list[int]) -> tuple[list[Tensor], Tensor, Tensor]:
        """obs (N, h, w, c), counts[0] of the first task, counts[1] of the second, ... -> what each
        hidden layer puts out, the convolutions' (N, C, h', w') and the heads' (task, max(counts),
        128), each task's rows, then padding; the shared features (N, D); the output (N, output).
        """
        x = obs.permute(0, 3, 1, 2).float()  # (N, c, h, w), channels last in memory
        conv1 = F.relu(self.normalise(self.conv1(x)))
        conv2 = F.relu(self.normalise(self.conv2(conv1)))
        conv3 = F.tanh(self.normalise(self.conv3(conv2)))
        features = conv3.permute(0, 2, 3, 1).flatten(1)  # (N, D), place by place
        by_task = pad_sequence(features.split(counts), batch_first=True)  # (task, max(counts), D)
        hidden = self.head_hidden(by_task)
        hidden = F.tanh(F.layer_norm(hidden, hidden.shape[-1:]) if self.layer_norm else hidden)
        output = self.head_output(hidden)
        output = torch.cat([rows[:count] for rows, count in zip(output, counts, strict=True)])
        return [conv1, conv2, conv3, hidden], features, output

    def normalise(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[1:]) if self.layer_norm else x

    def forward(self, obs: Tensor, counts: list[int]) -> Tensor:
        return self.activations(obs, counts)[-1]

    def get_extra_state(self) -> dict[str, Tensor]:  # makes the masks part of state_dict
        return self.masks

    def set_extra_state(self, state: dict[str, Tensor]) -> None:
        device = next(self.parameters()).device
        self.masks = {layer: mask.to(device) for layer, mask in state.items()}


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
    """Update the network's masks to the asked sparsity by magnitude, and apply them.

    scope "layer" ranks the weights of each layer apart, "global" those of the whole network. What
    was pruned ranks last: while sparsity grows, it stays so. Needs network.layers, {name: how
    many layers of one shape its weight stacks, 1 for a plain one}, and network.masks, {} at first,
    {name: zeros and ones in its weight's shape} then. apply_masks must follow every optimiser step.
    """
    weights = {name: network.get_submodule(name).weight for name in network.layers}
    scores = {name: weight.abs() for name, weight in weights.items()}
    for name, mask in network.masks.items():
        scores[name] = torch.where(mask > 0, scores[name], -1.0)
    if scope == "layer":
        for name, weight in weights.items():
            rows = scores[name].reshape(network.layers[name], -1)  # (layer, its weights)
            keep = rows.shape[1] - round(sparsity * rows.shape[1])
            if keep == 0:
                raise ValueError(f"leaves none of the {rows.shape[1]} weights of a {name}")
            network.masks[name] = keep_largest(rows, keep).view_as(weight)
    elif scope == "global":
        row = torch.cat([score.flatten() for score in scores.values()])
        keep = len(row) - round(sparsity * len(row))
        if keep < sum(network.layers.values()):
            raise ValueError(f"leaves {keep} weights, fewer than layers")
        mask = keep_largest(row[None], keep)[0]
        parts = mask.split([weight.numel() for weight in weights.values()])
        for (name, weight), part in zip(weights.items(), parts, strict=True):
            network.masks[name] = part.view_as(weight)
    else:
        raise ValueError(f"scope: layer or global, not {scope}")
    apply_masks(network)


@torch.no_grad()
def apply_masks(network: nn.Module) -> None:
    """Set the pruned weights to zero. To be called after every optimiser step, which moves them."""
    for name, mask in network.masks.items():
        network.get_submodule(name).weight.mul_(mask)


def update_masks(networks: dict, args: Args, last_timestep: int, timestep: int) -> bool:
    """Prune the networks to a timestep's sparsity if it is one to update masks at; True if so."""
    progress = timestep / last_timestep
    sparsity = gmp_sparsity(progress, args.prune_start, args.prune_end, args.sparsity)
    is_due = timestep % args.prune_frequency == 0 or timestep == last_timestep
    if sparsity == 0 or not is_due:
        return False
    for network in networks.values():
        prune(network, sparsity, args.prune_scope)
    return True


# Interventions: ReDo, Reset, PCGrad


def clear_state(optimizer, parameter: Tensor, where: Tensor) -> None:
    """Set to zero what the optimiser remembers (moments, momentum) of some of a parameter's
    entries; where: bool, in its shape or broadcast to it."""
    for remembered in optimizer.state.get(parameter, {}).values():
        if isinstance(remembered, Tensor) and remembered.shape == parameter.shape:
            remembered.masked_fill_(where, 0.0)


@torch.no_grad()
def draw_parameters(weight: Tensor, bias: Tensor) -> None:
    """Fill a layer's weight and bias with draws from torch's default distribution for it."""
    fan_in = weight[0].numel() if weight.dim() == 4 else weight.shape[-1]
    for tensor in (weight, bias):
        tensor.uniform_(-(fan_in**-0.5), fan_in**-0.5)


@torch.no_grad()
def redo(network: nn.Module, optimizer, obs: Tensor, tau: float) -> None:
    """Recycle dormant neurons: incoming weights and bias drawn anew, outgoing weights zero, the
    optimiser's moments of all of them cleared (Sokar et al. 2023, algorithm 1).

    obs (task, batch, h, w, c): what dormancy is measured on, a head's on its own task's.
    """
    layers = [network.get_submodule(name) for name in network.layers]
    hidden, _, _ = network.activations(obs.flatten(0, 1), [obs.shape[1]] * len(obs))
    alive = plasticity.alive_neurons(network)
    for layer, following, h, a in zip(layers[:-1], layers[1:], hidden, alive, strict=True):
        if h.dim() == 4:  # a convolution: dormant (C,)
            dormant = a & (plasticity.dormant_scores(h, a) <= tau)
            incoming, in_bias = dormant[:, None, None, None], dormant
            if following.weight.dim() == 4:
                outgoing = dormant[:, None, None]
            else:  # its features lie place by place
                outgoing = dormant.repeat(h.shape[2] * h.shape[3])
        else:  # heads: dormant (task, H)
            scores = torch.stack(
                [plasticity.dormant_scores(*task) for task in zip(h, a, strict=True)]
            )
            dormant = a & (scores <= tau)
            incoming, in_bias, outgoing = dormant[:, :, None], dormant[:, None], dormant[:, None]
        weight, bias = torch.empty_like(layer.weight), torch.empty_like(layer.bias)
        draw_parameters(weight, bias)
        for parameter, where, values in (
            (layer.weight, incoming, weight),
            (layer.bias, in_bias, bias),
            (following.weight, outgoing, torch.zeros_like(following.weight)),
        ):
            parameter.copy_(torch.where(where, values, parameter))
            clear_state(optimizer, parameter, where)
    apply_masks(network)


def reset_output(network: nn.Module, optimizer) -> None:
    """Draw every head's output layer anew and drop its optimiser state (Nikishin et al. 2022)."""
    layer = network.head_output
    draw_parameters(layer.weight, layer.bias)
    for parameter in layer.parameters():
        optimizer.state.pop(parameter, None)
    apply_masks(network)


def project_conflicts(gradients: Tensor) -> Tensor:
    """PCGrad: each task's gradient less its conflicts with the others', met in random order;
    gradients (task, P) -> (task, P). Source: Yu et al. 2020, algorithm 1."""
    num_tasks = len(gradients)
    order = torch.rand(num_tasks, num_tasks, device=gradients.device).argsort(1)
    itself = torch.arange(num_tasks, device=gradients.device)
    squared_norms = gradients.square().sum(1).clamp_min(1e-12)
    projected = gradients.clone()
    for other in order.unbind(1):  # (task,) the task that each one meets
        conflict = (projected * gradients[other]).sum(1).clamp(max=0) * (other != itself)
        projected -= (conflict / squared_norms[other])[:, None] * gradients[other]
    return projected


def pcgrad_backward(losses: Tensor, network: nn.Module) -> None:
    """Gradients of the mean of losses (task,), the trunk's after the projection of each task's."""
    losses.mean().backward(retain_graph=True)
    trunk = [layer for layer in network.layers if layer.startswith("conv")]
    parameters = [p for layer in trunk for p in network.get_submodule(layer).parameters()]
    masks = {network.get_submodule(name).weight: mask for name, mask in network.masks.items()}
    rows = []
    for loss in losses:  # pruned weights take no part
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        pairs = zip(gradients, parameters, strict=True)
        rows.append(torch.cat([(g * masks.get(p, 1.0)).flatten() for g, p in pairs]))
    mean = project_conflicts(torch.stack(rows)).mean(0)
    for p, part in zip(parameters, mean.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p)


# Acting


class PolicyTable:
    """The policy's log-probs on the host, computed once for each distinct view of each task."""

    def __init__(self, actor: nn.Module, num_tasks: int, device: str):
        self.actor, self.device = actor, device
        self.numbers = [{} for _ in range(num_tasks)]  # of each task: bytes of a view -> its number
        self.views = [[] for _ in range(num_tasks)]  # of each task, by number: arrays (h, w, c)
        self.log_probs = [[] for _ in range(num_tasks)]  # of the first of them: arrays (action,)

    def number(self, task: int, view: np.ndarray) -> int:
        """The number of a view among its task's, in the order in which they came."""
        number = self.numbers[task].setdefault(view.tobytes(), len(self.views[task]))
        if number == len(self.views[task]):
            self.views[task].append(view)
        return number

    @torch.no_grad()
    def look_up(self, tasks: list[int], numbers: list[int]) -> np.ndarray:
        """Log-probs (sample, action) of views of these tasks; the actor is run on all new ones."""
        if any(n >= len(self.log_probs[i]) for i, n in zip(tasks, numbers, strict=True)):
            pairs = zip(self.views, self.log_probs, strict=True)
            views, counts = to_batch([own[len(known) :] for own, known in pairs], self.device)
            new = F.log_softmax(self.actor(views, counts), dim=-1)
            new = new.cpu().split(counts)  # all that leaves the device
            for known, rows in zip(self.log_probs, new, strict=True):
                known.extend(rows.numpy())
        return np.stack([self.log_probs[i][n] for i, n in zip(tasks, numbers, strict=True)])

    def forget(self) -> None:
        """To be called when the actor has changed."""
        self.log_probs = [[] for _ in self.views]


def to_device(array: np.ndarray, device: str) -> Tensor:
    """The array on the device, without waiting for it; on the CPU in the same memory."""
    return torch.from_numpy(array).to(device, non_blocking=True)


def to_batch(views: list[list[np.ndarray]], device: str) -> tuple[Tensor, list[int]]:
    """Each task's views (h, w, c) as one batch (N, h, w, c), task by task; how many of each."""
    batch = np.stack([view for own in views for view in own])
    return to_device(batch, device), [len(own) for own in views]


class Rollout(NamedTuple):
    """The transitions of one iteration."""

    views: Tensor  # (N, h, w, c), each distinct view of the first task, the second, ...
    counts: list[int]  # how many are each task's
    view: np.ndarray  # int64 (task, num_steps) on the host, which view each step began with
    next_view: np.ndarray  # the same, which view it led to, also where the episode ended there
    action: Tensor  # int64 (task, num_steps) on the device, as are those below
    log_prob: Tensor  # of the behaviour policy, when it acted
    reward: Tensor
    terminated: Tensor  # bool
    done: Tensor  # bool, terminated or truncated


def collect(envs: list, actor, seeds: list[int], num_steps: int, device, timestep=0, renew=None):
    """Play num_steps steps in each of envs, one per task, from a reset with its seed on. Returns
    the rollout, and (return, length) of each task's episodes that ended. renew(timestep) follows
    each step but the last, and is True if it changed the actor; timestep: that of the reset."""
    num_tasks, shape = len(envs), (len(envs), num_steps)
    policy = PolicyTable(actor, num_tasks, device)
    noise = np.random.gumbel(size=(num_steps, num_tasks, envs[0].action_space.n))
    view, next_view, action = np.zeros((3, *shape), np.int64)
    log_prob, reward = np.zeros((2, *shape), np.float32)
    terminated, done = np.zeros((2, *shape), bool)
    episodes = [[] for _ in envs]
    tasks = range(num_tasks)
    now = [policy.number(i, envs[i].reset(seed=seeds[i])[0]) for i in tasks]
    for step in range(num_steps):
        # Gumbel-max: the argmax of log p + Gumbel noise is a draw from p
        log_probs = policy.look_up(tasks, now)  # (task, action)
        actions = (log_probs + noise[step]).argmax(1)
        view[:, step], action[:, step], log_prob[:, step] = now, actions, log_probs[tasks, actions]
        for i, chosen in enumerate(actions.tolist()):
            obs, reward[i, step], terminated[i, step], truncated, info = envs[i].step(chosen)
            next_view[i, step] = now[i] = policy.number(i, obs)
            done[i, step] = terminated[i, step] or truncated
            if done[i, step]:
                episodes[i].append((info["episode"]["r"], info["episode"]["l"]))
                now[i] = policy.number(i, envs[i].reset()[0])
        if renew is not None and step + 1 < num_steps:
            if renew(timestep + step + 1):
                policy.forget()
    views, counts = to_batch(policy.views, device)
    first = np.cumsum([0, *counts[:-1]])[:, None]  # place of each task's first view
    on_device = [to_device(x, device) for x in (action, log_prob, reward, terminated, done)]
    return Rollout(views, counts, view + first, next_view + first, *on_device), episodes


# PPO


def gae(rollout: Rollout, values: Tensor, next_values, gamma: float, gae_lambda: float) -> Tensor:
    """Generalised advantage estimates (Schulman et al. 2016, equation 16); all (task, num_steps).
    A termination does not bootstrap from next_values, a truncation and the rollout's end do; no
    estimate reaches over the end of an episode."""
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
    table = critic(rollout.views, rollout.counts).squeeze(-1)  # (N,), the value of each view
    values, next_values = (
        table[to_device(view, table.device)] for view in (rollout.view, rollout.next_view)
    )
    advantages = gae(rollout, values, next_values, args.gamma, args.gae_lambda)
    returns = advantages + values
    explained_variance = 1 - advantages.var() / returns.var()
    advantages = advantages - advantages.mean(1, keepdim=True)
    advantages /= advantages.std(1, correction=0, keepdim=True) + 1e-8
    return advantages, returns, explained_variance


def minibatches(rollout: Rollout, size: int):
    """Cut each task's steps, in an order of its own, into minibatches of at most size: the steps
    (task, batch), the distinct views they began with (n, h, w, c), how many of these are each
    task's, and which of them each step began with, (task, batch). All is worked out on the host,
    so that nothing waits for the device."""
    device, num_tasks = rollout.views.device, len(rollout.counts)
    task_of_view = np.repeat(np.arange(num_tasks), rollout.counts)
    order = np.random.random(rollout.view.shape).argsort(1)
    for start in range(0, order.shape[1], size):
        steps = order[:, start : start + size]
        view = np.take_along_axis(rollout.view, steps, 1)
        distinct, place = np.unique(view, return_inverse=True)  # in order, so task by task
        counts = np.bincount(task_of_view[distinct], minlength=num_tasks).tolist()
        steps, distinct, place = (to_device(x, device) for x in (steps, distinct, place))
        yield steps, rollout.views[distinct], counts, place.view_as(steps)


def actor_losses(logits, actions, old_log_probs, advantages, clip_coef: float, ent_coef: float):
    """Clipped surrogate with entropy bonus (Schulman et al. 2017, equations 7 and 9): logits (task,
    batch, action), the rest (task, batch) -> the losses (task,) and what to log."""
    log_probs = F.log_softmax(logits, dim=-1)
    log_ratio = log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1) - old_log_probs
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    logged = {
        "policy_loss": -surrogate.mean(),
        "entropy": entropy.mean(),
        "approx_kl": (ratio - 1 - log_ratio).mean(),
        "clipfrac": ((ratio - 1).abs() > clip_coef).float().mean(),
    }
    losses = -(surrogate + ent_coef * entropy).mean(1)
    return losses, {name: value.detach() for name, value in logged.items()}


def descend(losses: Tensor, network: nn.Module, optimizer, backward) -> None:
    """One step down the gradient of the mean of losses (task,), or what backward makes of them."""
    optimizer.zero_grad()
    losses.mean().backward() if backward is None else backward(losses, network)
    optimizer.step()
    apply_masks(network)


def update_actor(actor, optimizer, rollout, advantages, args: Args, backward=None) -> dict:
    """Epochs of PPO on the actor; the means of what actor_losses logs."""
    logged = []
    for _ in range(args.update_epochs):
        for steps, views, counts, place in minibatches(rollout, args.minibatch_size):
            logits = actor(views, counts)[place]  # (task, batch, action)
            samples = (x.gather(1, steps) for x in (rollout.action, rollout.log_prob, advantages))
            losses, to_log = actor_losses(logits, *samples, args.clip_coef, args.ent_coef)
            descend(losses, actor, optimizer, backward)
            logged.append(to_log)
    return {name: torch.stack([entry[name] for entry in logged]).mean() for name in logged[0]}


def update_critic(critic, optimizer, rollout, returns, args: Args, backward=None) -> dict:
    """Epochs of regression of the critic on the returns; its mean squared error."""
    logged = []
    for _ in range(args.critic_epochs):
        for steps, views, counts, place in minibatches(rollout, args.critic_minibatch_size):
            values = critic(views, counts).squeeze(-1)[place]  # (task, batch)
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
    buffer = plasticity.ObservationBuffer(
        args.plasticity_buffer_size, num_tasks, space.shape, torch.uint8, device
    )
    metrics_size = math.ceil(args.plasticity_batch_size / num_tasks)  # per task
    name = "custom" if args.env_ids else args.benchmark
    parts = networks | {f"{name}_optimizer": o for name, o in optimizers.items()}
    run = Run(args, name, device, args.num_steps, parts | {"buffer": buffer})
    renew = partial(update_masks, networks, args, run.last_timestep)
    backward = pcgrad_backward if args.pcgrad else None

    while run.timestep < run.last_timestep:
        # Collect, with masks updated on the way
        env_seeds = seed_all(args.seed, TRAINING, run.timestep, num_tasks)
        rollout, episodes = collect(
            envs, actor, env_seeds, args.num_steps, device, run.timestep, renew
        )
        buffer.add(rollout.views[to_device(rollout.view, device)])
        run.timestep += args.num_steps

        # Update
        advantages, returns, explained_variance = estimate_advantages(critic, rollout, args)
        losses = update_critic(critic, optimizers["critic"], rollout, returns, args, backward)
        losses |= update_actor(actor, optimizers["actor"], rollout, advantages, args, backward)
        losses["explained_variance"] = explained_variance
        scalars = {f"losses/{name}": value.item() for name, value in losses.items()}
        check_finite(networks, run.timestep)
        renew(run.timestep)

        # Measure and evaluate
        scalars |= plasticity.measure_sparsity(networks)
        scalars |= tags("charts", summarize(tasks, episodes))
        if run.is_due(args.plasticity_frequency):
            seed_all(args.seed, METRICS, run.timestep)
            scalars |= measure_plasticity(networks, buffer.sample(metrics_size), args)
        if run.is_due(args.eval_frequency):
            env_seeds = seed_all(
                args.seed, EVALUATION, run.timestep, num_tasks * args.eval_episodes
            )
            run.evaluation = summarize(tasks, evaluate(actor, eval_envs, env_seeds, device))
            scalars |= tags("eval", run.evaluation)
            scores = run.evaluation["normalized_return"]
            scalars["eval/normalized_return"] = sum(scores.values()) / num_tasks

        # Intervene: after the evaluation of what was trained, before the next acting
        if run.timestep < run.last_timestep:
            seed_all(args.seed, INTERVENTIONS, run.timestep)
            if run.reached(args.redo_frequency):
                sample = buffer.sample(metrics_size)
                for name, network in networks.items():
                    redo(network, optimizers[name], sample, args.redo_tau)
            if run.reached(args.reset_frequency, args.max_resets):
                for name, network in networks.items():
                    reset_output(network, optimizers[name])

        run.end_iteration(scalars)
    return run.finish()


# ======== Support: what surrounds the algorithm ========


# Tasks and environments

# Return of the shortest path, 1 - 0.9 * optimal steps / max steps, of each task of MT7
BEST_RETURN = {
    "LavaGapS7": 1 - 0.9 * 8 / 196,
    "RedBlueDoors-6x6": 1 - 0.9 * 8 / 720,
    "MemoryS11": 1 - 0.9 * 15 / 605,
    "DoorKey-6x6": 1 - 0.9 * 11 / 360,
    "DistShift1": 1 - 0.9 * 11 / 252,
    "SimpleCrossingS9N2": 1 - 0.9 * 15 / 324,
    "MultiRoom-N2-S4": 1 - 0.9 * 5 / 40,
}
NUM_TASKS = {"MT3": 3, "MT5": 5, "MT7": 7}  # the first of them


def task_ids(args: Args) -> list[str]:
    """Gymnasium ids of the run's tasks."""
    tasks = list(BEST_RETURN)[: NUM_TASKS[args.benchmark]]
    return list(args.env_ids) or [f"MiniGrid-{task}-v0" for task in tasks]


VIEWS = {}  # (task, state of its grid) -> view


def remember_views(env: gym.Env) -> None:
    """Make a MiniGrid environment draw the view of each state of its grid once: that takes most of
    a step, and states come again and again. All environments of a task share what they remember."""
    game = env.unwrapped
    for method in ("gen_obs", "gen_obs_grid"):
        if getattr(type(game), method, None) is not getattr(MiniGridEnv, method):
            return  # it has views of its own
    draw = game.gen_obs

    def gen_obs():
        cells = [(0,) if cell is None else cell.encode() for cell in game.grid.grid]
        place = (game.grid.width, *game.agent_pos, game.agent_dir)
        carried = game.carrying and game.carrying.encode()
        state = (env.spec.id, place, carried, bytes(chain.from_iterable(cells)))
        if state not in VIEWS:
            if len(VIEWS) >= 50_000:  # about 50 MB
                VIEWS.clear()
            VIEWS[state] = draw()["image"]
        view = VIEWS[state].copy()
        return {"image": view, "direction": game.agent_dir, "mission": game.mission}

    game.gen_obs = gen_obs


def make_env(env_id: str) -> gym.Env:
    """A task seen as its partial (h, w, c) view of integer codes."""
    env = gym.make(env_id, disable_env_checker=True)
    remember_views(env)
    return RecordEpisodeStatistics(ImgObsWrapper(env))


def make_networks(args: Args, device="cpu") -> dict[str, nn.Module]:
    """Actor and critic of the run's tasks, drawn anew."""
    env_ids = task_ids(args)
    env = make_env(env_ids[0])
    outputs = {"actor": int(env.action_space.n), "critic": 1}
    shape = env.observation_space.shape
    networks = {name: MultiHeadNetwork(shape, len(env_ids), n, args) for name, n in outputs.items()}
    return {name: network.to(device) for name, network in networks.items()}


NETWORKS, TRAINING, EVALUATION, METRICS, INTERVENTIONS = range(5)


def seed_all(seed: int, purpose: int, timestep: int, num_envs: int = 0) -> list[int]:
    """Seed torch and NumPy for one purpose at one timestep; returns seeds for environments. So
    neither evaluation nor metrics disturb training, and a resumed run needs no generator's state.
    """
    seeds = np.random.SeedSequence((seed, purpose, timestep)).generate_state(1 + num_envs).tolist()
    torch.manual_seed(seeds[0])
    np.random.seed(seeds[0])
    return seeds[1:]


# Evaluation and metrics


def evaluate(actor: nn.Module, envs: list[list[gym.Env]], seeds: list[int], device) -> list[list]:
    """Play one episode in each of envs[task][episode] with actions drawn from the policy; returns
    (return, length) of each task's."""
    policy = PolicyTable(actor, len(envs), device)
    episodes = [[] for _ in envs]
    running = {}  # (task, episode) -> the number of its view
    for (i, j), seed in zip(np.ndindex(len(envs), len(envs[0])), seeds, strict=True):
        running[i, j] = policy.number(i, envs[i][j].reset(seed=seed)[0])
    while running:
        log_probs = policy.look_up([i for i, _ in running], list(running.values()))
        actions = (log_probs + np.random.gumbel(size=log_probs.shape)).argmax(1).tolist()
        for (i, j), action in zip(list(running), actions, strict=True):
            obs, _, terminated, truncated, info = envs[i][j].step(action)
            running[i, j] = policy.number(i, obs)
            if terminated or truncated:
                episodes[i].append((info["episode"]["r"], info["episode"]["l"]))
                del running[i, j]
    return episodes


def summarize(tasks: list[str], episodes: list[list]) -> dict[str, dict[str, float]]:
    """{what: {task: mean}} over the (return, length) of each task's episodes, if there are any."""
    means = {t: np.mean(e, axis=0).tolist() for t, e in zip(tasks, episodes, strict=True) if e}
    return {
        "normalized_return": {t: mean[0] / BEST_RETURN.get(t, 1.0) for t, mean in means.items()},
        "episodic_return": {t: mean[0] for t, mean in means.items()},
        "episodic_length": {t: mean[1] for t, mean in means.items()},
    }


def tags(group: str, summary: dict[str, dict[str, float]]) -> dict[str, float]:
    """A summary under its log tags."""
    return {f"{group}/{what}/{t}": x for what, xs in summary.items() for t, x in xs.items()}


def measure_plasticity(networks: dict[str, nn.Module], obs: Tensor, args: Args) -> dict[str, float]:
    """Dormant ratio and effective rank of actor and critic, Fisher trace of the actor, for obs
    (task, batch, h, w, c). A head's neurons see their own task's observations alone."""
    actor, metrics = networks["actor"], {}
    counts, obs = [obs.shape[1]] * len(obs), obs.flatten(0, 1)
    for name, network in networks.items():
        with torch.no_grad():
            hidden, features, _ = network.activations(obs, counts)
        alive = plasticity.alive_neurons(network)
        layers, alive = [*hidden[:-1], *hidden[-1]], [*alive[:-1], *alive[-1]]  # each head apart
        dormant = plasticity.dormant_ratio(layers, args.dormant_tau, alive)
        metrics[f"plasticity/{name}_dormant_ratio"] = dormant
        rank = plasticity.effective_rank(features, args.srank_delta)
        metrics[f"plasticity/{name}_effective_rank"] = rank
    log_probs = partial(policy_log_probs, actor, obs, counts)
    metrics["plasticity/fisher_trace"] = plasticity.fisher_trace(actor, log_probs, actor.masks)
    return metrics


def policy_log_probs(actor: nn.Module, obs: Tensor, counts: list[int]) -> Tensor:
    """Of all actions (N, action), for obs (N, h, w, c)."""
    return F.log_softmax(actor(obs, counts), dim=-1)


# Checks of the arguments


def require(args: Args, names: str, allowed, what: str) -> None:
    """Raise ValueError for the first of these arguments that is not allowed."""
    for name in names.split():
        value = getattr(args, name)
        if not allowed(value):
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be {what}")


def check_tasks(env_ids: tuple[str, ...]) -> None:
    """Raise ValueError for a task that no run can have."""
    spaces = []
    for env_id in env_ids:
        try:
            env = make_env(env_id)
            env.reset(seed=0)  # some find here alone that they cannot
        except Exception as error:  # an environment may raise anything
            raise ValueError(f"--env-ids {env_id}: {type(error).__name__}: {error}") from error
        view, actions = env.observation_space, env.action_space
        spaces.append((view, actions))
        is_image = np.issubdtype(view.dtype, np.integer) and len(view.shape) == 3
        if not (is_image and min(view.shape[:2]) > 3 and isinstance(actions, gym.spaces.Discrete)):
            what = "discrete actions and an integer image (h, w, c) of 4 x 4 or more"
            raise ValueError(f"--env-ids {env_id}: must have {what}, not {actions}, {view}")
        if spaces[-1] != spaces[0]:
            raise ValueError(f"--env-ids {env_id}: {spaces[-1]} must equal the first's {spaces[0]}")


def check_run(args: Args) -> None:
    """Raise ValueError for an argument that no script can have."""
    require(args, "sparsity srank_delta", lambda x: 0 <= x < 1, "in [0, 1)")
    require(args, "seed dormant_tau", lambda x: 0 <= x < math.inf, "at least 0")
    counts = "eval_frequency eval_episodes plasticity_frequency plasticity_batch_size"
    require(args, f"{counts} checkpoint_frequency num_threads", lambda x: x >= 1, "at least 1")
    require(args, "device", lambda x: x != "cuda" or torch.cuda.is_available(), "auto or cpu here")
    if args.resume is not None:
        load_checkpoint(args.resume)
    elif args.run_dir is not None:
        is_new = not (Path(args.run_dir) / "checkpoint.pt").exists()
        require(args, "run_dir", lambda _: is_new, "a folder without a run, to go on: --resume")


# Run folder


def load_checkpoint(run_dir: str) -> dict:
    """The checkpoint of a run of this script. Raises ValueError for a folder of anything else."""
    path = Path(run_dir) / "checkpoint.pt"
    if not path.is_file():
        raise ValueError(f"--resume {run_dir}: must be the folder of a run, with a checkpoint.pt")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    of_script = checkpoint["script"], checkpoint["args"].keys()
    if of_script != (Path(__file__).stem, Args.__dataclass_fields__.keys()):
        raise ValueError(f"--resume {run_dir}: must be a run of this version of {Path(__file__)}")
    return checkpoint


def load_agent(run_dir: str) -> tuple[nn.Module, Args, list[str]]:
    """The actor of a run, on the CPU and without gradients, its arguments and its tasks."""
    checkpoint = load_checkpoint(run_dir)
    args = Args(**checkpoint["args"])
    actor = make_networks(args)["actor"]
    actor.load_state_dict(checkpoint["actor"])
    return actor.eval().requires_grad_(False), args, task_ids(args)


def check_finite(networks: dict[str, nn.Module], timestep: int) -> None:
    """Raise FloatingPointError where training has diverged."""
    for name, network in networks.items():
        if not all(parameter.isfinite().all() for parameter in network.parameters()):
            raise FloatingPointError(
                f"timestep {timestep}: a parameter of the {name} is not finite"
            )


class Run:
    """A run's folder with its log and its checkpoint, its timestep and its progress bar."""

    def __init__(self, args: Args, name: str, device: str, stride: int, parts: dict):
        """name: of the default folder; stride: timesteps of an iteration; parts: what a checkpoint
        holds, by name, each with state_dict and load_state_dict."""
        self.args, self.stride, self.parts = args, stride, parts
        self.timestep, self.evaluation = 0, {}  # {what: {task: value}}, the latest
        self.last_timestep = args.total_timesteps // stride * stride
        script = Path(__file__).stem
        default = f"runs/{name}__{script}__{args.seed}__{time.time_ns() // 10**6}"
        self.folder = Path(args.resume or args.run_dir or default)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.folder / "lock")  # the system frees it, however the run ends
        self.lock.acquire(timeout=0)
        if args.resume is None:
            self.save()
        else:
            self.load()
        # Logs are read in the order of their names, which begin with the clock's time
        for i, file in enumerate(sorted(self.folder.glob("events.*"))):
            file.rename(self.folder / f"events.out.tfevents.{i:010d}")
        self.writer = SummaryWriter(str(self.folder), purge_step=self.timestep + 1)
        rows = "".join(f"|{name}|{value}|\n" for name, value in asdict(args).items())
        self.writer.add_text("args", "|argument|value|\n|-|-|\n" + rows, self.timestep)
        print(f"{self.folder}: timesteps {self.timestep} to {self.last_timestep} on {device}")
        print(f"to go on after a stop: python {script}.py --resume {quote(str(self.folder))}")
        seconds = 0.1 if sys.stderr.isatty() else 60  # between two lines of the bar
        bar = dict(total=self.last_timestep, initial=self.timestep, unit=" timesteps")
        self.bar = tqdm(**bar, mininterval=seconds)

    def reached(self, frequency: int, times: float = math.inf) -> bool:
        """Whether this iteration came to one of the first times multiples of frequency (0: off)."""
        multiples = self.timestep // frequency if frequency else 0
        return 0 < multiples <= times and self.timestep % frequency < self.stride

    def is_due(self, frequency: int) -> bool:
        """Whether it did, or is the run's last one."""
        return self.reached(frequency) or self.timestep == self.last_timestep

    def end_iteration(self, scalars: dict[str, float]) -> None:
        """Log, show how the run goes, and save a checkpoint if it is time to."""
        bar = self.bar.format_dict
        scalars["charts/SPS"] = (self.timestep - bar["initial"]) / bar["elapsed"]
        for tag, value in scalars.items():
            self.writer.add_scalar(tag, value, self.timestep)
        for tag in scalars.keys() & {"eval/normalized_return", "eval/success_rate"}:
            self.bar.write(f"timestep {self.timestep}: {tag} {scalars[tag]:.3f}")
        returns = [x for tag, x in scalars.items() if tag.startswith("charts/episodic_return/")]
        self.bar.set_postfix_str(f"training return {np.mean(returns or math.nan):.3f}", False)
        self.bar.update(self.stride)
        if self.is_due(self.args.checkpoint_frequency):
            self.writer.flush()  # before the checkpoint, so that the log never lags behind it
            self.save()

    def save(self) -> None:
        """Write the checkpoint atomically: a reader finds the old one or the new one, whole."""
        state = {"script": Path(__file__).stem, "timestep": self.timestep}
        state |= {"args": asdict(self.args) | dict(resume=None, run_dir=None)}
        state |= {"evaluation": self.evaluation}
        state |= {name: part.state_dict() for name, part in self.parts.items()}
        with open(self.folder / "checkpoint.partial", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, self.folder / "checkpoint.pt")

    def load(self) -> None:
        """Go on from the checkpoint, and say which arguments have changed since."""
        state = load_checkpoint(self.folder)
        self.timestep, self.evaluation = state["timestep"], state["evaluation"]
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        for name, before in state["args"].items():
            now = getattr(self.args, name)
            if now != before and name not in ("resume", "run_dir"):
                print(f"--{name.replace('_', '-')} {now} from here on, {before} before")

    def finish(self) -> Path:
        """Print the last evaluation, a row per task and their mean. Returns the folder."""
        self.bar.close()
        self.writer.close()
        self.lock.release()
        values = np.array([list(column.values()) for column in self.evaluation.values()]).T
        tasks = [*next(iter(self.evaluation.values())), "mean"]
        print(f"{'task':26}" + "".join(f"{name.replace('_', ' '):>19}" for name in self.evaluation))
        for task, row in zip(tasks, [*values, values.mean(0)], strict=True):
            print(f"{task:26}" + "".join(f"{value:19.3f}" for value in row))
        print(f"finished: {self.folder}")
        return self.folder


def parse_args() -> Args:
    """The command line's arguments. With --resume, those of the run are the defaults."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume")
    run_dir = parser.parse_known_args()[0].resume
    try:
        own = load_checkpoint(run_dir)["args"] if run_dir else {}
    except ValueError as error:
        parser.error(str(error))
    return tyro.cli(Args, default=Args(**own))


if __name__ == "__main__":
    try:
        train(parse_args())
    except FloatingPointError as error:
        sys.exit(f"error: {error}")
