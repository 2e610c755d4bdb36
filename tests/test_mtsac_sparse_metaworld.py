"""Every formula of mtsac_sparse_metaworld.py against an oracle that shares no code with it, and
whole runs on Meta-World's own simulator."""

import copy
import gc
import math
import os
import re
import signal
import subprocess
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from test_mtppo_gmp import OneDevice
from test_runs import assert_same, checkpoint, command, scalars, start, wait_for, words
from torch import nn
from torch.distributions import Independent, Normal
from torch.optim import SGD

import mtsac_sparse_metaworld as script
from mtsac_sparse_metaworld import Args, ReplayBuffer, Transitions

TASKS = ("reach-v3", "push-v3", "pick-place-v3")


def make_networks(num_tasks=3, device="cpu", **flags):
    torch.manual_seed(0)
    args = Args(env_names=TASKS[:num_tasks], prune="none", **flags)
    networks = script.make_networks(args, device)
    networks["target"] = copy.deepcopy(networks["critic"]).requires_grad_(False)
    with torch.no_grad():  # heads and biases that count, a target that is not the critic
        for network in networks.values():
            network.head.weight.uniform_(-0.12, 0.12)
            for name, parameter in network.named_parameters():
                if name.endswith("bias"):
                    parameter.uniform_(-0.1, 0.1)
    return networks


def make_optimizers(networks, log_alpha):
    optimizers = {name: SGD(networks[name].parameters(), 0.1) for name in ("actor", "critic")}
    return optimizers | {"alpha": SGD([log_alpha], 0.1)}


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
            h = torch.cat([x[task], torch.eye(3)[task].repeat(4, 1)], 1)
            for k, layer in enumerate((network.hidden1, network.hidden2, network.hidden3)):
                h = nn.functional.linear(h, layer.weight[i], layer.bias[i, 0])
                h = nn.functional.layer_norm(h, (400,)) if layer_norm else h
                h = h.relu()
                torch.testing.assert_close(hidden[k][i, task * 4 : task * 4 + 4], h)
            head = network.head.weight[i * 3 + task], network.head.bias[i * 3 + task, 0]
            torch.testing.assert_close(output[i, task], nn.functional.linear(h, *head))


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
        assert layer.bound == math.sqrt(6 / fan_in) and not layer.bias.any()
    assert network.head.bound == head_bound  # from which SET may draw what it grows
    assert_uniform(network.head.weight, head_bound, 0.02)
    assert_uniform(network.head.bias, head_bound, 0.1)  # 400 or 100 of them


def test_log_std_is_clamped_and_log_prob_finite_far_out():
    actor = make_networks()["actor"]
    with torch.no_grad():
        actor.head.bias[:, 0] = torch.tensor([300.0, -300.0, 0.0, 50.0, -100.0, 100.0, 0.0, 0.0])
    mean, log_std = script.policy(actor, torch.randn(3, 2, 39))
    assert (log_std[..., 0] == -20).all() and (log_std[..., 1] == 2).all()
    acted, drawn = (script.choose_actions(actor, np.zeros((n, 39)), n == 3) for n in (3, 900))
    assert (acted[:, 0] == 1).all() and (acted[:, 1] == -1).all()
    assert np.abs(drawn).max() <= 1  # uniform before the policy learns
    assert drawn.std() == pytest.approx(3**-0.5, rel=0.03)
    actions, log_probs = script.draw_actions(mean, torch.full_like(mean, -20.0))
    log_probs.sum().backward()
    assert log_probs.isfinite().all() and actor.head.bias.grad.isfinite().all()
    assert (actions[..., 0] == 1).all() and (actions[..., 1] == -1).all()


# SAC


def plain_draws(actor, obs, noise):
    """Actions and log-probs from the given noise, in double precision."""
    mean, log_std = actor(obs)[0].double().chunk(2, -1)
    gaussian = Normal(mean, log_std.clamp(-20, 2).exp())
    u = gaussian.mean + gaussian.stddev * noise
    log_probs = gaussian.log_prob(u) - (1 - u.tanh() ** 2).log()
    return u.tanh().float(), log_probs.sum(-1)


