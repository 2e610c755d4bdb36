"""The metrics against closed forms and a plain per-sample loop, the buffer against a deque."""

import math
import subprocess
import sys
from collections import deque
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune, spectral_norm
from torch.nn.utils.parametrizations import weight_norm

from plasticity_metrics import (
    ObservationBuffer,
    alive_neurons,
    dormant_ratio,
    dormant_scores,
    effective_rank,
    fisher_trace,
    measure_sparsity,
)

ROOT = Path(__file__).parent.parent


def int_buffer(capacity, num_tasks=2):
    return ObservationBuffer(capacity, num_tasks, torch.tensor([0]), "cpu")


@pytest.mark.parametrize(
    "measure",
    [
        lambda: dormant_ratio([]),
        lambda: dormant_ratio([torch.zeros(0, 3)]),
        lambda: dormant_ratio([torch.zeros(3)]),
        lambda: dormant_ratio([torch.tensor([[1.0, math.nan]])]),
        lambda: dormant_ratio([torch.ones(2, 3)], alive=[]),
        lambda: dormant_ratio([torch.ones(2, 3)], alive=[torch.ones(4).bool()]),
        lambda: dormant_ratio([torch.ones(2, 3)], alive=[torch.ones(3)]),
        lambda: dormant_ratio([torch.ones(2, 3)], alive=[torch.zeros(3).bool()]),
        lambda: effective_rank(torch.zeros(0, 3)),
        lambda: effective_rank(torch.ones(3)),
        lambda: effective_rank(torch.tensor([[math.inf, 1.0]])),
        lambda: effective_rank(torch.ones(2, 2), delta=1.0),
        lambda: int_buffer(capacity=2, num_tasks=3),
        lambda: int_buffer(4).sample(3),  # empty
    ],
)
def test_what_cannot_be_measured_is_refused(measure):
    with pytest.raises(ValueError):
        measure()


def test_scores_are_magnitudes_over_the_layers_mean():
    activation = torch.tensor([[1.0, -2.0, 0.0, 5.0], [-3.0, 2.0, 0.0, 3.0]])
    assert dormant_scores(activation).tolist() == [1.0, 1.0, 0.0, 2.0]  # means 2 2 0 4, mean 2
    alive = torch.tensor([True, True, True, False])  # mean 4/3
    assert dormant_scores(activation, alive)[:3].tolist() == pytest.approx([1.5, 1.5, 0.0])


def test_a_channel_is_one_neuron():
    activation = torch.zeros(2, 3, 2, 2)
    activation[:, 0] = torch.tensor([[4.0, -4.0], [0.0, 0.0]])  # mean magnitude 2
    activation[1, 1, 1, 1] = 8.0  # 1
    assert dormant_scores(activation).tolist() == [2.0, 1.0, 0.0]


@pytest.mark.parametrize("masked", [False, True])
def test_layers_side_by_side_are_scored_apart(masked):
    torch.manual_seed(0)
    stack = torch.randn(3, 20, 5) * torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    stack[1, :, 2] *= 1e-4
    alive = torch.ones(3, 5).bool()
    alive[2, 0] = not masked
    one_by_one = [dormant_scores(*layer) for layer in zip(stack, alive, strict=True)]
    found = dormant_scores(stack, alive if masked else None)
    assert torch.equal(found, torch.stack(one_by_one))
    ratio = dormant_ratio([stack, stack[0]], alive=[alive, alive[0]] if masked else None)
    assert ratio == pytest.approx(1 / (19 if masked else 20))


