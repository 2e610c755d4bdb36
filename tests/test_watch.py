"""The GIF of an agent: what it shows, its determinism, bad input, Meta-World."""

import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import watch
from PIL import Image, ImageSequence

import mtppo_gmp
import mtsac_sparse_metaworld

ROOT = Path(__file__).parent.parent
# Short ones; an untrained agent comes to the goal of the first
TASKS = tuple(f"MiniGrid-{name}-v0" for name in ("Empty-5x5", "LavaGapS5", "MultiRoom-N2-S4"))


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """Its folder."""
    run_dir = tmp_path_factory.mktemp("tiny")
    flags = dict(env_ids=TASKS, total_timesteps=100, num_steps=50, eval_episodes=1)
    return mtppo_gmp.train(mtppo_gmp.Args(**flags, run_dir=str(run_dir)))


def films_of(script, run_dir, **flags):
    """task -> its pictures with their captions."""
    played = watch.play(script, watch.Args(run_dir, **flags))
    return {task: watch.film(task, *episodes) for task, episodes in played.items()}


def last_of_each_episode(shots):
    """The last caption of each episode."""
    last = {}
    for _, caption in shots:
        last[re.match(r"episode (\d+/\d+),", caption[1])[1]] = caption
    return last


def test_returns_and_lengths_are_those_of_an_evaluation(tiny_run):
    script = mtppo_gmp
    films = films_of(script, tiny_run, episodes=2, seed=5)
    actor, _, tasks = script.load_agent(tiny_run)
    envs = [[script.make_env(task) for _ in range(2)] for task in tasks]
    policy = script.PolicyTable(actor, envs[0][0].observation_space, 3, "cpu")
    script.evaluate(policy, envs, script.seed_all(5, script.EVALUATION, 0, 6))
    assert list(films) == tasks
    assert any(env.return_queue[0] > 0 for env in envs[0])  # else it shows nothing
    for task, own in zip(tasks, envs, strict=True):
        name = task.removeprefix("MiniGrid-").removesuffix("-v0")
        assert last_of_each_episode(films[task]) == {
            f"{j}/2": [name, f"episode {j}/2, step {length}", f"return {value:.2f}"]
            for j, env in enumerate(own, 1)
            for value, length in zip(env.return_queue, env.length_queue, strict=True)
        }


def test_long_episodes_skip_steps_and_short_ones_do_not():
    env = mtppo_gmp.make_env("MiniGrid-RedBlueDoors-6x6-v0")
    turn, how = 0, dict(seed=5)
    shots = watch.film("T", env, [(how, [turn] * 7), (how, [turn] * 716)])
    steps = [int(re.search(r"step (\d+)$", caption[1])[1]) for _, caption in shots]
    first, second = steps[: 7 + watch.HOLD], steps[7 + watch.HOLD :]
    assert first == [*range(7), *[7] * watch.HOLD]
    stride = second[1]
    assert second == [*range(0, 716, stride), *[716] * watch.HOLD] and stride == 8
    assert len(shots) <= watch.MAX_FRAMES
    # 716 turns in place end where they began, and the picture is the environment's own
    env.reset(**how)
    assert np.array_equal(shots[0][0], env.unwrapped.get_frame(tile_size=watch.SIZE // 12))
    assert np.array_equal(shots[0][0], shots[-1][0]) and (shots[0][0] != shots[1][0]).any()


def write(run_dir, out, **flags):
    watch.watch(watch.Args(run_dir, out=out, **flags))
    return out.read_bytes()


def test_a_gif_of_all_tasks_the_same_for_a_seed(tiny_run, tmp_path, capsys):
    watch.watch(watch.Args(tiny_run, episodes=1))
    first = (tiny_run / "agent.gif").read_bytes()
    shown = capsys.readouterr().out
    assert re.fullmatch(rf"{tiny_run}/agent.gif: \d+ frames, [\d,]+ bytes\n", shown)
    assert write(tiny_run, tmp_path / "again.gif", episodes=1) == first
    assert write(tiny_run, tmp_path / "other.gif", episodes=1, seed=2) != first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.gif", "other.gif"]
    with Image.open(tiny_run / "agent.gif") as gif:
        assert gif.size == (3 * watch.SIZE, watch.SIZE + watch.CAPTION)
        assert 1 < gif.n_frames <= watch.MAX_FRAMES and gif.info["loop"] == 0
        frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(gif)]
    for i in range(3):  # each tile is seen to change, and its caption too
        tiles = [frame[:, i * watch.SIZE : (i + 1) * watch.SIZE] for frame in frames]
        for part in (slice(watch.SIZE), slice(watch.SIZE, None)):
            assert any((tile[part] != tiles[0][part]).any() for tile in tiles)


def test_colours_and_captions_survive(tmp_path):
    red, name = np.zeros((160, 160, 3), np.uint8), "a-name-that-is-longer-than-its-tile-is-wide"
    red[3:5, 3:5] = 255, 0, 0
    blank = watch.mosaic([[(red, [])]], 0)
    caption = [name, "episode 1/3, step 500", "return 4999.99"]
    image = np.asarray(watch.mosaic([[(red, caption)]], 7))
    assert np.array_equal(image[:160], red) and np.array_equal(np.asarray(blank)[:160], red)
    below = image[160:].min(-1) < 255
    assert below.any() and not below[:, :2].any() and not below[:, -2:].any()  # nothing is cut off
    assert not below[-1].any() and not below[0].any()
    noise = np.random.default_rng(0).integers(0, 64, (160, 160, 3), np.uint8)
    watch.write_gif([[(red, [])], [(noise, [])]], tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as gif:
        pixels = np.asarray(gif.convert("RGB"))[:, :160]
    assert (pixels[3:5, 3:5] >= (230, 0, 0)).all() and (pixels[3:5, 3:5, 1:] < 32).all()


def test_rows_of_many_tasks():
    shots = [(np.zeros((9, 9, 3), np.uint8), [])]
    tile, height = watch.SIZE, watch.SIZE + watch.CAPTION
    for num_tasks, columns, rows in ((1, 1, 1), (5, 5, 1), (7, 5, 2), (10, 5, 2), (50, 10, 5)):
        assert watch.mosaic([shots] * num_tasks, 0).size == (columns * tile, rows * height)


def test_bad_input(tmp_path):
    (tmp_path / "checkpoint.pt").touch()
    for flags, message in (
        (dict(run_dir=tmp_path / "none"), "none: holds no checkpoint.pt, must be the folder of a"),
        (dict(episodes=0), "--episodes 0 "),
        (dict(seed=-1), "--seed -1: "),
        (dict(out=tmp_path / "none" / "a.gif"), "a.gif: must be a file in a folder that there is"),
    ):
        with pytest.raises(ValueError, match=message):
            watch.Args(**dict(run_dir=tmp_path) | flags)
    watch.Args(tmp_path, out=Path("a.gif"))


# Meta-World, in processes of their own: mujoco reads MUJOCO_GL when it is imported


def start(words, run_dir, backend, *flags):
    environment = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "MUJOCO_GL")}
    environment |= {"MUJOCO_GL": backend} if backend else {}
    environment |= {"PYTHONPATH": "benchmark"}
    words = [sys.executable, *words, str(run_dir), *flags]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def metaworld_run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("metaworld")
    flags = dict(env_names=("reach-v3", "plate-slide-back-side-v3"), vectorization="sync")
    flags |= dict(total_timesteps=1000, learning_starts=950, batch_size=4, buffer_size=1000)
    flags |= dict(eval_episodes=1, num_threads=1)
    mtsac_sparse_metaworld.train(mtsac_sparse_metaworld.Args(**flags, run_dir=str(run_dir)))
    return run_dir


