"""Whole runs as a user starts them: what they log and save, kills, resuming, bad input."""

import gc
import io
import re
import runpy
import signal
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, fields
from pathlib import Path
from unittest import mock

import filelock
import gymnasium as gym
import numpy as np
import pytest
import torch
from minigrid.wrappers import ImgObsWrapper
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import moe_sparse
import moore_sparse
import mtppo_gmp
import mtppo_set
import mtsac_sparse_metaworld as SAC

ROOT = Path(__file__).parent.parent
TINY = dict(
    benchmark="MT3",
    total_timesteps=600,
    num_steps=50,
    minibatch_size=20,
    update_epochs=1,
    eval_frequency=200,
    eval_episodes=1,
    plasticity_frequency=100,
    plasticity_batch_size=60,
    plasticity_buffer_size=300,
    checkpoint_frequency=100,
)
GMP = dict(prune_frequency=25)
SET = dict(set_frequency=75, set_regrow="gradient")
SCRIPTS = {  # each with all of its methods at once
    mtppo_gmp: GMP | dict(redo_frequency=75, reset_frequency=120, pcgrad=True),
    mtppo_set: SET,
    moe_sparse: GMP | dict(sparsifier="gmp", set_frequency=75),
    moore_sparse: SET | dict(sparsifier="set", orthogonal_mix=0.5, set_grow="init"),
}
ALL = [*SCRIPTS, SAC]  # whose runs are in test_mtsac_sparse_metaworld.py
on_every_script = pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)
on_all_five = pytest.mark.parametrize("script", ALL, ids=lambda s: s.__name__)
TASKS = ("LavaGapS7", "RedBlueDoors-6x6", "MemoryS11")  # of MT3
EMPTY, LAVA = "MiniGrid-Empty-5x5-v0", "MiniGrid-LavaGapS7-v0"


class OwnEnv(gym.Env):
    """A task of one's own that is no MiniGrid, with an image of another size."""

    image = gym.spaces.Box(-5, 5, (10, 10, 2), np.int16)
    observation_space = gym.spaces.Dict({"image": image})
    action_space = gym.spaces.Discrete(3)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return {"image": self.np_random.integers(-5, 6, (10, 10, 2), np.int16)}, {}

    def step(self, action):
        return self.reset()[0], 0.25, bool(self.np_random.random() < 0.1), False, {}


gym.register("Own-v0", OwnEnv)


def flags_of(script, **changes):
    """The flags of a tiny run of the script with all of its methods."""
    return TINY | dict(weight_decay=1e-6, layer_norm=True) | SCRIPTS[script] | changes


def run(script, run_dir, **changes):
    folder = script.train(script.Args(**flags_of(script, **changes), run_dir=str(run_dir)))
    assert folder == Path(run_dir)
    return checkpoint(run_dir), scalars(run_dir)


def words(**flags):
    """The flags as words of a command line, but for those that are False."""
    given = {name: value for name, value in flags.items() if value is not False}
    pairs = [("--" + name.replace("_", "-"), str(value)) for name, value in given.items()]
    return [word for pair in pairs for word in pair if word != "True"]


def start(script, **flags):
    """Start a process that leads a session, until it has told how to go on. Ctrl-C reaches it even
    where the tests run in the background."""
    process = subprocess.Popen(
        [sys.executable, f"{script.__name__}.py", *words(**flags)],
        **dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        start_new_session=True,
    )
    folder = flags.get("resume") or flags["run_dir"]
    _, told = process.stdout.readline(), process.stdout.readline()
    expected = f"to go on: python {script.__name__}.py --resume {folder}\n"
    assert told == expected, process.communicate()
    return process


def wait_for(run_dir, timestep, process):
    """Until the run has saved a checkpoint of at least this timestep."""
    path = Path(run_dir) / "checkpoint.pt"
    while not path.exists() or checkpoint(run_dir)["timestep"] < timestep:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)


def command(script, *words):
    """A script as the command line starts it, but in this process: its exit code and output."""
    shown = io.StringIO()
    with mock.patch.object(sys, "argv", [script.__file__, *map(str, words)]):
        with redirect_stdout(shown), redirect_stderr(shown):
            try:
                runpy.run_path(script.__file__, run_name="__main__")
            except SystemExit as ended:
                return ended.code, shown.getvalue()
    return 0, shown.getvalue()


