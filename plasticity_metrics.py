"""Plasticity metrics for any torch model: dormant neurons, effective rank, Fisher trace.

The three measures of *Sparsity-Driven Plasticity in Multi-Task Reinforcement Learning*
(arXiv 2508.06871) and the buffer of training observations they are computed on. Each
function raises ValueError on input it cannot measure (empty, NaN, wrong shape), and never
returns a made-up number.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


def dormant_scores(activation: Tensor, alive: Tensor | None = None) -> Tensor:
    """Score of each neuron: its mean |activation| over the mean of that over the layer.

    activation: (N, H), or (N, C, h, w) where a channel is one neuron.
    alive: bool (H,) or (C,), the neurons that make up the layer's mean (default: all).
    Returns (H,) or (C,); all zeros for a layer that is silent as a whole.
    Source: Sokar et al. 2023, "The Dormant Neuron Phenomenon in Deep RL", definition 3.1.
    """
    if activation.dim() not in (2, 4) or activation.numel() == 0:
        raise ValueError(f"activation: (N, H) or (N, C, h, w), not {tuple(activation.shape)}")
    if not activation.isfinite().all():
        raise ValueError("activation: holds NaN or infinity")
    neurons = activation.shape[1]
    if alive is None:
        alive = torch.ones(neurons, dtype=torch.bool, device=activation.device)
    if alive.shape != (neurons,) or alive.dtype != torch.bool:
        raise ValueError(f"alive: bool ({neurons},), not {alive.dtype} {tuple(alive.shape)}")
    magnitude = activation.double().abs().transpose(0, 1).flatten(1).mean(1)  # (neurons,)
    layer_mean = magnitude[alive].mean() if alive.any() else magnitude.new_zeros(())
    return torch.where(layer_mean > 0, magnitude / layer_mean, 0.0)


def dormant_ratio(
    activations: list[Tensor], tau: float = 0.001, alive: list[Tensor] | None = None
) -> float:
    """Share of neurons with a score of at most tau, pooled over all hidden layers.

    activations: one (N, H) or (N, C, h, w) tensor per hidden layer.
    alive: one bool mask (H,) or (C,) per layer; the others (a neuron whose incoming weights
    are all pruned) enter neither a layer's mean nor the count.
    Source: Sokar et al. 2023, definition 3.2.
    """
    if not activations:
        raise ValueError("activations: an empty list")
    if alive is None:
        alive = [torch.ones(a.shape[1:2], dtype=torch.bool, device=a.device) for a in activations]
    if len(alive) != len(activations):
        raise ValueError(f"alive: {len(alive)} masks for {len(activations)} layers")
    scores = torch.cat([dormant_scores(*layer) for layer in zip(activations, alive, strict=True)])
    counted = torch.cat(alive)
    if not counted.any():
        raise ValueError("alive: no neuron left to measure")
    return (scores[counted] <= tau).float().mean().item()


def effective_rank(features: Tensor, delta: float = 0.01) -> int:
    """Smallest k whose k largest singular values hold a share 1 - delta of the sum of all.

    features: (N, D). Returns 0 if every feature is zero.
    Source: Kumar et al. 2021, "Implicit Under-Parameterization", srank.
    """
    if features.dim() != 2 or features.numel() == 0:
        raise ValueError(f"features: (N, D), not {tuple(features.shape)}")
    if not features.isfinite().all():
        raise ValueError("features: hold NaN or infinity")
    if not 0 <= delta < 1:
        raise ValueError(f"delta: in [0, 1), not {delta}")
    singular_values = torch.linalg.svdvals(features.double())
    total = singular_values.sum()
    if total == 0:
        return 0
    share = singular_values.cumsum(0) / total
    # The tolerance keeps rounding from adding one where the share is met exactly.
    return int((share < 1 - delta - 1e-9).sum()) + 1


@torch.enable_grad()
def fisher_trace(model: nn.Module, policy, masks: dict[str, Tensor] | None = None) -> float:
    """Trace of the Fisher matrix of a policy over discrete actions, exact over the actions.

    The mean over samples of sum_a pi(a|s) ||grad_theta log pi(a|s)||^2, gradients per sample.
    policy: a function of no argument that runs model once on a batch and returns the
    log-probabilities (..., A) of all actions; a sample is one entry of the leading axes.
    masks: layer name -> mask of its weight, ones and zeros; pruned weights do not count.

    Every parameter must belong to an nn.Conv2d or to a linear layer (a weight (..., out, in)
    that acts as x @ weight.mT + bias) that sees each sample as one row. The gradient of such a
    layer for one sample follows from its input x and the gradient d at its output: d x^T for a
    linear layer, whose squared entries are d^2 (x^2)^T and need not be stored per sample.
    Memory is then that of one backward pass and one convolution's gradients per sample.
    Raises ValueError for any other layer. Source: Amari 1998 for the Fisher matrix; Goodfellow
    2015, arXiv 1510.01799, for the norms of per-sample gradients.
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if next(layer.parameters(recurse=False), None) is not None
    }
    if not layers:
        raise ValueError("model: has no parameters")
    calls = {name: [] for name in layers}
    hooks = [
        layer.register_forward_hook(
            lambda _, inputs, output, name=name: calls[name].append((inputs[0].detach(), output))
        )
        for name, layer in layers.items()
    ]
    try:
        log_probs = policy()
    finally:
        for hook in hooks:
            hook.remove()
    num_samples = log_probs[..., 0].numel()
    if num_samples == 0:
        raise ValueError(f"log-probabilities: (..., A), not {tuple(log_probs.shape)}")
    if not log_probs.exp().isfinite().all():
        raise ValueError("log-probabilities: hold NaN or infinity")
    for name, seen in calls.items():
        if len(seen) != 1:
            raise ValueError(f"layer {name}: called {len(seen)} times in a forward, not once")

    norms = [
        _gradient_norm(name, layers[name], *seen[0], num_samples, masks or {})
        for name, seen in calls.items()
    ]
    outputs = [output for ((_, output),) in calls.values()]
    weights = log_probs.detach().exp().sqrt()  # sqrt(pi): squared again with the gradient
    total = torch.zeros((), dtype=torch.float64, device=log_probs.device)
    for a in range(log_probs.shape[-1]):
        weighted = (weights[..., a] * log_probs[..., a]).sum()
        gradients = torch.autograd.grad(weighted, outputs, retain_graph=True)
        total += sum(norm(d) for norm, d in zip(norms, gradients, strict=True))
    return total.item() / num_samples


