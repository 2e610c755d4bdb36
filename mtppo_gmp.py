# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["torch==2.13.0", "gymnasium==1.4.0", "minigrid==3.2.0", "numpy==2.4.6",
#                 "tyro>=1.0", "tensorboard>=2.20", "tqdm>=4.67"]
# ///
"""Multi-task PPO with gradual magnitude pruning (GMP) on MiniGrid.

One shared convolutional trunk and one head per task, for the actor and for the critic, pruned
to 95 % during training (arXiv 2508.06871, section 4, MTPPO; networks and training loop of
MOORE, arXiv 2311.11385). A grid world's views repeat, and policy and value depend on the task
and the view alone: networks see each distinct view once, and samples look its output up.

    python mtppo_gmp.py --benchmark MT5 --seed 1

Read this script first. mtppo_set.py has the same networks and rewires them instead; ReDo, Reset
and PCGrad are here alone.
"""

import copy
import io
import itertools
import math
import os
import platform
import shutil
import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Literal, NamedTuple, NoReturn

import gymnasium as gym
import minigrid  # noqa: F401 (registers the tasks)
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from gymnasium.wrappers import RecordEpisodeStatistics
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
    env_ids: tuple[str, ...] = ()  # MiniGrid ids instead of a benchmark (one: single-task PPO)
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
    prune_frequency: int = 500  # timesteps between two renewals of the masks
    prune_scope: Literal["layer", "global"] = "global"  # rank weights per layer or per network

    # Comparison arms
    weight_decay: float = 0.0  # L2 coefficient of Adam
    layer_norm: bool = False  # normalise each hidden layer before its nonlinearity, no gain or bias
    redo_frequency: int = 0  # timesteps between two recyclings by ReDo, Sokar et al. 2023 (0: off)
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
    resume: str | None = None  # run folder to go on with, with the run's own flags
    num_threads: int = 0  # torch threads (0: one on MiniGrid, torch's choice on Meta-World)


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
    """Renew the network's masks to the asked sparsity by magnitude, and apply them.

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
            rows = scores[name].view(network.layers[name], -1)  # (layer, its weights)
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


def renew_masks(networks: dict, args: Args, last_timestep: int, timestep: int, stride=1) -> bool:
    """Prune the networks to a timestep's sparsity if it is one to renew masks at; whether it is."""
    progress = timestep / last_timestep
    sparsity = gmp_sparsity(progress, args.prune_start, args.prune_end, args.sparsity)
    is_due = timestep % args.prune_frequency < stride or timestep == last_timestep
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


# PPO


class Rollout(NamedTuple):
    """The transitions of one iteration, on --device but for counts and index."""

    views: Tensor  # uint8 (N, h, w, c), each distinct view of the first task, the second, ...
    counts: list[int]  # how many are each task's, on the host
    index: np.ndarray  # int64 (task, num_steps), which view each step began with, on the host
    view: Tensor  # the same, as are the shapes below
    next_view: Tensor  # which view it led to, also where the episode ended there
    action: Tensor  # int64
    log_prob: Tensor  # of the behaviour policy, when it acted
    reward: Tensor
    terminated: Tensor  # bool
    done: Tensor  # bool, terminated or truncated


# What collect notes of a step, in this order
TRANSITION = [("view", "i8"), ("next_view", "i8"), ("action", "i8"), ("log_prob", "f4")]
TRANSITION += [("reward", "f4"), ("terminated", "?"), ("done", "?")]


