"""Sparse evolutionary training: densities, exact counts, what is dropped and grown."""

import pytest
import torch
from torch import nn
from torch.optim import Adam

import mtppo_set as script

HIDDEN, OUTPUT = (128, 1024), (7, 128)  # a head's two layers, (out, in)


def make_network(num_tasks=3, num_outputs=7):
    torch.manual_seed(0)
    return script.MultiHeadNetwork((7, 7, 3), num_tasks, num_outputs, False)


def sparse_network(sparsity=0.95, epsilon=None, **shape):
    network = make_network(**shape)
    densities = script.set_densities(network, sparsity, epsilon)
    script.draw_masks(network, densities)
    return network, densities


def counts(network):
    """Active weights of each head: layer -> list over tasks."""
    return {name: mask.flatten(1).sum(1).tolist() for name, mask in network.masks.items()}


# Densities, worked out by hand


def test_erk_at_95_percent():
    # One head: 131072 + 896 weights, 5 % are 6598.4. ERK gives each layer a multiple of in + out:
    # 1152 and 135, so the scale is 6598.4 / 1287 = 5.12696.
    densities = script.erk_densities([HIDDEN, OUTPUT], 0.95)
    assert densities == pytest.approx([5.12696 * 1152 / 131072, 5.12696 * 135 / 896], rel=1e-5)
    assert densities[1] == pytest.approx(0.77248, abs=1e-5)


def test_erk_at_90_percent_saturates_the_output_layer():
    # The scale 10.2539 would give the output layer 1384 of its 896 weights: it is dense, and the
    # hidden layer has the rest, 13196.8 - 896
    assert script.erk_densities([HIDDEN, OUTPUT], 0.90) == pytest.approx([12300.8 / 131072, 1.0])


def test_erk_of_the_critic_saturates_at_95_percent():
    # 131072 + 128 weights, 6560 active: 129 of 1281 parts would be 660.6 of 128 weights
    assert script.erk_densities([HIDDEN, (1, 128)], 0.95) == pytest.approx([6432 / 131072, 1.0])


def test_erk_of_a_convolution_counts_its_kernel():
    # (64, 32, 2, 2): sum 100, product 8192; (16, 3, 2, 2): 23 of 192; one scale, 10 % of 8384 left
    scale = 838.4 / 123
    expected = [scale * 100 / 8192, scale * 23 / 192]
    assert script.erk_densities([(64, 32, 2, 2), (16, 3, 2, 2)], 0.90) == pytest.approx(expected)


def test_saturation_can_follow_from_saturation():
    # 10220 of 1000140 weights: the first scale 10220 / 2061 = 4.96 saturates (40, 1) alone, the
    # second, 10180 / 2020 = 5.04, gives (10, 10) 100.8 of its 100 weights
    shapes = [(1000, 1000), (10, 10), (40, 1)]
    densities = script.erk_densities(shapes, 1 - 10220 / 1000140)
    assert densities == pytest.approx([10080 / 1000000, 1.0, 1.0])


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.95, 0.99])
def test_all_layers_together_have_the_asked_sparsity(sparsity):
    network, _ = sparse_network(sparsity)
    active = sum(sum(layer) for layer in counts(network).values())
    total = 3 * (131072 + 896)
    assert active == pytest.approx((1 - sparsity) * total, abs=3)  # rounding, per head and layer


def test_epsilon_is_sets_own_density():
    # epsilon * (in + out) active weights in each layer, at most all
    network, densities = sparse_network(epsilon=11)
    assert counts(network) == {"head_hidden": [11 * 1152] * 3, "head_output": [896] * 3}
    assert densities["head_output"] == 1.0
    measured = script.measure_sparsity(network)
    assert measured["/head_hidden"] == pytest.approx(1 - 11 * 1152 / 131072)


def test_only_linear_layers_are_sparse_and_none_at_sparsity_0():
    network, _ = sparse_network()
    assert network.masks.keys() == {"head_hidden", "head_output"}
    assert script.set_densities(network, 0.0, None) == script.set_densities(network, 0.0, 11) == {}


# Evolution


