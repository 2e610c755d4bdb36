"""The metrics against closed forms and a plain per-sample loop, the buffer against a deque."""

import io
import math
import subprocess
import sys
from collections import deque
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

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


def test_scores_are_magnitudes_over_the_layers_mean():
    activation = torch.tensor([[1.0, -2.0, 0.0, 5.0], [-3.0, 2.0, 0.0, 3.0]])
    assert dormant_scores(activation).tolist() == [1.0, 1.0, 0.0, 2.0]  # means 2 2 0 4, mean 2


def test_a_channel_is_one_neuron():
    activation = torch.zeros(2, 3, 2, 2)
    activation[:, 0] = torch.tensor([[4.0, -4.0], [0.0, 0.0]])  # mean magnitude 2
    activation[1, 1, 1, 1] = 8.0  # 1
    assert dormant_scores(activation).tolist() == [2.0, 1.0, 0.0]


def test_neurons_that_are_not_alive_leave_the_mean():
    activation = torch.tensor([[2.0, 4.0, 100.0]])
    alive = torch.tensor([True, True, False])
    assert dormant_scores(activation, alive)[:2].tolist() == pytest.approx([2 / 3, 4 / 3])


def test_layers_side_by_side_are_scored_apart():
    torch.manual_seed(0)
    stack = torch.randn(3, 20, 5) * torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    stack[1, :, 2] *= 1e-4
    alive = torch.ones(3, 5, dtype=torch.bool)
    alive[2, 0] = False
    for masks in (None, alive):
        one_by_one = [
            dormant_scores(stack[i], None if masks is None else alive[i]) for i in (0, 1, 2)
        ]
        assert torch.equal(dormant_scores(stack, masks), torch.stack(one_by_one))
        together = dormant_ratio(
            [stack, stack[0]], 0.001, masks if masks is None else [alive, alive[0]]
        )
        assert together == pytest.approx(1 / (20 if masks is None else 19))


def test_ratio_pools_the_neurons_of_all_layers():
    one_of_two = torch.tensor([[0.0, 1.0]])
    none_of_six = torch.ones(1, 6)
    assert dormant_ratio([one_of_two, none_of_six]) == 1 / 8  # a mean of shares would be 1/4


def test_a_score_of_tau_is_dormant():
    activation = torch.tensor([[0.5, 1.5]])
    assert dormant_ratio([activation], tau=0.5) == 0.5
    assert dormant_ratio([activation], tau=0.49) == 0.0


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float16, torch.float32])
def test_scores_of_any_numbers(dtype):
    activation = torch.zeros(2, 1000, dtype=dtype)
    activation[:, 0] = 1 if not dtype.is_floating_point else torch.finfo(dtype).smallest_normal / 8
    assert dormant_scores(activation)[:2].tolist() == [1000.0, 0.0]
    if dtype.is_floating_point:
        activation.fill_(torch.finfo(dtype).max)
        assert dormant_scores(activation).tolist() == [1.0] * 1000


def test_a_silent_layer_is_dormant_as_a_whole():
    assert dormant_ratio([torch.zeros(3, 4), torch.ones(3, 4)]) == 0.5


def test_ratio_leaves_out_pruned_neurons():
    activation = torch.tensor([[0.0, 0.0, 1.0]])
    assert dormant_ratio([activation], alive=[torch.tensor([True, False, True])]) == 0.5


@pytest.mark.parametrize(
    "activations, alive",
    [
        ([], None),
        ([torch.zeros(0, 3)], None),
        ([torch.zeros(3)], None),
        ([torch.tensor([[1.0, math.nan]])], None),
        ([torch.ones(2, 3)], []),
        ([torch.ones(2, 3)], [torch.ones(4, dtype=torch.bool)]),
        ([torch.ones(2, 3)], [torch.ones(3)]),
        ([torch.ones(2, 3)], [torch.zeros(3, dtype=torch.bool)]),
    ],
)
def test_dormancy_refuses_what_it_cannot_measure(activations, alive):
    with pytest.raises(ValueError):
        dormant_ratio(activations, alive=alive)