def collect(envs: list[gym.Env], actor, seeds: list[int], num_steps: int, run, renew=None):
    """Fresh episodes in envs, one per task, seeded with seeds, for num_steps steps of each: the
    rollout, and (return, length) of each task's episodes that ended. renew(timestep), after each
    step but the last, says whether it changed the actor."""
    policy = PolicyTable(actor, len(envs), run.device)
    noise = np.random.gumbel(size=(num_steps, len(envs), envs[0].action_space.n))
    steps, episodes = [[] for _ in envs], [[] for _ in envs]  # of each task
    first = [env.reset(seed=seed)[0] for env, seed in zip(envs, seeds, strict=True)]
    now = [policy.number(i, obs) for i, obs in enumerate(first)]
    for step in range(num_steps):
        with run.timed("inference"):
            log_probs = policy.look_up(now)  # (task, action)
            # Gumbel-max: the argmax of log p + Gumbel noise is a draw from p
            actions = (log_probs + noise[step]).argmax(1).tolist()
        with run.timed("env"):
            for i, (env, action) in enumerate(zip(envs, actions, strict=True)):
                obs, reward, terminated, truncated, info = env.step(action)
                view, now[i], done = now[i], policy.number(i, obs), terminated or truncated
                log_prob = log_probs[i, action]
                steps[i].append((view, now[i], action, log_prob, reward, terminated, done))
                if done:
                    episodes[i].append((info["episode"]["r"], info["episode"]["l"]))
                    now[i] = policy.number(i, env.reset()[0])
        with run.timed("sparsify"):
            if renew and step + 1 < num_steps and renew(run.timestep + step + 1):
                policy.log_probs = None  # the actor has changed
    steps = np.array(steps, dtype=TRANSITION)  # (task, num_steps)
    order, views, counts = policy.by_task(0)
    rank = order.argsort()  # of each number among views
    for field in ("view", "next_view"):
        steps[field] = rank[steps[field]]
    fields = {field: to_device(steps[field].copy(), run.device) for field in steps.dtype.names}
    return Rollout(views, counts, index=steps["view"], **fields), episodes


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
    values, next_values = table[rollout.view], table[rollout.next_view]
    advantages = gae(rollout, values, next_values, args.gamma, args.gae_lambda)
    returns = advantages + values
    explained_variance = 1 - advantages.var() / returns.var()
    advantages = advantages - advantages.mean(1, keepdim=True)
    advantages /= advantages.std(1, correction=0, keepdim=True) + 1e-8
    return advantages, returns, explained_variance


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


def train(args: Args) -> None:
    """Train, evaluate and measure one run."""
    args = read_args(args)
    torch.set_num_threads(args.num_threads or 1)
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    env_ids, num_tasks = task_ids(args), len(task_ids(args))
    tasks = [env_id.removeprefix("MiniGrid-").removesuffix("-v0") for env_id in env_ids]
    envs = make_envs(env_ids)
    eval_envs = [[make_env(env_id) for _ in range(args.eval_episodes)] for env_id in env_ids]

    seed_all(args.seed, NETWORKS, 0)
    networks = make_networks(args, device)
    actor, critic = networks["actor"], networks["critic"]
    adam = partial(Adam, weight_decay=args.weight_decay, fused=True)
    optimizers = {
        "actor": adam(actor.parameters(), args.actor_lr),
        "critic": adam(critic.parameters(), args.critic_lr),
    }
    obs_shape = envs[0].observation_space.shape
    buffer = plasticity.ObservationBuffer(
        args.plasticity_buffer_size, num_tasks, obs_shape, torch.uint8, device
    )
    metrics_size = math.ceil(args.plasticity_batch_size / num_tasks)  # per task
    name = "custom" if args.env_ids else args.benchmark
    run = Run(args, name, device, args.num_steps, networks, optimizers, buffer=buffer)
    renew = partial(renew_masks, networks, args, run.last_timestep)
    backward = pcgrad_backward if args.pcgrad else None

    with run:
        while run.goes_on():
            # Collect, with masks renewed on the way
            env_seeds = seed_all(args.seed, TRAINING, run.timestep, num_tasks)
            rollout, episodes = collect(envs, actor, env_seeds, args.num_steps, run, renew)
            buffer.add(rollout.views[rollout.view])
            run.timestep += args.num_steps

            # Update
            with run.timed("update"):
                advantages, returns, explained_variance = estimate_advantages(critic, rollout, args)
                losses = update_critic(
                    critic, optimizers["critic"], rollout, returns, args, backward
                )
                losses |= update_actor(
                    actor, optimizers["actor"], rollout, advantages, args, backward
                )
                losses["explained_variance"] = explained_variance
                scalars = {f"losses/{name}": value.item() for name, value in losses.items()}
                run.check_finite(scalars)
            with run.timed("sparsify"):
                renew(run.timestep)

            # Measure and evaluate
            scalars |= plasticity.measure_sparsity(networks)
            scalars |= tags("charts", summarize(tasks, episodes))
            if run.is_due(args.plasticity_frequency):
                with run.timed("metrics"):
                    seed_all(args.seed, METRICS, run.timestep)
                    scalars |= measure_plasticity(networks, buffer.sample(metrics_size), args)
            if run.is_due(args.eval_frequency):
                with run.timed("eval"):
                    num_episodes = num_tasks * args.eval_episodes
                    env_seeds = seed_all(args.seed, EVALUATION, run.timestep, num_episodes)
                    run.evaluation = summarize(tasks, evaluate(actor, eval_envs, env_seeds, device))
                scalars |= tags("eval", run.evaluation)
                scores = run.evaluation["normalized_return"]
                scalars["eval/normalized_return"] = sum(scores.values()) / num_tasks

            # Intervene: after the evaluation of what was trained, before the next acting
            if run.timestep < run.last_timestep:
                seed_all(args.seed, INTERVENTIONS, run.timestep)
                with run.timed("sparsify"):
                    if run.reached(args.redo_frequency):
                        sample = buffer.sample(metrics_size)
                        for name, network in networks.items():
                            redo(network, optimizers[name], sample, args.redo_tau)
                    if run.reached(args.reset_frequency, args.max_resets):
                        for name, network in networks.items():
                            reset_output(network, optimizers[name])

            # Log and save
            run.end_iteration(scalars, num_tasks, "normalized_return", "normalized_return")
    if run.timestep == run.last_timestep:
        print_summary(tasks, run.evaluation, run.seconds)


