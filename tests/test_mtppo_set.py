"""Sparse evolutionary training: densities, exact counts, what is dropped and grown; the network
on as many rows of each task as there are."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD, Adam, RMSprop

import moe_sparse
import moore_sparse
import mtppo_set
import mtppo_set as script
import mtsac_sparse_metaworld

HIDDEN, OUTPUT = (128, 1024), (7, 128)  # a head's two layers, (out, in)
OPTIMIZERS = {  # how each is made, and its tensors of a parameter's shape
    "Adam": (partial(Adam, amsgrad=True), {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
    "fused Adam": (partial(Adam, fused=True), {"exp_avg", "exp_avg_sq"}),
    "SGD": (partial(SGD, momentum=0.9), {"momentum_buffer"}),
    "SGD without momentum": (SGD, set()),
    "RMSprop": (
        partial(RMSprop, momentum=0.9, centered=True),
        {"square_avg", "momentum_buffer", "grad_avg"},
    ),
}


def make_network(num_tasks=3, num_outputs=7, **flags):
    torch.manual_seed(0)
    return script.MultiHeadNetwork((7, 7, 3), num_tasks, num_outputs, script.Args(**flags))


def sparse_network(sparsity=0.95, epsilon=None, **shape):
    network = make_network(**shape)
    script.draw_masks(network, script.set_densities(network, sparsity, epsilon))
    return network


def random_obs(n):
    return torch.randint(0, 11, (n, 7, 7, 3), dtype=torch.uint8)


def backward(network, counts):
    """Leave a gradient of some loss on counts observations of the tasks."""
    network.zero_grad()
    network(random_obs(sum(counts)), counts).square().sum().backward()


def active_weights(network):
    """Active weights of each head: layer -> list over tasks."""
    return {name: mask.flatten(1).sum(1).tolist() for name, mask in network.masks.items()}


# The network


def plain_output(network, obs, task):
    """The output for observations of one task, layer by layer."""
    x = obs.permute(0, 3, 1, 2).float()
    convs = (network.conv1, F.relu), (network.conv2, F.relu), (network.conv3, F.tanh)
    for conv, nonlinearity in convs:
        x = F.conv2d(x, conv.weight, conv.bias)
        x = nonlinearity(F.layer_norm(x, x.shape[1:]) if network.layer_norm else x)
    x = torch.cat([x[:, :, i, j] for i in range(4) for j in range(4)], 1)  # place by place
    x = F.linear(x, network.head_hidden.weight[task], network.head_hidden.bias[task, 0])
    x = F.tanh(F.layer_norm(x, (128,)) if network.layer_norm else x)
    return F.linear(x, network.head_output.weight[task], network.head_output.bias[task, 0])


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("counts", [[4, 4, 4], [5, 0, 2], [0, 0, 3]])
def test_ragged_rows_are_each_tasks_own_in_value_and_gradient(counts, layer_norm):
    network, obs = make_network(layer_norm=layer_norm), random_obs(sum(counts))
    output = network(obs, counts)
    rows = enumerate(obs.split(counts))
    expected = torch.cat([plain_output(network, own, task) for task, own in rows if len(own)])
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    wanted = torch.randn_like(output)
    gradients = [
        torch.autograd.grad((x * wanted).sum(), list(network.parameters()))
        for x in (output, expected)
    ]
    for name, ours, plain in zip(dict(network.named_parameters()), *gradients, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4 * plain.abs().max().item())
        if name.startswith("head"):
            assert [g.abs().max() > 0 for g in ours] == [count > 0 for count in counts]


def test_counts_that_do_not_fit_are_refused():
    network, obs = make_network(), random_obs(6)
    for counts in ([2, 2, 1], [2, 2, 3], [6], [3, 3], [1, 1, 2, 2]):
        with pytest.raises((ValueError, RuntimeError)):
            network(obs, counts)


def test_masks_and_what_was_grown_are_part_of_the_state():
    network, other = sparse_network(), sparse_network()
    script.evolve(network, Adam(network.parameters()), 0.3, "random", "init")
    assert not torch.equal(other.masks["head_hidden"], network.masks["head_hidden"])
    other.load_state_dict(network.state_dict())
    assert other.masks.keys() == network.masks.keys()
    assert all(torch.equal(other.masks[name], mask) for name, mask in network.masks.items())
    kept = []
    for net in (network, other):
        torch.manual_seed(3)
        kept.append(script.evolve(net, Adam(net.parameters()), 0.3, "random", "init"))
    assert kept[0] == kept[1] > 0
    obs = random_obs(6)
    assert torch.equal(network(obs, [1, 2, 3]), other(obs, [1, 2, 3]))


# Densities


@pytest.mark.parametrize(
    "shapes, sparsity, expected",
    [
        # One head: 131072 + 896 weights, 5 % are 6598.4. ERK gives each layer a multiple of in +
        # out: 1152 and 135, so the scale is 6598.4 / 1287 = 5.12696.
        ([HIDDEN, OUTPUT], 0.95, [5.12696 * 1152 / 131072, 5.12696 * 135 / 896]),
        # The scale 10.2539 would give the output layer 1384 of its 896 weights: it is dense, and
        # the hidden layer has the rest, 13196.8 - 896
        ([HIDDEN, OUTPUT], 0.90, [12300.8 / 131072, 1.0]),
        # A critic: 131072 + 128 weights, 6560 active: 129 of 1281 parts would be 660.6 of 128
        ([HIDDEN, (1, 128)], 0.95, [6432 / 131072, 1.0]),
        # Convolutions count their kernel: 100 of 8192, 23 of 192; one scale, 10 % of 8384 left
        ([(64, 32, 2, 2), (16, 3, 2, 2)], 0.90, [838.4 / 123 * 100 / 8192, 838.4 / 123 * 23 / 192]),
        # 10220 of 1000140 weights: the first scale 10220 / 2061 = 4.96 saturates (40, 1) alone, the
        # second, 10180 / 2020 = 5.04, gives (10, 10) 100.8 of its 100 weights
        ([(1000, 1000), (10, 10), (40, 1)], 1 - 10220 / 1000140, [10080 / 1000000, 1.0, 1.0]),
    ],
)
def test_erk_densities_are_those_worked_out_by_hand(shapes, sparsity, expected):
    assert script.erk_densities(shapes, sparsity) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.95, 0.99])
def test_all_layers_together_have_the_asked_sparsity(sparsity):
    network = sparse_network(sparsity)
    active = sum(sum(layer) for layer in active_weights(network).values())
    total = 3 * (131072 + 896)
    assert active == pytest.approx((1 - sparsity) * total, abs=3)  # rounding, per head and layer


def test_epsilon_is_sets_own_density():
    # epsilon * (in + out) active weights in each layer, at most all
    active = {"head_hidden": [11 * 1152] * 3, "head_output": [896] * 3}
    assert active_weights(sparse_network(epsilon=11)) == active


def test_only_linear_layers_are_sparse_and_none_at_sparsity_0():
    network = sparse_network()
    assert network.masks.keys() == {"head_hidden", "head_output"}
    assert script.set_densities(network, 0.0, None) == script.set_densities(network, 0.0, 11) == {}


# Evolution


def test_counts_are_exact_over_200_evolutions():
    network = sparse_network(num_tasks=2)
    optimizer = Adam(network.parameters(), 0.01, fused=True)
    before = active_weights(network)
    first = {name: mask.clone() for name, mask in network.masks.items()}
    for i in range(200):
        if i % 20 == 0:
            backward(network, [8, 8])
            optimizer.step()
            script.apply_masks(network)
        regrow, grow = "gradient" if i % 2 else "random", "init" if i % 3 else "zero"
        script.evolve(network, optimizer, 0.3, regrow, grow)
        assert active_weights(network) == before
    for name, mask in network.masks.items():
        assert name == "head_output" or not torch.equal(mask, first[name])
        assert ((mask == 0) | (mask == 1)).all()
        assert (network.get_submodule(name).weight[mask == 0] == 0).all()


@pytest.mark.parametrize("layer, moved", [("head_hidden", 1772), ("head_output", 204)])
@pytest.mark.parametrize("regrow", ["random", "gradient"])
@pytest.mark.parametrize("grow", ["zero", "init"])
def test_the_smallest_are_dropped_and_as_many_inactive_places_grown(regrow, grow, layer, moved):
    """30 % of the active weights: 5906 of the hidden layer's, 692 of the output layer's 896, which
    has but 204 places left."""
    network = sparse_network()
    weights, masks = network.get_submodule(layer).weight, network.masks[layer] > 0
    before = weights.detach().clone()
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    script.evolve(network, Adam(network.parameters()), 0.3, regrow, grow)
    for task in range(3):
        old, new, weight = masks[task], network.masks[layer][task] > 0, weights[task]
        dropped, grown, kept = old & ~new, new & ~old, old & new
        assert dropped.sum() == grown.sum() == moved
        assert before[task][dropped].abs().max() <= before[task][kept].abs().min()
        assert torch.equal(weight[kept], before[task][kept])
        assert (weight[~new] == 0).all() and ((weight[grown] == 0) == (grow == "zero")).all()
        if regrow == "gradient":
            gradient = weights.grad[task].abs()
            largest = gradient[~old].sort(descending=True).values[:moved]
            assert torch.equal(gradient[grown].sort(descending=True).values, largest)


def test_grown_weights_are_drawn_as_a_layer_is_at_first():
    network = sparse_network(num_tasks=5)
    old = {name: mask.clone() for name, mask in network.masks.items()}
    script.evolve(network, Adam(network.parameters()), 0.3, "random", "init")
    for name, inputs in (("head_hidden", 1024), ("head_output", 128)):
        grown = (network.masks[name] > old[name]).flatten()
        drawn = network.get_submodule(name).weight.detach().flatten()[grown] * inputs**0.5
        n = len(drawn)
        # Kolmogorov-Smirnov against the uniform distribution on [-1, 1], 99.9 % quantile
        ranks = torch.arange(n) / n
        cdf = (drawn.sort().values + 1) / 2
        distance = max((cdf - ranks).max(), (ranks + 1 / n - cdf).max())
        assert drawn.abs().max() <= 1 and distance < 1.95 * n**-0.5


def test_first_masks_do_not_look_at_the_weights():
    network = make_network()
    magnitudes = network.head_hidden.weight.detach().abs()
    script.draw_masks(network, {"head_hidden": 0.05})
    active = magnitudes[network.masks["head_hidden"] == 1]
    error = magnitudes.std().item() / len(active) ** 0.5
    assert active.mean().item() == pytest.approx(magnitudes.mean().item(), abs=4 * error)


def test_random_growth_is_uniform_over_the_inactive_places():
    network = nn.Module()
    network.layer = script.BatchedLinear(1, 20, 10)
    network.layers, network.masks = {"layer": 1}, {}
    torch.manual_seed(0)
    script.draw_masks(network, {"layer": 0.2})
    start = network.masks["layer"].clone()
    weight = network.layer.weight.detach().clone()
    grown = torch.zeros_like(start)
    rounds, moved, inactive = 4000, 12, 160
    for _ in range(rounds):
        network.masks["layer"] = start.clone()
        with torch.no_grad():
            network.layer.weight.copy_(weight)
        script.evolve(network, Adam(network.parameters()), 0.3, "random", "zero")
        grown += (network.masks["layer"] > start).float()
    assert (grown[start == 1] == 0).all()
    expected = rounds * moved / inactive
    # Pearson's statistic, scaled for draws without replacement; its 99.9 % quantile at 159 degrees
    variance = expected * (1 - moved / inactive)
    statistic = ((grown[start == 0] - expected) ** 2 / variance).sum() * (inactive - 1) / inactive
    assert 103 < statistic < 221


@pytest.mark.parametrize("old, new", [(0.95, 0.9), (0.95, 0.98), (0.1, 0.5)])
def test_a_new_density_is_reached_after_some_evolutions(old, new):
    """As after --resume with another --sparsity."""
    network, other = sparse_network(old), sparse_network(new)
    network.densities = other.densities
    for _ in range(5):
        script.evolve(network, Adam(network.parameters()), 0.3, "random", "zero")
        assert all(((mask == 0) | (mask == 1)).all() for mask in network.masks.values())
    assert active_weights(network)["head_hidden"] == active_weights(other)["head_hidden"]


@pytest.mark.parametrize("make, remembered", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_state_of_grown_weights_is_cleared_and_the_others_kept(make, remembered):
    network = sparse_network()
    optimizer = make(network.parameters(), 1e-3)
    backward(network, [8, 8, 8])
    optimizer.step()
    script.apply_masks(network)
    for state in optimizer.state.values():
        for value in state.values():
            value.fill_(1.0)
    old = {name: mask.clone() for name, mask in network.masks.items()}
    script.evolve(network, optimizer, 0.3, "random", "zero")
    for name, parameter in network.named_parameters():
        layer, state = name.removesuffix(".weight"), optimizer.state[parameter]
        grown = torch.zeros_like(parameter, dtype=torch.bool)
        if layer in old:
            grown = network.masks[layer] > old[layer]
            assert grown.any()
        assert remembered <= state.keys()
        for key, value in state.items():  # what is not of the parameter's shape counts steps
            cleared = grown if key in remembered else torch.zeros_like(value, dtype=torch.bool)
            assert torch.equal(value, (~cleared).float())


def test_guided_growth_without_a_gradient_is_refused():
    network = sparse_network()
    network.head_hidden.weight.grad = torch.randn_like(network.head_hidden.weight)
    with pytest.raises(ValueError, match="head_output: has no gradient to grow by"):
        script.evolve(network, Adam(network.parameters()), 0.3, "gradient", "zero")


@pytest.mark.parametrize("script", [script, moe_sparse, moore_sparse, mtsac_sparse_metaworld])
def test_masks_are_made_on_the_networks_device(script):
    """meta stands for cuda: no tensor of a network may stay on the CPU."""
    flags = {} if script is mtppo_set else dict(sparsifier="set")
    for network in script.make_networks(script.Args(**flags), "meta").values():
        for layer, mask in network.masks.items():
            assert mask.is_meta and network.get_submodule(layer).grown.is_meta
        assert all(tensor.is_meta for tensor in (*network.parameters(), *network.buffers()))


# What becomes of the grown weights


def active_places(network):
    """Set of (layer, number of the weight) of all active weights."""
    flat = {name: mask.flatten() for name, mask in network.masks.items()}
    return {(name, i) for name, mask in flat.items() for i in mask.nonzero().flatten().tolist()}


@pytest.mark.parametrize("regrow", ["random", "gradient"])
@pytest.mark.parametrize("grow", ["zero", "init"])
def test_the_kept_share_is_a_plain_count(regrow, grow):
    network = sparse_network()
    optimizer = Adam(network.parameters(), 1e-2)
    grown, shares = set(), []
    for _ in range(5):
        for _ in range(3):
            backward(network, [4, 4, 4])
            optimizer.step()
            script.apply_masks(network)
        before = active_places(network)
        share = script.evolve(network, optimizer, 0.3, regrow, grow).item()
        after = active_places(network)
        if grown:
            assert share == pytest.approx(len(grown & after) / len(grown), rel=1e-5)
            shares.append(share)
        else:
            assert share != share  # NaN: nothing had been grown
        grown = after - before
    assert 0 < min(shares) < max(shares) < 1