def with_singular_values(values, n=50, d=30):
    u = torch.linalg.qr(torch.randn(n, len(values), dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(d, len(values), dtype=torch.float64)).Q
    return (u * torch.tensor(values, dtype=torch.float64)) @ v.T


def test_effective_rank_of_known_singular_values():
    torch.manual_seed(0)
    assert effective_rank(with_singular_values([70.0, 29.5, 0.3, 0.2])) == 2  # 99.5 % >= 99 %
    assert effective_rank(with_singular_values([70.0, 28.5, 1.0, 0.5])) == 3
    assert effective_rank(with_singular_values([70.0, 29.5, 0.3, 0.2]), delta=0.5) == 1
    assert effective_rank(torch.eye(100)) == 99
    assert effective_rank(torch.eye(100), delta=0) == 100
    assert effective_rank(torch.ones(8, 5)) == 1
    assert effective_rank(torch.zeros(8, 5)) == 0


@pytest.mark.parametrize(
    "features, delta",
    [
        (torch.zeros(0, 3), 0.01),
        (torch.ones(3), 0.01),
        (torch.tensor([[math.inf, 1.0]]), 0.01),
        (torch.ones(2, 2), 1.0),
    ],
)
def test_effective_rank_refuses_what_it_cannot_measure(features, delta):
    with pytest.raises(ValueError):
        effective_rank(features, delta)


class Policy(nn.Module):
    """Convolutions (one grouped), a linear layer and a layer with a weight per task."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 2)
        self.grouped = nn.Conv2d(4, 6, 2, padding=1, stride=2, groups=2, bias=False)
        self.hidden = nn.Linear(24, 5)
        self.heads = Heads(3, 5, 4)

    def forward(self, obs):  # (task, batch, 2, 4, 4)
        x = torch.relu(self.conv(obs.flatten(0, 1)))
        x = torch.tanh(self.grouped(x)).flatten(1)
        return self.heads(torch.tanh(self.hidden(x)).view(3, -1, 5))


class Heads(nn.Module):
    def __init__(self, tasks, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(tasks, outputs, inputs))
        self.bias = nn.Parameter(torch.randn(tasks, 1, outputs))

    def forward(self, x):
        return x @ self.weight.mT + self.bias


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


@pytest.mark.parametrize("masked", [False, True])
def test_fisher_trace_is_that_of_a_plain_loop(masked):
    torch.manual_seed(0)
    model, obs = Policy(), torch.randn(3, 5, 2, 4, 4)
    masks = {}
    if masked:
        layers = model.named_children()
        masks = {n: (torch.rand_like(layer.weight) > 0.5).float() for n, layer in layers}
    assert fisher_trace_on(model, obs, masks) == pytest.approx(
        plain_fisher_trace(model, obs, masks), rel=1e-5
    )


def test_fisher_trace_of_a_linear_softmax_policy():
    # grad log pi(a|s) = (e_a - pi) x^T, so the trace is E (1 - |pi|^2) (|x|^2 + 1)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 3)), torch.randn(40, 6)
    pi = model(x).softmax(-1)
    expected = ((1 - pi.square().sum(1)) * (x.square().sum(1) + 1)).mean().item()
    assert fisher_trace(model, lambda: model(x).log_softmax(-1)) == pytest.approx(
        expected, rel=1e-5
    )


def test_fisher_trace_is_not_the_norm_of_the_mean_gradient():
    # Opposite inputs: the mean gradient of each action vanishes, the trace does not.
    model = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(model.weight)
    x = torch.tensor([[3.0, 4.0], [-3.0, -4.0]])
    assert fisher_trace(nn.Sequential(model), lambda: model(x).log_softmax(-1)) == pytest.approx(
        12.5
    )


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


def residual_in_place(model, x):
    hidden = model.first(x)
    hidden += hidden.tanh()
    return model.second(hidden.relu_())


def unused_critic(model, x):
    hidden = model.first(x).relu()
    model.critic(hidden)
    return model.second(hidden)


def turned_rows(model, x):
    return model.second(model.first(x).tanh().flip(0)).flip(0)


def deep_leaky():
    return convolution(nn.Tanh(), nn.Conv2d(8, 8, 3, padding=1), nn.LeakyReLU(0.1, inplace=True))


MEASURED = {
    "ReLU in place": lambda: convolution(nn.ReLU(inplace=True)),
    "leaky ReLU in place": deep_leaky,
    "residual in place": lambda: network(residual_in_place),
    "circular": lambda: convolution(padding_mode="circular"),
    "reflect": lambda: convolution(padding_mode="reflect", padding=(2, 1)),
    "replicate": lambda: convolution(padding_mode="replicate", padding=(1, 2), stride=(2, 1)),
    "unused critic": lambda: network(unused_critic, critic=nn.Linear(9, 1)),
    "batch norm in eval": lambda: convolution(nn.BatchNorm2d(8, affine=False)).eval(),
    "turned rows": lambda: network(turned_rows),
}


@pytest.mark.parametrize("make", MEASURED.values(), ids=MEASURED)
def test_fisher_trace_of_what_people_build(make):
    torch.manual_seed(0)
    model, obs = make(), torch.randn(70, 3, 4, 4)
    plain = plain_fisher_trace(model, obs)
    assert fisher_trace_on(model, obs) == pytest.approx(plain, rel=1e-5)


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
    model, obs = network(lambda m, x: m.second(m.first(x).tanh())), torch.randn(70, 3, 4, 4)
    plain = plain_fisher_trace(model, obs)
    with torch.autocast("cpu", torch.bfloat16):
        assert fisher_trace_on(model, obs) == pytest.approx(plain, rel=2e-2)


class Scaled(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, 3 * self.weight, self.bias)


class Tuple(nn.Linear):
    def forward(self, x):
        return super().forward(x), None


class WeightPerRow(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 9, 48))

    def forward(self, x):
        return (self.weight[torch.arange(len(x)) % 2] @ x[..., None])[..., 0]


def pruned():
    conv = nn.Conv2d(3, 8, 3)
    prune.random_unstructured(conv, "weight", amount=0.5)
    return convolution(conv=conv)


def spectral_norm(spectral_norm):
    return convolution(conv=spectral_norm(nn.Conv2d(3, 8, 3)).eval())


def tied(kind):
    layers = dict(second=nn.Linear(9, 9), third=nn.Linear(9, 9))
    setattr(layers["third"], kind, getattr(layers["second"], kind))
    return network(lambda m, x: m.third(m.second(m.first(x).tanh()).tanh()), **layers)


def scaled_by_itself(model, x):
    return model.second(model.first(x)) * model.first.weight.square().sum()


def one_for_all(model, x):  # row 0 acts on every sample, the other rows on none
    return model.second((x[:, :9] + model.first(x)[:1]).tanh())


def bare(kind):
    model = network(lambda m, x: m.second(m.first(x)) * getattr(m, kind))
    setattr(model, kind, nn.Parameter(torch.ones(4)))
    return model


def lstm(model, x):
    return model.second(model.lstm(x.view(-1, 3, 16))[0][:, -1])


def frozen_part(model, x):
    with torch.no_grad():
        hidden = model.first(x)
    return model.second(hidden)


def frozen():
    return convolution().requires_grad_(False)


def infinite_slope(model, x):
    hidden = model.first(x)
    return model.second((hidden - hidden.detach()).sqrt())


REFUSED = {
    "padding by name": (lambda: convolution(padding="same"), "layer 0"),
    "pruned": (pruned, "layer 0"),
    "spectral norm": (lambda: spectral_norm(nn.utils.spectral_norm), "layer 0"),
    "parametrized": (lambda: spectral_norm(nn.utils.parametrizations.spectral_norm), "layer 0"),
    "scaled": (lambda: convolution(conv=Scaled(3, 8, 3)), "layer 0"),
    "tied weights": (lambda: tied("weight"), "layer second"),
    "tied biases": (lambda: tied("bias"), "layer second"),
    "weight used elsewhere": (lambda: network(scaled_by_itself), "layer first"),
    "batch norm": (lambda: convolution(nn.BatchNorm2d(8, affine=False)), "layer 0"),
    "sums over samples": (
        lambda: network(lambda m, x: m.second(m.first(x).cumsum(0).tanh())),
        "layer first",
    ),
    "one row for all samples": (lambda: network(one_for_all), "layer first"),
    "LSTM": (lambda: network(lstm, lstm=nn.LSTM(16, 9, batch_first=True)), "layer lstm"),
    "bare parameter": (lambda: bare("temperature"), "temperature"),
    "bare weight": (lambda: bare("weight"), "layer "),
    "embedding": (
        lambda: network(lambda m, x: m.second(m.first((x > 0).sum(1))), first=nn.Embedding(49, 9)),
        "layer first",
    ),
    "tuple": (
        lambda: network(lambda m, x: m.second(m.first(x)[0]), first=Tuple(48, 9)),
        "layer first",
    ),
    "keyword": (lambda: network(lambda m, x: m.second(m.first(input=x))), "layer first"),
    "weight per row": (
        lambda: network(lambda m, x: m.second(m.first(x)), first=WeightPerRow()),
        "layer first",
    ),
    "frozen": (frozen, "requires_grad_"),
    "frozen part": (lambda: network(frozen_part), "layer first"),
    "infinite gradient": (lambda: network(infinite_slope), "layer first"),
    "no action": (lambda: network(lambda m, x: m.second(m.first(x))[:, :0]), "log-prob"),
}


@pytest.mark.parametrize("make, message", REFUSED.values(), ids=REFUSED)
def test_fisher_trace_refuses_what_it_cannot_measure(make, message):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=message):
        fisher_trace_on(make(), torch.randn(6, 3, 4, 4))


@pytest.mark.parametrize("name", ["0.weight", "module.0", "1"])
def test_fisher_trace_refuses_a_mask_of_no_layer(name):
    with pytest.raises(ValueError, match=f"mask {name}"):
        fisher_trace_on(convolution(), torch.randn(6, 3, 4, 4), {name: torch.ones(8, 3, 3, 3)})


def test_fisher_trace_refuses_a_mask_of_another_shape():
    with pytest.raises(ValueError, match="mask 0"):
        fisher_trace_on(convolution(), torch.randn(6, 3, 4, 4), {"0": torch.ones(8, 1, 3, 3)})


def test_fisher_trace_refuses_a_compiled_model():
    model, obs = convolution(), torch.randn(6, 3, 4, 4)
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(ValueError, match="mask 0"):
        fisher_trace_on(compiled, obs, {"0": torch.ones(8, 3, 3, 3)})
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


def test_fisher_trace_refuses_layers_that_are_not_called_once_for_each_sample():
    x = torch.randn(4, 3)
    for model in (
        nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)),  # a layer it does not know
        nn.Sequential(nn.Tanh()),  # no parameters
    ):
        with pytest.raises(ValueError):
            fisher_trace(model, lambda model=model: model(x).log_softmax(-1))
    linear = nn.Linear(3, 3)
    shared = nn.Sequential(linear, linear)  # called twice
    unused = nn.ModuleList([linear, nn.Linear(3, 3)])
    one_row = nn.Sequential(nn.Linear(3, 3))  # one row serves four samples
    for model, policy in (
        (shared, lambda: shared(x)),
        (unused, lambda: linear(x)),
        (one_row, lambda: one_row(x[:1]).expand(4, 3)),
        (linear, lambda: linear(x * math.nan)),
        (linear, lambda: linear(x[:0])),
    ):
        with pytest.raises(ValueError):
            fisher_trace(model, lambda policy=policy: policy().log_softmax(-1))


def test_fisher_trace_of_the_whole_actor_fits_in_a_gigabyte():
    code = """
import resource, torch
from mtppo_gmp import Args, MultiHeadNetwork
from plasticity_metrics import fisher_trace
actor = MultiHeadNetwork((7, 7, 3), 5, 7, Args())
obs = torch.randint(0, 11, (5 * 205, 7, 7, 3), dtype=torch.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fisher_trace(actor, lambda: actor(obs, [205] * 5).log_softmax(-1))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert int(grown.stdout) * 1024 < 2**30


class Masked(nn.Module):
    """A convolution, a linear layer, one with a weight per task and an output, masked by hand."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 2)
        self.linear = nn.Linear(3, 4)
        self.heads = Heads(2, 4, 3)
        self.output = nn.Linear(3, 2)
        self.layers = dict(conv=1, linear=1, heads=2, output=1)
        conv, heads = torch.zeros(3, 2, 2, 2), torch.ones(2, 3, 4)
        conv[0, 1, 0, 1] = conv[2] = 1  # 9 of 24; the second channel is not alive
        heads[0, 1] = heads[1, 0] = heads[1, 2, 1:] = 0  # 13 of 24
        self.masks = {"conv": conv, "heads": heads, "output": torch.zeros(2, 3)}


def test_alive_neurons_have_an_unmasked_incoming_weight():
    conv, linear, heads = alive_neurons(Masked())
    assert conv.tolist() == [True, False, True]
    assert linear.tolist() == [True] * 4  # without a mask
    assert heads.tolist() == [[True, False, True], [False, True, True]]
    assert {conv.dtype, linear.dtype, heads.dtype} == {torch.bool}
    dense = Masked()
    dense.masks = {}
    assert [alive.shape for alive in alive_neurons(dense)] == [(3,), (4,), (2, 3)]
    assert all(alive.all() for alive in alive_neurons(dense))


def test_sparsity_is_the_share_of_masked_weights():
    actor, critic = Masked(), Masked()
    critic.masks = {"linear": torch.tensor([[1.0, 0.0, 1.0]]).expand(4, 3)}
    with torch.no_grad():
        critic.conv.weight.zero_()  # zero, but not masked
    assert measure_sparsity({"actor": actor, "critic": critic}) == {
        "sparsity/actor": (15 + 11 + 6) / 66,
        "sparsity/actor/conv": 15 / 24,
        "sparsity/actor/linear": 0,
        "sparsity/actor/heads": 11 / 24,
        "sparsity/actor/output": 1,
        "sparsity/critic": 4 / 66,
        "sparsity/critic/conv": 0,
        "sparsity/critic/linear": 4 / 12,
        "sparsity/critic/heads": 0,
        "sparsity/critic/output": 0,
    }


@pytest.mark.parametrize("name, mask", [("conv.weight", (3, 2, 2, 2)), ("conv", (3, 1, 1, 1))])
def test_masks_must_be_those_of_the_layers(name, mask):
    network = Masked()
    network.masks[name] = torch.ones(mask)
    with pytest.raises(ValueError, match=f"mask {name}"):
        alive_neurons(network)
    with pytest.raises(ValueError, match=f"mask {name}"):
        measure_sparsity({"actor": network})


def held(buffer):
    """What a buffer of few observations (1,) holds of each task: far more draws than those."""
    return [set(task.flatten().tolist()) for task in buffer.sample(500)]


def chunks(*sizes, start=0):
    """(task, n, 1) for each n: one task counts from start on, the other is always 1000 ahead."""
    for n in sizes:
        yield torch.arange(start, start + n)[None, :, None] + torch.tensor([0, 1000])[:, None, None]
        start += n


def test_buffer_keeps_the_latest_of_each_task():
    buffer = ObservationBuffer(11, 2, (1,), torch.int64, "cpu")  # 5 per task
    with pytest.raises(ValueError):
        buffer.sample(3)
    for chunk in chunks(1, 1, 1):
        buffer.add(chunk)
    assert held(buffer) == [{0, 1, 2}, {1000, 1001, 1002}]
    for chunk in chunks(*[1] * 9, start=3):
        buffer.add(chunk)
    assert buffer.sample(199).shape == buffer.sample(200).shape == (2, 100, 1)
    assert held(buffer) == [{7, 8, 9, 10, 11}, {1007, 1008, 1009, 1010, 1011}]


@pytest.mark.parametrize(
    "sizes",
    [
        (3, 3, 3, 3, 3),  # wraps around at every place
        (5, 1, 5, 4),  # exactly the capacity
        (2, 7, 1, 1, 1),  # more than the capacity
        (12, 3, 11, 2, 25),
        (4, 0, 2),
    ],
)
def test_buffer_is_a_deque_per_task(sizes):
    buffer = ObservationBuffer(10, 2, (1,), torch.int64, "cpu")
    plain = deque(maxlen=5), deque(maxlen=5)
    for chunk in chunks(*sizes):
        buffer.add(chunk)
        for numbers, task in zip(chunk.flatten(1).tolist(), plain, strict=True):
            task.extend(numbers)
        assert held(buffer) == [set(task) for task in plain]
        for size in (0, 1, 4, 5, 9):  # the oldest first
            latest = [list(task)[max(0, len(task) - size) :] for task in plain]
            assert buffer.latest(size)[..., 0].tolist() == latest


@pytest.mark.parametrize("before", [3, 7])
def test_a_buffer_goes_on_from_its_state(before):
    buffer, other = (ObservationBuffer(10, 2, (1,), torch.int64, "cpu") for _ in range(2))
    buffer.add(next(chunks(before)))
    file = io.BytesIO()
    torch.save(buffer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert held(other) == held(buffer)
    for chunk in chunks(1, 3, 1, start=before):
        buffer.add(chunk)
        other.add(chunk)
        torch.manual_seed(0)
        drawn = buffer.sample(20)
        torch.manual_seed(0)
        assert torch.equal(other.sample(20), drawn)  # slot by slot
    latest = range(before, before + 5)
    assert held(other) == [{*latest}, {1000 + i for i in latest}]


def test_buffer_refuses_a_capacity_below_one_per_task():
    with pytest.raises(ValueError):
        ObservationBuffer(2, 3, (1,), torch.int64, "cpu")
