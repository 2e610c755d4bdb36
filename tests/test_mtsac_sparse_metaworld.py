"""Every formula of mtsac_sparse_metaworld.py against an oracle that shares no code with it, and
whole runs on Meta-World's own simulator."""

import copy
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mtsac_sparse_metaworld as script
from mtsac_sparse_metaworld import Args, ReplayBuffer, Transitions

ROOT = Path(__file__).parent.parent


def make_networks(num_tasks=3, device="cpu", **flags):
    torch.manual_seed(0)
    args = Args(env_names=("reach-v3",) * num_tasks, prune="none", **flags)
    networks = script.make_networks(args, device)
    networks["target"] = copy.deepcopy(networks["critic"]).requires_grad_(False)
    with torch.no_grad():  # heads and biases that count, a target that is not the critic
        for network in networks.values():
            network.head.weight.uniform_(-0.12, 0.12)
            for name, parameter in network.named_parameters():
                if name.endswith("bias"):
                    parameter.uniform_(-0.1, 0.1)
    return networks


def make_optimizers(networks, log_alpha, kind=torch.optim.SGD):
    return {
        "actor": kind(networks["actor"].parameters(), 0.1),
        "critic": kind(networks["critic"].parameters(), 0.1),
        "alpha": kind([log_alpha], 0.1),
    }


def random_batch(num_tasks=3, size=5):
    batch = Transitions(
        torch.randn(num_tasks, size, 39),
        torch.rand(num_tasks, size, 4) * 2 - 1,
        torch.rand(num_tasks, size) * 10,
        torch.randn(num_tasks, size, 39),
        torch.randint(0, 2, (num_tasks, size)).float(),
    )
    batch.bootstrap[:, :2] = torch.tensor([0.0, 1.0])  # both kinds in every task
    return batch


def log_alphas(num_tasks=3):
    return torch.linspace(-1, 1, num_tasks).requires_grad_()


# Networks


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("name", ["actor", "critic"])
def test_network_is_copies_of_a_trunk_and_a_head_per_task(name, layer_norm):
    network = make_networks(layer_norm=layer_norm)[name]
    copies, in_size = (1, 39) if name == "actor" else (2, 43)
    x = torch.randn(3, 4, in_size)
    hidden, output = network.activations(x)
    assert output.shape == (copies, 3, 4, 8 if name == "actor" else 1)
    for i in range(copies):
        for task in range(3):
            for sample in range(4):
                h = torch.cat([x[task, sample], torch.eye(3)[task]])
                for k, layer in enumerate((network.hidden1, network.hidden2, network.hidden3)):
                    h = nn.functional.linear(h, layer.weight[i], layer.bias[i, 0])
                    h = nn.functional.layer_norm(h, (400,)) if layer_norm else h
                    h = h.relu()
                    torch.testing.assert_close(hidden[k][i, task * 4 + sample], h)
                head = network.head.weight[i * 3 + task], network.head.bias[i * 3 + task, 0]
                expected = nn.functional.linear(h, *head)
                torch.testing.assert_close(output[i, task, sample], expected)


@pytest.mark.parametrize("name, head_bound", [("actor", 1e-3), ("critic", 3e-3)])
def test_hidden_layers_start_he_uniform_and_heads_small(name, head_bound):
    def assert_uniform(drawn, bound, rel):
        for extreme in (drawn.max(), -drawn.min()):
            assert (1 - rel) * bound < extreme <= bound
        assert drawn.std().item() == pytest.approx(bound / math.sqrt(3), rel=2 * rel)

    torch.manual_seed(0)
    network = script.make_networks(Args(benchmark="MT50"))[name]
    in_size = {"actor": 39, "critic": 43}[name] + 50
    for layer, fan_in in (("hidden1", in_size), ("hidden2", 400), ("hidden3", 400)):
        layer = network.get_submodule(layer)
        assert_uniform(layer.weight, math.sqrt(6 / fan_in), 0.02)
        assert not layer.bias.any()
    assert_uniform(network.head.weight, head_bound, 0.02)
    assert_uniform(network.head.bias, head_bound, 0.1)  # 400 or 100 of them


def test_log_prob_against_torch_distributions():
    torch.manual_seed(0)
    mean, log_std = torch.randn(3, 200, 4, dtype=torch.double), torch.randn(3, 200, 4).double()
    actions, log_probs = script.draw_actions(mean, log_std)
    base = Independent(Normal(mean, log_std.exp()), 1)
    squashed = TransformedDistribution(base, TanhTransform())
    inside = actions.abs().amax(-1) < 0.999_999  # where atanh, which the oracle needs, is exact
    assert inside.float().mean() > 0.8
    torch.testing.assert_close(log_probs[inside], squashed.log_prob(actions)[inside])
    standard = script.draw_actions(torch.zeros(100_000, 4), torch.zeros(100_000, 4))[0]
    drawn = torch.atanh(standard)
    assert drawn.mean().abs() < 0.01 and (drawn.std() - 1).abs() < 0.01


def test_log_prob_is_finite_far_out():
    mean = torch.tensor([[300.0, -300.0, 0.0, 50.0]]).requires_grad_()
    actions, log_probs = script.draw_actions(mean, torch.full((1, 4), -20.0))
    log_probs.sum().backward()
    assert log_probs.isfinite().all() and mean.grad.isfinite().all()
    assert actions.tolist()[0][:2] == [1.0, -1.0]


def test_policy_clamps_log_std():
    actor = make_networks()["actor"]
    with torch.no_grad():
        actor.head.bias[:, 0, 4:] = torch.tensor([-100.0, 100.0, 0.0, 0.0])
    _, log_std = script.policy(actor, torch.randn(3, 2, 39))
    assert (log_std[..., 0] == -20).all() and (log_std[..., 1] == 2).all()


# SAC


