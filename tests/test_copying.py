"""Made to be copied: functions cut out of a script's text work alone, on a plain network that is
trained by another optimiser."""

import ast
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_runs import flags_of
from torch import Tensor, nn

import mtppo_gmp

ROOT = Path(__file__).parent.parent
SET = "clear_state erk_densities set_densities keep_largest draw_masks evolve apply_masks".split()


def cut(script, *names):
    """These functions of a script, from their text and torch alone."""
    source = (ROOT / script).read_text()
    found = {getattr(node, "name", ""): node for node in ast.parse(source).body}
    namespace = dict(torch=torch, nn=nn, Tensor=Tensor, F=F, math=math)
    for name in names:
        decorators = [f"@{ast.get_source_segment(source, d)}" for d in found[name].decorator_list]
        text = "\n".join([*decorators, ast.get_source_segment(source, found[name])])
        exec(text, namespace)
    return SimpleNamespace(**{name: namespace[name] for name in names})


class Plain(nn.Module):
    """What a reader might have: two linear layers."""

    def __init__(self, inputs=8, hidden=64):
        super().__init__()
        self.first = nn.Linear(inputs, hidden)
        self.second = nn.Linear(hidden, 1)
        self.layers = dict(first=1, second=1)
        self.masks = {}

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def fit(network, after_step, steps=300):
    """Regression by SGD with momentum; after_step(step, optimizer) follows every step. Returns the
    loss of the first step and of the last."""
    x = torch.randn(128, 8)
    y = x[:, :1] * x[:, 1:2] + x[:, 2:3]
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    losses = []
    for step in range(steps):
        loss = (network(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        after_step(step, optimizer)
    return losses[0], losses[-1]


def assert_masked(network):
    """Pruned weights are exactly zero, and no others."""
    for name, mask in network.masks.items():
        assert torch.equal(network.get_submodule(name).weight != 0, mask == 1)


def active(network):
    return {name: int(mask.sum()) for name, mask in network.masks.items()}


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_gradual_magnitude_pruning(scope):
    gmp = cut("mtppo_gmp.py", "gmp_sparsity", "keep_largest", "prune", "apply_masks")
    torch.manual_seed(0)
    network, seen = Plain(), []

    def after_step(step, optimizer):
        if step % 10 == 0:
            sparsity = gmp.gmp_sparsity(step / 300, 0.1, 0.7, 0.8)
            window = min(max((step - 30) / 180, 0), 1)
            assert sparsity == pytest.approx(0.8 * (1 - (1 - window) ** 3))
            gmp.prune(network, sparsity, scope)
            left = active(network)
            if scope == "layer":
                assert left == {name: n - round(sparsity * n) for name, n in sizes.items()}
            assert abs(sum(left.values()) - (576 - round(sparsity * 576))) <= (scope == "layer")
            seen.append(sum(left.values()))
        gmp.apply_masks(network)
        assert_masked(network)

    sizes = dict(first=512, second=64)
    first, last = fit(network, after_step)
    assert last < 0.3 * first
    assert seen[0] == 576 and seen[-1] == 115 and seen == sorted(seen, reverse=True)


@pytest.mark.parametrize("regrow", ["random", "gradient"])
@pytest.mark.parametrize("grow", ["zero", "init"])
def test_sparse_evolutionary_training(regrow, grow):
    sparse = cut("mtppo_set.py", *SET)
    torch.manual_seed(0)
    network, kept = Plain(), []
    if grow == "init":
        network.first.bound, network.second.bound = 8**-0.5, 64**-0.5
    # 576 weights, 172.8 active: 72 of 137 parts in the first layer would be 90.8, 65 of 137 in the
    # second 82 of 64; so that is dense, and the first has the rest
    sparse.draw_masks(network, sparse.set_densities(network, 0.7, None))
    assert active(network) == dict(first=109, second=64)

    def after_step(step, optimizer):
        sparse.apply_masks(network)
        assert_masked(network)
        if step % 20 == 19 and step < 250:
            old = network.masks["first"]
            kept.append(sparse.evolve(network, optimizer, 0.3, regrow, grow).item())
            grown = network.masks["first"] > old
            weight = network.first.weight
            momentum = optimizer.state[weight]["momentum_buffer"]
            assert grown.sum() == 33 and active(network) == dict(first=109, second=64)
            assert (weight[network.masks["first"] == 0] == 0).all()
            assert ((weight[grown] != 0) == (grow == "init")).all()
            assert weight[grown].abs().max() <= 8**-0.5
            assert torch.equal(momentum == 0, grown)

    first, last = fit(network, after_step)
    assert last < 0.3 * first
    assert math.isnan(kept[0]) and all(0 <= share <= 1 for share in kept[1:])


def test_gram_schmidt_between_layers():
    gram_schmidt = cut("moore_sparse.py", "gram_schmidt").gram_schmidt
    torch.manual_seed(0)

    class Orthogonal(Plain):
        def forward(self, x):
            basis = gram_schmidt(self.first(x).unflatten(1, (4, 16)))  # (batch, k, D)
            gram = basis @ basis.mT
            torch.testing.assert_close(gram, torch.eye(4).expand_as(gram), atol=1e-5, rtol=0)
            return self.second(basis.flatten(1))

    first, last = fit(Orthogonal(), lambda step, optimizer: None)
    assert last < 0.3 * first


PAGES = ROOT / "README.md", ROOT / "benchmark" / "README.md"
COPY, LOAD = (re.search(r"^```python\n(.*?)^```", p.read_text(), re.M | re.S)[1] for p in PAGES)


def test_the_readmes_example_of_copying_prunes_and_learns():
    torch.manual_seed(0)
    seen = {}
    exec(COPY, seen)
    network = seen["network"]
    assert active(network)["0"] + active(network)["2"] == 576 - round(0.8 * 576)
    assert_masked(network)
    x = torch.randn(1000, 8)
    y = x[:, :1] * x[:, 1:2]
    assert (network(x) - y).square().mean() < 0.3 * y.square().mean()


def test_the_readmes_example_of_loading_gives_probabilities(tmp_path):
    mtppo_gmp.train(mtppo_gmp.Args(**flags_of(mtppo_gmp), run_dir=str(tmp_path)))
    assert '"runs/..."' in LOAD
    seen = {}
    exec(LOAD.replace("runs/...", str(tmp_path)), seen)
    assert seen["log_probs"].shape == (1, 7)
    assert seen["log_probs"].exp().sum().item() == pytest.approx(1, abs=1e-5)