def _gradient_norm(name, layer, x, output, num_samples, masks):
    """Make the function that maps the gradient d at a layer's output, one sample in each row,
    to the squared norms of the gradients of the layer's parameters, summed over samples."""
    weight, bias = layer.weight, layer.bias
    mask = masks.get(name, torch.ones_like(weight))
    if isinstance(layer, nn.Conv2d) and len(x) == num_samples:
        patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        patches = patches.unflatten(1, (layer.groups, -1)).mT  # (N, groups, places, in * k * k)

        def norm(d):
            d = d.flatten(2)  # (N, out, places)
            squares = (d.unflatten(1, (layer.groups, -1)) @ patches).square_().sum(0)
            in_bias = 0 if bias is None else d.sum(2).square().sum()
            return (squares.view_as(weight) * mask).sum() + in_bias

    elif (
        weight.dim() >= 2
        and x.shape[:-1].numel() == num_samples
        and torch.allclose(x @ weight.mT + (0 if bias is None else bias), output, 1e-2, 1e-2)
    ):

        def norm(d):
            squares = d.square().mT @ x.square()  # (..., out, in)
            return (squares * mask).sum() + (0 if bias is None else d.square().sum())

    else:
        raise ValueError(f"layer {name}: neither a Conv2d nor linear with one row per sample")
    return norm