def plain_draws(actor, obs, noise):
    """Actions and log-probs, sample by sample, from the given noise."""
    outputs = actor(obs)[0]
    actions, log_probs = torch.zeros_like(noise), torch.zeros(noise.shape[:2])
    for t in range(obs.shape[0]):
        for i in range(obs.shape[1]):
            for d in range(4):
                std = math.exp(min(max(outputs[t, i, 4 + d].item(), -20), 2))
                u = outputs[t, i, d].item() + std * noise[t, i, d].item()
                density = math.exp(-0.5 * noise[t, i, d].item() ** 2)
                density /= std * math.sqrt(2 * math.pi) * (1 - math.tanh(u) ** 2)
                actions[t, i, d] = math.tanh(u)
                log_probs[t, i] += math.log(density)
    return actions, log_probs


@pytest.mark.parametrize("max_q", [0, 6.0])
@torch.no_grad()
def test_targets_against_a_plain_loop(max_q):
    networks, log_alpha, batch = make_networks(), log_alphas(), random_batch()
    torch.manual_seed(3)
    targets = script.critic_targets(
        networks["actor"], networks["target"], log_alpha, batch, 0.9, max_q
    )
    torch.manual_seed(3)
    noise = torch.randn(3, 5, 4)
    actions, log_probs = plain_draws(networks["actor"], batch.next_obs, noise)
    twins = networks["target"](torch.cat([batch.next_obs, actions], -1))[..., 0]
    clipped = 0
    for t in range(3):
        for i in range(5):
            expected = batch.rewards[t, i].item()
            if batch.bootstrap[t, i]:  # neither terminated nor cut without bootstrap
                smaller = min(twins[0, t, i].item(), twins[1, t, i].item())
                entropy = -math.exp(log_alpha[t].item()) * log_probs[t, i].item()
                expected += 0.9 * (smaller + entropy)
            if max_q:
                clipped += abs(expected) > max_q
                expected = max(min(expected, max_q), -max_q)
            assert targets[t, i].item() == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert clipped > 0 or not max_q


def test_update_follows_the_plain_gradients():
    """With SGD: critics on the targets, actor on the new critics, each of them alone."""
    networks, log_alpha, batch = make_networks(), log_alphas(), random_batch()
    old = copy.deepcopy(networks)
    args = Args(max_grad_norm=1e9, tau=0.25, gamma=0.9)
    torch.manual_seed(7)
    optimizers = make_optimizers(networks, log_alpha)
    losses = script.update(networks, log_alpha, optimizers, batch, args)
    start = log_alphas().detach()

    torch.manual_seed(7)
    targets = script.critic_targets(old["actor"], old["target"], start, batch, 0.9, 5000)
    qf_loss = 0.0
    for i in range(2):
        q = old["critic"](torch.cat([batch.obs, batch.actions], -1))[i, ..., 0]
        qf_loss = qf_loss + ((q - targets) ** 2).sum() / 30
    qf_loss.backward()
    with torch.no_grad():
        for parameter, new in zip(
            old["critic"].parameters(), networks["critic"].parameters(), strict=True
        ):
            torch.testing.assert_close(new.grad, parameter.grad, rtol=1e-4, atol=1e-5)
            parameter -= 0.1 * parameter.grad
    actions, log_probs = script.draw_actions(*script.policy(old["actor"], batch.obs))
    twins = old["critic"](torch.cat([batch.obs, actions], -1))[..., 0]
    smaller = torch.where(twins[0] < twins[1], twins[0], twins[1])
    actor_loss = (start.exp()[:, None] * log_probs - smaller).sum() / 15
    actor_loss.backward()
    with torch.no_grad():
        for parameter in old["actor"].parameters():
            parameter -= 0.1 * parameter.grad
        for target, source in zip(
            old["target"].parameters(), old["critic"].parameters(), strict=True
        ):
            target.copy_(0.75 * target + 0.25 * source)
    for name in networks:
        for new, plain in zip(networks[name].parameters(), old[name].parameters(), strict=True):
            torch.testing.assert_close(new, plain, rtol=1e-4, atol=1e-5)
    entropy_gap = log_probs.detach() - 4  # target entropy of four action dimensions
    alpha_loss = -(start[:, None] * entropy_gap).mean()
    plain = {"qf_loss": qf_loss, "actor_loss": actor_loss, "alpha_loss": alpha_loss}
    plain = {name: loss.item() for name, loss in plain.items()}
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(plain, rel=1e-4)
    torch.testing.assert_close(log_alpha.detach(), start + 0.1 * entropy_gap.mean(1) / 3)


def test_temperatures_move_on_their_own():
    networks, log_alpha = make_networks(), torch.zeros(3, requires_grad=True)
    with torch.no_grad():
        networks["actor"].head.weight.zero_()
        networks["actor"].head.bias.zero_()
        networks["actor"].head.bias[0, 0, 4:] = -6.0  # far less entropy than the target
    optimizers = make_optimizers(networks, log_alpha, partial(torch.optim.Adam, fused=True))
    torch.manual_seed(1)
    script.update(networks, log_alpha, optimizers, random_batch(), Args())
    up, *down = log_alpha.tolist()
    assert up == pytest.approx(0.1, rel=1e-3) and down == pytest.approx([-0.1] * 2, rel=1e-3)


