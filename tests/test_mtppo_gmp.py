"""Every formula of mtppo_gmp.py against an oracle that shares no code with it."""

import copy
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.wrappers import RecordEpisodeStatistics
from test_runs import on_every_script
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import moe_sparse
import moore_sparse
import mtppo_gmp
import mtppo_gmp as script
import mtppo_set
from mtppo_gmp import TRAINING, Args, MultiHeadNetwork, Rollout
from plasticity_metrics import ObservationBuffer, alive_neurons, measure_sparsity

OBS_SHAPE = (7, 7, 3)


def make_network(num_tasks=3, num_outputs=7, layer_norm=False):
    torch.manual_seed(0)
    return MultiHeadNetwork(OBS_SHAPE, num_tasks, num_outputs, Args(layer_norm=layer_norm))


def network_of(script, num_outputs=7, num_tasks=3, **flags):
    """The script's network, for three tasks."""
    torch.manual_seed(0)
    experts = {moe_sparse: "MixtureOfExperts", moore_sparse: "MixtureOfOrthogonalExperts"}
    name = experts.get(script, "MultiHeadNetwork")
    args = script.Args(**flags | (dict(num_experts=2) if script in experts else {}))
    return getattr(script, name)(OBS_SHAPE, num_tasks, num_outputs, args)


def random_obs(*shape):
    return torch.randint(0, 11, (*shape, *OBS_SHAPE), dtype=torch.uint8)


def apply(network, obs):
    """The network on every sample by itself: obs (task, batch, h, w, c) -> (task, batch, out)."""
    counts = [obs.shape[1]] * len(obs)
    return network(obs.flatten(0, 1), counts).view(*obs.shape[:2], -1)


def random_rollout(num_steps=40, num_views=None):
    """A rollout of three tasks, and the observation before each of its steps (task, num_steps, h,
    w, c). With num_views, the tasks' steps share 1, 2 and 3 times as many; else each has its own.
    """
    torch.manual_seed(0)
    counts = [i * num_views if num_views else num_steps for i in (1, 2, 3)]
    views = random_obs(sum(counts))
    own = [torch.randperm(num_steps) % count for count in counts]
    index = torch.stack([own[0], counts[0] + own[1], counts[0] + counts[1] + own[2]])
    actions, log_probs = torch.randint(0, 7, index.shape), torch.full(index.shape, -math.log(7))
    rewards, done = torch.rand(index.shape), torch.rand(index.shape) < 0.1
    fields = actions, log_probs, rewards, done & (rewards < 0.5), done
    return Rollout(views, counts, index.numpy(), index.roll(-1, 1).numpy(), *fields), views[index]


def table_of(actor, envs, script=script):
    return script.PolicyTable(actor, envs[0].observation_space, len(envs), "cpu")


# Environments and collection


def test_an_evaluation_is_plain_play():
    """One environment and one forward after the other, with the same noise."""
    actor, ids = make_network(2), ["MiniGrid-LavaGapS5-v0", "MiniGrid-Empty-5x5-v0"]
    envs = [[script.make_env(env_id) for _ in range(4)] for env_id in ids]
    policy = script.PolicyTable(actor, envs[0][0].observation_space, 2, "cpu")
    np.random.seed(4)
    episodes = script.evaluate(policy, envs, list(range(8)))
    np.random.seed(4)
    obs = {(i, j): envs[i][j].reset(seed=4 * i + j)[0] for i in range(2) for j in range(4)}
    played = {key: (0.0, 0) for key in obs}
    while obs:
        noise = np.random.gumbel(size=(len(obs), 7))
        for (i, j), gumbel in zip(list(obs), noise, strict=True):
            both = torch.from_numpy(obs[i, j]).expand(2, 1, *OBS_SHAPE)
            log_probs = apply(actor, both)[i, 0].log_softmax(-1).detach().numpy()
            action = int((log_probs + gumbel).argmax())
            obs[i, j], reward, terminated, truncated, _ = envs[i][j].step(action)
            played[i, j] = (played[i, j][0] + reward, played[i, j][1] + 1)
            if terminated or truncated:
                del obs[i, j]
    for i in range(2):
        assert sorted(episodes[i]) == sorted(played[i, j] for j in range(4))
    assert (0.0, 100) in episodes[1] and max(episodes[1]) > (0.0, 100)  # its limit, the goal