# ======== Support: what surrounds the algorithm ========


# Tasks and environments

BENCHMARKS = {"MT3": ("LavaGapS7", "RedBlueDoors-6x6", "MemoryS11")}
BENCHMARKS["MT5"] = BENCHMARKS["MT3"] + ("DoorKey-6x6", "DistShift1")
BENCHMARKS["MT7"] = BENCHMARKS["MT5"] + ("SimpleCrossingS9N2", "MultiRoom-N2-S4")

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


def task_ids(args: Args) -> list[str]:
    """Gymnasium ids of the run's tasks."""
    return list(args.env_ids) or [f"MiniGrid-{name}-v0" for name in BENCHMARKS[args.benchmark]]


def make_env(env_id: str) -> gym.Env:
    """A MiniGrid task seen as its partial (h, w, 3) view of integer codes."""
    return RecordEpisodeStatistics(ImgObsWrapper(gym.make(env_id, disable_env_checker=True)))


def make_envs(env_ids: list[str]) -> list[gym.Env]:
    """One environment per task, all with the same spaces."""
    envs = []
    for env_id in env_ids:
        try:
            make_env(env_id).reset(seed=0)  # some find here alone that they cannot
            envs.append(make_env(env_id))
        except Exception as error:  # an environment may raise anything
            fail(f"--env-ids {env_id}: cannot be made ({type(error).__name__}: {error})")
    for env_id, env in zip(env_ids, envs, strict=True):
        for space in ("observation_space", "action_space"):
            given, first = getattr(env, space), getattr(envs[0], space)
            if given != first:
                fail(f"--env-ids {env_id}: {space} {given} must equal {env_ids[0]}'s {first}")
    return envs


def sparsify_or_fail(args: Args, sparsify, *inputs) -> None:
    """Call a sparsifier, and end the run before it begins where it cannot do the sparsity."""
    try:
        sparsify(*inputs)
    except ValueError as error:
        fail(f"--sparsity {args.sparsity}: {error}")


def make_networks(args: Args, device="cpu") -> dict[str, nn.Module]:
    """Actor and critic of the run's tasks, drawn anew."""
    env_ids = task_ids(args)
    env = make_env(env_ids[0])
    outputs = {"actor": int(env.action_space.n), "critic": 1}
    shape = env.observation_space.shape
    networks = {name: MultiHeadNetwork(shape, len(env_ids), n, args) for name, n in outputs.items()}
    for network in networks.values():
        trial = copy.deepcopy(network)
        sparsify_or_fail(args, prune, trial, args.sparsity, args.prune_scope)
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