def unboxed(shown):
    """The words of an output, without tyro's boxes around them."""
    return " ".join(re.sub("[│╭╮╰╯─]", " ", shown).split())


def checkpoint(run_dir):
    return torch.load(Path(run_dir) / "checkpoint.pt", weights_only=True)


def scalars(run_dir):
    """tag -> [(step, value)], without the values of what no two runs share."""
    log = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    logged = {tag: [(e.step, e.value) for e in log.Scalars(tag)] for tag in log.Tags()["scalars"]}
    return logged | {"charts/SPS": [step for step, _ in logged["charts/SPS"]]}


def assert_same(a, b):
    """Equal to the bit: networks, masks, optimisers, observations, replay, arguments."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert_same(dict(enumerate(a)), dict(enumerate(b)))
    else:
        assert a == b


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    """For each script a run that was never stopped: its checkpoint, scalars and folder."""
    runs = {}
    for script in SCRIPTS:
        folder = tmp_path_factory.mktemp(script.__name__)
        state, logged = run(script, folder)
        for name in ("actor", "critic"):
            for layer, mask in state[name]["_extra_state"].items():
                assert (state[name][f"{layer}.weight"][mask == 0] == 0).all()
        runs[script] = state, logged, folder
    return runs


# Training


@on_every_script
def test_masks_and_interventions_come_at_their_timesteps(script, monkeypatch, tmp_path):
    """Inside a rollout run.timestep is that of its start; what comes at its end comes after the
    update, and all but pruning after the evaluation, never after the last update."""
    calls, runs = [], []

    class Watched(script.Run):
        def __init__(self, *args):
            runs.append(self)
            super().__init__(*args)

    def record(name, function):
        def recorder(*args):
            rule = [x for x in args if isinstance(x, float | str)]
            calls.append((runs[0].timestep, name, *rule))
            return function(*args)

        monkeypatch.setattr(script, name, recorder)

    monkeypatch.setattr(script, "Run", Watched)
    for name in ("update_actor", "evaluate", "prune", "evolve", "redo", "reset_output"):
        if hasattr(script, name):
            record(name, getattr(script, name))
    run(script, tmp_path)
    expected = []

    def prunes(now, shown):  # from 30 = 5 % to 480 = 80 % of 600, every 25
        share = 0.95 * (1 - (1 - min(max((now - 30) / 450, 0), 1)) ** 3)
        call = (shown, "prune", pytest.approx(share), "global")
        return [call] * 2 if script in (mtppo_gmp, moe_sparse) and share > 0 else []

    for end in range(50, 601, 50):
        expected += prunes(end - 25, end - 50) + [(end, "update_actor")] + prunes(end, end)
        expected += [(end, "evaluate")] if end % 200 == 0 else []
        if end < 600 and end % 75 < 50:  # 75, 150, ... were reached
            expected += [(end, "redo", 0.001)] * 2 if script is mtppo_gmp else []
            grow = {mtppo_set: "zero", moore_sparse: "init"}.get(script)
            expected += [(end, "evolve", 0.3, "gradient", grow)] * 2 if grow else []
        if end in (150, 250) and script is mtppo_gmp:  # 120 and 240, twice at the most
            expected += [(end, "reset_output")] * 2
    assert calls == expected


UNCHANGED = {  # nothing but the actor's own steps changes it between acting and its update
    "SET": (mtppo_set, dict(set_frequency=250, set_grow="init")),
    "SET of experts": (moe_sparse, dict(set_frequency=250, sparsifier="set", num_experts=2)),
    "ReDo": (mtppo_gmp, dict(sparsity=0, redo_frequency=250, redo_tau=0.5)),
    "Reset": (mtppo_gmp, dict(sparsity=0, reset_frequency=250, max_resets=9)),
}


@pytest.mark.parametrize("script, flags", UNCHANGED.values(), ids=UNCHANGED)
def test_the_update_is_made_for_the_policy_that_acted(script, flags, tmp_path):
    """One gradient step per rollout begins where the policy acted: no ratio has moved by then."""
    own = dict(env_ids=(LAVA,), update_epochs=1, minibatch_size=250, actor_lr=0.01)
    own |= dict(num_steps=250, total_timesteps=1500, eval_episodes=1)
    script.train(script.Args(**own, **flags, run_dir=str(tmp_path)))
    logged = scalars(tmp_path)
    assert len(logged["losses/clipfrac"]) == 6
    assert all(value == 0 for _, value in logged["losses/clipfrac"])
    assert all(abs(value) < 1e-6 for _, value in logged["losses/approx_kl"])


@pytest.mark.parametrize("flags", [dict(prune_end=1.0), dict(prune_frequency=1000)], ids=str)
def test_the_final_sparsity_is_reached_whatever_the_lengths(flags, tmp_path):
    state, _ = run(mtppo_gmp, tmp_path, total_timesteps=420, **flags)
    masks = state["actor"]["_extra_state"].values()
    zeros = sum((mask == 0).sum().item() for mask in masks)
    assert zeros / sum(mask.numel() for mask in masks) == pytest.approx(0.95, abs=1e-5)


PPO = "gamma=.5 gae_lambda=.5 clip_coef=.001 ent_coef=1 update_epochs=2 minibatch_size=10 "
PPO += "critic_epochs=2 critic_minibatch_size=10"
PRUNE = "sparsity=.5 prune_start=.4 prune_end=1 prune_frequency=50 prune_scope='layer'"
EVOLVE = "sparsity=.5 set_zeta=.6 set_frequency=100 set_epsilon=20 set_regrow='gradient' "
EVOLVE += "set_grow='init'"
EXPERTS = f"num_experts=3 sparsifier='none' {PRUNE} sparsifier='set' sparsifier='set',"
EXPERTS += " sparsifier='set',".join(EVOLVE.split())
FLAGS = {  # of methods; each run has those of one word
    mtppo_gmp: f"seed=2 {PPO} {PRUNE} pcgrad=True redo_frequency=50,redo_tau=.5 redo_frequency=100,"
    "redo_tau=.5 redo_frequency=50,redo_tau=.9 reset_frequency=50 reset_frequency=50,max_resets=1",
    mtppo_set: EVOLVE,
    moore_sparse: f"{EXPERTS} orthogonal_mix=.5",  # and moe_sparse's, whose train is the same
}


@pytest.mark.parametrize("script", FLAGS, ids=lambda s: s.__name__)
def test_every_method_flag_changes_the_weights(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "measure_plasticity", lambda *_: {})  # changes nothing
    base = TINY | dict(env_ids=(LAVA, EMPTY), total_timesteps=150, prune_frequency=25)
    base |= dict(set_frequency=50, num_experts=2)
    base = {name: x for name, x in base.items() if hasattr(script.Args(), name)}
    seen = {}
    for i, flags in enumerate(["", "weight_decay=.1", "layer_norm=True", *FLAGS[script].split()]):
        args = script.Args(**base | eval(f"dict({flags})"), run_dir=str(tmp_path / str(i)))
        state = checkpoint(script.train(args))
        weights = b"".join(
            x.numpy().tobytes()
            for name in ("actor", "critic")
            for key, x in state[name].items()
            if key.endswith("weight")
        )
        assert weights not in seen, f"{flags} changes nothing over {seen[weights]}"
        seen[weights] = flags or "the default"


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
def test_a_dense_run_has_no_masks(script, tmp_path):
    dense = dict(sparsifier="none") if script in (moe_sparse, moore_sparse) else dict(sparsity=0)
    state, logged = run(script, tmp_path, total_timesteps=100, **dense)
    assert state["actor"]["_extra_state"] == state["critic"]["_extra_state"] == {}
    assert [value for _, value in logged["sparsity/critic"]] == [0.0, 0.0]


@on_every_script
def test_one_seed_is_one_run_whatever_is_measured(script, whole_runs, tmp_path):
    """To the bit: neither evaluations nor metrics nor checkpoints disturb training."""
    others = dict(eval_frequency=150, plasticity_frequency=0, checkpoint_frequency=0)
    state, logged = run(script, tmp_path, **others)
    whole, whole_log, _ = whole_runs[script]
    for part in state.keys() - {"args"}:
        assert_same(state[part], whole[part])
    for tag, values in whole_log.items():
        if not tag.startswith(("eval", "plasticity")):
            assert logged[tag] == values
        assert logged[tag][-1] == values[-1]


# Logs and scores


@on_every_script
def test_every_promised_tag_is_logged(script, whole_runs):
    layers = ("conv1", "conv2", "conv3", "head_hidden", "head_output")
    names = "policy_loss value_loss entropy approx_kl clipfrac explained_variance".split()
    tags = {f"losses/{name}" for name in names} | {"eval/normalized_return", "charts/SPS"}
    episodes = [f"{name}/{t}" for t in TASKS for name in ("episodic_return", "episodic_length")]
    episodes += [f"normalized_return/{task}" for task in TASKS]
    tags |= {f"eval/{name}" for name in episodes} | {"plasticity/fisher_trace"}
    for network in ("actor", "critic"):
        tags |= {f"plasticity/{network}_dormant_ratio", f"plasticity/{network}_effective_rank"}
        tags |= {f"sparsity/{network}"} | {f"sparsity/{network}/{layer}" for layer in layers}
    if script in (mtppo_set, moore_sparse):
        tags |= {f"sparsity/{network}_grown_kept" for network in ("actor", "critic")}
    if script in (moe_sparse, moore_sparse):
        tags |= {f"routing/{task}/expert_{i}" for task in TASKS for i in range(2)}
    logged = whole_runs[script][1]
    training = {tag for tag in logged if tag.startswith("charts/")} - {"charts/SPS"}
    assert logged.keys() - training == tags
    assert training and training <= {f"charts/{name}" for name in episodes}
    assert [step for step, _ in logged["eval/normalized_return"]] == [200, 400, 600]
    assert [step for step, _ in logged["plasticity/fisher_trace"]] == list(range(100, 601, 100))
    assert logged["charts/SPS"] == list(range(50, 601, 50))
    sparsity = [value for _, value in logged["sparsity/actor/head_hidden"]]
    if script in (mtppo_set, moore_sparse):  # 3 heads of 128 x 1024 and 7 x 128, in proportion
        scale = 0.05 * (128 * 1024 + 7 * 128) / (128 + 1024 + 7 + 128)
        expected = 1 - scale * (128 + 1024) / (128 * 1024)
        assert sparsity == pytest.approx([expected] * 12, abs=1e-5)
        assert {value for _, value in logged["sparsity/actor/conv1"]} == {0.0}
    else:
        assert sparsity == sorted(sparsity) and sparsity[-1] > 0.9
        whole = [value for _, value in logged["sparsity/actor"]]
        assert whole == sorted(whole) and whole[-1] == pytest.approx(0.95, abs=1e-5)


@on_every_script
def test_scores_are_returns_over_the_best_return(script, monkeypatch, tmp_path):
    """Of the policy as the update left it; all that is drawn follows from the seed."""

    def evaluate(policy, *_):
        known = list(policy.log_probs)
        fresh = script.PolicyTable(policy.actor, policy.space, 3, "cpu")
        assert known and np.allclose(policy.look_up(known), fresh.look_up(known))
        return [[(0.5, 8), (0.7, 10)]] * 3

    seeds, seed_all = set(), script.seed_all
    monkeypatch.setattr(script, "seed_all", lambda *key: seeds.add(key[0]) or seed_all(*key))
    monkeypatch.setattr(script, "evaluate", evaluate)
    _, logged = run(script, tmp_path, total_timesteps=50, seed=3)
    assert seeds == {3}
    scores = [0.6 / 0.9633, 0.6 / 0.9900, 0.6 / 0.9777]
    names = ("normalized_return", "episodic_return", "episodic_length")
    for task, score in zip(TASKS, scores, strict=True):
        shown = [logged[f"eval/{name}/{task}"][0][1] for name in names]
        assert shown == pytest.approx([score, 0.6, 9], rel=1e-4)
    assert logged["eval/normalized_return"][0][1] == pytest.approx(sum(scores) / 3, rel=1e-4)


@on_every_script
def test_tasks_of_ones_own_are_scored_by_their_return(script, tmp_path):
    experts = {} if script in (mtppo_gmp, mtppo_set) else dict(num_experts=2)
    _, logged = run(script, tmp_path, env_ids=("Own-v0",), total_timesteps=100, **experts)
    [(_, score)] = logged["eval/normalized_return"]
    [(_, length)] = logged["eval/episodic_length/Own"]
    assert score == logged["eval/episodic_return/Own"][0][1] == 0.25 * length


def test_what_a_run_prints(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    args = mtppo_gmp.Args(**TINY | dict(total_timesteps=999, num_steps=200, eval_frequency=400))
    folder = mtppo_gmp.train(args)
    first, told, last = (out := capsys.readouterr()).out.splitlines()
    assert re.fullmatch(r"runs/MT3__mtppo_gmp__1__\d+", str(folder)) and folder.is_dir()
    assert re.fullmatch(f"{folder}: timesteps 0 to 800 on (cpu|cuda)", first)
    assert told == f"to go on: python mtppo_gmp.py --resume {folder}"
    assert last == f"finished: {folder}"
    scores = {tag: own for tag, own in scalars(folder).items() if tag.startswith("eval/")}
    lines = {f"timestep 800: {tag} {own[-1][1]:.3f}" for tag, own in scores.items()}
    timestep, score = scores["eval/normalized_return"][0]
    lines |= {f"timestep {timestep}: eval/normalized_return {score:.3f}"}  # before: the mean alone
    assert {line for line in re.split(r"[\r\n]", out.err) if "eval/" in line} == lines
    assert timestep == 400 and len(lines) == 3 * len(TASKS) + 2


@on_every_script
def test_the_agent_of_a_run_is_loaded_as_it_was_trained(script, whole_runs):
    state, _, folder = whole_runs[script]
    actor, args, tasks = script.load_agent(str(folder))
    assert args == script.Args(**flags_of(script, device="cpu"))
    assert tasks == [f"MiniGrid-{task}-v0" for task in TASKS]
    assert_same(dict(actor.state_dict()), dict(state["actor"]))
    assert not any(parameter.requires_grad for parameter in actor.parameters())


def test_remembered_views_are_those_of_minigrid():
    """On every task that can be made here, and where there are too many views to remember."""
    ids = [i for i in gym.registry if i.startswith(("MiniGrid-", "BabyAI-")) and "-WFC-" not in i]
    assert len(ids) > 150
    rng = np.random.default_rng(0)
    for env_id in ids:
        plain, ours = ImgObsWrapper(gym.make(env_id)), mtppo_gmp.make_env(env_id)
        assert ours.observation_space == plain.observation_space
        for seed in (0, 0, 1):
            theirs, mine = plain.reset(seed=seed)[0], ours.reset(seed=seed)[0]
            for step in range(30):
                assert mine.dtype == theirs.dtype and np.array_equal(mine, theirs), env_id
                mine[:] = 99  # its reader may change it
                if seed == 1 and step == 15:
                    mtppo_gmp.VIEWS.clear()
                    mtppo_gmp.VIEWS.update(dict.fromkeys(range(50_000)))
                action = int(rng.integers(plain.action_space.n))
                (theirs, *rest, _), (mine, *others, _) = plain.step(action), ours.step(action)
                assert rest == others
                if rest[1] or rest[2]:
                    theirs, mine = plain.reset()[0], ours.reset()[0]
        assert len(mtppo_gmp.VIEWS) <= 50_000


# Kills and resuming

KILLS = {
    mtppo_gmp: {0: signal.SIGKILL, 300: signal.SIGTERM},
    mtppo_set: {300: signal.SIGINT},
    moe_sparse: {300: signal.SIGTERM},
    moore_sparse: {300: signal.SIGKILL},
}


@on_every_script
def test_a_killed_run_goes_on_to_the_same_bits(script, whole_runs, tmp_path):
    run_dir = tmp_path / "killed run"
    flags = flags_of(script, run_dir=run_dir)
    for timestep, kill in KILLS[script].items():
        with start(script, **flags) as process:
            wait_for(run_dir, timestep, process)
            process.send_signal(kill)
            process.communicate(timeout=60)
        assert process.returncode == -kill  # as the signal leaves it: a shell shows 130, 143
        flags = dict(resume=run_dir)
    code, _ = command(script, *words(**flags))
    assert code == 0
    state, logged, _ = whole_runs[script]
    assert_same(checkpoint(run_dir), state)
    assert scalars(run_dir) == logged


def test_a_crash_while_it_saves_loses_nothing(whole_runs, monkeypatch, tmp_path):
    """The log is then ahead of the checkpoint, which is the old one; the clock may be behind."""
    save, now = torch.save, time.time

    def crash(state, file):
        if state["timestep"] == 300:
            Path(file).write_bytes(b"half a checkpoint")
            raise KeyboardInterrupt
        save(state, file)

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(KeyboardInterrupt):
        run(mtppo_gmp, tmp_path)
    gc.collect()  # frees the lock, as the end of a process does
    assert checkpoint(tmp_path)["timestep"] == 200
    assert scalars(tmp_path)["losses/entropy"][-1][0] == 300
    monkeypatch.setattr(torch, "save", save)
    monkeypatch.setattr(time, "time", lambda: now() - 10**9)
    mtppo_gmp.train(mtppo_gmp.Args(**flags_of(mtppo_gmp), resume=str(tmp_path)))
    state, logged, _ = whole_runs[mtppo_gmp]
    assert_same(checkpoint(tmp_path), state)
    assert scalars(tmp_path) == logged


def test_a_resumed_run_keeps_its_flags_but_for_those_given(tmp_path):
    own = flags_of(mtppo_gmp, total_timesteps=100, gamma=0.9, eval_frequency=100)
    command(mtppo_gmp, *words(**own), "--run-dir", tmp_path)
    changes = ["--gamma", "0.99", "--no-pcgrad", "--actor-lr", "0.002"]
    for total, given in ((200, []), (300, changes)):
        # The total is below the default of --num-steps
        given = [f"--resume={tmp_path}", "--total-timesteps", total, *given]
        assert f"timesteps {total - 100} to {total}" in command(mtppo_gmp, *given)[1]
    own |= dict(total_timesteps=300, gamma=0.99, pcgrad=False, actor_lr=0.002)
    state = checkpoint(tmp_path)
    assert state["timestep"] == 300 and state["args"] == asdict(mtppo_gmp.Args(**own))
    assert [group["lr"] for group in state["actor_optimizer"]["param_groups"]] == [0.002]
    assert scalars(tmp_path)["charts/SPS"] == list(range(50, 301, 50))
    texts = EventAccumulator(str(tmp_path)).Reload().Tensors("args/text_summary")
    shown = [(e.step, e.tensor_proto.string_val[0].decode()) for e in texts]
    gammas = [(step, re.search(r"\|gamma\|(.*)\|", text)[1]) for step, text in shown]
    assert gammas == [(0, "0.9"), (100, "0.9"), (200, "0.99")]
    assert all(f"|{field.name}|" in shown[-1][1] for field in fields(mtppo_gmp.Args))


def test_a_finished_run_keeps_its_flags(tmp_path):
    run(mtppo_gmp, tmp_path, total_timesteps=100)
    before = checkpoint(tmp_path)
    flags = flags_of(mtppo_gmp, total_timesteps=149, gamma=0.5)  # no rollout more
    mtppo_gmp.train(mtppo_gmp.Args(**flags, resume=str(tmp_path)))
    assert_same(checkpoint(tmp_path), before)
    assert len(EventAccumulator(str(tmp_path)).Reload().Tensors("args/text_summary")) == 1


@pytest.mark.parametrize("flags", [dict(benchmark="MT5"), dict(plasticity_buffer_size=30)], ids=str)
def test_a_run_goes_on_with_networks_and_buffers_of_its_own_sizes(flags, tmp_path):
    run(mtppo_gmp, tmp_path, total_timesteps=100)
    args = mtppo_gmp.Args(**flags_of(mtppo_gmp, **flags), resume=str(tmp_path))
    with pytest.raises(ValueError, match=f"--resume {tmp_path}: its (actor|buffer) differs: "):
        mtppo_gmp.train(args)


def test_two_processes_cannot_share_a_folder(tmp_path):
    with start(mtppo_gmp, **flags_of(mtppo_gmp, total_timesteps=10**5, run_dir=tmp_path)) as first:
        [log] = tmp_path.glob("events.*")
        with pytest.raises(filelock.Timeout):
            mtppo_gmp.train(mtppo_gmp.Args(**flags_of(mtppo_gmp), resume=str(tmp_path)))
        assert [log] == [*tmp_path.glob("events.*")]
        first.kill()
    gc.collect()
    flags = flags_of(mtppo_gmp, total_timesteps=100, resume=str(tmp_path))
    mtppo_gmp.train(mtppo_gmp.Args(**flags))  # the lock is free


@on_every_script
@pytest.mark.parametrize("flags", [dict(actor_lr=1e38), dict(critic_lr=1e30)], ids=str)
def test_numbers_that_blow_up_end_the_run_and_the_command_says_so(script, flags, tmp_path):
    flags = flags_of(script, layer_norm=False, checkpoint_frequency=50, run_dir=tmp_path, **flags)
    error, _ = command(script, *words(**flags))
    state = checkpoint(tmp_path)
    assert error == f"error: {tmp_path}: diverged at timestep {state['timestep'] + 50}"
    for name in ("actor", "critic"):
        parameters = [x for x in state[name].values() if isinstance(x, torch.Tensor)]
        assert all(x.isfinite().all() for x in parameters)


# Bad input

NUMBERS = "num_steps update_epochs minibatch_size critic_epochs critic_minibatch_size "
NOWHERE, WFC = "MiniGrid-Nowhere-v0", "MiniGrid-WFC-MazeSimple-v0"
OBSTACLES = "MiniGrid-Dynamic-Obstacles-5x5-v0"  # has fewer actions
BAD = [
    (mtppo_gmp, f"{NUMBERS} prune_frequency", 0, "at least 1"),
    (mtppo_gmp, "eval_episodes plasticity_batch_size num_threads", 0, "positive"),
    (mtppo_gmp, "gamma gae_lambda prune_end", 1.5, "at most 1"),
    (mtppo_gmp, "prune_start", 0.8, "below --prune-end"),
    (mtppo_gmp, "total_timesteps", 1999, "at least --num-steps"),
    (mtppo_gmp, "redo_frequency reset_frequency", 1999, "0 or at least --num-steps"),
    (mtppo_gmp, "sparsity srank_delta", 1.0, "below 1"),
    (mtppo_gmp, "device", "cuda", "auto or cpu here"),
    (mtppo_gmp, "env_ids", (NOWHERE,), f"{NOWHERE}: NameNotFound: "),
    (mtppo_gmp, "env_ids", ("CartPole-v1",), "CartPole-v1: "),
    (mtppo_gmp, "env_ids", (WFC,), "FileNotFoundError: "),
    (mtppo_gmp, "env_ids", (EMPTY, EMPTY), "different tasks"),
    (mtppo_gmp, "env_ids", (EMPTY, "Own-v0"), "of equal spaces, not {"),
    (mtppo_gmp, "env_ids", (EMPTY, OBSTACLES), f"{OBSTACLES}': "),
    (mtppo_gmp, "benchmark", "MT4", "one of MT3, MT5, MT7"),
    (mtppo_gmp, "plasticity_buffer_size", 4, "at least one a task, 5"),
    (mtppo_set, "set_zeta", 1.5, "at most 1"),
    (mtppo_set, "set_regrow", "rigl", "one of random, gradient"),
    (mtppo_set, "set_frequency", 1999, "0 or at least --num-steps"),
    (moe_sparse, "prune_start", 0.9, "below"),
    (moe_sparse, "sparsifier", "GMP", "one of none, gmp, set"),
    (moe_sparse, "env_ids", (EMPTY,), "at least 1 with --env-ids"),
    (moore_sparse, "num_experts", 1025, "at most 1024"),
    (moore_sparse, "orthogonal_mix", 1.1, "in [0, 1]"),
    (SAC, "batch_size updates_per_step prune_frequency", 0, "at least 1"),
    (SAC, "gamma tau prune_end set_zeta", 1.1, "at most 1"),
    (SAC, "prune_start", 0.8, "below --prune-end"),
    (SAC, "prune", "actors", "one of actor, critic, both, none"),
    (SAC, "env_names", ("reach",), "different tasks of Meta-World"),
    (SAC, "env_names", ("reach-v3", "reach-v3"), "different tasks of Meta-World"),
    (SAC, "total_timesteps", 4999, "at least an episode of every task"),
    (SAC, "learning_starts", 20_000_000, "below 20000000, the last timestep"),
    (SAC, "buffer_size", 1279, "at least a batch, 1280"),
    (SAC, "max_grad_norm", 0, "positive"),
]
CASES = [(script, name, *case) for script, names, *case in BAD for name in names.split()]


@pytest.mark.parametrize("script, name, value, message", CASES, ids=str)
def test_bad_input_is_refused(script, name, value, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        script.Args(**{name: value})
    assert re.match(r"--[a-z-]+ ", str(refused.value))


@on_all_five
def test_numbers_below_zero_and_no_numbers_are_refused(script):
    numbers = [f.name for f in fields(script.Args) if re.search("int|float", str(f.type))]
    assert len(numbers) > 20
    for name in numbers:
        for value in (-1, -0.1, float("nan"), float("-inf"), float("inf")):
            with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} {value}: must be "):
                script.Args(**{name: value})


def test_what_is_refused_makes_nothing(monkeypatch, tmp_path):
    """On the command line: exit code 2 and what was given."""
    monkeypatch.chdir(tmp_path)
    torch.save({"script": "mtppo_set"}, tmp_path / "checkpoint.pt")
    for flags, message in {
        "--sparsity 1": "--sparsity 1.0: must be below 1",
        "--benchmark MT4": "invalid choice 'MT4'",
        "--run-dir .": "--run-dir .: must be a folder without a run, not beside --resume",
        "--resume nothing": "--resume nothing: must be a run of this version of mtppo_gmp",
        "--resume=.": "--resume .: must be a run of this version of mtppo_gmp",
    }.items():
        code, shown = command(mtppo_gmp, *flags.split())
        assert code == 2 and message in unboxed(shown)
    for folder in (".", "nothing"):
        with pytest.raises(ValueError):
            mtppo_gmp.train(mtppo_gmp.Args(resume=folder))
    assert {path.name for path in tmp_path.iterdir()} <= {"checkpoint.pt", "lock", "nothing"}


@pytest.mark.parametrize("script", [mtppo_gmp, moe_sparse, moore_sparse, SAC])
@pytest.mark.parametrize("scope, sparsity", [("layer", 0.999), ("global", 0.99999)])
def test_a_sparsity_that_must_empty_a_layer_is_refused_at_the_start(
    script, scope, sparsity, tmp_path
):
    """Not when the schedule gets there; 0.999 leaves none of a critic's 128 or 400 weights."""
    args = script.Args(sparsity=sparsity, prune_scope=scope, run_dir=str(tmp_path / "run"))
    if script is SAC:
        args.prune, args.vectorization = "critic", "sync"
    with pytest.raises(ValueError, match=f"sparsity {sparsity}: leaves"):
        script.train(args)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", [mtppo_set, SAC])
