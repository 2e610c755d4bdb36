"""Plasticity metrics for any torch model: dormant neurons, effective rank, Fisher trace.

The three measures of *Sparsity-Driven Plasticity in Multi-Task Reinforcement Learning*
(arXiv 2508.06871) and the buffer of training observations they are computed on. Each
function raises ValueError on input it cannot measure (empty, NaN, wrong shape), and never
returns a made-up number.
"""

from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


def dormant_scores(activation: Tensor, alive: Tensor | None = None) -> Tensor:
    """Score of each neuron: its mean |activation| over the mean of that over the layer.

    activation: (N, H), or (N, C, h, w) where a channel is one neuron, or (stack, N, H), layers side
    by side. alive: bool (H,), (C,) or (stack, H), the neurons that make up a layer's mean (default:
    all). Returns the shape of alive; all zeros for a layer that is silent as a whole.
    Source: Sokar et al. 2023, "The Dormant Neuron Phenomenon in Deep RL", definition 3.1.
    """
    if activation.dim() == 3 and len(activation):
        layers = zip(activation, [None] * len(activation) if alive is None else alive, strict=True)
        return torch.stack([dormant_scores(*layer) for layer in layers])
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

    activations: one tensor per hidden layer, or stack of layers, as for dormant_scores.
    alive: one bool mask per tensor; the others (a neuron whose incoming weights are all pruned)
    enter neither a layer's mean nor the count.
    Source: Sokar et al. 2023, definition 3.1.
    """
    if not activations:
        raise ValueError("activations: an empty list")
    alive = [None] * len(activations) if alive is None else alive
    if len(alive) != len(activations):
        raise ValueError(f"alive: {len(alive)} masks for {len(activations)} layers")
    scores = [dormant_scores(*layer) for layer in zip(activations, alive, strict=True)]
    pairs = zip(alive, scores, strict=True)
    counted = [torch.ones_like(score).bool() if mask is None else mask for mask, score in pairs]
    scores, counted = (torch.cat([x.flatten() for x in xs]) for xs in (scores, counted))
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
    policy: a function of no argument that runs model, not compiled, once on a batch and returns the
    log-probabilities (..., A) of all actions; a sample is one entry of the leading axes.
    masks: layer name -> mask of its weight, ones and zeros; pruned weights do not count.

    Every parameter must be the weight or bias of an nn.Conv2d or of a linear layer (a weight
    (..., out, in) that acts as x @ weight.mT + bias) that sees each sample as one row. The gradient
    of such a layer for one sample follows from its input x and the gradient d at its output: d x^T
    for a linear layer, whose squared entries are d^2 (x^2)^T and need not be stored per sample.
    Memory is then that of one backward pass. Raises ValueError for any other layer, also where
    autograd alone shows it (the weight is computed or shared, samples mix). Source: Amari 1998 for
    the Fisher matrix; Goodfellow 2015, arXiv 1510.01799, for the norms of per-sample gradients.
    """
    layers, parameters, masks = {}, {}, masks or {}
    for name, layer in model.named_modules():
        own = dict(layer.named_parameters(recurse=False))
        if own and not {"weight"} <= own.keys() <= {"weight", "bias"}:
            raise ValueError(f"layer {name}: has {', '.join(own)}, not weight, or weight and bias")
        if not all(parameter.requires_grad for parameter in own.values()):
            raise ValueError(f"layer {name}: is frozen, call model.requires_grad_() first")
        if own:
            layers[name] = layer
            parameters[name] = [own[kind] for kind in ("weight", "bias") if kind in own]
    if not layers:
        raise ValueError("model: has no parameters")
    _check_masks(masks, {name: layer.weight for name, layer in layers.items()})
    calls = {name: [] for name in layers}

    def keep(name, _, inputs, output):
        if len(inputs) != 1 or not isinstance(output, Tensor) or not output.requires_grad:
            raise ValueError(f"layer {name}: does not map one tensor to one with a gradient")
        calls[name].append((inputs[0].detach(), output))
        return output.clone()  # an activation in place overwrites the copy alone

    hooks = [layer.register_forward_hook(partial(keep, name)) for name, layer in layers.items()]
    try:
        log_probs = policy()
    finally:
        for hook in hooks:
            hook.remove()
    if log_probs.dim() == 0 or log_probs.numel() == 0:
        raise ValueError(f"log-probabilities: (..., A), not {tuple(log_probs.shape)}")
    if not log_probs.exp().isfinite().all():
        raise ValueError("log-probabilities: hold NaN or infinity")
    for name, seen in calls.items():
        if len(seen) != 1:
            raise ValueError(f"layer {name}: called {len(seen)} times in a forward, not once")

    num_samples = log_probs[..., 0].numel()
    sums = {  # layer -> (d, power) -> sums over samples of that power of its masked gradients
        name: _gradient_sums(name, layer, parameters[name], *calls[name][0], num_samples, masks)
        for name, layer in layers.items()
    }
    outputs = [output for ((_, output),) in calls.values()]
    gradient = partial(torch.autograd.grad, retain_graph=True, materialize_grads=True)
    weights = log_probs.detach().exp().sqrt()  # sqrt(pi): squared again with the gradient
    device = log_probs.device

    # A test of the layers' formula: the gradient for half of the samples and all actions, each with
    # a factor of its own, must be autograd's, and the other samples must not reach the same rows.
    factors = torch.arange(num_samples, device=device).mul(2).cos().view_as(log_probs[..., :1])
    mixed = weights * log_probs * torch.arange(log_probs.shape[-1], device=device).cos()
    tensors = [*outputs, *model.parameters()]
    half = dict(zip(tensors, gradient((factors.clamp_min(0) * mixed).sum(), tensors), strict=True))
    others = gradient((factors.clamp_max(0) * mixed).sum(), outputs)
    for name, d, other in zip(layers, (half[output] for output in outputs), others, strict=True):
        weight, *bias = (half[parameter] for parameter in parameters[name])
        true, made = [weight * masks.get(name, 1), *bias], sums[name](d, 1)
        error = sum((x - y).square().sum() for x, y in zip(made, true, strict=True))
        if not error <= 1e-4 * sum(x.square().sum() for x in made):  # nor NaN
            raise ValueError(f"layer {name}: autograd gives another gradient (computed weight?)")
        if ((d != 0) & (other != 0)).any():
            raise ValueError(f"layer {name}: one of its rows acts on several samples")

    total = torch.zeros((), dtype=torch.float64, device=device)
    for a in range(log_probs.shape[-1]):
        gradients = gradient((weights[..., a] * log_probs[..., a]).sum(), outputs)
        for name, d in zip(layers, gradients, strict=True):
            total += sum(x.sum() for x in sums[name](d, 2))
    return total.item() / num_samples


