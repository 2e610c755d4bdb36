"""Mixture of experts and orthogonal experts against a loop over plain experts, and against QR."""

import re

import pytest
import torch
import torch.nn.functional as F

import moe_sparse
import moore_sparse
from moe_sparse import MixtureOfExperts
from moore_sparse import MixtureOfOrthogonalExperts, gram_schmidt

OBS_SHAPE = (7, 7, 3)
NETWORKS = {moe_sparse: MixtureOfExperts, moore_sparse: MixtureOfOrthogonalExperts}
both_scripts = pytest.mark.parametrize("script", NETWORKS, ids=lambda s: s.__name__)


def make_network(script, num_experts=3, num_tasks=4, **flags):
    torch.manual_seed(0)
    args = script.Args(num_experts=num_experts, **flags)
    return NETWORKS[script](OBS_SHAPE, num_tasks, 7, args)


def random_obs(*shape):
    return torch.randint(0, 11, (*shape, *OBS_SHAPE), dtype=torch.uint8)


def plain_features(network, obs, task, mix):
    """The mixed features of one task's observations, an expert and a sample at a time."""
    experts = []
    for i in range(network.num_experts):
        x = obs.permute(0, 3, 1, 2).float()
        for conv, outputs in ((network.conv1, 16), (network.conv2, 32), (network.conv3, 64)):
            own = slice(i * outputs, (i + 1) * outputs)
            x = F.conv2d(x, conv.weight[own], conv.bias[own])
            x = F.layer_norm(x, x.shape[1:]) if network.layer_norm else x
            x = x if conv is network.conv3 else F.relu(x)
        experts.append(x.flatten(1))
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
@pytest.mark.parametrize("counts", [[5, 5, 5, 5], [3, 0, 6, 1], [0, 0, 4, 0]])
def test_network_is_a_loop_over_plain_experts(counts, mix, layer_norm):
    """Each task's rows alone, in value and gradient, also where a task has none."""
    script, flags = (moe_sparse, {}) if mix is None else (moore_sparse, dict(orthogonal_mix=mix))
    network = make_network(script, layer_norm=layer_norm, **flags)
    obs = random_obs(sum(counts))
    hidden, features, output = network.activations(obs, counts)
    assert torch.equal(network(obs, counts), output)
    assert hidden[-1].shape == (4, max(counts), 128)
    plain = []  # outputs
    for task, rows in enumerate(torch.arange(sum(counts)).split(counts)):
        if not len(rows):
            continue
        expected = plain_features(network, obs[rows], task, mix)
        torch.testing.assert_close(features[rows], expected, rtol=1e-3, atol=1e-4)
        inner = expected @ network.head_hidden.weight[task].T + network.head_hidden.bias[task]
        inner = torch.tanh(F.layer_norm(inner, (128,)) if layer_norm else inner)
        torch.testing.assert_close(hidden[-1][task, : len(rows)], inner, rtol=1e-4, atol=1e-5)
        expected = inner @ network.head_output.weight[task].T + network.head_output.bias[task]
        torch.testing.assert_close(output[rows], expected, rtol=1e-4, atol=1e-5)
        plain.append(expected)
    wanted = torch.randn_like(output)
    gradients = [
        torch.autograd.grad((x * wanted).sum(), list(network.parameters()))
        for x in (output, torch.cat(plain))
    ]
    for name, ours, loop in zip(dict(network.named_parameters()), *gradients, strict=True):
        torch.testing.assert_close(ours, loop, rtol=1e-3, atol=1e-4 * loop.abs().max().item())
        by_task = ours.T if name == "task_encoder.weight" else ours
        if not name.startswith("conv"):
            assert [g.abs().max() > 0 for g in by_task] == [count > 0 for count in counts]


@both_scripts
def test_benchmarks_have_the_papers_numbers_of_experts(script):
    assert script.NUM_EXPERTS == {"MT3": 2, "MT5": 3, "MT7": 4}


# Gram-Schmidt


@pytest.mark.parametrize("k", [1, 2, 3, 4, 20])
def test_gram_schmidt_is_qr(k):
    torch.manual_seed(0)
    features = torch.randn(5, 6, k, 50)
    basis = gram_schmidt(features)
    q, r = torch.linalg.qr(features.double().mT)
    expected = (q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)).mT.float()
    torch.testing.assert_close(basis, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e10])
@pytest.mark.parametrize("apart", [1.0, 1e-2, 1e-4])
def test_any_independent_features_become_orthonormal(scale, apart):
    torch.manual_seed(0)
    nearly_parallel = torch.randn(30, 1, 1024) + apart * torch.randn(30, 4, 1024)
    basis = gram_schmidt(scale * nearly_parallel).double()
    assert (basis @ basis.mT - torch.eye(4)).abs().max() < 1e-5


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


def test_more_experts_than_features_and_half_precision_are_refused():
    for features in (torch.randn(2, 4, 3), torch.randn(2, 4, 30).half()):
        given = re.escape(f"{features.dtype} {tuple(features.shape)}")
        with pytest.raises(ValueError, match=given):
            gram_schmidt(features)


# Sparsifiers and metrics on experts


@both_scripts
def test_each_expert_and_each_head_is_pruned_apart(script):
    network = make_network(script)
    script.prune(network, 0.9, "layer")
    assert network.masks.keys() == network.layers.keys()  # the task encoder stays dense
    for name, mask in network.masks.items():
        parts = 4 if name.startswith("head") else 3
        size = mask.numel() // parts
        zeros = (mask.view(parts, -1) == 0).sum(1).tolist()
        assert zeros == [round(0.9 * size)] * parts
        assert (network.get_submodule(name).weight[mask == 0] == 0).all()
    assert (network.task_encoder.weight != 0).all()


@both_scripts
def test_metrics_count_each_experts_channels(script):
    args = script.Args()
    networks = {"actor": make_network(script), "critic": make_network(script)}
    obs = random_obs(4, 64)
    neurons = 3 * (16 + 32 + 64) + 4 * 128
    before = script.measure_plasticity(networks, obs, args)
    with torch.no_grad():  # the second expert's fifth channel of the last convolution
        networks["actor"].conv3.weight[64 + 4] = networks["actor"].conv3.bias[64 + 4] = 0
    after = script.measure_plasticity(networks, obs, args)
    tag = "plasticity/actor_dormant_ratio"
    assert (after[tag] - before[tag]) * neurons == pytest.approx(1, abs=1e-3)


@both_scripts
def test_fisher_trace_of_experts_is_that_of_a_plain_loop(script):
    network, obs = make_network(script, num_experts=2, num_tasks=2), random_obs(2, 2)
    script.prune(network, 0.5, "layer")
    total = 0.0
    for log_probs in network(obs.flatten(0, 1), [2, 2]).log_softmax(-1):
        for log_prob in log_probs:
            network.zero_grad()
            log_prob.backward(retain_graph=True)
            for name, p in network.named_parameters():
                mask = network.masks.get(name.removesuffix(".weight"), 1.0)
                total += log_prob.exp().item() * (p.grad * mask).square().sum().item()
    metrics = script.measure_plasticity({"actor": network}, obs, script.Args())
    assert metrics["plasticity/fisher_trace"] == pytest.approx(total / 4, rel=1e-4)