def to_device(array: np.ndarray, device) -> Tensor:
    """The array on the device, without waiting for it; on the CPU in the same memory."""
    return torch.from_numpy(array).to(device, non_blocking=True)


class PolicyTable:
    """The policy's log-probs on the host, worked out once for each distinct view of each task."""

    def __init__(self, actor: nn.Module, num_tasks: int, device):
        self.actor, self.num_tasks, self.device = actor, num_tasks, device
        self.numbers = {}  # (task, bytes of the view) -> number, in the order in which they came
        self.tasks, self.views = [], []  # of each number
        self.log_probs = None  # (number, action) of the first numbers; None: the actor has changed

    def number(self, task: int, obs: np.ndarray) -> int:
        """The number of a task's view."""
        number = self.numbers.setdefault((task, obs.tobytes()), len(self.views))
        if number == len(self.views):
            self.tasks.append(task)
            self.views.append(obs.copy())
        return number

    def by_task(self, start: int) -> tuple[np.ndarray, Tensor, list[int]]:
        """The views from number start on: start + order are their numbers, task by task; the views
        in this order, on the device (N, h, w, c); how many are each task's."""
        tasks = np.array(self.tasks[start:])
        order = tasks.argsort(kind="stable")
        views = np.stack([self.views[start + i] for i in order])
        counts = np.bincount(tasks, minlength=self.num_tasks).tolist()
        return order, to_device(views, self.device), counts

    @torch.no_grad()
    def look_up(self, numbers: list[int]) -> np.ndarray:
        """Log-probs (sample, action) of these views; the actor sees those that it has not seen."""
        known = 0 if self.log_probs is None else len(self.log_probs)
        if max(numbers) >= known:
            order, obs, counts = self.by_task(known)
            new = F.log_softmax(self.actor(obs, counts), dim=-1)
            new = new.cpu().numpy()[order.argsort()]  # all that leaves the device
            self.log_probs = np.concatenate([self.log_probs, new]) if known else new
        return self.log_probs[numbers]


def minibatches(rollout: Rollout, size: int):
    """Cut each task's steps, in an order of its own, into minibatches of at most size: the steps
    (task, batch), the distinct views they began with (n, h, w, c), how many of these are each
    task's, and which of them each step began with, (task, batch). All is worked out on the host,
    so that nothing waits for the device."""
    device, num_tasks = rollout.views.device, len(rollout.counts)
    task_of_view = np.repeat(np.arange(num_tasks), rollout.counts)
    order = np.random.random(rollout.index.shape).argsort(1)
    for start in range(0, order.shape[1], size):
        steps = order[:, start : start + size]
        index = np.take_along_axis(rollout.index, steps, 1)
        distinct, place = np.unique(index, return_inverse=True)  # in order, so task by task
        counts = np.bincount(task_of_view[distinct], minlength=num_tasks).tolist()
        steps, distinct, place = (to_device(x, device) for x in (steps, distinct, place))
        yield steps, rollout.views[distinct], counts, place.view_as(steps)


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
        log_probs = policy.look_up(list(running.values()))
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


def measure_plasticity(networks: dict[str, nn.Module], obs: Tensor, args: Args) -> dict:
    """Dormant ratio and effective rank of actor and critic, Fisher trace of the actor, for obs
    (task, batch, h, w, c). A head's neurons see their own task's observations alone."""
    actor, metrics = networks["actor"], {}
    counts, obs = [obs.shape[1]] * len(obs), obs.flatten(0, 1)
    for name, network in networks.items():
        with torch.no_grad():
            hidden, features, _ = network.activations(obs, counts)
        alive = plasticity.alive_neurons(network)
        layers, alive = [*hidden[:-1], *hidden[-1]], [*alive[:-1], *alive[-1]]  # each head apart
        metrics |= measured(
            f"{name}_dormant_ratio", plasticity.dormant_ratio, layers, args.dormant_tau, alive
        )
        metrics |= measured(
            f"{name}_effective_rank", plasticity.effective_rank, features, args.srank_delta
        )
    log_probs = partial(policy_log_probs, actor, obs, counts)
    return metrics | measured(
        "fisher_trace", plasticity.fisher_trace, actor, log_probs, actor.masks
    )