def test_gradients_are_clipped_over_a_network_by_its_active_weights():
    networks, batch = make_networks(), random_batch()
    actor = networks["actor"]
    script.prune(actor, 0.5, "layer")
    before = copy.deepcopy(actor)
    optimizer = torch.optim.SGD(actor.parameters(), 1.0)
    loss = (actor(batch.obs) ** 2).sum() * 100
    script.descend_clipped(loss, actor, optimizer, 0.01)
    steps = [(new - old).flatten() for new, old in zip(actor.parameters(), before.parameters())]  # noqa: B905
    assert torch.cat(steps).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_an_update_takes_little_more_than_its_matrix_products():
    """Default sizes of MT10. To see the figures: pytest -s -k matrix_products"""
    networks, log_alpha = make_networks(10), torch.zeros(10, requires_grad=True)
    adam = partial(torch.optim.Adam, fused=True)
    optimizers = make_optimizers(networks, log_alpha, adam)
    buffer = ReplayBuffer(20_000, 10, "cpu")
    for field in buffer.fields:
        field.uniform_()
    buffer.added, args = 2000, Args()

    def update():
        script.update(networks, log_alpha, optimizers, buffer.sample(128), args)

    def layers(copies, in_size, out_size):
        trunk = [(copies, 1280, n, 400) for n in (in_size, 400, 400)]
        sizes = [*trunk, (copies * 10, 128, 400, out_size)]
        return [
            (torch.rand(k, n, i), torch.rand(k, i, o), torch.rand(k, n, o)) for k, n, i, o in sizes
        ]

    actor, critic = layers(1, 49, 8), layers(2, 53, 1)

    def products():
        for x, w, _ in actor + actor + critic + critic + critic:  # forward: next_obs, obs
            x @ w
        for x, _, d in actor + critic:  # gradients of weights
            d.mT @ x
        for _, w, d in actor[1:] + critic[1:] + critic:  # gradients of inputs
            d @ w.mT

    fastest = {update: math.inf, products: math.inf}
    for _ in range(8):
        for work in fastest:
            start = time.perf_counter()
            work()
            fastest[work] = min(fastest[work], time.perf_counter() - start)
    ours, floor = fastest.values()
    ratio = ours / floor
    print(f"update {1e3 * ours:.0f} ms, products {1e3 * floor:.0f} ms, ratio {ratio:.2f}")
    assert ratio < 2.5


# Sparsity


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_targets_are_masked_like_the_critics(scope, tmp_path, monkeypatch):
    seen = stub_run(tmp_path, monkeypatch, prune="both", prune_scope=scope)
    critic, target = seen["networks"]["critic"], seen["networks"]["target"]
    pruned = total = 0
    for name in ("hidden1", "hidden2", "hidden3", "head"):
        mask = critic.masks[name]
        for network in (critic, target):
            assert (network.get_submodule(name).weight[mask == 0] == 0).all()
        kept = mask == 1
        assert (target.get_submodule(name).weight[kept] != 0).all()
        pruned, total = pruned + (mask == 0).sum().item(), total + mask.numel()
        if scope == "layer":  # each head's and each twin's layer alone
            rows = mask.flatten(1)
            assert ((rows == 0).sum(1) == round(0.95 * rows.shape[1])).all()
    assert pruned / total == pytest.approx(0.95, abs=1e-4)
    assert seen["logged"]["sparsity/critic"][-1][1] == pytest.approx(0.95, abs=1e-4)


@pytest.mark.parametrize(
    ("prune", "sparse"),
    [("actor", {"actor"}), ("critic", {"critic", "target"}), ("none", set())],
)
@pytest.mark.parametrize("sparsifier", ["gmp", "set"])
def test_only_the_asked_networks_are_pruned(prune, sparse, sparsifier, tmp_path, monkeypatch):
    seen = stub_run(tmp_path, monkeypatch, prune=prune, sparsifier=sparsifier)
    assert {name for name, network in seen["networks"].items() if network.masks} == sparse


def test_set_keeps_its_counts_and_waits_for_learning(tmp_path, monkeypatch):
    evolved, evolve = {1: [], 2: []}, script.evolve  # masks before and after, by a network's copies

    def watch(network, optimizer, *rule):
        assert rule == (0.2, "gradient", "init")
        assert all(weight.grad is not None for weight in network.parameters())
        before = copy.deepcopy(network.masks)
        share = evolve(network, optimizer, *rule)
        evolved[len(before["hidden1"])].append((before, copy.deepcopy(network.masks)))
        return share

    monkeypatch.setattr(script, "evolve", watch)
    options = dict(sparsifier="set", prune="both", set_frequency=9, learning_starts=36)
    rule = dict(set_zeta=0.2, set_regrow="gradient", set_grow="init")
    seen = stub_run(tmp_path, monkeypatch, **options, **rule)
    for name, masks in (("actor", evolved[1]), ("critic", evolved[2])):
        [(first, _), (before, after), _] = masks  # at 45, 54 and 63; at 72 the run is over
        active = total = grown = kept = 0
        for layer, mask in seen["networks"][name].masks.items():
            assert mask.sum() == first[layer].sum()
            assert mask.all() or not torch.equal(mask, first[layer])  # ERK leaves small heads dense
            active, total = active + mask.sum().item(), total + mask.numel()
            new = after[layer] > before[layer]
            grown, kept = grown + new.sum().item(), kept + mask[new].sum().item()
        assert 1 - active / total == pytest.approx(0.95, abs=1e-3)
        # The first evolution has nothing to log; of an episode's two there is the last one's
        [(step, share)] = seen["logged"][f"sparsity/{name}_grown_kept"]
        assert step == 72 and share == pytest.approx(kept / grown) and 0 < share < 1
    for layer, mask in seen["networks"]["critic"].masks.items():
        assert not seen["networks"]["target"].get_submodule(layer).weight[mask == 0].any()