def test_ratio_is_the_share_of_dormant_neurons_of_all_layers():
    assert dormant_ratio([torch.tensor([[0.0, 1.0]]), torch.ones(1, 6)]) == 1 / 8  # not 1 / 4
    assert dormant_ratio([torch.zeros(3, 4), torch.ones(3, 4)]) == 1 / 2  # one is silent
    alive = torch.tensor([True, False, True])  # a pruned neuron is left out
    assert dormant_ratio([torch.tensor([[0.0, 0.0, 1.0]])], alive=[alive]) == 1 / 2
    for tau, ratio in ((0.5, 1 / 2), (0.49, 0)):  # a score of tau is dormant
        assert dormant_ratio([torch.tensor([[0.5, 1.5]])], tau) == ratio


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float16, torch.float32])
def test_scores_of_any_numbers(dtype):
    activation = torch.zeros(2, 1000, dtype=dtype)
    activation[:, 0] = 1 if not dtype.is_floating_point else torch.finfo(dtype).smallest_normal / 8
    assert dormant_scores(activation)[:2].tolist() == [1000.0, 0.0]
    if dtype.is_floating_point:
        activation.fill_(torch.finfo(dtype).max)
        assert dormant_scores(activation).tolist() == [1.0] * 1000


@pytest.mark.parametrize(
    "values, delta, rank",
    [
        ([70.0, 29.5, 0.3, 0.2], 0.01, 2),  # 99.5 % >= 99 %
        ([70.0, 28.5, 1.0, 0.5], 0.01, 3),
        ([70.0, 29.5, 0.3, 0.2], 0.5, 1),
        ([1.0] * 10, 0.1, 9),  # 90 % but for rounding
        ([1.0] * 100, 0.0, 100),
        ([0.0] * 5, 0.01, 0),
    ],
)
def test_effective_rank_of_known_singular_values(values, delta, rank):
    torch.manual_seed(0)
    values = torch.tensor(values).double()
    u, v = (torch.linalg.qr(torch.randn(n, len(values)).double()).Q for n in (150, 130))
    assert effective_rank((u * values) @ v.T, delta) == rank


class Heads(nn.Module):
    """A linear layer with a weight per task."""

    def __init__(self, tasks, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(tasks, outputs, inputs))
        self.bias = nn.Parameter(torch.randn(tasks, 1, outputs))

    def forward(self, x):
        return x @ self.weight.mT + self.bias


