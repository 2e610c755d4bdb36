"""Whole runs as a user starts them: logs, checkpoints, kills, bad input."""

import fcntl
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import moe_sparse
import moore_sparse
import mtppo_gmp
import mtppo_set
import plasticity_metrics

ROOT = Path(__file__).parent.parent
TINY = dict(
    benchmark="MT3",
    total_timesteps=600,
    num_steps=50,
    minibatch_size=20,
    update_epochs=1,
    prune_frequency=25,
    eval_frequency=200,
    eval_episodes=1,
    plasticity_frequency=100,
    plasticity_batch_size=60,
    plasticity_buffer_size=300,
    checkpoint_frequency=100,
    num_threads=1,
)
COMMON_ARMS = dict(weight_decay=1e-6, layer_norm=True)
SET = dict(set_frequency=75, set_regrow="gradient")
SCRIPTS = {  # each with all of its arms at once
    mtppo_gmp: COMMON_ARMS | dict(redo_frequency=75, reset_frequency=120, pcgrad=True),
    mtppo_set: COMMON_ARMS | SET,
    moe_sparse: COMMON_ARMS | dict(sparsifier="gmp"),
    moore_sparse: COMMON_ARMS | SET | dict(sparsifier="set", orthogonal_mix=0.5, set_grow="init"),
}
on_every_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)


def flags_of(script, **changes):
    """The flags of a tiny run of the script with all of its arms."""
    known = {field.name for field in fields(script.Args)}
    return {name: x for name, x in TINY.items() if name in known} | SCRIPTS[script] | changes


def run(script, run_dir, **changes):
    script.train(script.Args(**flags_of(script, **changes), run_dir=str(run_dir)))
    return checkpoint(run_dir), scalars(run_dir)


def command(script, **flags):
    """The command line of a run with these flags."""
    words = [sys.executable, f"{script.__name__}.py"]
    for name, value in flags.items():
        flag = "--" + name.replace("_", "-")
        words += [flag] if value is True else [flag, str(value)]
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


def masks_of(state, name):
    """The masks of a checkpoint's network."""
    return state[name]["_extra_state"]


def assert_same(a, b):
    """Equal to the bit: networks, masks, optimisers, observations."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - {"args", "seconds", "num_threads"}:
            assert_same(a[key], b[key])
    else:
        assert a == b


@pytest.fixture(autouse=True)
def signals():
    """Ctrl-C is pytest's again after a run in this process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    """For each script a run that was never stopped: its checkpoint and scalars."""
    runs = {script: run(script, tmp_path_factory.mktemp(script.__name__)) for script in SCRIPTS}
    for state, _ in runs.values():
        for name in ("actor", "critic"):
            assert masks_of(state, name)
            for layer, mask in masks_of(state, name).items():
                assert (state[name][f"{layer}.weight"][mask == 0] == 0).all()
    return runs


@on_every_script
def test_masks_and_interventions_come_at_their_timesteps(script, monkeypatch, tmp_path):
    """Inside a rollout run.timestep is that of its start; what comes at its end comes after the
    update, and all but the masks' renewal after the evaluation, never after the last update."""
    calls, runs = [], []

    class Watched(script.Run):
        def __init__(self, *args, **others):
            runs.append(self)
            super().__init__(*args, **others)

    def record(name, details=lambda args: ()):
        function = getattr(script, name)

        def recorder(*args):
            if runs:  # not what is tried before the run begins
                calls.append((runs[0].timestep, name, *details(args)))
            return function(*args)

        monkeypatch.setattr(script, name, recorder)

    monkeypatch.setattr(script, "Run", Watched)
    record("update_actor")
    record("evaluate")
    details = {"prune": lambda args: args[1:2], "evolve": lambda args: args[2:]}
    for name in ("prune", "evolve", "redo", "reset_output"):
        if hasattr(script, name):
            record(name, details.get(name, lambda args: ()))
    run(script, tmp_path)
    gmp = script in (mtppo_gmp, moe_sparse)
    expected = []
    for end in range(50, 601, 50):
        start = end - 50

        def prunes(now, shown, gmp=gmp):  # from 30 = 5 % to 480 = 80 % of 600, every 25
            share = 0.95 * (1 - (1 - min(max((now - 30) / 450, 0), 1)) ** 3)
            return [(shown, "prune", pytest.approx(share))] * 2 if gmp and share > 0 else []

        expected += prunes(start + 25, start) + [(end, "update_actor")] + prunes(end, end)
        expected += [(end, "evaluate")] if end % 200 == 0 else []
        if end < 600 and end % 75 < 50:  # 75, 150, ... were reached
            expected += [(end, "redo")] * 2 if script is mtppo_gmp else []
            grow = {mtppo_set: "zero", moore_sparse: "init"}.get(script)
            expected += [(end, "evolve", 0.3, "gradient", grow)] * 2 if grow else []
        if end in (150, 250) and script is mtppo_gmp:  # 120 and 240, twice at the most
            expected += [(end, "reset_output")] * 2
    assert calls == expected