@pytest.mark.parametrize("grow", ["zero", "init"])
@pytest.mark.parametrize("name, head_bound", [("actor", 1e-3), ("critic", 3e-3)])
def test_evolution_drops_the_smallest_and_starts_the_grown_anew(name, head_bound, grow):
    network = make_networks()[name]
    script.draw_masks(network, dict(hidden1=0.1, hidden2=0.05, hidden3=0.05, head=0.7))
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for rule, what in ((("gradient", grow), "no gradient"), (("random", "normal"), "normal")):
        with pytest.raises(ValueError, match=what):
            script.evolve(network, optimizer, 0.5, *rule)
    network(torch.randn(3, 40, {"actor": 39, "critic": 43}[name])).square().sum().backward()
    optimizer.step()
    script.apply_masks(network)
    old, old_optimizer = copy.deepcopy((network, optimizer))
    assert script.evolve(network, optimizer, 0.5, "random", grow).isnan()  # none was grown before
    grown = {}
    for layer in network.layers:
        new, past = (n.get_submodule(layer).weight for n in (network, old))
        now, was = network.masks[layer] > 0, old.masks[layer] > 0
        dropped, kept = was & ~now, was & now
        grown[layer] = fresh = now & ~was
        for i in range(len(new)):  # each twin's layer and each task's head alone
            moved = min(round(0.5 * was[i].sum().item()), (~was[i]).sum())  # heads: no more to grow
            assert dropped[i].sum() == fresh[i].sum() == moved
            assert past[i][dropped[i]].abs().max() <= past[i][kept[i]].abs().min()
        assert torch.equal(new[kept], past[kept]) and not new[~now].any()
        if grow == "zero":
            assert not new[fresh].any()
        else:
            bound = head_bound if layer == "head" else math.sqrt(6 / new.shape[-1])
            assert new[fresh].all() and 0.95 * bound < new[fresh].abs().max() <= bound
            assert new[fresh].std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        for moment in ("exp_avg", "exp_avg_sq"):
            before, after = old_optimizer.state[past][moment], optimizer.state[new][moment]
            assert before[fresh].any() and not after[fresh].any()
            assert torch.equal(after[~fresh], before[~fresh])
    share = script.evolve(network, optimizer, 0.5, "gradient", grow)
    kept = sum(network.masks[layer][places].sum() for layer, places in grown.items())
    assert share == kept / sum(places.sum() for places in grown.values())
    assert (share == 0) == (grow == "zero")  # zeros are the smallest


@pytest.mark.parametrize("sparsifier", ["gmp", "set"])
def test_masks_change_in_their_order_with_evaluations(sparsifier, tmp_path, monkeypatch):
    events, judges = [], ["measure_networks", "evaluate_mode", "critic_error"]

    def record(name, function):
        monkeypatch.setattr(script, name, lambda *args: (events.append(name), function(*args))[1])

    for name in ("update", "prune", "evolve", *judges):
        record(name, getattr(script, name))
    every_12 = dict(prune_frequency=12, set_frequency=12)
    stub_run(tmp_path, monkeypatch, prune="both", sparsifier=sparsifier, **every_12)
    expected = ["prune"] * 2 * (sparsifier == "gmp")  # tried before the run begins
    for timestep in range(3, 73, 3):
        expected += ["update"] * (timestep > 24)
        if sparsifier == "gmp" and timestep % 12 == 0:
            expected += ["prune"] * 2
        if sparsifier == "set" and timestep in (36, 60):  # 12 and 24 are before learning
            expected += ["evolve"] * 2
        if timestep % 24 == 0:
            expected += judges
        if sparsifier == "set" and timestep == 48:  # 72 is after the last update
            expected += ["evolve"] * 2
    assert events == expected


# Replay


def test_replay_keeps_the_latest_transitions_of_each_task():
    buffer = ReplayBuffer(11, 2, "cpu")  # five per task
    assert buffer.fields.obs.shape == (2, 5, 39)
    for step in range(13):
        row = np.array([step, 100.0 + step])
        buffer.add(row[:, None] + np.zeros(39), row[:, None] + np.zeros(4), row, row[:, None], row)
        state, buffer = buffer.state_dict(), ReplayBuffer(11, 2, "cpu")
        buffer.load_state_dict(state)  # and goes on like the saved one
        for field in state["fields"]:  # an empty part would fill the checkpoint
            assert field.untyped_storage().nbytes() == 4 * field.numel()
        latest = set(range(max(0, step - 4), step + 1))
        values = [{*map(int, rewards)} for rewards in Transitions(*state["fields"]).rewards]
        assert values == [latest, {100 + s for s in latest}]
    torch.manual_seed(0)
    batch = buffer.sample(200)
    assert batch.next_obs.shape == (2, 200, 39)
    for field in batch:
        rows = field.view(2, 200, -1)[..., 0]
        assert torch.equal(rows, batch.rewards)  # the fields of one transition stay together
        assert {*rows[0].tolist()} == {8, 9, 10, 11, 12} == {r - 100 for r in rows[1].tolist()}
    assert not torch.equal(batch.rewards[0] + 100, batch.rewards[1])  # tasks drawn apart