def test_normalised_score_of_the_spec():
    # The figures of MOORE's benchmark, rounded as they are printed there
    printed = {
        "LavaGapS7": (196, 0.9633),
        "RedBlueDoors-6x6": (720, 0.9900),
        "MemoryS11": (605, 0.9777),
        "DoorKey-6x6": (360, 0.9725),
        "DistShift1": (252, 0.9607),
        "SimpleCrossingS9N2": (324, 0.9583),
        "MultiRoom-N2-S4": (40, 0.8875),
    }
    ids = [f"MiniGrid-{task}-v0" for task in printed]
    for size in (3, 5, 7):
        assert script.task_ids(Args(benchmark=f"MT{size}")) == ids[:size]
    for task, (max_steps, best) in printed.items():
        env = script.make_env(f"MiniGrid-{task}-v0")
        assert env.unwrapped.max_steps == max_steps
        assert script.BEST_RETURN[task] == pytest.approx(best, abs=5e-5)
        assert env.observation_space.shape == OBS_SHAPE and env.action_space.n == 7


def shortest_path(env):
    """Steps from the start to the goal, by breadth-first search over places and directions."""
    start = (*map(int, env.agent_pos), int(env.agent_dir))
    steps, queue = {start: 0}, [start]
    for x, y, direction in queue:  # which grows
        dx, dy = [(1, 0), (0, 1), (-1, 0), (0, -1)][direction]
        ahead, now = env.grid.get(x + dx, y + dy), steps[x, y, direction]
        if ahead is not None and ahead.type == "goal":
            return now + 1
        reached = [(x, y, (direction + turn) % 4) for turn in (1, 3)]
        for state in reached + [(x + dx, y + dy, direction)] * (ahead is None):
            if state not in steps:
                steps[state] = now + 1
                queue.append(state)


@pytest.mark.parametrize("task, mean", [("LavaGapS7", 0.989), ("DistShift1", 0.993)])
def test_scores_of_shortest_paths_are_those_of_the_page(task, mean):
    """benchmark/choices.md: below 1."""
    env, scores = gym.make(f"MiniGrid-{task}-v0").unwrapped, []
    for seed in range(200):
        env.reset(seed=seed)
        best = 1 - 0.9 * shortest_path(env) / env.max_steps
        scores.append(best / script.BEST_RETURN[task])
    assert np.mean(scores) == pytest.approx(mean, abs=5e-4)


class CountdownEnv(gym.Env):
    """A stand-in for MiniGrid: episode e has 3 + e % 4 steps; even ones terminate, odd ones are
    truncated. The observation tells (task, episode, step)."""

    observation_space = gym.spaces.Box(0, 255, OBS_SHAPE, np.uint8)
    action_space = gym.spaces.Discrete(7)

    def __init__(self, env_id):
        self.task = 1 + list(script.task_ids(Args())).index(env_id)
        self.episode = -1

    def observe(self):
        obs = np.zeros(OBS_SHAPE, np.uint8)
        obs[0, 0] = self.task, self.episode, self.step_count
        return obs

    def reset(self, *, seed=None, options=None):
        self.episode += 1
        self.step_count = 0
        return self.observe(), {}

    def step(self, action):
        self.step_count += 1
        over = self.step_count == 3 + self.episode % 4
        terminated = over and self.episode % 2 == 0
        reward = (self.task + 2 * self.episode + self.step_count) % 5 / 4
        return self.observe(), reward, terminated, over and not terminated, {}


def Countdown(env_id):
    return RecordEpisodeStatistics(CountdownEnv(env_id))


def plain_advantages(value, task, num_steps, gamma, gae_lambda):
    """GAE by its definition: a sum over the rest of each episode, on Countdown's own law."""
    env = Countdown(script.task_ids(Args())[task])
    obs, _ = env.reset()
    steps = []  # (value, reward, next value, terminated, over)
    for _ in range(num_steps):
        next_obs, reward, terminated, truncated, _ = env.step(0)
        steps.append((value(task, obs), reward, value(task, next_obs), terminated, truncated))
        obs = env.reset()[0] if terminated or truncated else next_obs
    advantages = []
    for start in range(num_steps):
        total, weight = 0.0, 1.0
        for v, reward, next_v, terminated, truncated in steps[start:]:
            total += weight * (reward + (0.0 if terminated else gamma * next_v) - v)
            weight *= gamma * gae_lambda
            if terminated or truncated:
                break
        advantages.append(total)
    return advantages