UNCHANGED = {  # nothing but the actor's own steps changes it between acting and its update
    "SET": (mtppo_set, dict(set_frequency=250)),
    "SET, grown weights drawn": (mtppo_set, dict(set_frequency=250, set_grow="init")),
    "SET of experts": (moe_sparse, dict(set_frequency=250, sparsifier="set", num_experts=2)),
    "ReDo": (mtppo_gmp, dict(sparsity=0, redo_frequency=250, redo_tau=0.5)),
    "Reset": (mtppo_gmp, dict(sparsity=0, reset_frequency=250, max_resets=9)),
}


@pytest.mark.parametrize("script, flags", UNCHANGED.values(), ids=UNCHANGED)
def test_the_update_is_made_for_the_policy_that_acted(script, flags, tmp_path):
    """One gradient step per rollout begins where the policy acted: no ratio has moved by then."""
    own = dict(env_ids=("MiniGrid-LavaGapS7-v0",), update_epochs=1, minibatch_size=250)
    own |= dict(num_steps=250, actor_lr=0.01, total_timesteps=2000, eval_episodes=1)
    script.train(script.Args(**own, **flags, plasticity_frequency=500, run_dir=str(tmp_path)))
    logged = scalars(tmp_path)
    assert len(logged["losses/clipfrac"]) == 8
    assert all(value == 0 for _, value in logged["losses/clipfrac"])
    assert all(abs(value) < 1e-6 for _, value in logged["losses/approx_kl"])


def test_the_final_sparsity_is_reached_whatever_the_lengths(tmp_path):
    odd = dict(
        total_timesteps=420, eval_frequency=1000, plasticity_frequency=1000, redo_frequency=0
    )
    for i, flags in enumerate((dict(prune_end=1.0), dict(prune_frequency=1000))):
        state, _ = run(mtppo_gmp, tmp_path / str(i), **odd, **flags)
        masks = masks_of(state, "actor").values()
        zeros = sum((mask == 0).sum().item() for mask in masks)
        assert zeros / sum(mask.numel() for mask in masks) == pytest.approx(0.95, abs=1e-5)


ARMS = {  # flags that must reach the training
    mtppo_gmp: dict(weight_decay=0.1, layer_norm=True, pcgrad=True, prune_scope="layer"),
    mtppo_set: dict(
        weight_decay=0.1, layer_norm=True, set_regrow="gradient", set_zeta=0.6, set_grow="init"
    ),
    moe_sparse: dict(weight_decay=0.1, layer_norm=True, num_experts=3, prune_scope="layer"),
    moore_sparse: dict(weight_decay=0.1, layer_norm=True, orthogonal_mix=0.5),
}


@on_every_script
def test_every_arm_changes_the_weights(script, tmp_path):
    base = {name: getattr(script.Args(), name) for name in SCRIPTS[script]}
    base |= dict(total_timesteps=150, eval_frequency=1000, plasticity_frequency=1000)
    base |= dict(set_frequency=50) if script is mtppo_set else dict(prune_end=0.3)

    def weights(name, **flags):
        state, _ = run(script, tmp_path / name, **base | flags)
        return state["actor"]["head_hidden.weight"].clone()

    plain = weights("plain")
    assert torch.equal(plain, weights("again"))
    for flag, value in ARMS[script].items():
        assert not torch.equal(plain, weights(flag, **{flag: value})), flag


@on_every_script
def test_learning_rates_reach_their_networks(script, tmp_path):
    def networks(name, **flags):
        return run(script, tmp_path / name, total_timesteps=50, **flags)[0]

    plain, weight = networks("plain"), "head_output.bias"
    for name, other in (("actor", "critic"), ("critic", "actor")):
        changed = networks(name, **{f"{name}_lr": 5e-3})
        assert not torch.equal(changed[name][weight], plain[name][weight])
        assert torch.equal(changed[other][weight], plain[other][weight])


@on_every_script
def test_scores_are_returns_over_the_best_return(script, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "evaluate", lambda *_: [[(0.5, 8), (0.7, 10)]] * 3)
    _, logged = run(script, tmp_path, total_timesteps=200)
    best = {"LavaGapS7": 0.9633, "RedBlueDoors-6x6": 0.9900, "MemoryS11": 0.9777}
    for task, value in best.items():
        [(_, score)] = logged[f"eval/normalized_return/{task}"]
        assert score == pytest.approx(0.6 / value, rel=1e-4)
        assert logged[f"eval/episodic_return/{task}"][0][1] == pytest.approx(0.6)
    mean = sum(0.6 / value for value in best.values()) / 3
    assert logged["eval/normalized_return"][0][1] == pytest.approx(mean, rel=1e-4)