class Stub(gym.Env):
    """A stand-in for Meta-World: observations tell (task, goal, step); episodes of reach end by
    termination, the others by truncation; push succeeds at step 3 alone."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (39,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (4,), np.float32)
    names = ("reach-v3", "push-v3", "pick-place-v3")

    def __init__(self, name, goals):
        self.task = self.names.index(name)

    def observe(self):
        obs = np.zeros(39)
        obs[:3] = self.task, self.goal, self.steps
        return obs

    def reset(self, *, seed=None, options=None):
        self.goal, self.steps = seed % 50, 0
        return self.observe(), {}

    def step(self, action):
        self.steps += 1
        success = float(self.task == 1 and self.steps == 3)
        over = self.steps == script.EPISODE_STEPS
        terminated, truncated = over and self.task == 0, over and self.task != 0
        reward = self.task + self.steps / 10
        return self.observe(), reward, terminated, truncated, {"success": success}


class Benchmark:
    def __init__(self, name, seed):
        self.train_tasks = list(range(50))


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def stub_run(tmp_path, monkeypatch, **changes):
    """Train on the stubs for three episodes of 8 steps; networks, replay and logged scalars."""
    seen = {}

    class Watched(ReplayBuffer):
        def __init__(self, *args):
            super().__init__(*args)
            seen["buffer"] = self

    update = script.update

    def watch(networks, log_alpha, optimizers, batch, args):
        seen.update(networks=networks, batch=batch)
        return update(networks, log_alpha, optimizers, batch, args)

    monkeypatch.setattr(script, "EPISODE_STEPS", 8)
    monkeypatch.setattr(script, "CRITIC_ERROR_STRIDE", 3)
    monkeypatch.setattr(script, "GoalEnv", Stub)
    monkeypatch.setattr(script.metaworld, "MT1", Benchmark)
    monkeypatch.setattr(script, "ReplayBuffer", Watched)
    monkeypatch.setattr(script, "update", watch)
    args = dict(
        env_names=Stub.names,
        total_timesteps=72,
        batch_size=2,
        buffer_size=300,
        learning_starts=24,
        vectorization="sync",
        prune_frequency=3,
        eval_episodes=2,
        eval_frequency=24,
        plasticity_frequency=24,
        plasticity_batch_size=10,
        num_threads=1,
        run_dir=str(tmp_path / "run"),
    )
    script.train(Args(**args | changes))
    return seen | {"logged": scalars(tmp_path / "run")}


@pytest.mark.parametrize("bootstrap", [True, False])
def test_no_transition_crosses_a_reset(bootstrap, tmp_path, monkeypatch):
    seen = stub_run(tmp_path, monkeypatch, prune="none", bootstrap_at_truncation=bootstrap)
    held = Transitions(*seen["buffer"].state_dict()["fields"])
    assert held.rewards.shape == (3, 24) and seen["batch"].rewards.shape == (3, 2)
    goals = []
    for task in range(3):
        for i in range(24):
            step = i % 8
            obs, next_obs = held.obs[task, i, :3].tolist(), held.next_obs[task, i, :3].tolist()
            goals += [obs[1]] * (step == 0)
            assert obs == [task, goals[-1], step] and next_obs == [task, goals[-1], step + 1]
            assert held.rewards[task, i].item() == pytest.approx(task + (step + 1) / 10)
            no_value = step == 7 and (task == 0 or not bootstrap)
            assert held.bootstrap[task, i].item() == float(not no_value)
    assert len(set(goals)) > 4  # drawn anew for each episode
    assert held.actions.abs().max() <= 1
    random_part = held.actions[:, :8].flatten()  # before learning
    assert random_part.std().item() == pytest.approx(3**-0.5, rel=0.15)


def test_success_counts_at_any_step(tmp_path, monkeypatch):
    logged = stub_run(tmp_path, monkeypatch, prune="none")["logged"]
    assert [value for _, value in logged["eval/success_rate/push"]] == [1.0] * 3
    assert [value for _, value in logged["eval/success_rate/pick-place"]] == [0.0] * 3
    assert [value for _, value in logged["eval/success_rate"]] == pytest.approx([1 / 3] * 3)
    assert logged["eval/episodic_return/push"][0][1] == pytest.approx(8 + 3.6)
    assert [value for _, value in logged["charts/success/push"]] == [1.0] * 3
    last = checkpoint(tmp_path / "run")["evaluation"]
    assert last["success_rate"] == {"reach": 0.0, "push": 1.0, "pick-place": 0.0}
    returns = {"reach": 3.6, "push": 11.6, "pick-place": 19.6}
    assert last["episodic_return"] == pytest.approx(returns) and len(last) == 2


@pytest.mark.parametrize("sparsifier", ["gmp", "set"])
def test_every_promised_tag_is_logged(sparsifier, tmp_path, monkeypatch):
    options = dict(prune="both", sparsifier=sparsifier, set_frequency=12)
    logged = stub_run(tmp_path, monkeypatch, **options)["logged"]
    tasks = ("reach", "push", "pick-place")
    tags = {f"losses/{name}" for name in ("qf_loss", "actor_loss", "alpha_loss")}
    tags |= {"eval/success_rate", "plasticity/fisher_trace", "plasticity/critic_error"}
    for task in tasks:
        tags |= {f"losses/alpha/{task}", f"eval/success_rate/{task}", f"charts/success/{task}"}
        tags |= {f"eval/episodic_return/{task}", f"charts/episodic_return/{task}"}
    for network in ("actor", "critic"):
        tags |= {f"plasticity/{network}_dormant_ratio", f"plasticity/{network}_effective_rank"}
        layers = ("", "/hidden1", "/hidden2", "/hidden3", "/head")
        tags |= {f"sparsity/{network}{layer}" for layer in layers}
        tags |= {f"sparsity/{network}_grown_kept"} if sparsifier == "set" else set()
    assert logged.keys() == tags
    assert [step for step, _ in logged["losses/qf_loss"]] == [48, 72]  # 24 is warm-up


# Run folder


@pytest.mark.parametrize("sparsifier", ["gmp", "set"])
def test_a_loaded_agent_is_the_trained_one(sparsifier, tmp_path, monkeypatch):
    seen = stub_run(tmp_path, monkeypatch, sparsifier=sparsifier)
    state = checkpoint(tmp_path / "run")
    entries = """actor critic target actor_optimizer critic_optimizer alpha_optimizer temperatures
    buffer timestep seconds evaluation args script num_threads"""
    assert state.keys() == {*entries.split()}
    actor, args, names = script.load_agent(str(tmp_path / "run"))
    assert names == list(Stub.names) and args == Args(**state["args"])
    assert args.sparsifier == sparsifier and args.total_timesteps == 72
    assert not any(parameter.requires_grad for parameter in actor.parameters())
    obs = torch.randn(3, 5, 39)
    assert torch.equal(actor(obs), seen["networks"]["actor"](obs))
    saved, x = state["actor"], torch.cat([obs, torch.eye(3)[:, None].expand(3, 5, 3)], -1)
    for layer in ("hidden1", "hidden2", "hidden3"):
        x = (x @ saved[f"{layer}.weight"][0].T + saved[f"{layer}.bias"][0]).relu()
    for task in range(3):
        output = x[task] @ saved["head.weight"][task].T + saved["head.bias"][task]
        torch.testing.assert_close(actor(obs)[0, task], output)
    assert_same(actor.masks, seen["networks"]["actor"].masks)


def test_neither_a_stop_nor_evaluations_change_a_set_run(tmp_path, monkeypatch):
    options = dict(sparsifier="set", prune="both", set_frequency=12, set_grow="init")
    logged = stub_run(tmp_path / "whole", monkeypatch, **options)["logged"]
    whole = checkpoint(tmp_path / "whole" / "run")
    rare = dict(eval_frequency=72, plasticity_frequency=72)
    stub_run(tmp_path / "rare", monkeypatch, **options, **rare)
    assert_same(checkpoint(tmp_path / "rare" / "run"), whole)
    calls, update = [], script.update

    def interrupt(*args):
        calls.append(0)
        if len(calls) == 12:  # in the third block, whose updates are dropped
            signal.raise_signal(signal.SIGTERM)
        return update(*args)

    monkeypatch.setattr(script, "update", interrupt)
    stub_run(tmp_path, monkeypatch, **options)
    assert checkpoint(tmp_path / "run")["timestep"] == 48  # where an evolution falls
    script.train(Args(resume=str(tmp_path / "run")))
    assert_same(checkpoint(tmp_path / "run"), whole)
    assert scalars(tmp_path / "run") == logged


# Evaluation and plasticity


def test_evaluation_goals_come_once_before_any_comes_twice():
    for episodes in (10, 50, 120):
        goals = script.draw_goals(3, 4, episodes)
        assert goals.shape == (4, episodes)
        for task in goals:
            counts = np.bincount(task, minlength=50)
            assert counts.max() - counts.min() <= 1 and len(counts) == 50
    assert not np.array_equal(goals[0], goals[1])
    assert not np.array_equal(goals, script.draw_goals(4, 4, 120))


@pytest.mark.parametrize("bootstrap", [True, False])
@torch.no_grad()
def test_critic_error_against_a_plain_loop(bootstrap, monkeypatch):
    monkeypatch.setattr(script, "EPISODE_STEPS", 8)
    monkeypatch.setattr(script, "CRITIC_ERROR_STRIDE", 3)
    monkeypatch.setattr(script, "GoalEnv", Stub)
    monkeypatch.setattr(script.metaworld, "MT1", Benchmark)
    args = Args(gamma=0.9, bootstrap_at_truncation=bootstrap)
    args = replace(args, env_names=Stub.names, vectorization="sync")
    envs = script.make_vector_env(args)
    networks, log_alpha = make_networks(), log_alphas().detach()
    torch.manual_seed(5)
    goals = np.array([[1, 2], [3, 4], [5, 6]])
    played = script.evaluate_mode(networks["actor"], envs, goals, "cpu")
    assert played.successes.tolist() == [[False, False], [True, True], [False, False]]
    error = script.critic_error(networks, log_alpha, played, args)

    torch.manual_seed(5)
    noise = [[torch.randn(3, 4) for _ in range(8)] for _ in range(2)]
    last_noise = torch.randn(3, 2, 4)
    errors = []
    for t in range(3):
        alpha = math.exp(log_alpha[t].item())
        for e in range(2):

            def batch(step, t=t, e=e):
                obs = torch.zeros(3, 1, 39)
                obs[t, 0, :3] = torch.tensor([t, goals[t, e], step])
                return obs

            def entropy(obs, noise, t=t):
                drawn = torch.zeros(3, 1, 4)
                drawn[t, 0] = noise
                actions, log_probs = plain_draws(networks["actor"], obs, drawn)
                return actions, -log_probs[t, 0].item()

            def smaller_q(obs, actions, t=t):
                return networks["critic"](torch.cat([obs, actions], -1))[:, t, 0, 0].min().item()

            actions, bonus = entropy(batch(8), last_noise[t, e])
            tail = smaller_q(batch(8), actions) + alpha * bonus
            bonuses = [alpha * entropy(batch(s), noise[e][s][t])[1] for s in range(8)]
            for start in (0, 3, 6):
                total = 0.0
                for step in range(start, 8):
                    total += 0.9 ** (step - start) * (t + (step + 1) / 10)
                    if step > start:
                        total += 0.9 ** (step - start) * bonuses[step]
                if bootstrap:
                    total += 0.9 ** (8 - start) * tail
                mode = networks["actor"](batch(start))[0, ..., :4].tanh()
                errors.append((smaller_q(batch(start), mode) - total) ** 2)
    assert error == pytest.approx(np.mean(errors), rel=1e-4)


def test_fisher_trace_is_the_variance_of_the_sampled_score():
    actor = make_networks(2)["actor"]
    obs = torch.randn(2, 1, 39)
    script.prune(actor, 0.3, "layer")
    with torch.no_grad():
        actor.head.bias[0, 0, 5] = 50.0  # a clamped log-std has no score
    exact = script.squashed_fisher_trace(actor, obs)
    alive = {f"{name}.weight": mask for name, mask in actor.masks.items()}
    torch.manual_seed(0)
    norms = []
    for _ in range(400):
        mean, log_std = script.policy(actor, obs)
        base = Independent(Normal(mean, log_std.exp()), 1)
        u = base.sample().detach()
        log_prob = base.log_prob(u) - torch.log1p(-u.tanh().square() + 1e-12).sum(-1)
        for task in range(2):
            actor.zero_grad()
            log_prob[task, 0].backward(retain_graph=True)
            norms.append(
                sum((p.grad * alive.get(n, 1)).square().sum() for n, p in actor.named_parameters())
            )
    assert torch.stack(norms).mean().item() == pytest.approx(exact, rel=0.1)
    plain = 0.0
    for task in range(2):
        mean, log_std = script.policy(actor, obs)
        for d in range(4):
            of_mean = math.exp(-2 * log_std[task, 0, d].item())
            for output, variance in ((mean, of_mean), (log_std, 2.0)):
                actor.zero_grad()
                output[task, 0, d].backward(retain_graph=True)
                for name, p in actor.named_parameters():
                    plain += variance * (p.grad * alive.get(name, 1)).square().sum().item() / 2
    assert exact == pytest.approx(plain, rel=1e-4)


def test_metrics_count_each_twins_neurons_and_leave_masked_ones_out():
    networks, batch = make_networks(), random_batch(size=40)
    args = Args(dormant_tau=0.0)  # silent ones alone
    with torch.no_grad():
        networks["critic"].hidden3.bias[1, 0, :30] = 10  # all active, and no layer below
    before = script.measure_networks(networks, batch, args)
    with torch.no_grad():
        networks["critic"].hidden3.weight[1, :30] = 0
        networks["critic"].hidden3.bias[1, 0, :30] = -1
    after = script.measure_networks(networks, batch, args)
    name = "plasticity/critic_dormant_ratio"
    gained = after[name] - before[name]
    assert gained == pytest.approx(30 / 2400, abs=1e-6)
    assert after["plasticity/actor_dormant_ratio"] == before["plasticity/actor_dormant_ratio"]
    networks["critic"].masks["hidden3"] = torch.ones(2, 400, 400)
    networks["critic"].masks["hidden3"][1, :30] = 0
    masked = script.measure_networks(networks, batch, args)
    assert masked[name] * 2370 == pytest.approx(before[name] * 2400, abs=0.01)
    features = networks["actor"].activations(batch.obs)[0][-1][0].detach().double().numpy()
    singular = np.linalg.svd(features, compute_uv=False)
    rank = int((np.cumsum(singular) / singular.sum() < 0.99).sum()) + 1
    assert after["plasticity/actor_effective_rank"] == rank


# Meta-World itself


def test_an_episode_follows_from_its_goal_and_actions_alone():
    goals = script.metaworld.MT1("peg-insert-side-v3", 1).train_tasks
    actions = np.random.default_rng(0).uniform(-1, 1, (60, 4)).astype(np.float32)

    def play(env, goal):
        obs = [env.reset(seed=goal)[0]]
        return np.stack(obs + [env.step(action)[0] for action in actions])

    fresh, used = (script.GoalEnv("peg-insert-side-v3", goals) for _ in range(2))
    other = play(used, 3)
    assert np.array_equal(play(used, 7), play(fresh, 7))
    assert np.array_equal(play(used, 57), play(fresh, 7))  # goals go round
    assert not np.array_equal(other[0], play(fresh, 7)[0])
    assert fresh.unwrapped.observation_space.shape == (39,) and other[0][36:].any()  # goal seen


TINY = dict(
    env_names="reach-v3",
    total_timesteps=1500,
    learning_starts=950,
    batch_size=4,
    buffer_size=1000,
    vectorization="sync",
    prune="both",
    prune_frequency=50,
    eval_episodes=1,
    eval_frequency=1000,
    plasticity_frequency=500,
    plasticity_batch_size=20,
    checkpoint_frequency=500,
    num_threads=1,
)


def run(run_dir, **changes):
    args = TINY | {"env_names": ("reach-v3",)} | changes
    script.train(Args(**args, run_dir=str(run_dir)))
    return checkpoint(run_dir), scalars(run_dir)


def command(**flags):
    words = [sys.executable, "mtsac_sparse_metaworld.py"]
    for name, value in flags.items():
        words += ["--" + name.replace("_", "-"), str(value)]
    return words


def checkpoint(run_dir):
    return torch.load(Path(run_dir) / "checkpoint.pt", weights_only=True)


def scalars(run_dir):
    """tag -> [(step, value)] of all that must be the same in two equal runs."""
    log = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in log.Tags()["scalars"] if not tag.startswith("time/")]
    return {
        tag: [(e.step, e.value) for e in log.Scalars(tag)] for tag in tags if tag != "charts/SPS"
    }


def assert_same(a, b):
    """Equal to the bit: networks, masks, optimisers, replay."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - {"args", "seconds"}:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for pair in zip(a, b, strict=True):
            assert_same(*pair)
    else:
        assert a == b


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run that was never stopped: its checkpoint and scalars."""
    return run(tmp_path_factory.mktemp("whole"))


def test_kill_9_then_resume_gives_the_same_run(whole_run, tmp_path, capsys):
    """Killed with half a buffer. Nobody else's words reach the user, and no process stays."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    flags = TINY | dict(vectorization="async", run_dir=tmp_path)
    with subprocess.Popen(command(**flags), cwd=ROOT, **pipes) as process:
        path = tmp_path / "checkpoint.pt"
        while not path.exists() or checkpoint(tmp_path)["timestep"] < 500:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        time.sleep(0.3)
        process.kill()
        out, err = process.communicate(timeout=20)  # the environments' processes end too
    assert (out, err) == ("", "")
    assert checkpoint(tmp_path)["timestep"] < 1500
    buffer = checkpoint(tmp_path)["buffer"]
    assert buffer["fields"][0].shape[1] == buffer["added"] <= 1000
    script.train(Args(resume=str(tmp_path)))
    assert_same(checkpoint(tmp_path), whole_run[0])
    assert scalars(tmp_path) == whole_run[1]
    first = capsys.readouterr().out
    first = first[first.index("checkpoint.pt") :]  # without the lines of evaluations
    script.train(Args(resume=str(tmp_path)))
    assert capsys.readouterr().out == first
    assert re.search(r"^mean +\d\.\d{3} +\d+\.\d$", first, re.M)
    assert f"checkpoint.pt: {path.stat().st_size:,} bytes" in first