@pytest.mark.parametrize(
    "script, num_steps",
    # the rollout ends in an episode, at a truncation, at a termination
    [(mtppo_gmp, n) for n in (37, 18, 12, 7, 2)]
    + [(other, 37) for other in (mtppo_set, moe_sparse, moore_sparse)],
)
def test_no_transition_crosses_a_reset(monkeypatch, tmp_path, script, num_steps):
    """train's rollout, bootstrap and advantages on scripted episodes, against the definition."""
    seen = {}

    def update_critic(critic, optimizer, rollout, returns, *_):
        seen.update(critic=copy.deepcopy(critic), rollout=rollout, returns=returns.clone())
        return {}

    def update_actor(actor, optimizer, rollout, advantages, *_):
        seen.update(advantages=advantages.clone())
        return {}

    monkeypatch.setattr(script, "make_env", Countdown)
    monkeypatch.setattr(script, "update_actor", update_actor)
    monkeypatch.setattr(script, "update_critic", update_critic)
    monkeypatch.setattr(script, "measure_plasticity", lambda *_: {})
    args = script.Args(
        num_steps=num_steps,
        total_timesteps=num_steps,
        eval_episodes=1,
        sparsity=0,
        run_dir=str(tmp_path / "run"),
    )
    script.train(args)
    rollout = seen["rollout"]

    @torch.no_grad()
    def value(task, obs):
        every_task = torch.from_numpy(obs)[None, None].expand(5, 1, *OBS_SHAPE)
        return apply(seen["critic"], every_task)[task, 0, 0].item()

    for task in range(5):
        expected = plain_advantages(value, task, num_steps, args.gamma, args.gae_lambda)
        values = [value(task, obs.numpy()) for obs in rollout.views[rollout.index[task]]]
        returns = [a + v for a, v in zip(expected, values, strict=True)]
        assert seen["returns"][task].tolist() == pytest.approx(returns, abs=1e-5)
        standardised = (np.array(expected) - np.mean(expected)) / (np.std(expected) + 1e-8)
        assert seen["advantages"][task].tolist() == pytest.approx(list(standardised), abs=1e-4)


class Repeating(gym.Env):
    """A world of four views that come again and again."""

    observation_space = gym.spaces.Box(0, 255, OBS_SHAPE, np.uint8)
    action_space = gym.spaces.Discrete(7)

    def reset(self, *, seed=None, options=None):
        self.place = 0
        return np.full(OBS_SHAPE, self.place, np.uint8), {}

    def step(self, action):
        self.place = (self.place + action) % 4
        return np.full(OBS_SHAPE, self.place, np.uint8), 0.0, action == 6, False, {}


@on_every_script
def test_actions_are_draws_from_the_policy(script):
    """Also after a mask update inside the rollout, which the policy must follow at once."""
    actor, num_steps = network_of(script, num_tasks=2), 20_000
    with torch.no_grad():
        for name in ("head_output", "head_hidden"):  # far from uniform
            actor.get_submodule(name).weight.mul_(4)
    before, after = copy.deepcopy(actor), []

    def renew(timestep):
        if timestep == 100 + 8000:
            actor.head_output.bias.data[:, 0, 2] += 1.0
            after.append(copy.deepcopy(actor))
        return timestep == 100 + 8000

    envs = [RecordEpisodeStatistics(Repeating()) for _ in range(2)]
    script.seed_all(1, TRAINING, 0)
    policy = table_of(actor, envs, script)
    rollout, _ = script.collect(envs, policy, [0, 1], num_steps, 100, renew)
    assert rollout.counts == [4, 4]
    views = torch.arange(4).view(4, 1, 1, 1).expand(2, 4, *OBS_SHAPE)
    for network, steps in ((before, slice(0, 8000)), (after[0], slice(8000, None))):
        log_probs = apply(network, views).log_softmax(-1)
        for task, place in np.ndindex(2, 4):
            there = rollout.views[rollout.index[task, steps], 0, 0, 0] == place
            actions, expected = rollout.action[task, steps][there], log_probs[task, place]
            torch.testing.assert_close(rollout.log_prob[task, steps][there], expected[actions])
            share = torch.bincount(actions, minlength=7) / len(actions)
            torch.testing.assert_close(share, expected.exp(), atol=5 / len(actions) ** 0.5, rtol=0)


@on_every_script
def test_a_rollout_holds_what_happened(script):
    """Its views, rewards and ends against the environments played again with its actions."""
    ids = ["MiniGrid-LavaGapS5-v0", "MiniGrid-Empty-5x5-v0"]
    actor = network_of(script, num_tasks=2)
    script.seed_all(1, TRAINING, 0)
    envs = [script.make_env(env_id) for env_id in ids]
    rollout, episodes = script.collect(envs, table_of(actor, envs, script), [3, 4], 250)
    parts = rollout.views.flatten(1).split(rollout.counts)
    assert [len(part.unique(dim=0)) for part in parts] == rollout.counts  # each view once
    for task, env_id in enumerate(ids):
        env = script.make_env(env_id)
        obs, _ = env.reset(seed=3 + task)
        ended = []
        for step in range(250):
            assert (rollout.views[rollout.index[task, step]].numpy() == obs).all()
            action = rollout.action[task, step].item()
            obs, reward, terminated, truncated, info = env.step(action)
            assert (rollout.views[rollout.next_index[task, step]].numpy() == obs).all()
            assert rollout.reward[task, step].item() == pytest.approx(reward)
            assert rollout.terminated[task, step] == terminated
            assert rollout.done[task, step] == (terminated or truncated)
            if terminated or truncated:
                ended.append((info["episode"]["r"], info["episode"]["l"]))
                obs, _ = env.reset()
        assert episodes[task] == ended and len(ended) > 1


