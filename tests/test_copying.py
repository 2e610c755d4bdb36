"""Made to be copied: the functions of the README's table, cut out of a script's text, work alone on
a plain network that is trained by another optimiser, and however its weights lie in memory."""

import ast
import copy
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_runs import assert_same, flags_of
from torch import Tensor, nn
from torch.optim import SGD

import moore_sparse
import mtppo_gmp
import mtppo_set

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md").read_text(), (ROOT / "benchmark" / "README.md").read_text()
COPY, LOAD = (re.search(r"^```python\n(.*?)^```", page, re.M | re.S)[1] for page in PAGES)
TABLE = re.findall(r"^\| (.*) \| `(\w+\.py)` \|", PAGES[0], re.M)
NAMES = {script: re.findall(r"`(\w+)`", take) for take, script in TABLE}


def cut(script):
    """The functions that the README takes from a script, from their text and torch alone."""
    namespace = dict(torch=torch, nn=nn, Tensor=Tensor, F=F, math=math)
    for node in ast.parse((ROOT / script).read_text()).body:
        if getattr(node, "name", "") in NAMES[script]:
            exec(ast.unparse(node), namespace)
    return SimpleNamespace(**namespace)


def active(network):
    """Active weights of each layer; the others are exactly zero."""
    for name, mask in network.masks.items():
        assert torch.equal(network.get_submodule(name).weight != 0, mask == 1)
    return {name: int(mask.sum()) for name, mask in network.masks.items()}


@pytest.mark.parametrize("copied", [False, True])
def test_the_readmes_example_of_copying_prunes_and_learns(copied):
    torch.manual_seed(0)
    text, seen = COPY, {}
    if copied:
        text, seen = re.sub("^from mtppo_gmp .*$", "", COPY, flags=re.M), vars(cut("mtppo_gmp.py"))
    exec(text, seen)
    network = seen["network"]
    assert sum(active(network).values()) == 576 - round(0.8 * 576)
    x = torch.randn(1000, 8)
    y = x[:, :1] * x[:, 1:2]
    assert (network(x) - y).square().mean() < 0.3 * y.square().mean()


@pytest.mark.parametrize("regrow", ["random", "gradient"])
@pytest.mark.parametrize("grow", ["zero", "init"])
def test_sparse_evolutionary_training_of_a_plain_network_learns(regrow, grow):
    sparse = cut("mtppo_set.py")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1))
    network.layers, network.masks = {"0": 1, "2": 1}, {}
    # 576 weights, 172.8 active: 72 of 137 parts in the first layer would be 90.8, 65 of 137 in the
    # second 82 of 64; so that is dense, and the first has the rest
    sparse.draw_masks(network, sparse.set_densities(network, 0.7, None))
    optimizer = SGD(network.parameters(), 0.05, momentum=0.9)
    x, weight, losses = torch.randn(128, 8), network[0].weight, []
    for step in range(300):
        loss = (network(x) - x[:, :1] * x[:, 1:2] - x[:, 2:3]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sparse.apply_masks(network)
        losses.append(loss.item())
        if step % 20 == 19 and step < 250:
            old = network.masks["0"]
            sparse.evolve(network, optimizer, 0.3, regrow, grow)
            grown = network.masks["0"] > old
            assert grown.sum() == 33
            assert ((weight[grown] != 0) == (grow == "init")).all()
            assert weight[grown].abs().max() <= 8**-0.5  # the bound of nn.Linear
            assert torch.equal(optimizer.state[weight]["momentum_buffer"] == 0, grown)
    assert network.masks["0"].sum() == 109 and network.masks["2"].all()
    assert losses[-1] < 0.3 * losses[0]


def test_gram_schmidt_cut_out_is_that_of_the_script():
    features = torch.randn(5, 4, 16)
    basis = cut("moore_sparse.py").gram_schmidt(features)
    assert torch.equal(basis, moore_sparse.gram_schmidt(features))


@pytest.mark.parametrize("method", ["layer", "global", "evolve", "redo"])
def test_weights_may_lie_in_memory_in_any_order(method, monkeypatch):
    """Convolutions channels last, linear weights transposed: all is as with contiguous ones."""
    # Draws in an order that is not that of the memory
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.rand(x.shape))
    monkeypatch.setattr(mtppo_gmp, "draw_parameters", lambda *both: [x.fill_(1.0) for x in both])
    torch.manual_seed(0)
    args = mtppo_gmp.Args(dormant_tau=0.2)
    plain = mtppo_gmp.make_networks(args)["actor"]
    other = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    for layer in (other.head_hidden, other.head_output):
        layer.weight.data = layer.weight.data.mT.contiguous().mT
    obs, outcomes = torch.randint(0, 11, (5, 4, 7, 7, 3), dtype=torch.uint8), []
    for network in (plain, other):
        torch.manual_seed(1)
        optimizer = SGD(network.parameters(), 0.0, momentum=0.9)
        for p in network.parameters():
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape))
        optimizer.step()
        if method == "evolve":
            mtppo_set.draw_masks(network, mtppo_set.set_densities(network, 0.9, None))
            for regrow in ("gradient", "random"):
                mtppo_set.evolve(network, optimizer, 0.3, regrow, "zero")
        else:
            mtppo_gmp.prune(network, 0.9, "layer" if method == "redo" else method)
        if method == "redo":
            mtppo_gmp.redo(network, optimizer, obs, 0.2)
        metrics = mtppo_gmp.measure_plasticity({"actor": network}, obs, args)
        state = dict(network.state_dict()), optimizer.state_dict()["state"]
        outcomes.append((list(state), metrics))
    assert not any(other.get_submodule(name).weight.is_contiguous() for name in other.layers)
    assert_same(outcomes[0][0], outcomes[1][0])
    assert outcomes[0][1] == pytest.approx(outcomes[1][1], rel=1e-4)


def test_the_readmes_example_of_loading_gives_probabilities(tmp_path):
    flags = flags_of(mtppo_gmp, total_timesteps=50)
    mtppo_gmp.train(mtppo_gmp.Args(**flags, run_dir=str(tmp_path)))
    assert '"runs/..."' in LOAD
    seen = {}
    exec(LOAD.replace("runs/...", str(tmp_path)), seen)
    assert seen["log_probs"].shape == (1, 7)
    assert seen["log_probs"].exp().sum().item() == pytest.approx(1, abs=1e-5)