def test_async_is_the_same_run_and_stops_on_sigterm(whole_run, tmp_path, monkeypatch, capsys):
    update = script.update
    calls = []

    def interrupt(*args):
        calls.append(0)
        if len(calls) == 20:
            signal.raise_signal(signal.SIGTERM)
        return update(*args)

    monkeypatch.setattr(script, "update", interrupt)
    state, logged = run(tmp_path, vectorization="async")
    assert state["timestep"] == 500 and "losses/qf_loss" not in logged  # the block is dropped
    assert (
        "stopped at timestep 500, to go on from timestep 500: --resume" in capsys.readouterr().out
    )
    script.train(Args(resume=str(tmp_path)))
    assert_same(checkpoint(tmp_path), whole_run[0])
    assert scalars(tmp_path) == whole_run[1]


@pytest.mark.parametrize("evaluation", [False, True])
def test_a_dead_process_of_a_task_ends_the_run_with_one_line(evaluation, tmp_path):
    """Also one of the evaluation's, long before it is asked; no process stays."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    flags = TINY | dict(vectorization="async", run_dir=tmp_path, total_timesteps=100_000)
    with subprocess.Popen(command(**flags), cwd=ROOT, **pipes) as process:
        while not (tmp_path / "checkpoint.pt").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[evaluation]), signal.SIGKILL)  # training's is made first
        out, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert re.search(
        rf"^error: {tmp_path}: the process of reach-v3 died; to go on from ", err, re.M
    )
    assert "Traceback" not in err
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert checkpoint(tmp_path)["timestep"] % 500 == 0


def test_numbers_that_blow_up_end_the_run_with_one_line(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        stub_run(tmp_path, monkeypatch, critic_lr=1e30)
    assert ended.value.code == 1
    assert "diverged at timestep 48: " in capsys.readouterr().err.splitlines()[-1]
    state = checkpoint(tmp_path / "run")
    assert state["timestep"] == 24
    assert all(x.isfinite().all() for x in state["critic"].values() if isinstance(x, torch.Tensor))


# Bad input

BAD = {
    "--env-names reach: must be tasks of Meta-World": dict(env_names=("reach",)),
    "--env-names reach-v3 reach-v3: must be": dict(env_names=("reach-v3",) * 2),
    "--buffer-size 1279: must be at least one batch (--batch-size 128 of each task)": dict(
        buffer_size=1279
    ),
    "--learning-starts 5000: must be below 5000": dict(learning_starts=5000, total_timesteps=5000),
    "--total-timesteps 4999: must be at least one episode of every task": dict(
        total_timesteps=4999
    ),
    "--buffer-size 1000000000000: needs 1,008,000,000,000,000 bytes, must fit in the": dict(
        buffer_size=10**12
    ),
    "--sparsity 1.0: must be in [0, 1)": dict(sparsity=1.0),
    "--prune-start 0.8: must be in [0, --prune-end 0.8)": dict(prune_start=0.8),
    "--prune-end 1.5: must be in (0, 1]": dict(prune_end=1.5),
    "--set-zeta 1.0: must be in (0, 1)": dict(set_zeta=1.0),
    "--set-epsilon 0.0: must be positive": dict(set_epsilon=0.0),
    "--max-q -1.0: must be at least 0": dict(max_q=-1.0),
    "--tau 0.0: must be in (0, 1]": dict(tau=0.0),
    "--gamma nan: must be in [0, 1]": dict(gamma=float("nan")),
    "--adam-eps 0.0: must be positive": dict(adam_eps=0.0),
    "--updates-per-step 0: must be at least 1": dict(updates_per_step=0),
    "--eval-episodes 0: must be at least 1": dict(eval_episodes=0),
    "--learning-starts -1: must be at least 0": dict(learning_starts=-1),
    "--device cuda: must be auto or cpu": dict(device="cuda"),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_ends_before_anything_is_made(message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "make_vector_env", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        script.train(Args(**BAD[message]))
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: " + message) and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_default_flags_fit_any_number_of_tasks():
    names = tuple(sorted(script.ALL_V3_ENVIRONMENTS))
    chosen = [({"env_names": names[:number]}, number) for number in (1, 3, 7, 49)]
    for flags, number in [({}, 10), ({"benchmark": "MT50"}, 50), *chosen]:
        script.check_args(Args(**flags))
        assert len({*script.task_ids(Args(**flags))} & {*names}) == number


def test_every_flag_is_documented(capsys):
    source = Path(script.__file__).read_text()
    documented = re.findall(r"^    (\w+): [^#\n]+ = [^#\n]+  # (\S[^\n]+)$", source, re.M)
    assert [name for name, _ in documented] == [field.name for field in fields(Args)]
    with pytest.raises(SystemExit):
        tyro.cli(Args, args=["--help"])
    shown = " ".join(re.sub("[─│╭╮╰╯]", " ", capsys.readouterr().out).split())
    for name, text in documented:
        flag, to_own_help = name.replace("_", "-"), r"(?:(?! --(?!no-)).)*"
        assert re.search(rf" --{flag}[ ,]{to_own_help} {re.escape(text)} \(default", shown)


# Devices


class OneDevice(TorchDispatchMode):
    """A stand-in for CUDA: everything is on torch's meta device, and an operation that sees or
    makes a CPU tensor fails. What would wait for the device (.item(), .cpu(), a bool index)
    fails on the meta device by itself."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                raise AssertionError(f"{function}: a tensor on {tensor.device}")
        return result