def test_counts_are_exact_over_1000_evolutions():
    network, densities = sparse_network(num_tasks=2)
    optimizer = Adam(network.parameters(), 0.01, fused=True)
    before = counts(network)
    first = {name: mask.clone() for name, mask in network.masks.items()}
    for i in range(1000):
        if i % 100 == 0:
            optimizer.zero_grad()
            network(torch.randint(0, 11, (2, 8, 7, 7, 3))).square().sum().backward()
            optimizer.step()
            script.apply_masks(network)
        regrow = "gradient" if i % 2 else "random"
        script.evolve(network, optimizer, densities, 0.3, regrow)
        assert counts(network) == before
    for name, mask in network.masks.items():
        assert name == "head_output" or not torch.equal(mask, first[name])
        assert ((mask == 0) | (mask == 1)).all()
        assert (network.get_submodule(name).weight[mask == 0] == 0).all()


@pytest.mark.parametrize("regrow", ["random", "gradient"])
def test_the_smallest_are_dropped_and_as_many_inactive_places_grown(regrow):
    network, densities = sparse_network()
    layer, old = network.head_hidden, network.masks["head_hidden"].bool()
    weight = layer.weight.detach().clone()
    layer.weight.grad = torch.randn_like(weight)
    script.evolve(network, Adam(network.parameters()), densities, 0.3, regrow)
    new = network.masks["head_hidden"].bool()
    for task in range(3):
        active = old[task].sum().item()
        dropped, grown = old[task] & ~new[task], new[task] & ~old[task]
        assert dropped.sum() == grown.sum() == round(0.3 * active)
        kept = old[task] & new[task]
        assert weight[task][dropped].abs().max() <= weight[task][kept].abs().min()
        assert torch.equal(layer.weight[task][kept], weight[task][kept])
        assert (layer.weight[task][grown] == 0).all()  # grown weights start at zero
        if regrow == "gradient":
            gradient = layer.weight.grad[task].abs()
            passed_over = ~old[task] & ~new[task]
            assert gradient[grown].min() >= gradient[passed_over].max()


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
        script.evolve(network, Adam(network.parameters()), {"layer": 0.2}, 0.3, "random")
        grown += (network.masks["layer"] > start).float()
    assert (grown[start == 1] == 0).all()
    expected = rounds * moved / inactive
    # Pearson's statistic, scaled for draws without replacement; its 99.9 % quantile at 159 degrees
    variance = expected * (1 - moved / inactive)
    statistic = ((grown[start == 0] - expected) ** 2 / variance).sum() * (inactive - 1) / inactive
    assert 103 < statistic < 221


def test_moments_of_grown_weights_are_cleared_and_the_others_kept():
    network, densities = sparse_network()
    optimizer = Adam(network.parameters(), 1e-3, fused=True)
    network(torch.randint(0, 11, (3, 8, 7, 7, 3))).square().sum().backward()
    optimizer.step()
    for state in optimizer.state.values():
        state["exp_avg"].fill_(1.0)
        state["exp_avg_sq"].fill_(1.0)
    old = {name: mask.clone() for name, mask in network.masks.items()}
    script.evolve(network, optimizer, densities, 0.3, "random")
    for name, mask in network.masks.items():
        grown = (mask == 1) & (old[name] == 0)
        state = optimizer.state[network.get_submodule(name).weight]
        for moment in (state["exp_avg"], state["exp_avg_sq"]):
            assert torch.equal(moment == 0, grown) and grown.any()


def test_a_nearly_dense_layer_swaps_what_it_can():
    network, densities = sparse_network()
    # 692 of 896 are active; 30 % of them are 208, the inactive are only 204
    old = network.masks["head_output"].clone()
    script.evolve(network, Adam(network.parameters()), densities, 0.3, "random")
    new = network.masks["head_output"]
    assert ((new == 1) & (old == 0)).sum((1, 2)).tolist() == [204] * 3


def test_before_the_first_update_guided_growth_is_random():
    network, densities = sparse_network()
    assert script.dense_gradients(network) == {}
    torch.manual_seed(3)
    script.evolve(network, Adam(network.parameters()), densities, 0.3, "gradient")
    guided = network.masks["head_hidden"]
    network, densities = sparse_network()
    torch.manual_seed(3)
    script.evolve(network, Adam(network.parameters()), densities, 0.3, "random")
    assert torch.equal(guided, network.masks["head_hidden"])