def test_the_table_of_the_policy_follows_the_actor():
    """Log-probs are the actor's for each view, in any order, also after it has changed; known views
    are computed again at once, and nothing twice."""
    actor, calls = make_network(2), []
    obs = random_obs(2, 9)
    keys = [(i, obs[i, j].numpy().tobytes()) for i in range(2) for j in range(9)]
    space = gym.spaces.Box(0, 255, OBS_SHAPE, np.uint8)
    policy = script.PolicyTable(actor, space, 2, "cpu")
    actor.register_forward_hook(lambda _, inputs, output: calls.append(len(output)))
    for change in (0.0, 1.0):
        with torch.no_grad():
            actor.head_output.bias += change * torch.randn_like(actor.head_output.bias)
        policy.refresh(obs[:, :4].numpy())
        got = np.stack([policy.look_up([keys[n], keys[-1 - n]])[0] for n in range(18)])
        expected = apply(actor, obs).log_softmax(-1).detach().flatten(0, 1)
        torch.testing.assert_close(torch.from_numpy(got), expected)
        calls.pop()  # of the oracle
        assert sum(calls) == 18 and calls[0] == (18 if change else 8)
        calls.clear()


def test_seeds_differ_by_seed_purpose_and_timestep():
    keys = [(1, TRAINING, 0), (2, TRAINING, 0), (1, script.EVALUATION, 0), (1, TRAINING, 2000)]
    drawn = [(*script.seed_all(*key, 6), torch.rand(()).item(), np.random.rand()) for key in keys]
    assert len(set(sum(drawn, ()))) == 32
    assert drawn[0] == (*script.seed_all(1, TRAINING, 0, 6), torch.rand(()), np.random.rand())


# Networks: what they put out is tested in test_mtppo_set.py


def test_parameters_have_torchs_default_distribution():
    network = make_network()
    for layer, fan_in in ((network.head_hidden, 1024), (network.head_output, 128)):
        for parameter in layer.parameters():
            assert parameter.abs().max() <= fan_in**-0.5
            assert parameter.abs().max() > 0.9 * fan_in**-0.5


# Gradual magnitude pruning


def test_the_schedule_is_a_cubic_between_its_corners():
    shares = [script.gmp_sparsity(x, 0.05, 0.80, 0.95) for x in (0.0, 0.05, 0.425, 0.80, 1.0)]
    assert shares == pytest.approx([0, 0, 0.95 * 7 / 8, 0.95, 0.95])  # the third is halfway
    assert script.gmp_sparsity(1.0, 0.0, 1.0, 0.5) == 0.5


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_counts_are_exact_and_the_smallest_go(scope):
    network = make_network()
    before = copy.deepcopy(network)
    script.prune(network, 0.7, scope)
    ranked = []  # (weights before, mask) of each layer, each task's own
    for name, new in network.named_children():
        old, mask = before.get_submodule(name), network.masks[name]
        assert torch.equal(new.weight, old.weight * mask) and torch.equal(new.bias, old.bias)
        rows = network.layers[name]
        ranked += zip(old.weight.reshape(rows, -1), mask.reshape(rows, -1), strict=True)
    assert len(ranked) == 3 + 2 * 3
    if scope == "global":
        ranked = [(torch.cat([w for w, _ in ranked]), torch.cat([m for _, m in ranked]))]
    for weight, mask in ranked:
        assert (mask == 0).sum() == round(0.7 * mask.numel())
        assert weight[mask == 0].abs().max() <= weight[mask == 1].abs().min()


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_pruned_weights_stay_zero_and_never_come_back(scope):
    network = make_network()
    optimizer = torch.optim.Adam(network.parameters(), 0.05, weight_decay=0.1, fused=True)
    (rollout, _), advantages = random_rollout(), torch.randn(3, 40)
    args = Args(update_epochs=1, minibatch_size=20, ent_coef=1.0)
    old = {}
    for sparsity in (0.3, 0.3, 0.31, 0.6, 0.95, 0.5):
        script.prune(network, sparsity, scope)
        masks = copy.deepcopy(network.masks)
        script.update_actor(network, optimizer, rollout, advantages, args)
        for name, mask in masks.items():
            assert (network.get_submodule(name).weight[mask == 0] == 0).all()
            assert (mask <= old.get(name, 1.0)).all()
        old = masks


def test_a_scope_that_it_does_not_know_is_refused():
    with pytest.raises(ValueError, match="layer or global, not layers"):
        script.prune(make_network(), 0.5, "layers")