def policy_log_probs(actor: nn.Module, obs: Tensor, counts: list[int]) -> Tensor:
    """Of all actions (N, action), for obs (N, h, w, c)."""
    return F.log_softmax(actor(obs, counts), dim=-1)


def measured(name: str, measure, *args) -> dict[str, float]:
    """A metric under its tag, or a line that says why it cannot be measured."""
    try:
        return {f"plasticity/{name}": measure(*args)}
    except ValueError as error:
        tqdm.write(f"{name}: not measured ({error})", file=sys.stderr or sys.stdout)
        return {}


def print_summary(tasks: list[str], evaluation: dict, seconds: dict[str, float]) -> None:
    """Print the final evaluation per task, and where the time went."""
    rows = [[by_task[task] for by_task in evaluation.values()] for task in tasks]
    print(f"\n{'task':<20}{'normalized return':>18}{'episodic return':>17}{'length':>9}")
    for task, row in zip([*tasks, "mean"], [*rows, np.mean(rows, axis=0)], strict=True):
        print("{:<20}{:>18.3f}{:>17.3f}{:>9.1f}".format(task, *row))
    total = sum(seconds.values())
    print(f"\n{'time':<20}{'seconds':>18}{'share':>17}")
    for phase, value in [*seconds.items(), ("sum", total)]:
        print(f"{phase:<20}{value:>18.1f}{value / total:>17.1%}")


# Checks of the arguments

AT_LEAST_1 = """num_steps update_epochs minibatch_size critic_epochs critic_minibatch_size
eval_episodes eval_frequency plasticity_frequency plasticity_batch_size checkpoint_frequency
prune_frequency"""
LIMITS = [  # flags, what they may be given all arguments, and the same in words
    (AT_LEAST_1, lambda x, args: x >= 1, "at least 1"),
    ("seed", lambda x, args: 0 <= x < 2**63, "in [0, 2^63)"),
    ("num_threads max_resets redo_frequency reset_frequency", lambda x, args: x >= 0, "at least 0"),
    ("actor_lr critic_lr clip_coef", lambda x, args: 0 < x < math.inf, "positive and finite"),
    ("ent_coef weight_decay dormant_tau redo_tau", lambda x, args: 0 <= x < math.inf, "at least 0"),
    ("gamma gae_lambda", lambda x, args: 0 <= x <= 1, "in [0, 1]"),
    ("sparsity srank_delta", lambda x, args: 0 <= x < 1, "in [0, 1)"),
    ("prune_end", lambda x, args: 0 < x <= 1, "in (0, 1]"),
    ("prune_start", lambda x, args: 0 <= x < args.prune_end, "in [0, --prune-end {prune_end})"),
    ("redo_frequency", lambda x, args: not 0 < x < args.num_steps, "0 or at least --num-steps"),
    ("reset_frequency", lambda x, args: not 0 < x < args.num_steps, "0 or at least --num-steps"),
    ("total_timesteps", lambda x, args: x >= args.num_steps, "at least --num-steps {num_steps}"),
    ("plasticity_buffer_size", lambda x, args: x >= len(task_ids(args)), "at least 1 per task"),
    (
        "env_ids",
        lambda ids, args: len({*ids} & {i for i in gym.registry if "MiniGrid-" in i}) == len(ids),
        "registered MiniGrid tasks (like MiniGrid-DoorKey-6x6-v0), each named once",
    ),
    ("device", lambda x, args: x != "cuda" or torch.cuda.is_available(), "auto or cpu: no CUDA"),
    ("num_steps", lambda x, args: check_room(args), "what fits in memory"),
]