def hygiene(plant=None):
    """The hot loop: replay, update, pruning, evolution, metrics' input, critic error."""
    networks = make_networks(device="meta")
    log_alpha = torch.zeros(3, device="meta", requires_grad=True)
    optimizers = make_optimizers(networks, log_alpha)  # torch's fused Adam knows no meta
    buffer = ReplayBuffer(60, 3, "meta")
    args = Args()
    if plant:
        plant(networks, buffer)
    with OneDevice():
        for field, value in zip(buffer.fields, buffer.fields, strict=True):
            field[:, 3] = value[:, 2]
        buffer.added = 5
        script.update(networks, log_alpha, optimizers, buffer.sample(4), args)
        for sparsity in (0.5, 0.9):
            script.prune(networks["critic"], sparsity, args.prune_scope)
        script.mask_target(networks)
        actor = networks["actor"]
        script.draw_masks(actor, script.set_densities(actor, 0.9, None))
        for rule in (("gradient", "init"), ("random", "zero")):
            script.evolve(actor, optimizers["actor"], 0.3, *rule)
        script.update(networks, log_alpha, optimizers, buffer.sample(4), args)
        script.plasticity.alive_neurons(networks["critic"])
        script.soft_returns(buffer.fields.rewards, buffer.fields.bootstrap, log_alpha, 0.9)


def test_the_hot_loop_stays_on_its_device():
    hygiene()


def plant_field(networks, buffer):
    buffer.fields = buffer.fields._replace(rewards=torch.zeros(3, 20))


def plant_mask(networks, buffer):
    networks["critic"].masks["hidden2"] = torch.ones(2, 400, 400)


@pytest.mark.parametrize("plant", [plant_field, plant_mask])
def test_a_planted_cpu_tensor_is_caught(plant):
    with pytest.raises((AssertionError, RuntimeError), match="cpu"):
        hygiene(plant)
