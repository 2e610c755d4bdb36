"""Mixture of experts and orthogonal experts against a loop over plain experts, and against QR."""

import pytest
import torch
from torch import nn

import moe_sparse
import moore_sparse
from moe_sparse import MixtureOfExperts
from moore_sparse import MixtureOfOrthogonalExperts, gram_schmidt

OBS_SHAPE = (7, 7, 3)
NETWORKS = [(moe_sparse, MixtureOfExperts), (moore_sparse, MixtureOfOrthogonalExperts)]


def make_network(script, network, num_experts=3, num_tasks=4, **flags):
    torch.manual_seed(0)
    return network(OBS_SHAPE, num_tasks, 7, script.Args(num_experts=num_experts, **flags))


def random_obs(*shape):
    return torch.randint(0, 11, (*shape, *OBS_SHAPE), dtype=torch.uint8)


def plain_features(network, obs, task, mix):
    """The mixed features of one task's observations, an expert and a sample at a time."""
    layer_norm = network.layer_norm

    def norm(*shape):
        return nn.LayerNorm(shape) if layer_norm else nn.Identity()

    experts = []
    for i in range(network.num_experts):
        convs = []
        for conv, inputs, outputs in (
            (network.conv1, 3, 16),
            (network.conv2, 16, 32),
            (network.conv3, 32, 64),
        ):
            plain = nn.Conv2d(inputs, outputs, 2)
            with torch.no_grad():
                plain.weight.copy_(conv.weight[i * outputs : (i + 1) * outputs])
                plain.bias.copy_(conv.bias[i * outputs : (i + 1) * outputs])
            convs.append(plain)
        trunk = nn.Sequential(
            *(convs[0], norm(16, 6, 6), nn.ReLU()),
            *(convs[1], norm(32, 5, 5), nn.ReLU()),
            *(convs[2], norm(64, 4, 4), nn.Flatten()),
        )
        experts.append(trunk(obs.permute(0, 3, 1, 2).float()))
    rows = []
    for sample in torch.stack(experts, 1):  # (k, 1024)
        if mix:
            q, r = torch.linalg.qr(sample.double().T)  # orthonormal columns, up to their signs
            basis = (q * r.diagonal().sign()).T.float()
            sample = (1 - mix) * sample + mix * basis
        weights = network.task_encoder.weight[:, task]  # of the one-hot task
        rows.append(torch.tanh(sum(w * f for w, f in zip(weights, sample, strict=True))))
    return torch.stack(rows)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("mix", [None, 0.0, 0.3, 1.0])
def test_network_is_a_loop_over_plain_experts(mix, layer_norm):
    flags = dict(layer_norm=layer_norm)
    if mix is None:
        network = make_network(moe_sparse, MixtureOfExperts, **flags)
    else:
        network = make_network(
            moore_sparse, MixtureOfOrthogonalExperts, orthogonal_mix=mix, **flags
        )
    obs = random_obs(4, 5)
    (*_, hidden), features, output = network.activations(obs)
    for task in range(4):
        expected = plain_features(network, obs[task], task, mix)
        torch.testing.assert_close(features[task], expected, rtol=1e-3, atol=1e-4)
        inner = nn.functional.linear(
            features[task], network.head_hidden.weight[task], network.head_hidden.bias[task, 0]
        )
        inner = torch.tanh(nn.functional.layer_norm(inner, (128,)) if layer_norm else inner)
        torch.testing.assert_close(hidden[task], inner, rtol=1e-4, atol=1e-5)
        expected = nn.functional.linear(
            inner, network.head_output.weight[task], network.head_output.bias[task, 0]
        )
        torch.testing.assert_close(output[task], expected, rtol=1e-4, atol=1e-5)


# Gram-Schmidt


def assert_orthonormal(basis):
    gram = basis.double() @ basis.double().mT
    assert (gram - torch.eye(basis.shape[-2])).abs().max() < 1e-5


@pytest.mark.parametrize("k", [1, 2, 3, 4, 20])
def test_gram_schmidt_is_qr(k):
    torch.manual_seed(0)
    features = torch.randn(5, 6, k, 50)
    basis = gram_schmidt(features)
    q, r = torch.linalg.qr(features.double().mT)
    expected = (q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)).mT.float()
    torch.testing.assert_close(basis, expected, rtol=1e-4, atol=1e-5)
    assert_orthonormal(basis)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e10])
@pytest.mark.parametrize("apart", [1.0, 1e-2, 1e-4])
def test_any_independent_features_become_orthonormal(scale, apart):
    torch.manual_seed(0)
    nearly_parallel = torch.randn(30, 1, 1024) + apart * torch.randn(30, 4, 1024)
    assert_orthonormal(gram_schmidt(scale * nearly_parallel))