@pytest.mark.parametrize("max_q", [0, 6.0])
@torch.no_grad()
def test_targets_against_a_plain_loop(max_q):
    networks, log_alpha, batch = make_networks(), log_alphas(), random_batch()
    torch.manual_seed(3)
    targets = script.critic_targets(
        networks["actor"], networks["target"], log_alpha.exp()[:, None], batch, 0.9, max_q
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
    old, start = copy.deepcopy(networks), log_alphas().detach()
    args = Args(max_grad_norm=1e9, tau=0.25, gamma=0.9)
    torch.manual_seed(7)
    losses = script.update(networks, log_alpha, make_optimizers(networks, log_alpha), batch, args)

    def descend(loss, network):
        loss.backward()
        with torch.no_grad():
            for parameter in network.parameters():
                parameter -= 0.1 * parameter.grad

    torch.manual_seed(7)
    alpha = start.exp()[:, None]
    targets = script.critic_targets(old["actor"], old["target"], alpha, batch, 0.9, 5000)
    twins = old["critic"](torch.cat([batch.obs, batch.actions], -1))[..., 0]
    qf_loss = sum(((q - targets) ** 2).sum() / 30 for q in twins)
    descend(qf_loss, old["critic"])
    actions, log_probs = script.draw_actions(*script.policy(old["actor"], batch.obs))
    twins = old["critic"](torch.cat([batch.obs, actions], -1))[..., 0]
    smaller = torch.where(twins[0] < twins[1], twins[0], twins[1])
    actor_loss = (start.exp()[:, None] * log_probs - smaller).sum() / 15
    descend(actor_loss, old["actor"])
    for target, source in zip(*(old[n].parameters() for n in ("target", "critic")), strict=True):
        target.copy_(0.75 * target + 0.25 * source.detach())
    for name in networks:
        for new, plain in zip(networks[name].parameters(), old[name].parameters(), strict=True):
            torch.testing.assert_close(new, plain, rtol=1e-4, atol=1e-5)
    entropy_gap = log_probs.detach() - 4  # target entropy of four action dimensions
    alpha_loss = -(start[:, None] * entropy_gap).mean()
    torch.testing.assert_close(log_alpha.detach(), start + 0.1 * entropy_gap.mean(1) / 3)
    plain = dict(qf_loss=qf_loss.item(), actor_loss=actor_loss.item(), alpha_loss=alpha_loss.item())
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(plain, rel=1e-4)


def test_gradients_are_clipped_over_a_network_by_its_active_weights():
    networks, batch = make_networks(), random_batch()
    actor = networks["actor"]
    script.prune(actor, 0.5, "layer")
    before = copy.deepcopy(actor)
    optimizer = SGD(actor.parameters(), 1.0)
    loss = (actor(batch.obs) ** 2).sum() * 100
    script.descend_clipped(loss, actor, optimizer, 0.01)
    pairs = zip(actor.parameters(), before.parameters(), strict=True)
    squares = [(new - old).square().sum().item() for new, old in pairs]
    assert math.sqrt(sum(squares)) == pytest.approx(0.01, rel=1e-3)


# Sparsity


@pytest.mark.parametrize(
    "flags",
    [dict(prune_scope="layer"), dict(prune_scope="global"), dict(sparsifier="set")],
    ids=str,
)
@pytest.mark.parametrize(
    ("prune", "sparse"),
    [("actor", {"actor"}), ("critic", {"critic", "target"}), ("none", set())],
)
def test_only_the_asked_networks_are_pruned_and_the_target_as_the_critic(
    prune, sparse, flags, stub_run
):
    networks = stub_run(prune=prune, **flags)["networks"]
    assert {name for name, network in networks.items() if network.masks} == sparse
    for name in sparse:
        masks = networks[name.replace("target", "critic")].masks
        for layer, mask in masks.items():
            assert torch.equal(networks[name].get_submodule(layer).weight != 0, mask == 1)
        # Within a layer, each head's and each twin's alone
        pruned = torch.cat([(mask == 0).float().mean((1, 2)) for mask in masks.values()])
        assert all(abs(pruned - 0.95) < 1e-4) == ("layer" in flags.values())


def test_set_follows_its_rule_and_tells_what_it_keeps(stub_run, monkeypatch):
    masks, evolve = [], script.evolve  # the critic's after each update, at 48, 72 and 96

    def watch(network, optimizer, *rule):
        share = evolve(network, optimizer, *rule)
        masks.append(dict(network.masks))
        assert rule == (0.2, "gradient", "init")
        return share

    monkeypatch.setattr(script, "evolve", watch)
    rule = dict(set_frequency=9, set_zeta=0.2, set_regrow="gradient", set_grow="init")
    seen = stub_run(sparsifier="set", prune="critic", total_timesteps=120, **rule)
    first, second, third = masks
    grown = kept = 0
    for layer in first:
        new = second[layer] > first[layer]
        grown, kept = grown + new.sum().item(), kept + third[layer][new].sum().item()
        target = seen["networks"]["target"].get_submodule(layer).weight
        assert not target[third[layer] == 0].any()
    assert seen["logged"]["sparsity/critic"][-1][1] == pytest.approx(0.95, abs=1e-3)
    # The first update has nothing to log, none follows the last episode
    steps, shares = zip(*seen["logged"]["sparsity/critic_grown_kept"], strict=True)
    assert steps == (72, 96) and shares[1] == pytest.approx(kept / grown) and 0 < kept < grown


@pytest.mark.parametrize("sparsifier, set_frequency", [("gmp", 12), ("set", 12), ("set", 0)])
def test_masks_change_in_their_order_with_evaluations(
    sparsifier, set_frequency, stub_run, monkeypatch
):
    events, judges = [], ["measure_networks", "play by mode", "play drawn", "critic_error"]

    def record(name, function):
        def recorded(*args, **how):
            told = {True: " drawn", False: " by mode"}.get(how.get("draw"), "")
            events.append((name, args[1]) if name == "prune" else name + told)
            return function(*args, **how)

        monkeypatch.setattr(script, name, recorded)

    for name in ("update", "prune", "evolve", "measure_networks", "play", "critic_error"):
        record(name, getattr(script, name))
    flags = dict(sparsifier=sparsifier, set_frequency=set_frequency)
    stub_run(prune="both", prune_frequency=12, **flags)
    expected = []
    for timestep in range(3, 73, 3):
        expected += ["update"] * (timestep > 24)
        if sparsifier == "gmp" and timestep % 12 == 0:
            share = min((timestep / 72 - 0.05) / 0.75, 1)
            expected += [("prune", pytest.approx(0.95 * (1 - (1 - share) ** 3)))] * 2
        if timestep % 24 == 0:
            expected += judges
        evolves = sparsifier == "set" and set_frequency > 0
        if evolves and timestep == 48:  # 24 is before learning, 72 after it
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
    with pytest.raises(RuntimeError):  # whose free places would be drawn as zeros
        ReplayBuffer(30, 2, "cpu").load_state_dict(state)
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

    def __init__(self, name, goals, task):
        assert goals == f"goals of {name}" and name == TASKS[task]
        self.task = task

    def observe(self):
        return np.array([self.task, self.goal, self.steps] + [0.0] * 36)

    def reset(self, *, seed=None, options):
        self.goal, self.steps = options["goals"][self.task] % 50, 0
        return self.observe(), {}

    def step(self, action):
        self.steps += 1
        success = float(self.task == 1 and self.steps == 3)
        over = self.steps == script.EPISODE_STEPS
        terminated, truncated = over and self.task == 0, over and self.task != 0
        reward = self.task + self.steps / 10
        return self.observe(), reward, terminated, truncated, {"success": success}


@pytest.fixture
def stubs(monkeypatch):
    """Episodes of 8 steps of the stubs."""
    monkeypatch.setattr(script, "EPISODE_STEPS", 8)
    monkeypatch.setattr(script, "CRITIC_ERROR_STRIDE", 3)
    monkeypatch.setattr(script, "GoalEnv", Stub)
    monkeypatch.setattr(script, "draw_tasks", lambda name, seed: f"goals of {name}")


@pytest.fixture
def stub_run(stubs, tmp_path, monkeypatch):
    """Train on the stubs for three episodes; the networks, the last batch, the number of updates
    and their losses, the checkpoint and the scalars."""

    def stub_run(name="run", **changes):
        seen, update = {"updates": 0, "losses": []}, script.update
        seeds, seed_all = set(), script.seed_all

        def watch(networks, log_alpha, optimizers, batch, args):
            seen.update(networks=networks, batch=batch, updates=seen["updates"] + 1)
            seen["losses"].append(update(networks, log_alpha, optimizers, batch, args))
            return seen["losses"][-1]

        folder = str(tmp_path / name)
        flags = dict(env_names=TASKS, total_timesteps=72, learning_starts=24, batch_size=2)
        flags |= dict(buffer_size=300, vectorization="sync", prune_frequency=3, eval_episodes=2)
        flags |= dict.fromkeys(("eval_frequency", "plasticity_frequency"), 24)
        flags |= dict(plasticity_batch_size=10, checkpoint_frequency=24, num_threads=1)
        flags |= {} if "resume" in changes else dict(run_dir=folder)
        args = Args(**flags | changes)
        with monkeypatch.context() as patch:
            patch.setattr(script, "update", watch)
            patch.setattr(script, "seed_all", lambda *key: seeds.add(key[0]) or seed_all(*key))
            script.train(args)
        assert seeds == {args.seed}  # all that is drawn follows from it
        return seen | {"state": checkpoint(folder), "logged": scalars(folder)}

    return stub_run


@pytest.mark.parametrize("bootstrap", [True, False])
def test_no_transition_crosses_a_reset(bootstrap, stub_run, monkeypatch):
    learning, choose = [], script.choose_actions
    monkeypatch.setattr(script, "choose_actions", lambda *x: learning.append(x[2]) or choose(*x))
    seen = stub_run(prune="none", bootstrap_at_truncation=bootstrap)
    held = Transitions(*seen["state"]["buffer"]["fields"])
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
    assert learning == [False] * 8 + [True] * 16


def test_every_promised_tag_is_logged(stub_run):
    """A success counts at any step."""
    seen = stub_run(prune="both")
    logged, losses = seen["logged"], "qf_loss actor_loss alpha_loss alpha/"
    tags = {"eval/success_rate", "plasticity/fisher_trace", "plasticity/critic_error"}
    tags |= {"charts/SPS"}
    returns, successes = {"reach": 3.6, "push": 11.6, "pick-place": 19.6}, dict(push=1.0)
    for task in returns:
        tags |= {f"losses/{name}{task * name.endswith('/')}" for name in losses.split()}
        for group, name in (("eval", "success_rate"), ("charts", "success")):
            values = [value for _, value in logged[f"{group}/{name}/{task}"]]
            assert values == [successes.get(task, 0.0)] * 3
            values = [value for _, value in logged[f"{group}/episodic_return/{task}"]]
            assert values == pytest.approx([returns[task]] * 3)
            tags |= {f"{group}/{name}/{task}", f"{group}/episodic_return/{task}"}
    for network in ("actor", "critic"):
        tags |= {f"plasticity/{network}_dormant_ratio", f"plasticity/{network}_effective_rank"}
        layers = ("", "/hidden1", "/hidden2", "/hidden3", "/head")
        tags |= {f"sparsity/{network}{layer}" for layer in layers}
    assert logged.keys() == tags
    for name in ("qf_loss", "actor_loss", "alpha_loss"):  # 24 is warm-up, then 8 updates each
        own = [each[name].item() for each in seen["losses"]]
        steps, means = zip(*logged[f"losses/{name}"], strict=True)
        assert steps == (48, 72) and len(own) == 16
        assert means == pytest.approx((sum(own[:8]) / 8, sum(own[8:]) / 8), rel=1e-4)
    assert [value for _, value in logged["eval/success_rate"]] == pytest.approx([1 / 3] * 3)


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
def test_critic_error_against_a_plain_loop(bootstrap, stubs):
    args = Args(gamma=0.9, bootstrap_at_truncation=bootstrap, env_names=TASKS, vectorization="sync")
    networks, log_alpha = make_networks(), log_alphas().detach()
    actor, envs = networks["actor"], script.make_vector_env(args)
    goals = np.array([[1, 2], [3, 4], [5, 6]])
    torch.manual_seed(5)
    drawn = script.play(actor, envs, goals, "cpu", draw=True)
    assert drawn.successes.tolist() == [[0, 0], [1, 1], [0, 0]]
    error = script.critic_error(networks, log_alpha, drawn, args)

    torch.manual_seed(5)
    noise = torch.stack([torch.randn(3, 4) for _ in range(16)], 1).view(3, 2, 8, 4)
    noise = torch.cat([noise, torch.randn(3, 2, 4)[:, :, None]], 2)  # (task, episode, step, 4)
    errors, squares = np.zeros(3), np.zeros(3)
    for t in range(3):
        for e in range(2):
            obs = torch.zeros(3, 9, 39)
            obs[t, :, :3] = torch.tensor([[t, goals[t, e], step] for step in range(9)])
            assert torch.equal(drawn.obs[t, e], obs[t])
            actions, log_probs = plain_draws(actor, obs, noise[t, e].expand(3, 9, 4))
            bonuses = [-math.exp(log_alpha[t]) * x for x in log_probs[t].tolist()]

            def smaller_q(step, actions, t=t, obs=obs):
                inputs = torch.cat([obs, actions], -1)
                return networks["critic"](inputs)[:, t, step, 0].min().item()

            tail = smaller_q(8, actions) + bonuses[8]
            for first in (0, 3, 6):
                total = 0.9 ** (8 - first) * tail if bootstrap else 0.0
                for step in range(first, 8):
                    bonus = bonuses[step] if step > first else 0.0
                    total += 0.9 ** (step - first) * (t + (step + 1) / 10 + bonus)
                errors[t] += (smaller_q(first, actions) - total) ** 2
                squares[t] += total**2
    assert error == pytest.approx(np.mean(errors / squares), rel=1e-4)


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
            grads = [p.grad * alive.get(name, 1) for name, p in actor.named_parameters()]
            norms.append(sum(grad.square().sum() for grad in grads))
    assert torch.stack(norms).mean().item() == pytest.approx(exact, rel=0.1)


def test_metrics_count_each_twins_neurons_and_leave_masked_ones_out():
    networks, batch = make_networks(), random_batch(size=40)
    args, name = Args(dormant_tau=0.0), "plasticity/critic_dormant_ratio"  # silent ones alone
    last = networks["critic"].hidden3
    with torch.no_grad():
        last.bias[1, 0, :30] = 10  # all active
        before = script.measure_networks(networks, batch, args)
        last.weight[1, :30], last.bias[1, 0, :30] = 0, -1  # all silent
        after = script.measure_networks(networks, batch, args)
    assert after[name] - before[name] == pytest.approx(30 / 2400, abs=1e-6)
    networks["critic"].masks["hidden3"] = mask = torch.ones(2, 400, 400)
    mask[1, :30] = 0
    masked = script.measure_networks(networks, batch, args)
    assert masked[name] * 2370 == pytest.approx(before[name] * 2400, abs=0.01)
    with torch.no_grad():  # features of rank 3, 5 and 7, which is that of the last layer alone
        for network, ranks in (("actor", [3]), ("critic", [5, 7])):
            layer = networks[network].hidden3
            layer.bias.zero_()
            for twin, rank in enumerate(ranks):
                layer.weight[twin, : 400 - rank] = 0
                layer.bias[twin, 0, 400 - rank :] = 10  # none is silent
    args.srank_delta = 0.0
    ranks = script.measure_networks(networks, batch, args)
    assert ranks["plasticity/actor_effective_rank"] == 3
    assert ranks["plasticity/critic_effective_rank"] == 6  # the twins' mean


# Meta-World itself


@pytest.mark.parametrize("name", script.MT10_V3)
def test_an_episode_follows_from_its_goal_and_actions_alone(name):
    goals = script.draw_tasks(name, 1)
    actions = np.random.default_rng(0).uniform(-1, 1, (60, 4)).astype(np.float32)

    def play(env, goal):
        obs = [env.reset(options={"goals": [None, goal]})[0]]
        return np.stack(obs + [env.step(action)[0] for action in actions])

    fresh, used = (script.GoalEnv(name, goals, 1) for _ in range(2))
    other = play(used, 3)
    assert np.array_equal(play(used, 7), play(fresh, 7))
    assert np.array_equal(play(used, 57), play(fresh, 7))  # goals go round
    assert not np.array_equal(other[0], play(fresh, 7)[0])
    assert fresh.unwrapped.observation_space.shape == (39,) and other[0][36:].any()  # goal seen


# Run folder


TINY = dict(env_names="reach-v3", total_timesteps=1500, learning_starts=1390, batch_size=4)
TINY |= dict(buffer_size=1000, prune="both", prune_frequency=50, eval_episodes=1)
TINY |= dict(eval_frequency=1000, plasticity_frequency=500, plasticity_batch_size=20)
TINY |= dict(checkpoint_frequency=500, num_threads=1)


SPARSIFIERS = {
    "GMP": dict(prune_frequency=10),
    "SET": dict(sparsifier="set", set_frequency=12, set_grow="init", set_regrow="random"),
    "SET by gradient": dict(sparsifier="set", set_frequency=12, set_regrow="gradient"),
}


@pytest.mark.parametrize("options", SPARSIFIERS.values(), ids=SPARSIFIERS)
def test_neither_a_stop_nor_evaluations_change_a_run(options, stub_run, tmp_path, monkeypatch):
    options = options | dict(prune="both")
    whole = stub_run("whole", **options)
    rare = stub_run("rare", **options, eval_frequency=72, plasticity_frequency=72)
    assert_same(rare["state"] | {"args": None}, whole["state"] | {"args": None})
    calls, update = [], script.update

    def interrupt(*args):
        calls.append(0)
        if len(calls) == 12:  # in the third episode
            raise KeyboardInterrupt
        return update(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(script, "update", interrupt)
        stub_run(**options)
    gc.collect()  # the traceback's run, with its lock
    assert checkpoint(tmp_path / "run")["timestep"] == 48  # where a SET update falls
    resumed = stub_run(**options, resume=str(tmp_path / "run"))
    assert resumed["updates"] == 8
    assert_same(resumed["state"], whole["state"])
    assert resumed["logged"] == whole["logged"]
    again = stub_run(**options, resume=str(tmp_path / "run"))
    assert again["updates"] == 0 and again["logged"] == whole["logged"]
    with pytest.raises(ValueError, match="--resume .*run: its buffer differs: "):
        stub_run(**options, resume=str(tmp_path / "run"), buffer_size=30)
    actor, _, names = script.load_agent(str(tmp_path / "run"))
    assert_same(dict(actor.state_dict()), dict(whole["state"]["actor"]))
    assert names == list(TASKS)


def test_each_flag_changes_its_networks(stub_run):
    """By a single update."""
    once = dict(total_timesteps=24, learning_starts=21, prune="none")
    networks, every = ["actor", "critic", "target"], ["actor", "critic", "target", "temperatures"]

    def tensors(part):
        return [x for x in part.values() if isinstance(x, torch.Tensor)]

    plain = stub_run("plain", **once)["state"]
    plain = {name: tensors(plain[name]) for name in every}
    for flags, expected in (
        (dict(actor_lr=0.1), ["actor"]),
        (dict(critic_lr=0.1), networks),  # the actor's loss is by the new critics
        (dict(alpha_lr=0.1), ["temperatures"]),
        (dict(adam_eps=0.1), every),
        (dict(weight_decay=0.1), networks),
        (dict(max_grad_norm=1e-6), networks),
        (dict(gamma=0.5), networks),
        (dict(max_q=0.1), networks),
        (dict(tau=0.5), ["target"]),
        (dict(seed=2), every),
        (dict(layer_norm=True), every),
    ):
        state = stub_run(str(flags), **once, **flags)["state"]
        changed = [n for n in every if not all(map(torch.equal, tensors(state[n]), plain[n]))]
        assert changed == expected, flags


@pytest.mark.parametrize("learning_starts", [24, 25, 47])
def test_a_run_tells_the_number_of_its_updates(learning_starts, stub_run, tmp_path, capsys):
    """Of the whole run, also when it goes on; a run without any is refused."""
    with pytest.raises(ValueError, match="--learning-starts 48: must be below 48"):
        stub_run(learning_starts=48, total_timesteps=71)
    flags = dict(learning_starts=learning_starts, updates_per_step=2)
    stub_run(**flags, total_timesteps=48)
    rest = stub_run(**flags, total_timesteps=100, resume=str(tmp_path / "run"))
    whole = stub_run("whole", **flags, total_timesteps=100)
    told = re.findall(r"^(\d+) updates in all", capsys.readouterr().out, re.M)
    first, resumed, uninterrupted = map(int, told)
    assert resumed == uninterrupted == whole["updates"] == first + rest["updates"]


def test_numbers_that_blow_up_end_the_run(stub_run, tmp_path):
    with pytest.raises(FloatingPointError, match="run: diverged at timestep 48"):
        stub_run(critic_lr=1e30)
    state = checkpoint(tmp_path / "run")
    assert state["timestep"] == 24
    assert all(x.isfinite().all() for x in state["critic"].values() if isinstance(x, torch.Tensor))


def end(process):
    """What it wrote. Its pipes are closed by the last process that ends, an environment's too."""
    try:
        return process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run that was never stopped: its checkpoint and scalars."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    script.train(tyro.cli(Args, args=words(**TINY, vectorization="sync", run_dir=folder)))
    return checkpoint(folder), scalars(folder)


def test_a_run_goes_on_however_it_is_stopped(whole_run, tmp_path):
    """Ctrl-C reaches all processes. What goes on to the end is in one process."""
    flags = TINY | dict(run_dir=tmp_path)
    for timestep, killed in (0, "all"), (500, "an environment"), (1000, "run"):
        process = start(script, **flags)
        wait_for(tmp_path, timestep, process)
        children = Path(f"/proc/{process.pid}/task").glob("*/children")
        environments = [int(pid) for path in children for pid in path.read_text().split()]
        assert len(environments) == 2  # one for training and one for evaluation, which comes later
        if killed == "all":
            os.killpg(process.pid, signal.SIGINT)
        else:
            os.kill(process.pid if killed == "run" else max(environments), signal.SIGKILL)
        _, err = end(process)
        codes = {"all": -signal.SIGINT, "an environment": 1, "run": -signal.SIGKILL}
        assert process.returncode == codes[killed], err
        assert timestep <= checkpoint(tmp_path)["timestep"] < 1500
        flags = dict(resume=tmp_path)
    code, shown = command(script, "--resume", tmp_path, "--vectorization", "sync")
    assert code == 0 and "110 updates in all" in shown
    assert_same(checkpoint(tmp_path), whole_run[0])  # its arguments too
    assert scalars(tmp_path) == whole_run[1]


# Devices


def test_the_hot_loop_stays_on_its_device():
    """Replay, update, pruning, SET and the metrics' input."""
    networks, args = make_networks(device="meta"), Args(prune="both")
    log_alpha = torch.zeros(3, device="meta", requires_grad=True)
    optimizers = make_optimizers(networks, log_alpha)  # torch's fused Adam knows no meta
    buffer = ReplayBuffer(60, 3, "meta")
    buffer.added = 5
    with OneDevice():
        script.update(networks, log_alpha, optimizers, buffer.sample(4), args)
        for progress in (0.4, 0.9):
            script.sparsify(networks, optimizers, args, progress)
        actor = networks["actor"]
        script.draw_masks(actor, script.set_densities(actor, 0.9, None))
        for rule in (("gradient", "init"), ("random", "zero")):
            script.evolve(actor, optimizers["actor"], 0.3, *rule)
        script.update(networks, log_alpha, optimizers, buffer.sample(4), args)
        script.plasticity.alive_neurons(networks["critic"])
        script.soft_returns(buffer.fields.rewards, buffer.fields.bootstrap, log_alpha, 0.9)