def fail(message: str) -> NoReturn:
    """End with one line on standard error and exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def check_args(args: Args) -> None:
    """Refuse values that no run can have, before anything is made."""
    for names, allowed, what in LIMITS:
        for name in names.split():
            value = getattr(args, name)
            if not allowed(value, args):
                flag = "--" + name.replace("_", "-")
                shown = " ".join(value) if isinstance(value, tuple) else value
                fail(f"{flag} {shown}: must be {what.format(**vars(args))}")


def check_room(args: Args) -> bool:
    """End with an error where what a flag asks for does not fit in the memory of --device."""
    free, num_tasks = available_bytes(args.device), len(task_ids(args))
    needs = {  # bytes, roughly: a step's objects in Python, a view, an expert in both updates
        "num_steps": args.num_steps * num_tasks * 700,
        "plasticity_buffer_size": args.plasticity_buffer_size * 147,
        "num_experts": getattr(args, "num_experts", 0) * 15_000_000,
    }
    for name, needed in needs.items():
        if needed > free:
            flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
            fail(f"{flag}: needs about {needed:,} bytes, must fit in the {free:,} that are free")
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


# Run folder


def load_checkpoint(run_dir: str) -> dict:
    """The checkpoint of a run of this script."""
    path = Path(run_dir) / "checkpoint.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        fail(f"{run_dir}: holds no checkpoint.pt, must be the folder of a run")
    except OSError as error:
        fail(f"{str(run_dir)[:200]}: checkpoint.pt must be readable ({error.strerror})")
    except Exception as error:  # torch.load raises nearly anything on a damaged file
        fail(f"{run_dir}: checkpoint.pt is damaged ({type(error).__name__})")
    if not isinstance(state, dict) or state.get("script") != Path(__file__).stem:
        fail(f"{run_dir}: checkpoint.pt is of another script, must be one of this script")
    if state["args"].keys() != asdict(Args()).keys():
        fail(f"{run_dir}: checkpoint.pt has the flags of another version of this script")
    return state


def load_agent(run_dir: str) -> tuple[nn.Module, Args, list[str]]:
    """The actor of a run, on the CPU and without gradients, its arguments and its tasks."""
    checkpoint = load_checkpoint(run_dir)
    args = Args(**checkpoint["args"])
    actor = make_networks(args)["actor"]
    actor.load_state_dict(checkpoint["actor"])
    return actor.eval().requires_grad_(False), args, task_ids(args)


def read_args(args: Args) -> Args:
    """Check the arguments, or take a run's own ones with --device and --num-threads as given."""
    if args.resume is not None:
        given = dict(resume=args.resume, device=args.device, num_threads=args.num_threads)
        if args != Args(**given):
            fail(f"--resume {args.resume}: only --device and --num-threads may stand beside it")
        checkpoint = load_checkpoint(args.resume)
        own = Args(**checkpoint["args"])
        device = own.device if args.device == "auto" else args.device
        num_threads = args.num_threads or checkpoint.get("num_threads", own.num_threads)
        own = replace(own, device=device, num_threads=num_threads)
        args = replace(own, run_dir=args.resume, resume=args.resume)
    check_args(args)
    return args


def open_folder(args: Args, name: str) -> tuple[Path, io.TextIOBase]:
    """The run's folder, made if it is new, by default runs/<name>__<script>__<seed>__<time>, and a
    lock on it, held as long as the file is open: by the operating system, so that a kill frees it.
    """
    default = f"runs/{name}__{Path(__file__).stem}__{args.seed}__{int(time.time())}"
    run_dir = Path(args.run_dir or default)
    try:
        for number in itertools.count(2):
            try:
                run_dir.mkdir(parents=True, exist_ok=args.run_dir is not None)
                break
            except FileExistsError:  # another run began in this second
                if args.run_dir:
                    raise
                run_dir = Path(f"{default}_{number}")
        lock = open(run_dir / "lock", "a+")
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            fail(f"{run_dir}: is in use by {lock.read() or 'another process'}")
        except (ImportError, OSError):
            pass  # a system, or a file system, without locks
        if args.resume is None and [*run_dir.glob("checkpoint.pt"), *run_dir.glob("events.*")]:
            fail(f"{run_dir}: already holds a run, must be another folder (or --resume it)")
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}")
        lock.flush()
    except OSError as error:
        fail(f"{str(run_dir)[:200]}: must be a new or a writable folder ({error.strerror})")
    return run_dir, lock