def test_its_gradient_is_that_of_the_formula():
    torch.manual_seed(0)
    features = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gram_schmidt, features)


def test_dependent_and_zero_features_are_finite_in_value_and_gradient():
    torch.manual_seed(0)
    a, b = torch.randn(2, 8, 100)
    zero = torch.zeros(8, 100)
    dependent = [zero, zero], [a, a], [a, -2 * a, b], [zero, a, b], [a, b, a - 3 * b], [a, zero]
    for rows in (*dependent, [1e-15 * a, b], [1e-30 * a, 1e-30 * b]):
        features = torch.stack(rows, 1).requires_grad_()
        basis = gram_schmidt(features)
        (basis * torch.randn_like(basis)).sum().backward()
        assert basis.isfinite().all() and features.grad.isfinite().all()
        assert features.grad.abs().max() < 100  # rounding is not amplified
        gram = basis @ basis.mT  # every direction is a unit or nothing, and they are orthogonal
        lengths = gram.diagonal(dim1=1, dim2=2)
        assert ((lengths - 1).abs().lt(1e-5) | (lengths == 0)).all()
        torch.testing.assert_close(gram, torch.diag_embed(lengths), atol=1e-5, rtol=0)
        rank = torch.linalg.matrix_rank(features.detach().double(), atol=1e-12, rtol=1e-6)
        assert torch.equal(lengths.round().sum(1).long(), rank)


def test_more_experts_than_features_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 4, 3\)"):
        gram_schmidt(torch.randn(2, 4, 3))


# Sparsifiers and metrics on experts


@pytest.mark.parametrize("script, network", NETWORKS)
def test_each_expert_and_each_head_is_pruned_apart(script, network):
    network = make_network(script, network)
    script.prune(network, 0.9, "layer")
    assert network.masks.keys() == network.layers.keys()  # the task encoder stays dense
    for name, mask in network.masks.items():
        parts = 4 if name.startswith("head") else 3
        size = mask.numel() // parts
        zeros = (mask.view(parts, -1) == 0).sum(1).tolist()
        assert zeros == [round(0.9 * size)] * parts
        assert (network.get_submodule(name).weight[mask == 0] == 0).all()
    assert (network.task_encoder.weight != 0).all()


@pytest.mark.parametrize("script, network", NETWORKS)
def test_set_leaves_convolutions_and_task_encoder_dense(script, network):
    network = make_network(script, network)
    densities = script.set_densities(network, 0.95, None)
    script.draw_masks(network, densities)
    script.evolve(network, torch.optim.Adam(network.parameters()), densities, 0.3, "random")
    assert network.masks.keys() == {"head_hidden", "head_output"}
    zeros = sum((mask == 0).sum().item() for mask in network.masks.values())
    assert zeros / (4 * (131072 + 896)) == pytest.approx(0.95, abs=1e-5)


@pytest.mark.parametrize("script, network", NETWORKS)
def test_metrics_count_each_experts_channels(script, network):
    args = script.Args()
    networks = {"actor": make_network(script, network), "critic": make_network(script, network)}
    obs = random_obs(4, 64)
    neurons = 3 * (16 + 32 + 64) + 4 * 128
    before = script.measure_plasticity(networks, obs, args)
    with torch.no_grad():  # the second expert's fifth channel of the last convolution
        networks["actor"].conv3.weight[64 + 4] = networks["actor"].conv3.bias[64 + 4] = 0
    after = script.measure_plasticity(networks, obs, args)
    grown = (after["actor_dormant_ratio"] - before["actor_dormant_ratio"]) * neurons
    assert grown == pytest.approx(1, abs=1e-3)
    features = networks["actor"].activations(obs)[1].flatten(0, 1).detach().double()
    values = torch.linalg.svdvals(features)
    rank = int((values.cumsum(0) / values.sum() < 0.99).sum()) + 1
    assert after["actor_effective_rank"] == rank


@pytest.mark.parametrize("script, network", NETWORKS)
def test_fisher_trace_of_experts_is_that_of_a_plain_loop(script, network):
    network, obs = make_network(script, network, num_experts=2, num_tasks=2), random_obs(2, 2)
    script.prune(network, 0.5, "layer")
    total = 0.0
    for log_probs in network(obs).log_softmax(-1).flatten(0, 1):
        for log_prob in log_probs:
            network.zero_grad()
            log_prob.backward(retain_graph=True)
            for name, p in network.named_parameters():
                mask = network.masks.get(name.removesuffix(".weight"), 1.0)
                total += log_prob.exp().item() * (p.grad * mask).square().sum().item()
    trace = script.fisher_trace(network, lambda: network(obs).log_softmax(-1), network.masks)
    assert trace == pytest.approx(total / 4, rel=1e-4)