@pytest.mark.parametrize("flags", [dict(set_epsilon=0.0), dict(sparsity=0.99999)], ids=str)
def test_a_density_that_empties_a_layer_is_refused_at_the_start(script, flags, tmp_path):
    args = script.Args(**flags, run_dir=str(tmp_path / "run"))
    if script is SAC:
        args.sparsifier, args.vectorization = "set", "sync"
    with pytest.raises(ValueError, match="by sparsity or epsilon: no weight of a h"):
        script.train(args)
    assert not (tmp_path / "run").exists()


def test_the_command_line_is_the_same_in_every_script():
    assert len({Path(script.__file__).read_text().split("\nif __name__")[1] for script in ALL}) == 1


@on_all_five
def test_every_flag_is_documented(script):
    """By the comment behind it, which is what --help shows."""
    source, shown = Path(script.__file__).read_text(), unboxed(command(script, "--help")[1])
    source = source[: source.index("def __post_init__")]
    documented = dict(re.findall(r"^    (\w+): .* = .*  # (.+)$", source, re.M))
    assert list(documented) == [field.name for field in fields(script.Args)]
    for name, what in documented.items():
        flag = f"--{name.replace('_', '-')}"
        assert re.search(rf"{flag}\b[^#]*? {re.escape(what)} \(default: ", shown), flag