@on_every_script
def test_two_runs_with_one_seed_are_equal_to_the_bit(script, whole_runs, tmp_path):
    state, logged = run(script, tmp_path)
    assert_same(state, whole_runs[script][0])
    assert logged == whole_runs[script][1]


def test_another_seed_is_another_run(whole_runs, tmp_path):
    state, _ = run(mtppo_gmp, tmp_path, seed=2, total_timesteps=100)
    weights = [s["actor"]["conv1.weight"] for s in (state, whole_runs[mtppo_gmp][0])]
    assert not torch.equal(*weights)


def test_evaluation_and_metrics_do_not_disturb_training(whole_runs, tmp_path):
    state, _ = run(mtppo_gmp, tmp_path, eval_frequency=600, plasticity_frequency=600)
    for name in ("actor", "critic"):
        assert_same(state[name], whole_runs[mtppo_gmp][0][name])


@on_every_script
def test_every_promised_tag_is_logged(script, whole_runs):
    tasks = ("LavaGapS7", "RedBlueDoors-6x6", "MemoryS11")
    layers = ("conv1", "conv2", "conv3", "head_hidden", "head_output")
    names = "policy_loss value_loss entropy approx_kl clipfrac explained_variance".split()
    tags = {f"losses/{name}" for name in names} | {"eval/normalized_return"}
    for name in ("normalized_return", "episodic_return", "episodic_length"):
        tags |= {f"eval/{name}/{task}" for task in tasks}
    for network in ("actor", "critic"):
        tags |= {f"plasticity/{network}_dormant_ratio", f"plasticity/{network}_effective_rank"}
        tags |= {f"sparsity/{network}"} | {f"sparsity/{network}/{layer}" for layer in layers}
    tags |= {"plasticity/fisher_trace"}
    if script in (mtppo_set, moore_sparse):
        tags |= {f"sparsity/{network}_grown_kept" for network in ("actor", "critic")}
    if script in (moe_sparse, moore_sparse):
        tags |= {f"routing/{task}/expert_{i}" for task in tasks for i in range(2)}
    logged = whole_runs[script][1]
    charts = {tag for tag in logged if tag.startswith("charts/")}
    assert logged.keys() - charts == tags
    names = ("normalized_return", "episodic_return", "episodic_length")
    allowed = {f"charts/{name}/{task}" for name in names for task in tasks}
    assert charts and charts <= allowed
    assert [step for step, _ in logged["eval/normalized_return"]] == [200, 400, 600]
    assert [step for step, _ in logged["plasticity/fisher_trace"]] == list(range(100, 601, 100))
    assert [step for step, _ in logged["losses/entropy"]] == list(range(50, 601, 50))
    sparsity = [value for _, value in logged["sparsity/actor/head_hidden"]]
    if script in (mtppo_set, moore_sparse):  # constant; that of one head's 131072 weights
        expected = script.erk_densities([(128, 1024), (7, 128)], 0.95)[0]
        assert sparsity == pytest.approx([1 - expected] * 12, abs=1e-5)
        assert {value for _, value in logged["sparsity/actor/conv1"]} == {0.0}
    else:
        assert sparsity == sorted(sparsity) and sparsity[-1] > 0.9
        whole = [value for _, value in logged["sparsity/actor"]]
        assert whole == sorted(whole) and whole[-1] == pytest.approx(0.95, abs=1e-5)


def test_times_and_arguments_are_logged(tmp_path):
    run(mtppo_gmp, tmp_path, total_timesteps=50)
    log = EventAccumulator(str(tmp_path)).Reload()
    for what in ("env", "inference", "update", "sparsify", "metrics", "eval"):
        assert log.Scalars(f"time/{what}")[0].value > 0
    assert log.Scalars("charts/SPS")[0].value > 0
    text = log.Tensors("args/text_summary")[0].tensor_proto.string_val[0].decode()
    assert all(f"|{field.name}|" in text for field in fields(mtppo_gmp.Args))


@on_every_script
def test_the_masks_of_a_dense_run_are_none(script, tmp_path):
    dense = dict(sparsity=0) if "sparsifier" not in SCRIPTS[script] else dict(sparsifier="none")
    state, logged = run(script, tmp_path, total_timesteps=100, **dense)
    assert masks_of(state, "actor") == masks_of(state, "critic") == {}
    assert [value for _, value in logged["sparsity/critic"]] == [0.0, 0.0]