class Policy(nn.Module):
    """A convolution, a linear layer, one with a weight per task and an output, masked by hand."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)
        self.relu = nn.ReLU()
        self.linear = nn.Linear(12, 4)
        self.heads = Heads(2, 4, 3)
        self.output = nn.Linear(3, 2)
        self.layers = dict(conv=1, linear=1, heads=2, output=1)
        conv, heads = torch.zeros(3, 3, 3, 3), torch.ones(2, 3, 4)
        conv[0, 1, 0, 1] = conv[2] = 1  # 28 of 81; the second channel is not alive
        heads[0, 1] = heads[1, 0] = heads[1, 2, 1:] = 0  # 13 of 24
        self.masks = {"conv": conv, "heads": heads, "output": torch.zeros(2, 3)}

    def forward(self, obs):  # (N, 3, 4, 4), half of them of each task
        x = self.relu(self.conv(obs)).flatten(1)
        return self.output(self.heads(self.linear(x).tanh().view(2, -1, 4)).tanh())


def network(function, **layers):
    """A policy for observations (N, 3, 4, 4): a function of its layers and x (N, 48)."""
    model = nn.Module()
    layers = dict(first=nn.Linear(48, 9), second=nn.Linear(9, 4)) | layers
    for name, layer in layers.items():
        setattr(model, name, layer)
    model.forward = lambda obs: function(model, obs.flatten(1))
    return model


def convolution(*activation, conv=None, **options):
    """A policy for observations (N, 3, 4, 4)."""
    conv = conv or nn.Conv2d(3, 8, 3, **dict(padding=1) | options)
    hidden = nn.Sequential(conv, *(activation or [nn.ReLU()]), nn.Flatten())
    return nn.Sequential(*hidden, nn.Linear(hidden(torch.zeros(1, 3, 4, 4)).numel(), 4))


def plain_fisher_trace(model, obs, masks=None):
    """Every gradient of every sample and action, one after the other."""
    total, masks = 0.0, masks or {}
    log_probs = model(obs).log_softmax(-1)
    for log_prob in log_probs.flatten():
        model.zero_grad()
        log_prob.backward(retain_graph=True)
        for name, p in model.named_parameters():
            if p.grad is not None:
                mask = masks.get(name.removesuffix(".weight"), 1.0)
                total += log_prob.exp().item() * (p.grad * mask).square().sum().item()
    return total / log_probs[..., 0].numel()


def fisher_trace_on(model, obs, masks=None):
    return fisher_trace(model, lambda: model(obs).log_softmax(-1), masks)


def two_layers(model, x):
    return model.second(model.first(x).tanh())


def residual_in_place(model, x):
    hidden = model.first(x)
    hidden += hidden.tanh()
    return model.second(hidden.relu_())


def unused_critic(model, x):
    model.critic(x)
    return two_layers(model, x)


MEASURED = {
    "weight per task": Policy,
    "grouped": lambda: convolution(nn.Tanh(), nn.Conv2d(8, 6, 2, 2, 1, groups=2, bias=False)),
    "ReLU in place": lambda: convolution(nn.ReLU(inplace=True)),
    "leaky ReLU in place": lambda: convolution(nn.Conv2d(8, 8, 3), nn.LeakyReLU(0.1, inplace=True)),
    "residual in place": lambda: network(residual_in_place),
    "circular": lambda: convolution(padding_mode="circular"),
    "reflect": lambda: convolution(padding_mode="reflect", padding=(2, 1)),
    "replicate": lambda: convolution(padding_mode="replicate", padding=(1, 2), stride=(2, 1)),
    "unused critic": lambda: network(unused_critic, critic=nn.Linear(48, 1)),
    "batch norm in eval": lambda: convolution(nn.BatchNorm2d(8, affine=False)).eval(),
    "turned rows": lambda: network(lambda m, x: m.second(m.first(x).tanh().flip(0)).flip(0)),
}


@pytest.mark.parametrize("make", MEASURED.values(), ids=MEASURED)
def test_fisher_trace_is_that_of_a_plain_loop(make):
    torch.manual_seed(0)
    model, obs = make(), torch.randn(70, 3, 4, 4)
    weights = {n: p for n, p in model.named_parameters() if n.endswith("weight")}
    masks = {n.removesuffix(".weight"): torch.rand_like(p).round() for n, p in weights.items()}
    plain = plain_fisher_trace(model, obs, masks)
    assert fisher_trace_on(model, obs, masks) == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_fisher_trace_of_other_floats(dtype):
    torch.manual_seed(0)
    model = nn.Linear(48, 4, bias=False).to(dtype)
    x = (torch.randn(70, 48) * 1e-4).to(dtype)  # its squares are no float16
    trace = fisher_trace_on(model, x)
    plain = plain_fisher_trace(model.double(), x.double())
    assert trace == pytest.approx(plain, rel=1e-5 if dtype == torch.float64 else 1e-2)


def test_fisher_trace_under_autocast():
    torch.manual_seed(0)
    model, obs = network(two_layers), torch.randn(70, 3, 4, 4)
    plain = plain_fisher_trace(model, obs)
    with torch.autocast("cpu", torch.bfloat16):
        assert fisher_trace_on(model, obs) == pytest.approx(plain, rel=2e-2)


class Scaled(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, 3 * self.weight, self.bias)


class Tuple(nn.Linear):
    def forward(self, x):
        return super().forward(x), None


class WeightPerRow(Heads):
    def forward(self, x):
        return (self.weight[torch.arange(len(x)) % 2] @ x[..., None])[..., 0]


def tied(kind):
    layers = dict(second=nn.Linear(9, 9), third=nn.Linear(9, 9))
    setattr(layers["third"], kind, getattr(layers["second"], kind))
    return network(lambda m, x: m.third(m.second(m.first(x).tanh()).tanh()), **layers)


def bare(kind):
    model = network(lambda m, x: two_layers(m, x) * getattr(m, kind))
    setattr(model, kind, nn.Parameter(torch.ones(4)))
    return model


REFUSED = {
    "padding by name": ("layer 0", lambda: convolution(padding="same")),
    "pruned": ("layer 0", lambda: convolution(conv=prune.identity(nn.Conv2d(3, 8, 3), "weight"))),
    "spectral norm": ("layer 0", lambda: convolution(conv=spectral_norm(nn.Conv2d(3, 8, 3)))),
    "parametrized": ("layer 0", lambda: convolution(conv=weight_norm(nn.Conv2d(3, 8, 3)))),
    "scaled": ("layer 0", lambda: convolution(conv=Scaled(3, 8, 3))),
    "batch norm": ("layer 0", lambda: convolution(nn.BatchNorm2d(8, affine=False))),
    "weight per row": ("layer first", lambda: network(two_layers, first=WeightPerRow(2, 48, 9))),
    "tied weights": ("layer second", lambda: tied("weight")),
    "tied biases": ("layer second", lambda: tied("bias")),
    "layer norm": ("layer second", lambda: network(two_layers, second=nn.LayerNorm(9))),
    "LSTM": ("layer lstm", lambda: network(two_layers, lstm=nn.LSTM(16, 9))),
    "tuple": ("layer first", lambda: network(lambda m, x: m.first(x)[0], first=Tuple(48, 9))),
    "embedding": (
        "layer first",
        lambda: network(lambda m, x: two_layers(m, (x > 0).sum(1)), first=nn.Embedding(49, 9)),
    ),
    "bare parameter": ("temperature", lambda: bare("temperature")),
    "bare weight": ("layer :", lambda: bare("weight")),
    "frozen": ("requires_grad_", lambda: convolution().requires_grad_(False)),
    "no parameters": ("no parameters", nn.Flatten),
}
CALLS = {  # of the two linear layers of a network
    "weight used elsewhere": ("layer first", lambda m, x: two_layers(m, x) * m.first.weight.norm()),
    "sums over samples": ("layer first", lambda m, x: m.second(m.first(x).cumsum(0).tanh())),
    "one row acts on all": ("layer first", lambda m, x: x[:, :4] + two_layers(m, x)[:1]),
    "one row for all": ("layer first", lambda m, x: two_layers(m, x[:1]).expand(len(x), 4)),
    "called twice": ("layer first", lambda m, x: two_layers(m, x) + two_layers(m, x)),
    "never called": ("layer second", lambda m, x: m.first(x)),
    "keyword": ("layer first", lambda m, x: m.second(m.first(input=x))),
    "frozen part": ("layer first", lambda m, x: m.second(torch.no_grad()(m.first)(x))),
    "gradient of NaN": ("layer first", lambda m, x: m.second((0 * m.first(x)).sqrt())),
    "NaN": ("log-prob", lambda m, x: two_layers(m, x * math.nan)),
    "no sample": ("log-prob", lambda m, x: two_layers(m, x[:0])),
    "no action": ("log-prob", lambda m, x: two_layers(m, x)[:, :0]),
}
REFUSED |= {name: (message, partial(network, call)) for name, (message, call) in CALLS.items()}


@pytest.mark.parametrize("message, make", REFUSED.values(), ids=REFUSED)
def test_fisher_trace_refuses_what_it_cannot_measure(message, make):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=message):
        fisher_trace_on(make(), torch.randn(6, 3, 4, 4))


def test_fisher_trace_refuses_a_compiled_model():
    model, obs = convolution(), torch.randn(6, 3, 4, 4)
    compiled = torch.compile(model, backend="aot_eager")
    for of in (compiled, model):
        with pytest.raises(ValueError, match="layer"):
            fisher_trace(of, lambda: compiled(obs).log_softmax(-1))


def test_fisher_trace_leaves_the_model_as_it_was():
    model, obs = convolution(nn.ReLU(inplace=True)), torch.randn(6, 3, 4, 4)
    before = model(obs)
    fisher_trace_on(model, obs)
    assert torch.equal(model(obs), before)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(layer._forward_hooks for layer in model.modules())


def test_fisher_trace_of_the_whole_actor_fits_in_a_gigabyte():
    """The gradients of half a measurement's samples, each kept for one action, would take more."""
    code = """
import resource, torch
from mtppo_gmp import Args, MultiHeadNetwork
from plasticity_metrics import fisher_trace
torch.set_num_threads(1)
actor = MultiHeadNetwork((7, 7, 3), 5, 7, Args())
obs = torch.randint(0, 11, (5 * 100, 7, 7, 3), dtype=torch.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fisher_trace(actor, lambda: actor(obs, [100] * 5).log_softmax(-1))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT)
    assert int(grown) * 1024 < 2**30


def test_alive_neurons_have_an_unmasked_incoming_weight():
    conv, linear, heads = alive_neurons(Policy())
    assert conv.tolist() == [True, False, True]
    assert linear.tolist() == [True] * 4  # without a mask
    assert heads.tolist() == [[True, False, True], [False, True, True]]
    assert {conv.dtype, linear.dtype, heads.dtype} == {torch.bool}


def test_sparsity_is_the_share_of_masked_weights():
    policy = Policy()
    nn.init.zeros_(policy.linear.weight)  # zero, but not masked
    assert measure_sparsity({"actor": policy}) == {
        "sparsity/actor": (53 + 11 + 6) / 159,
        "sparsity/actor/conv": 53 / 81,
        "sparsity/actor/linear": 0,
        "sparsity/actor/heads": 11 / 24,
        "sparsity/actor/output": 1,
    }


@pytest.mark.parametrize("name", ["conv.weight", "module.conv", "relu", "conv"])
def test_masks_must_be_those_of_the_layers(name):
    policy, obs = Policy(), torch.randn(6, 3, 4, 4)
    policy.masks = {name: torch.ones(3, 1, 3, 3) if name == "conv" else torch.ones(3, 3, 3, 3)}
    for measure in (
        lambda: alive_neurons(policy),
        lambda: measure_sparsity({"actor": policy}),
        lambda: fisher_trace_on(policy, obs, policy.masks),
    ):
        with pytest.raises(ValueError, match=f"mask {name}"):
            measure()


def held(buffer):
    """What a buffer of few observations (1,) holds of each task: far more draws than those."""
    return [set(task.flatten().tolist()) for task in buffer.sample(500)]


def chunks(*sizes):
    """(task, n, 1) for each n: one task counts from 0 on, the other is always 1000 ahead."""
    counts = torch.arange(sum(sizes)) + torch.tensor([[0], [1000]])
    return counts[..., None].split(sizes, dim=1)


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize(
    "sizes", [(3, 3, 3, 3, 3), (5, 1, 5, 4), (2, 7, 1, 1, 1), (12, 3, 11, 2, 25), (4, 0, 2)]
)
def test_buffer_is_a_deque_per_task_and_goes_on_from_its_state(sizes, restored):
    buffer, plain = int_buffer(11), [deque(maxlen=5), deque(maxlen=5)]
    for chunk in chunks(*sizes):
        buffer.add(chunk)
        if restored:
            state, buffer = buffer.state_dict(), int_buffer(11)
            buffer.load_state_dict(state)
        for numbers, task in zip(chunk[..., 0].tolist(), plain, strict=True):
            task.extend(numbers)
        assert held(buffer) == [set(task) for task in plain]
        for size in (0, 1, 4, 5, 9):  # the oldest first
            latest = [list(task)[max(0, len(task) - size) :] for task in plain]
            assert buffer.latest(size)[..., 0].tolist() == latest
    assert buffer.sample(199).shape == buffer.sample(200).shape == (2, 100, 1)