def test_metaworld(metaworld_run):
    few = "import tyro, watch; watch.MAX_FRAMES = 50; watch.watch(tyro.cli(watch.Args))"
    out = "--episodes", "1", "--out", str(metaworld_run / "a.gif")
    ended = start(["-c", few], metaworld_run, None, *out)
    if "MuJoCo cannot render" in ended.stderr:
        pytest.skip("no offscreen renderer for MuJoCo here")
    assert ended.returncode == 0 and ended.stderr == "", ended.stderr
    with Image.open(metaworld_run / "a.gif") as gif:
        assert gif.size == (2 * watch.SIZE, watch.SIZE + watch.CAPTION) and gif.n_frames > 20
        for i in range(2):
            pixels = np.asarray(gif.convert("RGB"))[: watch.SIZE, i * watch.SIZE :][:, : watch.SIZE]
            red = (pixels[..., 0] > 100) & (pixels[..., 1:] < 60).all(-1)
            assert 0.03 < red.mean() < 0.5  # Sawyer's arm


def test_metaworld_returns_are_those_of_an_evaluation(metaworld_run, monkeypatch):
    script = mtsac_sparse_metaworld
    monkeypatch.setattr(watch, "camera", lambda env: nullcontext(lambda: None))  # none is needed
    films = films_of(script, metaworld_run, episodes=2, seed=4)
    actor, args, tasks = script.load_agent(metaworld_run)
    goals = script.draw_goals(4, len(tasks), 2)
    played = script.play(actor, script.make_vector_env(args), goals, "cpu", draw=False)
    for task, returns in zip(tasks, played.rewards.sum(2).tolist(), strict=True):
        ends = last_of_each_episode(films[task])
        for j, episodic_return in enumerate(returns, 1):
            name, where, shown = ends[f"{j}/2"]
            assert (name, where) == (task.removesuffix("-v3"), f"episode {j}/2, step 500")
            assert float(shown.removeprefix("return ")) == pytest.approx(episodic_return, abs=0.02)


def test_metaworld_without_a_renderer(metaworld_run):
    ended = start(["benchmark/watch.py"], metaworld_run, "glfw")  # which needs a display
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1, ended.stderr
    assert ended.stderr.startswith("error: MuJoCo cannot render (FatalError): install libegl1")
    assert not (metaworld_run / "agent.gif").exists()
