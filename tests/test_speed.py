"""Where speed.py says that the time goes: on a clock of our own, and of the scripts."""

from pathlib import Path

import pytest
import speed

ROOT = Path(__file__).parent.parent

# A script whose functions take as many seconds as they say
SCRIPT = """
import time
from types import SimpleNamespace as Args

clock = [0.0]
time.perf_counter = lambda: clock[0]

def taking(seconds):
    def call(*args, **others):
        clock[0] += seconds
    return call

estimate_advantages, update_critic, update_actor = taking(1), taking(2), taking(4)
measure_plasticity, evaluate, choose = taking(100), taking(0), taking(0.5)

class Run:
    end_iteration = taking(1000)  # log and checkpoint

def make_env(step_seconds):
    return Args(step=taking(step_seconds), reset=taking(8))

def train(args):
    env, run = make_env(16 * args.slow), Run()
    for iteration in range(args.total_timesteps // 2000):
        first, last = iteration == 0, iteration == args.total_timesteps // 2000 - 1
        env.reset(seed=1)
        for _ in range(20 if first else 2):
            choose()
            env.step(0)
        estimate_advantages()
        update_critic()
        update_actor()
        if last:
            measure_plasticity()
            env.step(0)
            evaluate()
        run.end_iteration({})
    print("finished")
"""


def table(capsys, **flags):
    """The rows that speed.py prints: {method: {column: cell}}."""
    speed.speed(speed.Args(**flags))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    titles, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return {name: dict(zip(titles[1:], cells, strict=False)) for name, *cells in rows}


def test_seconds_on_a_clock_of_our_own(capsys, monkeypatch, tmp_path):
    for name, slow in ("ours", 1), ("theirs", 2):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mtppo_gmp.py").write_text(SCRIPT.replace("args.slow", str(slow)))
    monkeypatch.setattr(speed, "ROOT", tmp_path / "ours")
    flags = dict(methods=("MTPPO GMP",), against=tmp_path / "theirs", rounds=1)
    rows = table(capsys, **flags, iterations=2)
    ours, theirs = rows["MTPPO GMP"], rows["MTPPO GMP, other"]
    columns = "environments update rest sum metrics evaluation".split()
    assert [float(ours[c]) for c in columns] == [8 + 2 * 16, 7, 1, 48, 100, 16]
    assert [float(theirs[c]) for c in columns] == [8 + 4 * 16, 7, 1, 80, 100, 32]
    assert ours["ratio of sums (range)"] == "0.60 (0.60 to 0.60)"
    assert ours["of evaluations (range)"] == "0.50 (0.50 to 0.50)"


SMALL = dict(benchmark="MT3", num_steps=200, eval_episodes=1)
SMALL_SAC = speed.MTSAC | dict(env_names=("reach-v3",), learning_starts=950, batch_size=2)
SMALL_SAC |= dict(buffer_size=1000)
TINY = {
    "MTPPO GMP": ("mtppo_gmp", SMALL, 200),
    "MT-SAC GMP": ("mtsac_sparse_metaworld", SMALL_SAC, 500),
}


@pytest.mark.parametrize("method", TINY)
def test_seconds_of_the_scripts(method, capsys, monkeypatch):
    monkeypatch.setitem(speed.METHODS, method, TINY[method])
    measured = speed.measure(ROOT, method, speed.Args(rounds=1, iterations=2))
    assert measured.keys() == {*speed.COLUMNS} and min(measured.values()) > 0
    parts = sum(measured[phase] for phase in ("environments", "update", "rest"))
    assert parts == pytest.approx(measured["sum"])  # medians of two are their means


def test_bad_input(tmp_path):
    for flags, message in (
        (dict(rounds=0), "--rounds 0: must be at least 1"),
        (dict(iterations=-1), "--iterations -1: must be at least 1"),
        (dict(against=tmp_path), f"--against {tmp_path}: must be a checkout"),
    ):
        with pytest.raises(ValueError, match=message):
            speed.Args(**flags)


def test_a_script_that_fails(tmp_path):
    (tmp_path / "mtppo_gmp.py").write_text("raise OSError('no such thing')")
    with pytest.raises(SystemExit, match="MTPPO GMP in .*(?s:.*)OSError: no such thing"):
        speed.measure(tmp_path, "MTPPO GMP", speed.Args())