def open_log(run_dir: Path, args: Args, timestep: int) -> SummaryWriter:
    """The run's TensorBoard log; readers drop what an earlier process logged after timestep."""
    if any(run_dir.glob("events.out.tfevents.*")):
        time.sleep(1)  # they are read in the order of their names, which begin with the second
    writer = SummaryWriter(str(run_dir), purge_step=timestep + 1)
    if timestep == 0:
        rows = "".join(f"|{name}|{value}|\n" for name, value in asdict(args).items())
        writer.add_text("args", "|argument|value|\n|-|-|\n" + rows)
    return writer


class Run:
    """What surrounds the algorithm: timestep, log, times, checkpoint, signals. SIGINT or SIGTERM
    drops what is half done of an iteration, saves and ends the run; a second one ends it at once.
    Numbers that are not finite, a process that died and a full disk end it with one line."""

    PROGRESS = ("timestep", "seconds", "evaluation")  # of its own, what a checkpoint holds

    def __init__(self, args, name, device, stride, networks, optimizers, **others):
        """name: of the default folder; stride: timesteps of an iteration; networks, optimizers (by
        their networks' names) and others: what else a checkpoint holds, each with state_dict and
        load_state_dict."""
        self.args, self.device, self.stride, self.networks = args, device, stride, networks
        optimizers = {f"{name}_optimizer": optimizer for name, optimizer in optimizers.items()}
        self.parts = networks | optimizers | others
        self.last_timestep = args.total_timesteps // stride * stride
        self.timestep, self.evaluation = 0, {}
        self.seconds = dict.fromkeys("env inference update sparsify metrics eval".split(), 0.0)
        self.run_dir, self.lock = open_folder(args, name)
        self.busy, self.stopped, self.handlers, self.saved_timestep = True, False, {}, -1
        if args.resume is not None:
            checkpoint = load_checkpoint(self.run_dir)
            for name in self.PROGRESS:
                setattr(self, name, checkpoint[name])
            for name, part in self.parts.items():
                part.load_state_dict(checkpoint[name])
            self.saved_timestep = self.timestep
        self.take_snapshot()

    def __enter__(self):
        if self.args.resume is None:
            self.save()
        self.start_timestep, self.start_time = self.timestep, time.perf_counter()
        self.writer = open_log(self.run_dir, self.args, self.timestep)
        bar = dict(total=self.last_timestep, initial=self.timestep, unit="timestep")
        self.bar = tqdm(**bar, disable=None if sys.stderr else True)  # None: at a terminal alone
        if threading.current_thread() is threading.main_thread():
            numbers = signal.SIGINT, signal.SIGTERM
            self.handlers = {n: signal.signal(n, self.stop) for n in numbers}
        self.busy = False
        return self

    def stop(self, number, frame) -> None:
        """Ends the iteration at once, or where the run is busy saving, as soon as it is not."""
        for each in self.handlers:
            signal.signal(each, signal.SIG_DFL)
        self.stopped = True
        again = f"once more: at once, to go on from timestep {self.saved_timestep}"
        line = f"\nsaving timestep {self.snapshot['timestep']} before it stops ({again})\n"
        with suppress(OSError):
            os.write(2, line.encode())  # print may not be called while it writes
        if not self.busy:
            raise KeyboardInterrupt

    def goes_on(self) -> bool:
        return self.timestep < self.last_timestep and not self.stopped

    def reached(self, frequency: int, times: float = math.inf) -> bool:
        """Whether this iteration came to one of the first times multiples of frequency (0: off)."""
        multiples = self.timestep // frequency if frequency else 0
        return 0 < multiples <= times and self.timestep % frequency < self.stride

    def is_due(self, frequency: int) -> bool:
        """Whether it did, or is the run's last one."""
        return self.reached(frequency) or self.timestep == self.last_timestep

    @contextmanager
    def timed(self, phase: str):
        """Add the wall-clock time of the block to the seconds of a phase."""
        start = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - start

    def check_finite(self, scalars: dict[str, float]) -> None:
        """Raise FloatingPointError where a loss or a network's parameter is not finite."""
        known = {"losses/explained_variance"}  # that of returns that are all the same
        bad = [name for name in scalars.keys() - known if not math.isfinite(scalars[name])]
        for name, network in self.networks.items():
            if not all(parameter.isfinite().all() for parameter in network.parameters()):
                bad.append(f"a parameter of the {name}")
        if bad:
            raise FloatingPointError(f"diverged at timestep {self.timestep}: {bad[0]} not finite")

    def take_snapshot(self) -> None:
        """Keep what a checkpoint holds, as it is between two iterations."""
        state = {"script": Path(__file__).stem, "num_threads": torch.get_num_threads()}
        state["args"] = asdict(replace(self.args, resume=None, run_dir=str(self.run_dir)))
        state |= {name: getattr(self, name) for name in self.PROGRESS}
        state |= {name: part.state_dict() for name, part in self.parts.items()}
        self.snapshot = copy.deepcopy(state)

    def save(self) -> None:
        """Write atomically: a reader finds the old checkpoint or the new one, never a part."""
        partial = self.run_dir / f"checkpoint.{os.getpid()}.partial"
        try:
            with open(partial, "wb") as file:
                torch.save(self.snapshot, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.run_dir / "checkpoint.pt")
        except (OSError, RuntimeError) as error:  # torch's writer does not say why
            partial.unlink(missing_ok=True)
            raise OSError(f"checkpoint.pt could not be written ({error})") from error
        self.saved_timestep = self.snapshot["timestep"]

    def end_iteration(self, scalars: dict[str, float], steps: int, shown: str, score: str) -> None:
        """Log, save if it is time to, and show how it goes: at a terminal a bar with the mean of
        charts/<shown>, else a line at each evaluation with eval/<score>. steps: environment steps
        of a timestep."""
        self.busy = True
        seconds = time.perf_counter() - self.start_time
        timesteps = self.timestep - self.start_timestep
        sps, sparsity = steps * timesteps / seconds, scalars["sparsity/actor"]
        times = {f"time/{phase}": value for phase, value in self.seconds.items()}
        for tag, value in (scalars | {"charts/SPS": sps} | times).items():
            self.writer.add_scalar(tag, value, self.timestep)
        self.take_snapshot()
        if self.is_due(self.args.checkpoint_frequency):
            self.writer.flush()  # before the checkpoint, so that the log never lags behind it
            self.save()
        values = [x for tag, x in scalars.items() if tag.startswith(f"charts/{shown}")]
        mean = np.mean(values or [math.nan])
        self.bar.set_postfix_str(f"return={mean:.3f}, sparsity={sparsity:.3f}, SPS={sps:.0f}")
        self.bar.update(self.stride)
        if self.bar.disable and f"eval/{score}" in scalars:
            left = (self.last_timestep - self.timestep) * seconds / timesteps
            values = f"score {scalars[f'eval/{score}']:.3f}, sparsity {sparsity:.3f}"
            print(f"timestep {self.timestep}: {values}, {left / 60:.0f} min left", flush=True)
        self.busy = False

    def __exit__(self, kind, error, traceback) -> bool:
        """End bar and log, save the last whole iteration, and say why and how to go on."""
        self.busy, self.timestep = True, self.snapshot["timestep"]
        self.bar.close()
        try:
            self.writer.close()
            if self.saved_timestep < self.timestep:
                self.save()
        except OSError as failed:
            error = failed
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.lock.close()
        go_on = f"to go on from timestep {self.saved_timestep}: --resume {quote(str(self.run_dir))}"
        if isinstance(error, FloatingPointError | OSError):
            free = f"{shutil.disk_usage(self.run_dir).free:,} bytes of its disk are free"
            what = (
                error
                if isinstance(error, FloatingPointError | ChildProcessError)
                else f"{error}, {free}"
            )
            print(f"error: {self.run_dir}: {what}; {go_on}", file=sys.stderr)
            raise SystemExit(1)
        if self.stopped and self.timestep < self.last_timestep:
            print(f"stopped at timestep {self.timestep}, {go_on}")
        return self.stopped and kind is KeyboardInterrupt


if __name__ == "__main__":
    train(tyro.cli(Args))