def _check_masks(masks: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    """ValueError for a mask of a layer that has none of these weights, or of another shape."""
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    for name, mask in masks.items():
        if shapes.get(name) != tuple(mask.shape):
            raise ValueError(f"mask {name}: {tuple(mask.shape)}, where the weights are {shapes}")


def alive_neurons(network: nn.Module) -> list[Tensor]:
    """Which neurons of each hidden layer have an unmasked incoming weight: bool (C,) of a
    convolution, (H,) of a linear layer, (stack, H) of stacked ones.

    network.layers names its layers in order, the output's last; network.masks has ones and zeros
    in the shape of the weights of those that are pruned.
    """
    alive, weights = [], {name: network.get_submodule(name).weight for name in network.layers}
    _check_masks(network.masks, weights)
    for name in list(network.layers)[:-1]:
        mask = network.masks.get(name, torch.ones_like(weights[name]))
        alive.append(mask.any(-1) if mask.dim() == 3 else mask.flatten(1).any(-1))
    return alive


def measure_sparsity(networks: dict[str, nn.Module]) -> dict[str, float]:
    """Share of masked weights of each network, and of each of its layers, under their log tags.

    Networks as for alive_neurons.
    """
    shares = {}
    for name, network in networks.items():
        weights = {layer: network.get_submodule(layer).weight for layer in network.layers}
        _check_masks(network.masks, weights)
        sizes = {layer: weight.numel() for layer, weight in weights.items()}
        masked = {layer: (mask == 0).sum().item() for layer, mask in network.masks.items()}
        shares[f"sparsity/{name}"] = sum(masked.values()) / sum(sizes.values())
        for layer, size in sizes.items():
            shares[f"sparsity/{name}/{layer}"] = masked.get(layer, 0) / size
    return shares


class ObservationBuffer:
    """The latest observations of each task, on one device; the oldest make room for new ones."""

    def __init__(self, capacity, num_tasks, obs_shape, dtype, device):
        """capacity: observations of all tasks together; num_tasks shares of equal size."""
        if capacity < num_tasks:
            raise ValueError(f"capacity: at least one observation per task, not {capacity}")
        self.observations = torch.zeros(
            (num_tasks, capacity // num_tasks, *obs_shape), dtype=dtype, device=device
        )
        self.added = 0  # observations per task so far

    def add(self, obs: Tensor) -> None:
        """Store n observations of every task, (task, n, *obs_shape), the latest last."""
        num_tasks, capacity, *obs_shape = self.observations.shape
        if (len(obs), *obs.shape[2:]) != (num_tasks, *obs_shape):
            raise ValueError(f"obs: ({num_tasks}, n, {obs_shape}), not {tuple(obs.shape)}")
        new = torch.arange(self.added, self.added + obs.shape[1], device=obs.device)[-capacity:]
        self.observations[:, new % capacity] = obs[:, -capacity:]
        self.added += obs.shape[1]

    def sample(self, size: int) -> Tensor:
        """Draw size observations per task, with replacement: (task, size, *obs_shape)."""
        if self.added == 0:
            raise ValueError("the observation buffer is empty")
        num_tasks, capacity = self.observations.shape[:2]
        device = self.observations.device
        slot = torch.randint(min(self.added, capacity), (num_tasks, size), device=device)
        return self.observations[torch.arange(num_tasks, device=device)[:, None], slot]

    def state_dict(self) -> dict:
        """What load_state_dict takes."""
        return {"observations": self.observations, "added": self.added}

    def load_state_dict(self, state: dict) -> None:
        """Go on with the observations of another buffer of the same size."""
        if state["observations"].shape != self.observations.shape:
            raise ValueError(f"observations: not {tuple(state['observations'].shape)}")
        self.observations.copy_(state["observations"])
        self.added = state["added"]