# Methods to compare with


def trained(network):
    """An Adam with moments for every parameter of the network."""
    optimizer = torch.optim.Adam(network.parameters(), 1e-3, fused=True)
    (apply(network, random_obs(3, 8)) ** 2).sum().backward()
    optimizer.step()
    return optimizer


def test_redo_recycles_dormant_neurons_alone():
    network = make_network()
    optimizer = trained(network)
    with torch.no_grad():  # silence channel 4 of conv2, channel 9 of conv3, neuron 3 of head 1
        network.conv1.bias += 10  # and no other
        network.conv2.bias += 100
        network.conv2.bias[4] = -1e6
        network.conv3.weight[9] = network.conv3.bias[9] = 0
        network.head_hidden.weight[1, 3] = network.head_hidden.bias[1, 0, 3] = 0
    for state in optimizer.state.values():  # so that a cleared moment is told from a small one
        state["exp_avg"].fill_(1.0)
        state["exp_avg_sq"].fill_(1.0)
    before = copy.deepcopy(network)
    script.redo(network, optimizer, random_obs(3, 30), 0.001)

    drawn = {name: torch.zeros_like(p, dtype=bool) for name, p in network.named_parameters()}
    zeroed = copy.deepcopy(drawn)
    drawn["conv2.weight"][4] = drawn["conv2.bias"][4] = True
    zeroed["conv3.weight"][:, 4] = True
    drawn["conv3.weight"][9] = drawn["conv3.bias"][9] = True
    # a feature's place in the flattened map: place * channels + channel
    zeroed["head_hidden.weight"].view(3, 128, 16, 64)[..., 9] = True
    drawn["head_hidden.weight"][1, 3] = drawn["head_hidden.bias"][1, 0, 3] = True
    zeroed["head_output.weight"][1, :, 3] = True
    for name, new in network.named_parameters():
        changed, recycled = new != before.get_parameter(name), drawn[name] | zeroed[name]
        # Layers go in order: neuron 9 of conv3 is drawn after its input 4 was cut, and so on
        assert changed[drawn[name]].all() and (new[zeroed[name] & ~drawn[name]] == 0).all()
        assert not changed[~recycled].any()
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[new][moment] == 0, recycled)


def test_redo_respects_masks():
    network = make_network()
    script.prune(network, 0.5, "layer")
    with torch.no_grad():
        network.conv3.weight[9] = network.conv3.bias[9] = 0
    script.redo(network, torch.optim.Adam(network.parameters()), random_obs(3, 30), 0.001)
    for name, layer in network.named_children():
        assert (layer.weight[network.masks[name] == 0] == 0).all()
    assert (network.conv3.weight[9][network.masks["conv3"][9] == 1] != 0).all()


def test_reset_draws_the_output_layer_anew_and_drops_its_moments():
    network = make_network()
    optimizer = trained(network)
    script.prune(network, 0.5, "layer")
    before = copy.deepcopy(network)
    script.reset_output(network, optimizer)
    for name, new in network.named_parameters():
        old = before.get_parameter(name)
        if name.startswith("head_output"):
            assert new not in optimizer.state
            assert (new.abs() <= 128**-0.5).all() and new.abs().max() > 0.8 * 128**-0.5
            kept = network.masks["head_output"] == 1 if name.endswith("weight") else ...
            assert (new[kept] != old[kept]).all()
        else:
            assert torch.equal(new, old) and optimizer.state[new]["exp_avg"].any()
    assert (network.head_output.weight[network.masks["head_output"] == 0] == 0).all()


def test_pcgrad_leaves_agreeing_gradients_and_a_single_one_alone():
    for gradients in ([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]], [[1.0, 2.0]]):
        gradients = torch.tensor(gradients)
        assert torch.equal(script.project_conflicts(gradients), gradients)


def test_pcgrad_is_a_plain_loop_in_an_order_drawn_for_each_task():
    torch.manual_seed(0)
    # All three conflict, so that each order has a result of its own
    gradients = torch.tensor([[2.0, -1.0, -1.0], [-1.0, 3.0, -1.0], [-2.0, -1.0, 4.0]])

    def is_plain_loop(g, i, order):
        expected = gradients[i].clone()
        for other in gradients[order]:
            expected -= min(expected @ other, 0) / (other @ other) * other
        return torch.allclose(g, expected, atol=1e-6)

    seen = set()
    for _ in range(100):
        projected, first = script.project_conflicts(gradients), []  # whom each task met first
        for i, (j, k) in enumerate([(1, 2), (0, 2), (0, 1)]):
            [order] = [o for o in ([j, k], [k, j]) if is_plain_loop(projected[i], i, o)]
            first.append(order[0])
        seen.add(tuple(first))
    assert len(seen) == 2**3


