"""On a GPU: whole runs, waits of the hot loop, and runs that change the device."""

from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
import torch
from test_runs import checkpoint, flags_of, on_every_script, scalars

import mtsac_sparse_metaworld

pytestmark = pytest.mark.cuda
adam = partial(torch.optim.Adam, fused=True)


@contextmanager
def no_waits():
    """What waits for the device is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_every_script
def test_a_whole_run_is_like_that_on_the_cpu(script, tmp_path, monkeypatch):
    """With every method; the first iteration's losses, before rounding spreads. SET's first masks
    are drawn on the device, whose draws are others: here the CPU's. The agent is read on the CPU.
    """
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.rand(x.shape).to(x.device))
    runs = {}
    for device in ("cpu", "cuda"):
        run_dir = tmp_path / device
        script.train(script.Args(**flags_of(script), device=device, run_dir=str(run_dir)))
        runs[device] = scalars(run_dir)
    # A task's episodes are logged where one ended, and rounding makes other actions
    tags = [{tag for tag in run if not tag.startswith("charts/")} for run in runs.values()]
    assert tags[0] == tags[1]
    for tag in ("losses/value_loss", "losses/policy_loss", "losses/entropy", "sparsity/actor"):
        (_, first_cpu), (_, first_cuda) = runs["cpu"][tag][0], runs["cuda"][tag][0]
        assert first_cuda == pytest.approx(first_cpu, rel=1e-3, abs=1e-5), tag
    actor, _, _ = script.load_agent(str(tmp_path / "cuda"))
    assert all(p.device.type == "cpu" for p in actor.parameters())


@on_every_script
def test_updates_do_not_wait_for_the_device(script):
    sizes = dict(minibatch_size=20, critic_minibatch_size=20)
    args = script.Args(update_epochs=1, critic_epochs=1, **sizes)
    networks = script.make_networks(args, "cuda")
    envs = [script.make_env(env_id) for env_id in script.task_ids(args)]
    policy = script.PolicyTable(networks["actor"], envs[0].observation_space, len(envs), "cuda")
    rollout, _ = script.collect(envs, policy, range(len(envs)), 40)
    targets = torch.randn(len(envs), 40, device="cuda")
    for name, update in (("actor", script.update_actor), ("critic", script.update_critic)):
        optimizer = adam(networks[name].parameters())
        update(networks[name], optimizer, rollout, targets, args)  # the first one makes its state
        with no_waits():
            update(networks[name], optimizer, rollout, targets, args)


def test_sac_updates_do_not_wait_for_the_device():
    script = mtsac_sparse_metaworld
    args = script.Args(env_names=("reach-v3", "push-v3"), prune="both", batch_size=8)
    networks = script.make_networks(args, "cuda")
    networks["target"] = script.make_networks(args, "cuda")["critic"]
    log_alpha = torch.zeros(2, device="cuda", requires_grad=True)
    optimizers = {name: adam(networks[name].parameters()) for name in ("actor", "critic")}
    optimizers["alpha"] = adam([log_alpha])
    buffer = script.ReplayBuffer(100, 2, "cuda")
    buffer.added = 20
    script.update(networks, log_alpha, optimizers, buffer.sample(8), args)  # makes their state
    with no_waits():
        script.update(networks, log_alpha, optimizers, buffer.sample(8), args)


def test_a_sac_run_changes_the_device(tmp_path):
    script = mtsac_sparse_metaworld
    flags = dict(env_names=("reach-v3",), total_timesteps=500, learning_starts=450, batch_size=4)
    flags |= dict(vectorization="sync", prune="both", prune_frequency=100, eval_episodes=1)
    args = script.Args(**flags, run_dir=str(tmp_path), device="cuda")
    script.train(args)
    for device, timesteps in (("cpu", 1000), ("cuda", 1500)):
        changes = dict(device=device, total_timesteps=timesteps, run_dir=None)
        script.train(replace(args, resume=str(tmp_path), **changes))
        assert checkpoint(tmp_path)["timestep"] == timesteps
    actor, _, _ = script.load_agent(str(tmp_path))
    assert all(mask.device.type == "cpu" for mask in actor.masks.values())