@on_every_script
def test_custom_tasks_are_scored_by_raw_return(script, tmp_path, capsys):
    ids = ("MiniGrid-Empty-5x5-v0",)
    experts = {} if script in (mtppo_gmp, mtppo_set) else dict(num_experts=2)
    _, logged = run(script, tmp_path, env_ids=ids, total_timesteps=100, **experts)
    assert logged["eval/normalized_return/Empty-5x5"] == logged["eval/episodic_return/Empty-5x5"]
    assert "Empty-5x5" in capsys.readouterr().out


def wait_for(run_dir, timestep, process):
    """Until the run has saved a checkpoint of at least this timestep."""
    path = Path(run_dir) / "checkpoint.pt"
    while not path.exists() or checkpoint(run_dir)["timestep"] < timestep:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


@on_every_script
def test_kill_9_at_any_moment_then_resume_gives_the_same_run(script, whole_runs, tmp_path):
    run_dir = tmp_path / "killed"
    start = command(script, **flags_of(script), run_dir=run_dir)
    kills = ((0.0, 0), (0.3, 100), (0.1, 300)) if script is mtppo_gmp else ((0.1, 300),)
    for delay, at in kills:
        pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        with subprocess.Popen(start, cwd=ROOT, **pipes) as process:
            wait_for(run_dir, at, process)
            time.sleep(delay)
            process.kill()
        start = command(script, resume=run_dir)
    subprocess.run(start, cwd=ROOT, check=True, capture_output=True)
    assert_same(checkpoint(run_dir), whole_runs[script][0])
    assert scalars(run_dir) == whole_runs[script][1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_the_run_in_good_order(number, tmp_path, whole_runs):
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    start = command(mtppo_gmp, **flags_of(mtppo_gmp), run_dir=tmp_path)
    with subprocess.Popen(start, cwd=ROOT, **pipes) as process:
        wait_for(tmp_path, 100, process)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    stopped = int(re.search(r"^stopped at timestep (\d+), .*--resume \S+\n\Z", out, re.M)[1])
    assert re.fullmatch(rf"\nsaving timestep {stopped} before it stops \(once more: .*\)\n", err)
    assert checkpoint(tmp_path)["timestep"] == stopped < 600
    assert scalars(tmp_path)["losses/entropy"][-1][0] == stopped
    mtppo_gmp.train(mtppo_gmp.Args(resume=str(tmp_path)))
    assert_same(checkpoint(tmp_path), whole_runs[mtppo_gmp][0])
    assert scalars(tmp_path) == whole_runs[mtppo_gmp][1]


@on_every_script
def test_a_log_of_the_same_second_is_read_after_the_earlier_one(script, tmp_path, monkeypatch):
    """Names end with the process id, and a later process may have a smaller one."""
    for pid, timestep in ((9, 0), (1, 50)):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        with script.open_log(tmp_path, script.Args(), timestep) as writer:
            writer.add_scalar("losses/entropy", pid, 100)
    assert scalars(tmp_path)["losses/entropy"] == [(100, 1)]


def test_a_crash_before_the_first_checkpoint_leaves_no_double_log(
    whole_runs, monkeypatch, tmp_path
):
    writers = []

    def open_log(*args):
        writers.append(mtppo_gmp.SummaryWriter(str(args[0]), purge_step=1))
        return writers[0]

    def crash(network):
        writers[0].flush()
        if scalars(tmp_path).get("losses/entropy", [])[-1:] == [(150, pytest.approx(1.9, abs=1))]:
            raise KeyboardInterrupt
        return measure(network)

    measure = plasticity_metrics.measure_sparsity
    monkeypatch.setattr(mtppo_gmp, "open_log", open_log)
    monkeypatch.setattr(plasticity_metrics, "measure_sparsity", crash)
    with pytest.raises(KeyboardInterrupt):
        run(mtppo_gmp, tmp_path, checkpoint_frequency=600)
    assert checkpoint(tmp_path)["timestep"] == 150  # saved as the exception passed
    monkeypatch.undo()
    mtppo_gmp.train(mtppo_gmp.Args(resume=str(tmp_path)))
    assert scalars(tmp_path) == whole_runs[mtppo_gmp][1]


@on_every_script
def test_a_signal_after_the_save_is_saved_too(script, monkeypatch, tmp_path, capsys):
    done = []

    class SignallingBar(script.tqdm):
        def update(self, n=1):
            done.append(n)
            if sum(done) == 150:  # no multiple of --checkpoint-frequency
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(script, "tqdm", SignallingBar)
    state, _ = run(script, tmp_path)
    assert state["timestep"] == 150
    assert "stopped at timestep 150" in capsys.readouterr().out


def test_resuming_a_finished_run_prints_its_result_again(tmp_path, capsys):
    run(mtppo_gmp, tmp_path, total_timesteps=50)
    first = capsys.readouterr().out
    first = first[first.index("\ntask") :]  # without the line of the evaluation
    mtppo_gmp.train(mtppo_gmp.Args(resume=str(tmp_path)))
    assert capsys.readouterr().out == first
    assert re.search(r"^mean +\d\.\d{3} +\d\.\d{3} +\d+\.\d$", first, re.M)


@on_every_script
def test_a_full_disk_keeps_the_last_checkpoint(script, tmp_path, monkeypatch, capsys):
    save, saved = torch.save, []

    def full(state, file):
        if len(saved) == 2:
            file.write(b"half a checkpoint")
            raise OSError(28, "No space left on device")
        saved.append(state["timestep"])
        save(state, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(SystemExit) as ended:
        run(script, tmp_path)
    assert ended.value.code == 1
    assert checkpoint(tmp_path)["timestep"] == saved[-1] == 100
    assert not list(tmp_path.glob("*.partial"))
    err = capsys.readouterr().err
    assert err.startswith(f"error: {tmp_path}: checkpoint.pt could not be written ([Errno 28] No")
    assert "bytes of its disk are free; to go on from timestep 100: --resume" in err


@on_every_script
def test_the_agent_of_a_run_is_loaded_as_it_was_trained(script, tmp_path):
    state, _ = run(script, tmp_path, total_timesteps=100)
    actor, args, tasks = script.load_agent(str(tmp_path))
    assert args.benchmark == "MT3" and args.num_steps == 50
    assert tasks == [f"MiniGrid-{t}-v0" for t in ("LavaGapS7", "RedBlueDoors-6x6", "MemoryS11")]
    assert_same(dict(actor.state_dict()), dict(state["actor"]))
    assert not any(parameter.requires_grad for parameter in actor.parameters())
    obs = torch.from_numpy(script.make_env(tasks[1]).reset(seed=0)[0])
    assert actor(obs[None], [0, 1, 0]).softmax(-1).sum().item() == pytest.approx(1)


BAD = {
    "--sparsity 1.0: must be in [0, 1)": dict(sparsity=1.0),
    "--sparsity -0.1: must be in [0, 1)": dict(sparsity=-0.1),
    "--sparsity nan: must be in [0, 1)": dict(sparsity=float("nan")),
    "--prune-start 0.8: must be in [0, --prune-end 0.8)": dict(prune_start=0.8),
    "--prune-end 1.5: must be in (0, 1]": dict(prune_end=1.5),
    "--prune-start -0.1: must be": dict(prune_start=-0.1),
    "--prune-frequency 0: must be at least 1": dict(prune_frequency=0),
    "--eval-frequency 0: must be at least 1": dict(eval_frequency=0),
    "--plasticity-frequency -5: must be": dict(plasticity_frequency=-5),
    "--checkpoint-frequency 0: must be": dict(checkpoint_frequency=0),
    "--redo-frequency -1: must be at least 0": dict(redo_frequency=-1),
    "--reset-frequency -1: must be at least 0": dict(reset_frequency=-1),
    "--redo-frequency 500: must be 0 or at least --num-steps": dict(redo_frequency=500),
    "--reset-frequency 1999: must be 0 or at least --num-steps": dict(reset_frequency=1999),
    "--eval-episodes 0: must be": dict(eval_episodes=0),
    "--minibatch-size 0: must be": dict(minibatch_size=0),
    "--update-epochs 0: must be": dict(update_epochs=0),
    "--num-steps 0: must be": dict(num_steps=0),
    "--seed -1: must be": dict(seed=-1),
    f"--seed {2**63}: must be in [0, 2^63)": dict(seed=2**63),
    "--actor-lr 0.0: must be positive": dict(actor_lr=0.0),
    "--critic-lr inf: must be positive and finite": dict(critic_lr=float("inf")),
    "--gamma 1.5: must be in [0, 1]": dict(gamma=1.5),
    "--srank-delta 1.0: must be in [0, 1)": dict(srank_delta=1.0),
    "--weight-decay -1.0: must be": dict(weight_decay=-1.0),
    "--total-timesteps 1999: must be at least --num-steps 2000": dict(total_timesteps=1999),
    "--plasticity-buffer-size 4: must be at least 1 per task": dict(plasticity_buffer_size=4),
    "--env-ids MiniGrid-DoorKey-6x6: must be registered MiniGrid tasks (like MiniGrid-DoorKey": (
        dict(env_ids=("MiniGrid-DoorKey-6x6",))
    ),
    "--env-ids CartPole-v1: must be registered MiniGrid tasks": dict(env_ids=("CartPole-v1",)),
    "MiniGrid-Empty-5x5-v0 MiniGrid-Empty-5x5-v0: must be registered MiniGrid tasks": dict(
        env_ids=("MiniGrid-Empty-5x5-v0",) * 2
    ),
    "--device cuda: must be auto or cpu": dict(device="cuda"),
}


BAD_SET = {
    "--set-zeta 0.0: must be in (0, 1)": dict(set_zeta=0.0),
    "--set-zeta 1.0: must be in (0, 1)": dict(set_zeta=1.0),
    "--set-epsilon 0.0: must be positive and finite": dict(set_epsilon=0.0),
    "--set-epsilon -11.0: must be positive and finite": dict(set_epsilon=-11.0),
    "--set-frequency 0: must be at least 1": dict(set_frequency=0),
    "--set-frequency 1999: must be at least --num-steps 2000": dict(set_frequency=1999),
    "--sparsity 1.0: must be in [0, 1)": dict(sparsity=1.0),
}
BAD_GMP = {
    "--prune-start 0.9: must be in [0, --prune-end 0.8)": dict(prune_start=0.9),
    "--prune-frequency 0: must be at least 1": dict(prune_frequency=0),
}
BAD_EXPERTS = {
    "--num-experts -1: must be": dict(num_experts=-1),
    "--num-experts 0: must be": dict(env_ids=("MiniGrid-Empty-5x5-v0",)),
}
BAD_MIX = {
    "--num-experts 1025: must be 1 to 1024 (the number of features)": dict(num_experts=1025),
    "--orthogonal-mix -0.1: must be in [0, 1]": dict(orthogonal_mix=-0.1),
    "--orthogonal-mix 1.1: must be in [0, 1]": dict(orthogonal_mix=1.1),
}
BAD_OF = {
    mtppo_gmp: BAD,
    mtppo_set: BAD_SET,
    moe_sparse: BAD_GMP | BAD_SET | BAD_EXPERTS,
    moore_sparse: BAD_GMP | BAD_SET | BAD_EXPERTS | BAD_MIX,
}


def one_line_of_error(args, capsys, script=mtppo_gmp):
    """What train prints on standard error as it ends with exit code 2."""
    with pytest.raises(SystemExit) as ended:
        script.train(args)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    "script, message", [(script, message) for script, bad in BAD_OF.items() for message in bad]
)
def test_bad_input_ends_before_anything_is_made(script, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "make_env", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    only_set = {} if script in (mtppo_gmp, mtppo_set) else dict(sparsifier="set")
    args = script.Args(**BAD_OF[script][message] | only_set)
    assert message in one_line_of_error(args, capsys, script)
    assert not list(tmp_path.iterdir())


def test_tasks_with_other_spaces_are_refused(capsys, tmp_path):
    ids = ("MiniGrid-Empty-5x5-v0", "MiniGrid-Dynamic-Obstacles-5x5-v0")
    args = mtppo_gmp.Args(env_ids=ids, run_dir=str(tmp_path / "run"))
    err = one_line_of_error(args, capsys)
    assert "MiniGrid-Dynamic-Obstacles-5x5-v0: action_space Discrete(3) must equal" in err


def test_a_folder_with_a_run_is_refused(capsys, tmp_path):
    run(mtppo_gmp, tmp_path, total_timesteps=50)
    capsys.readouterr()
    err = one_line_of_error(mtppo_gmp.Args(**TINY, run_dir=str(tmp_path)), capsys)
    assert "already holds a run" in err


def test_default_folders_never_collide(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "time", lambda: 1e9)
    for _ in range(3):
        mtppo_gmp.train(mtppo_gmp.Args(**TINY | dict(total_timesteps=50)))
    first = "MT3__mtppo_gmp__1__1000000000"
    assert {path.name for path in Path("runs").iterdir()} == {first, f"{first}_2", f"{first}_3"}


def test_a_folder_that_cannot_be_written_is_refused(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    args = mtppo_gmp.Args(run_dir=str(tmp_path / "file"))
    assert "must be a new or a writable folder" in one_line_of_error(args, capsys)


def test_what_cannot_be_resumed_is_refused(capsys, tmp_path):
    resume = mtppo_gmp.Args(resume=str(tmp_path))
    assert "holds no checkpoint.pt" in one_line_of_error(resume, capsys)
    run(mtppo_gmp, tmp_path, total_timesteps=50)
    capsys.readouterr()
    both = mtppo_gmp.Args(resume=str(tmp_path), seed=7)
    both = one_line_of_error(both, capsys)
    assert "only --device and --num-threads may stand beside it" in both
    path = tmp_path / "checkpoint.pt"
    content = path.read_bytes()
    garbage = b"", b"no checkpoint at all", b"\x80\x02c" + bytes(range(250)), b"(dp0\nS'a'\n"
    for part in (content[: len(content) // 2], content[:10], *garbage):
        path.write_bytes(part)
        assert "checkpoint.pt is damaged" in one_line_of_error(resume, capsys)
    for other in ({"script": "mtppo_set"}, {"weights": 1}, [1, 2]):
        torch.save(other, path)
        assert "must be one of this script" in one_line_of_error(resume, capsys)
    torch.save({"script": "mtppo_gmp", "args": {"seed": 1}}, path)
    assert "flags of another version" in one_line_of_error(resume, capsys)


def test_the_command_line(tmp_path):
    """As a process: one line and exit code 2; help that names every flag."""
    ended = subprocess.run(
        command(mtppo_gmp, sparsity=1, run_dir=tmp_path), cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert ended.stderr == "error: --sparsity 1.0: must be in [0, 1)\n" and ended.stdout == ""
    with pytest.raises(SystemExit) as unknown:
        tyro.cli(mtppo_gmp.Args, args=["--benchmark", "MT4"], console_outputs=False)
    assert unknown.value.code == 2


@on_every_script
def test_every_flag_is_documented(script):
    """By the comment behind it, which is what --help shows."""
    source = Path(script.__file__).read_text()
    documented = dict(re.findall(r"^    (\w+): .* = .*  # (.+)$", source, re.M))
    assert list(documented) == [field.name for field in fields(script.Args)]
    ended = subprocess.run(
        command(script) + ["--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    shown = " ".join(re.sub("[│╭╮╰╯─]", " ", ended.stdout).split())
    for name, what in documented.items():
        assert re.search(
            rf"--{name.replace('_', '-')}\b[^#]*? {re.escape(what)} \(default: ", shown
        )


def test_flags_reach_the_run():
    words = "--env-ids MiniGrid-Empty-5x5-v0 MiniGrid-Empty-6x6-v0 --layer-norm --pcgrad"
    args = tyro.cli(mtppo_gmp.Args, args=words.split())
    assert args.env_ids == ("MiniGrid-Empty-5x5-v0", "MiniGrid-Empty-6x6-v0")
    assert args.layer_norm and args.pcgrad and not mtppo_gmp.Args().layer_norm


# What people do to a run


@on_every_script
def test_two_processes_cannot_share_a_folder(script, tmp_path, capsys):
    start = command(script, **flags_of(script, total_timesteps=100_000), run_dir=tmp_path)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(start, cwd=ROOT, **pipes) as process:
        wait_for(tmp_path, 100, process)
        for flags in (dict(resume=str(tmp_path)), dict(run_dir=str(tmp_path))):
            files = {p: p.stat().st_size for p in tmp_path.glob("events.*")}
            err = one_line_of_error(script.Args(**flags), capsys, script)
            assert f"is in use by process {process.pid} on" in err
            assert files.keys() == {*tmp_path.glob("events.*")}
        process.kill()  # frees the lock
    timer = threading.Timer(4, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    script.train(script.Args(resume=str(tmp_path)))  # until the signal
    assert "stopped at timestep" in capsys.readouterr().out


@on_every_script
def test_handlers_are_restored_and_threads_need_none(script, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run(script, tmp_path / "main", total_timesteps=50)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    args = script.Args(**flags_of(script, total_timesteps=50), run_dir=str(tmp_path / "thread"))
    thread = threading.Thread(target=script.train, args=[args])
    thread.start()
    thread.join()
    assert_same(checkpoint(tmp_path / "thread"), checkpoint(tmp_path / "main"))


@on_every_script
@pytest.mark.parametrize("where", ["evaluate", "update_critic", "measure_plasticity"])
def test_a_signal_drops_what_is_half_done(script, where, whole_runs, tmp_path, monkeypatch, capfd):
    """In the middle of an iteration; the run goes on to the same bits."""
    function, calls = getattr(script, where), []

    def interrupted(*args):
        calls.append(0)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return function(*args)

    monkeypatch.setattr(script, where, interrupted)
    state, _ = run(script, tmp_path)
    stopped = dict(evaluate=350, update_critic=50, measure_plasticity=150)[where]
    assert state["timestep"] == stopped
    out, err = capfd.readouterr()
    assert f"stopped at timestep {stopped}" in out and f"saving timestep {stopped} before" in err
    script.train(script.Args(resume=str(tmp_path)))
    assert_same(checkpoint(tmp_path), whole_runs[script][0])
    assert scalars(tmp_path) == whole_runs[script][1]


@on_every_script
@pytest.mark.parametrize("flags", [dict(actor_lr=1e38), dict(critic_lr=1e30)], ids=str)
def test_numbers_that_blow_up_end_the_run_with_one_line(script, flags, tmp_path, capsys):
    own = flags_of(script, layer_norm=False, **flags)
    with pytest.raises(SystemExit) as ended:
        script.train(script.Args(**own, run_dir=str(tmp_path)))
    assert ended.value.code == 1
    err = capsys.readouterr().err.splitlines()[-1]
    found = re.search(r"diverged at timestep (\d+): .* not finite; to go on from timestep", err)
    assert found
    state = checkpoint(tmp_path)
    assert state["timestep"] == int(found[1]) - 50
    for name in ("actor", "critic"):
        parameters = [x for x in state[name].values() if isinstance(x, torch.Tensor)]
        assert all(x.isfinite().all() for x in parameters)


def test_a_metric_that_cannot_be_measured_says_so(capsys):
    def measure(name):
        raise ValueError(f"no neuron left in {name}")

    assert mtppo_gmp.measured("fisher_trace", measure, "conv1") == {}
    assert capsys.readouterr().err == "fisher_trace: not measured (no neuron left in conv1)\n"
    assert mtppo_gmp.measured("fisher_trace", len, "four") == {"plasticity/fisher_trace": 4}


IMPOSSIBLE = {
    "--sparsity 0.999999: leaves 1 weights, fewer than layers": dict(sparsity=0.999999),
    "--sparsity 0.9999: leaves none of the 192 weights of a conv1": dict(
        sparsity=0.9999, prune_scope="layer"
    ),
    "--num-steps 1000000000: needs about": dict(num_steps=10**9, total_timesteps=10**9),
    "--plasticity-buffer-size 100000000000: needs about": dict(plasticity_buffer_size=10**11),
    "--env-ids MiniGrid-WFC-MazeSimple-v0: cannot be made (FileNotFoundError: ": dict(
        env_ids=("MiniGrid-WFC-MazeSimple-v0",)
    ),
    f"{'a' * 200}: must be a new or a writable folder (File name": dict(run_dir="a" * 300),
    f"{'a' * 200}: checkpoint.pt must be readable (File name too long)": dict(resume="a" * 300),
}


@pytest.mark.parametrize("message", IMPOSSIBLE)
def test_impossible_requests_end_before_anything_is_made(message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert message in one_line_of_error(mtppo_gmp.Args(**IMPOSSIBLE[message]), capsys)
    assert not list(tmp_path.iterdir())


def test_other_scripts_refuse_what_leaves_or_takes_too_much(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    empty = mtppo_set.Args(sparsity=0.999999)
    assert "leaves none of the 131072 weights" in one_line_of_error(empty, capsys, mtppo_set)
    for script in (moe_sparse, moore_sparse):
        many = script.Args(num_experts=1024 if script is moore_sparse else 100_000)
        monkeypatch.setattr(script, "available_bytes", lambda device: 10**9)
        assert f"--num-experts {many.num_experts}: needs" in one_line_of_error(many, capsys, script)
    assert not list(tmp_path.iterdir())


def test_resuming_elsewhere(tmp_path, capsys):
    """With another device or number of threads; by default the run's own, at first 1."""
    run_dir = tmp_path / "with a space"
    torch.set_num_threads(2)
    run(mtppo_gmp, run_dir, total_timesteps=100, checkpoint_frequency=50, num_threads=0)
    assert checkpoint(run_dir)["num_threads"] == torch.get_num_threads() == 1
    torch.set_num_threads(2)
    mtppo_gmp.train(mtppo_gmp.Args(resume=str(run_dir)))
    assert torch.get_num_threads() == 1
    mtppo_gmp.train(mtppo_gmp.Args(resume=str(run_dir), device="cpu", num_threads=2))
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


def test_not_at_a_terminal_a_line_is_printed_at_each_evaluation(tmp_path):
    ended = subprocess.run(
        f"{' '.join(command(mtppo_gmp, **flags_of(mtppo_gmp), run_dir=tmp_path))} 2>&-",
        **dict(shell=True, cwd=ROOT, capture_output=True, text=True, check=True),
    )
    lines = re.findall(
        r"^timestep (\d+): score \d\.\d{3}, sparsity 0\.\d{3}, \d+ min left$", ended.stdout, re.M
    )
    assert lines == ["200", "400", "600"] and "\r" not in ended.stdout


@on_every_script
def test_a_read_only_file_system_is_refused(script, tmp_path, monkeypatch, capsys):
    """Neither a new folder nor the lock of an old one can be written there."""
    run(script, tmp_path / "old", total_timesteps=50)
    capsys.readouterr()

    def read_only(*args, **others):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    for flags in (dict(run_dir=str(tmp_path / "new")), dict(resume=str(tmp_path / "old"))):
        err = one_line_of_error(script.Args(**flags), capsys, script)
        assert "must be a new or a writable folder (Read-only file system)" in err
    assert not (tmp_path / "new").exists()


def test_a_run_goes_on_where_there_are_no_locks(tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    assert run(mtppo_gmp, tmp_path, total_timesteps=50)[0]["timestep"] == 50