@pytest.mark.parametrize("num_tasks", [1, 3])
def test_pcgrad_projects_the_trunk_and_leaves_the_heads(num_tasks):
    network, obs = make_network(num_tasks), random_obs(num_tasks, 6)
    script.prune(network, 0.5, "layer")
    losses = ((apply(network, obs) - 100 * torch.randn(num_tasks, 6, 7)) ** 2).mean((1, 2))
    tasks = []  # gradients of each one's loss; the pruned weights of the trunk take no part
    for loss in losses:
        network.zero_grad()
        loss.backward(retain_graph=True)
        for layer in ("conv1", "conv2", "conv3"):
            network.get_submodule(layer).weight.grad *= network.masks[layer]
        tasks.append([p.grad for p in network.parameters()])
    network.zero_grad()
    torch.manual_seed(5)
    script.pcgrad_backward(losses, network)
    got, flat = [p.grad for p in network.parameters()], nn.utils.parameters_to_vector
    torch.manual_seed(5)  # the trunk: weights and biases of the three convolutions
    trunk = script.project_conflicts(torch.stack([flat(own[:6]) for own in tasks])).mean(0)
    torch.testing.assert_close(flat(got[:6]), trunk, rtol=1e-4, atol=1e-5)
    for i in range(6, len(got)):
        torch.testing.assert_close(got[i], sum(own[i] for own in tasks) / num_tasks)


# PPO


def test_losses_against_torch_distributions():
    torch.manual_seed(0)
    logits, actions = torch.randn(3, 50, 7), torch.randint(0, 7, (3, 50))
    old, advantages = torch.randn(3, 50) - 2, torch.randn(3, 50)
    policy = torch.distributions.Categorical(logits=logits)
    entropy, log_ratio = policy.entropy(), policy.log_prob(actions) - old
    ratio, surrogate = log_ratio.exp(), torch.empty(3, 50)
    for i in np.ndindex(3, 50):
        r, advantage = ratio[i].item(), advantages[i].item()
        surrogate[i] = min(r * advantage, min(max(r, 0.8), 1.2) * advantage)
    losses, logged = script.actor_losses(logits, actions, old, advantages, 0.2, 0.01)
    torch.testing.assert_close(losses, -(surrogate + 0.01 * entropy).mean(1))
    expected = {"policy_loss": -surrogate.mean(), "entropy": entropy.mean()}
    expected["approx_kl"] = (ratio - 1 - log_ratio).mean()
    expected["clipfrac"] = ((ratio < 0.8) | (ratio > 1.2)).float().mean()
    torch.testing.assert_close(logged, expected)


@pytest.mark.parametrize("num_views", [5, None])
def test_minibatches_hold_every_step_of_every_task_once(num_views):
    rollout, obs = random_rollout(num_steps=100, num_views=num_views)
    np.random.seed(0)
    parts = list(script.minibatches(rollout, 32))
    assert [steps.shape for steps, *_ in parts] == [(3, 32)] * 3 + [(3, 4)]
    whole = torch.cat([steps for steps, *_ in parts], dim=1)
    assert torch.equal(whole.sort(1).values, torch.arange(100).expand(3, 100))
    assert not torch.equal(whole[0], whole[1])  # each task in an order of its own
    for steps, views, counts, place in parts:
        assert len(views) == sum(counts)
        for task in range(3):
            assert torch.equal(views[place[task]], obs[task, steps[task]])
            own = views[sum(counts[:task]) : sum(counts[: task + 1])].flatten(1)
            assert len(own.unique(dim=0)) == len(own) == len(place[task].unique())


@on_every_script
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("num_views", [5, None])
def test_updates_follow_the_plain_gradient(script, layer_norm, masked, num_views):
    """One batch and SGD: the step is the gradient of the loss, with every sample computed by
    itself, whether its view comes often or once."""
    rollout, obs = random_rollout(num_views=num_views)
    torch.manual_seed(1)
    targets = torch.randn(3, 40)  # returns, or advantages
    for update, num_outputs in ((script.update_actor, 7), (script.update_critic, 1)):
        network = network_of(script, num_outputs, layer_norm=layer_norm)
        if masked:
            for layer in network.layers:
                weight = network.get_submodule(layer).weight
                network.masks[layer] = (torch.rand_like(weight) < 0.5).float()
            script.apply_masks(network)
        before = copy.deepcopy(network)
        output = apply(before, obs)
        if num_outputs == 1:
            loss = ((output[..., 0] - targets) ** 2).mean()
            expected = {"value_loss": loss.item()}
        else:
            policy = torch.distributions.Categorical(logits=output)
            ratio = (policy.log_prob(rollout.action) - rollout.log_prob).exp()
            surrogate = torch.min(ratio * targets, ratio.clamp(0.8, 1.2) * targets).mean()
            loss = -surrogate - 0.01 * policy.entropy().mean()
            expected = {"policy_loss": -surrogate.item(), "entropy": policy.entropy().mean().item()}
        loss.backward()
        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        logged = update(network, optimizer, rollout, targets, script.Args(update_epochs=1))
        for name, value in expected.items():
            assert logged[name].item() == pytest.approx(value, rel=1e-5)
        for name, new in network.named_parameters():
            old = before.get_parameter(name)
            assert (new.grad - old.grad).abs().max() <= 1e-5 * old.grad.abs().max(), name
            mask = network.masks.get(name.removesuffix(".weight"), 1.0)
            torch.testing.assert_close(new, (old - 0.1 * old.grad) * mask)
            assert not torch.equal(new, old)