def _gradient_sums(name, layer, parameters, x, output, num_samples, masks):
    """Make the function that maps the gradient d at a layer's output, one sample in each row, to
    the gradients of its parameters, masked, to some power (1 or 2) and summed over samples."""
    weight, *bias = parameters
    mask = masks.get(name, torch.ones_like(weight))
    x = x.to(torch.promote_types(weight.dtype, torch.float32))  # half floats lack the range
    if (
        isinstance(layer, nn.Conv2d)
        and x.shape[:-3] == (num_samples,)
        and not isinstance(layer.padding, str)
    ):
        height, width = layer.padding
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, (width, width, height, height), mode)
        patches = F.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride)
        patches = patches.unflatten(1, (layer.groups, -1)).mT  # (N, groups, places, in * k * k)
        patches = patches.contiguous().split(64)  # few samples at once: less memory, faster

        def sums(d, power):
            d = d.to(x.dtype).flatten(2)  # (N, out, places)
            pairs = zip(d.unflatten(1, (layer.groups, -1)).split(64), patches, strict=True)
            in_weight = sum((some @ patch).pow_(power).sum(0) for some, patch in pairs)
            in_bias = d.sum(2).pow(power).sum(0)
            return [in_weight.view_as(weight) * mask, in_bias][: len(parameters)]

    elif (
        x.dim() >= weight.dim() >= 2
        and x.shape[:-1].numel() == num_samples
        and x.shape[-weight.dim() : -2] == weight.shape[:-2]
        and output.shape == (*x.shape[:-1], weight.shape[-2])
        and all(b.numel() == weight[..., 0].numel() for b in bias)
    ):
        inputs = {1: x, 2: x.square()}

        def sums(d, power):
            d = d.to(x.dtype).pow(power)
            in_weight = (d.mT @ inputs[power]).sum_to_size(weight.shape)  # (..., out, in)
            in_bias = (d.sum(-2).sum_to_size(weight.shape[:-1]).view_as(b) for b in bias)
            return [in_weight * mask, *in_bias]

    else:
        raise ValueError(f"layer {name}: neither a Conv2d nor linear with one row per sample")
    return sums


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

    def __init__(self, capacity: int, num_tasks: int, example, device):
        """capacity: observations of all tasks together; num_tasks shares of equal size. example:
        an observation, array or tensor, of their shape and type."""
        if capacity < num_tasks:
            raise ValueError(f"capacity: at least one observation per task, not {capacity}")
        example = torch.as_tensor(example, device=device)
        self.observations = example.new_zeros(num_tasks, capacity // num_tasks, *example.shape)
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
        """Draw size observations with replacement, as many of each task, rounded up: (task, n,
        *obs_shape)."""
        if self.added == 0:
            raise ValueError("the observation buffer is empty")
        num_tasks, capacity = self.observations.shape[:2]
        device, per_task = self.observations.device, -(-size // num_tasks)
        slot = torch.randint(min(self.added, capacity), (num_tasks, per_task), device=device)
        return self.observations[torch.arange(num_tasks, device=device)[:, None], slot]

    def latest(self, size: int) -> Tensor:
        """The latest size observations of each task, or all there are: (task, n, *obs_shape)."""
        capacity = self.observations.shape[1]
        first, device = max(0, self.added - min(size, capacity)), self.observations.device
        return self.observations[:, torch.arange(first, self.added, device=device) % capacity]

    def state_dict(self) -> dict:
        """What load_state_dict takes."""
        return {"observations": self.observations, "added": self.added}

    def load_state_dict(self, state: dict) -> None:
        """Go on with the observations of another buffer of the same size."""
        shape, own = state["observations"].shape, self.observations.shape
        if shape != own:
            raise ValueError(f"observations: must be {tuple(own)}, not {tuple(shape)}")
        self.observations.copy_(state["observations"])
        self.added = state["added"]