def test_each_minibatch_has_a_gradient_of_its_own():
    """With a learning rate of 0 that of the last one is left."""
    rollout, obs = random_rollout()
    network, plain = make_network(), make_network()
    advantages = torch.randn(3, 40)
    np.random.seed(0)
    *_, (steps, *_) = script.minibatches(rollout, 20)
    batch = torch.arange(3)[:, None], steps
    samples = rollout.action[batch], rollout.log_prob[batch], advantages[batch]
    losses, _ = script.actor_losses(apply(plain, obs[batch]), *samples, 0.2, 0.01)
    losses.mean().backward()
    np.random.seed(0)
    optimizer = torch.optim.SGD(network.parameters(), 0.0)
    args = Args(update_epochs=1, minibatch_size=20)
    script.update_actor(network, optimizer, rollout, advantages, args)
    for new, old in zip(network.parameters(), plain.parameters(), strict=True):
        assert (new.grad - old.grad).abs().max() <= 1e-5 * old.grad.abs().max()


def test_pcgrad_with_repeated_views_is_that_of_all_samples():
    rollout, obs = random_rollout(num_views=5)
    network, plain = make_network(num_outputs=1), make_network(num_outputs=1)
    targets = torch.randn(3, 40) * 10
    torch.manual_seed(5)
    script.pcgrad_backward((apply(plain, obs)[..., 0] - targets).square().mean(1), plain)
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    torch.manual_seed(5)
    script.update_critic(network, optimizer, rollout, targets, Args(), script.pcgrad_backward)
    for new, old in zip(network.parameters(), plain.parameters(), strict=True):
        assert (new.grad - old.grad).abs().max() <= 1e-5 * old.grad.abs().max()


def test_what_is_logged_is_the_mean_over_minibatches():
    """With a learning rate of 0 that of two halves is that of all samples."""
    rollout, obs = random_rollout()
    actor, critic, targets = make_network(), make_network(num_outputs=1), torch.randn(3, 40)
    args = Args(update_epochs=2, minibatch_size=20, critic_minibatch_size=20)
    actor_sgd, critic_sgd = (torch.optim.SGD(x.parameters(), 0.0) for x in (actor, critic))
    logged = script.update_actor(actor, actor_sgd, rollout, targets, args)
    logged |= script.update_critic(critic, critic_sgd, rollout, targets, args)
    entropy = torch.distributions.Categorical(logits=apply(actor, obs)).entropy().mean()
    error = (apply(critic, obs)[..., 0] - targets).square().mean()
    assert logged["entropy"].item() == pytest.approx(entropy.item(), rel=1e-5)
    assert logged["value_loss"].item() == pytest.approx(error.item(), rel=1e-5)


# Plasticity of the networks


def test_metrics_see_each_head_on_its_own_task():
    args = Args()
    networks = {"actor": make_network(), "critic": make_network(num_outputs=1)}
    obs = random_obs(3, 64)
    dense = script.measure_plasticity(networks, obs, args)
    hidden_neurons = 16 + 32 + 64 + 3 * 128
    dormant = "plasticity/actor_dormant_ratio"
    base = dense[dormant] * hidden_neurons
    with torch.no_grad():
        networks["actor"].head_hidden.weight[1, :10] = 0
        networks["actor"].head_hidden.bias[1, 0, :10] = 0
    after = script.measure_plasticity(networks, obs, args)
    assert after[dormant] * hidden_neurons == pytest.approx(base + 10, abs=1e-3)
    critic = "plasticity/critic_dormant_ratio"
    assert after[critic] == dense[critic]
    script.prune(networks["actor"], 0.01, "layer")
    networks["actor"].masks["head_hidden"][1, :10] = 0  # dead by its mask: not a neuron any more
    masked = script.measure_plasticity(networks, obs, args)[dormant]
    assert masked * (hidden_neurons - 10) == pytest.approx(base, abs=1e-3)
    features = networks["actor"].activations(obs.flatten(0, 1), [64] * 3)[1]
    singular = np.linalg.svd(features.detach().double().numpy(), compute_uv=False)
    rank = int((np.cumsum(singular) / singular.sum() < 0.99).sum()) + 1
    assert after["plasticity/actor_effective_rank"] == rank


# Devices


class OneDevice(TorchDispatchMode):
    """A stand-in for CUDA: everything is on torch's meta device, and an operation that sees or
    makes a CPU tensor fails, but for copies to the device. What would wait for the device (.item(),
    .cpu(), a bool index) fails on the meta device by itself."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function is torch.ops.aten.lift_fresh.default:  # of from_numpy
            return result
        copied = function is torch.ops.aten._to_copy.default and kwargs.get("non_blocking")
        for tensor in tree_leaves(result if copied else (args, kwargs, result)):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                raise AssertionError(f"{function}: a tensor on {tensor.device}")
        return result


def hygiene(script):
    """The hot loop: advantages, updates, sparsifiers and interventions."""
    args = script.Args(update_epochs=1, minibatch_size=20)
    with torch.device("meta"):
        actor, critic = network_of(script), network_of(script, num_outputs=1)
    rollout, _ = random_rollout()
    rollout = Rollout(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in rollout))
    buffer = ObservationBuffer(90, 3, np.zeros(OBS_SHAPE, np.uint8), "meta")
    # SGD: torch's fused Adam does not know the meta device
    optimizers = [torch.optim.SGD(n.parameters(), 0.1, momentum=0.9) for n in (actor, critic)]
    with OneDevice():
        buffer.add(rollout.views[script.to_device(rollout.index, "meta")])
        advantages, returns, _ = script.estimate_advantages(critic, rollout, args)
        script.update_critic(critic, optimizers[1], rollout, returns, args)
        script.update_actor(actor, optimizers[0], rollout, advantages, args)
        if hasattr(script, "evolve"):
            script.draw_masks(actor, script.set_densities(actor, 0.95, None))
            for regrow, grow in (("random", "zero"), ("gradient", "init")):
                script.evolve(actor, optimizers[0], 0.3, regrow, grow)
        if hasattr(script, "prune"):
            actor.masks = {}
            for sparsity, scope in ((0.5, "layer"), (0.95, "global")):
                script.prune(actor, sparsity, scope)
        script.update_actor(actor, optimizers[0], rollout, advantages, args)
        if script is mtppo_gmp:
            script.reset_output(actor, optimizers[0])
            pcgrad = script.pcgrad_backward
            script.update_actor(actor, optimizers[0], rollout, advantages, args, pcgrad)
            script.update_critic(critic, optimizers[1], rollout, returns, args, pcgrad)
        alive_neurons(actor)
        buffer.sample(4)


@on_every_script
def test_the_hot_loop_stays_on_its_device(script):
    hygiene(script)


def test_a_copy_that_waits_is_caught(monkeypatch):
    monkeypatch.setattr(script, "to_device", lambda x, device: torch.from_numpy(x).to(device))
    with pytest.raises(AssertionError, match="cpu"):
        hygiene(script)


class ExplicitDevice(TorchFunctionMode):
    """For what must fetch numbers, which the meta device cannot: making a tensor from no other
    without saying on which device fails."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        made = not any(isinstance(x, torch.Tensor) for x in tree_leaves((args, kwargs)))
        made = made and function is not torch.from_numpy  # to_device moves what it makes
        if made and isinstance(result, torch.Tensor) and kwargs.get("device") is None:
            raise AssertionError(f"{function}: makes a tensor on the default device")
        return result


@on_every_script
def test_metrics_and_rollouts_make_every_tensor_on_the_models_device(script):
    actor, critic = network_of(script), network_of(script, num_outputs=1)
    buffer = ObservationBuffer(90, 3, np.zeros(OBS_SHAPE, np.uint8), "cpu")
    optimizer = torch.optim.Adam(actor.parameters(), fused=True)
    args, networks = script.Args(minibatch_size=20), {"actor": actor, "critic": critic}
    envs = [RecordEpisodeStatistics(Repeating()) for _ in range(3)]
    with ExplicitDevice():
        policy = table_of(actor, envs, script)
        policy.refresh(buffer.latest(40).cpu().numpy())
        rollout, _ = script.collect(envs, policy, [0, 1, 2], 40)
        buffer.add(rollout.views[script.to_device(rollout.index, "cpu")])
        script.measure_plasticity(networks, buffer.sample(8), args)
        measure_sparsity(networks)
        script.estimate_advantages(critic, rollout, args)
        if script is mtppo_gmp:
            script.redo(actor, optimizer, buffer.sample(8), 0.001)
    with pytest.raises(AssertionError, match="default device"), ExplicitDevice():
        torch.zeros(3)
