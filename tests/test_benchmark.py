"""Sweeps and reports: studies, kills, failing arms, statistics, what is left out."""

import csv
import fcntl
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import submitit
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import moe_sparse
import moore_sparse
import mtppo_gmp
import mtppo_set
import mtsac_sparse_metaworld

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmark"))

import archive  # noqa: E402
import report  # noqa: E402
import speed  # noqa: E402
import sweep  # noqa: E402

STUDIES = sorted((ROOT / "benchmark" / "studies").glob("*.toml"))
MT3 = ("LavaGapS7", "RedBlueDoors-6x6", "MemoryS11")


# Statistics


def test_iqm_by_hand():
    assert report.iqm(np.array([0.0, 1, 2, 3, 4, 5, 6, 100])) == 3.5
    # (timestep, run) -> (timestep,)
    assert report.iqm(np.array([[0.0, 1], [2, 4]])).tolist() == [0.5, 3]


def test_interval_by_hand():
    # The resamples of two seeds are 00, 01, 10, 11, with means 0, 1/2, 1/2, 1
    assert report.interval(report.iqm, np.array([0.0, 1.0])).tolist() == [0, 1]
    assert report.interval(report.iqm, np.array([[0.0, 1], [2, 4]])).T.tolist() == [[0, 1], [2, 4]]
    assert report.interval(report.iqm, np.array([0.1])) is None


def test_interval_of_a_difference_against_every_resample():
    ours, base = np.array([0.3, 0.6, 0.8]), np.array([0.1, 0.2, 0.7])
    draws = [list(draw) for draw in itertools.product(range(3), repeat=3)]
    every = [ours[a].mean() - base[a].mean() for a in draws]  # 3 scores: none is cut
    difference = report.difference_of_iqms
    # From 3 seeds the percentiles are expanded to all there is: 27 resamples
    assert report.interval(difference, ours, base) == pytest.approx([min(every), max(every)])
    # The seeds of both arms are drawn together: what they share does not vary
    assert report.interval(difference, base + 0.25, base) == pytest.approx(0.25)


def test_an_interval_of_few_seeds_holds_the_truth_in_95_percent():
    held = 0
    for scores in np.random.default_rng(0).normal(size=(600, 6)):
        low, high = report.interval(lambda x: x.mean(-1), scores, resamples=1000)
        held += low <= 0 <= high
    assert held / 600 == pytest.approx(0.95, abs=0.03)


def test_probability_of_improvement_by_hand():
    ours, base = np.array([0.5, 0.9]), np.array([0.5, 0.7, 0.1])
    # 0.5 wins once and ties once, 0.9 wins thrice
    assert report.probability_of_improvement(ours, base) == pytest.approx((1.5 + 3) / 6)
    assert report.probability_of_improvement(base, ours) == pytest.approx(1.5 / 6)
    u = scipy.stats.mannwhitneyu(ours, base).statistic / 6
    assert report.probability_of_improvement(ours, base) == pytest.approx(u)


def test_seeds_to_tell_a_gain_of_normal_scores():
    """The middle half's mean of n normal scores has the variance s^2 / (0.83 n)."""
    rng, s = np.random.default_rng(1), 0.2
    scores, base = rng.normal(0.5, s, 5000), rng.normal(0.8, s, 5000)
    assert report.seeds_to_tell(scores, scores + 0.3) == "5"  # what the arms share does not count
    expected = (1.96 + 0.84) ** 2 * 2 * s**2 / 0.83 / 0.1**2  # 76
    assert abs(int(report.seeds_to_tell(scores, base)) - expected) <= 10
    assert report.seeds_to_tell(base / 100, base / 100) == "5"
    # Draws from 3 runs have 2/3 of the variance that the runs themselves estimate
    few, zero = np.array([0.35, 0.5, 0.65]), np.zeros(3)
    many = np.repeat(few, 1000)  # the same draws, uncorrected
    ratio = int(report.seeds_to_tell(few, zero)) / int(report.seeds_to_tell(many, 0 * many))
    assert ratio == pytest.approx(1.5, abs=0.25)
    assert report.seeds_to_tell(scores[:2], base[:2]) == "-"


def test_spearman_by_hand():
    x, y = np.array([1.0, 2, 3, 4]), np.array([1.0, 30, 20, 400])
    assert report.spearman(x, y) == pytest.approx(0.8)  # 1 - 6 * (1 + 1) / (4 * 15)
    assert "Spearman 1.00 (1.00, 1.00), 8 runs" == report.describe_correlation(
        np.arange(8.0), np.arange(8.0) ** 3
    )
    assert "equal in all runs" in report.describe_correlation(np.zeros(8), np.arange(8.0))
    assert "2 of at least 5 runs" in report.describe_correlation(np.arange(2), np.arange(2))


def test_interval_of_a_correlation_against_every_resample():
    x, y = np.array([1.0, 2, 3, 4, 5]), np.array([2.0, 3, 1, 5, 4])
    draws = (np.array(draw) for draw in itertools.product(range(5), repeat=5))
    every = [scipy.stats.spearmanr(x[d], y[d]).statistic for d in draws if len(set(d)) > 1]
    text = report.describe_correlation(x, y)
    numbers = [float(number) for number in re.findall(r"-?\d\.\d\d", text)]
    assert numbers == pytest.approx([0.6, *np.quantile(every, (0.025, 0.975))], abs=0.13)


# Reports

GMP = ("GMP", "mtppo_gmp.py", "")


def write_log(folder, scores=(0.5, 0.6, 0.7), until=400, purge=None, nan_at=None, unit=1, **flags):
    """The log of a run of 400 units of timesteps and two evaluations; scores are MT3's."""
    defaults = dict(benchmark="MT3", total_timesteps=400 * unit)
    args = mtppo_gmp.Args(**defaults | flags)
    with SummaryWriter(str(folder), purge_step=purge) as writer:
        if not purge:
            rows = "".join(f"|{name}|{value}|\n" for name, value in asdict(args).items())
            writer.add_text("args", "|argument|value|\n|-|-|\n" + rows)
        for step in range(purge or 100 * unit, until * unit + 1, 100 * unit):
            writer.add_scalar("sparsity/actor", args.sparsity, step)
            if step == 100 * unit:  # no evolution follows the last update
                writer.add_scalar("sparsity/actor_grown_kept", 0.5, step)
            writer.add_scalar("sparsity/actor/conv1", 0.5, step)
            writer.add_scalar("losses/explained_variance", float("nan"), step)
            for i, name in enumerate([*report.CURVES, "critic_effective_rank"]):
                value = step * (i + args.seed + np.nansum(scores)) / unit / 1000
                writer.add_scalar(
                    f"plasticity/{name}", float("nan") if step == nan_at else value, step
                )
            if step % (200 * unit) == 0:
                for task, score in zip(MT3, scores, strict=True):
                    score *= step / (400 * unit)
                    writer.add_scalar(f"eval/normalized_return/{task}", score, step)
    return folder


def write_report(out, *runs, **changes):
    report.report(report.Args(runs=runs, out=out, **changes))
    return (out / "report.md").read_text()


def test_report_of_two_arms(tmp_path, capsys):
    for seed, shift in ((1, 0.0), (2, 0.3)):
        scores = [x + shift for x in (0.5, 0.55, 0.6)]
        common = dict(seed=seed, unit=1000)
        write_log(tmp_path / "runs" / f"gmp{seed}", scores=scores, **common)
        write_log(tmp_path / "runs" / f"dense{seed}", sparsity=0, scores=(0.1, 0.1, 0.1), **common)
        write_log(tmp_path / "runs" / f"late{seed}", sparsity=0.9, critic_epochs=8, **common)
    text = write_report(tmp_path / "out", tmp_path / "runs")
    # One of six is cut at each end: the mean of 0.55, 0.6, 0.8, 0.85
    row = r"^\| MT3 \| MTPPO GMP \| 2 \| 400000 \| 0\.70 \(0\.\d\d, 0\.\d\d\) "
    assert re.search(row, text, re.M)
    paper = "0.77 (0.73, 0.80) | yes |"
    assert paper in text and text.index("MTPPO dense") < text.index("MTPPO GMP")
    assert "| MTPPO dense | 2 | 400000 | 0.10 (0.10, 0.10) | 0.70 (0.60, 0.76) | no |" in text
    # The first evaluation has half the scores of the second: their IQM is 0.525. The metrics are
    # 0.4 x (i + seed + sum of the scores) at the end, on average 0.4 x (i + 3.6)
    row = r"GMP \| MTPPO dense \| 0\.60 \(0\.45, 0\.75\) \| 0\.45 \(0\.34, 0\.56\) \| "
    row += r"1\.00 \(1\.00, 1\.00\) \| - \| 0\.5[23] \| 0\.55, 0\.85 \| 0\.70 \| 144\.0 / "
    assert re.search(row, text) and "| 144.0 / 184.0 % | 2 / 3 | 2.64 |" in text
    assert re.search(
        r"MTPPO dense \| - \| - \| - \| - \| - \| 0\.0[78] \| 0\.10, 0\.10 \| 0\.10 \|", text
    )
    # Another experiment than the paper's has no figure of the paper's next to it
    assert "| MTPPO GMP 0.9 | 2 | 400000 | 0.60 (0.60, 0.60) | - | - |" in text
    assert "Spearman" in text and "| MT3 | MTPPO GMP | 2 | 400000 |" in capsys.readouterr().out
    names = "learning_curves final_returns performance_profile plasticity dormancy_return".split()
    assert all(f"![]({name}.png)" in text for name in names)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *("report.md", "results.csv"),
        *(f"{name}.png" for name in names),
    }
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert len(rows) == 3 * 2 * 2 * 3  # arms, seeds, evaluations, tasks
    assert rows[0] == dict(
        **dict(arm="MTPPO dense", benchmark="MT3", seed="1", timestep="200000", task="LavaGapS7"),
        **dict(normalized_return="0.05", actor_dormant_ratio="0.26", critic_dormant_ratio="0.46"),
        **dict(actor_effective_rank="0.66", critic_effective_rank="1.06", fisher_trace="0.86"),
        **dict(actor_sparsity="0", actor_grown_kept="0.5"),
    )
    earlier = write_report(tmp_path / "earlier", tmp_path / "runs", timestep=200_000)
    assert "| MTPPO dense | 2 | 200000 | 0.05 (0.05, 0.05) | - | - |" in earlier


def test_an_arm_is_compared_with_the_one_that_its_study_names(tmp_path):
    arms = dict(dense="sparsity = 0", early="prune-start = 0.0", late="prune-start = 0.1")
    arms = [(name, "mtppo_gmp.py", flags) for name, flags in arms.items()]
    study = study_file(tmp_path / "study.toml", *arms, seeds="[1, 2, 3]")
    study.write_text(study.read_text() + 'against = "early"\n')
    for plan in sweep.read_study(study, tmp_path / "runs"):
        score = dict(dense=0.1, early=0.5, late=0.8)[plan.arm] + 0.05 * plan.seed
        own = dict(dense=dict(sparsity=0), early=dict(prune_start=0.0), late=dict(prune_start=0.1))
        write_log(plan.folder, scores=[score] * 3, seed=plan.seed, **own[plan.arm])
    text = write_report(tmp_path / "out", study, runs_dir=tmp_path / "runs")
    assert "| MT3 | early | dense | 0.40 (0.40, 0.40) | 0.30 (0.30, 0.30) |" in text
    assert "| MT3 | late | early | 0.30 (0.30, 0.30) | 0.2" in text
    # 400 / 1000 of the sum of three scores apart in every seed
    assert "| MT3 | late | early | 36.00 (36.00, 36.00) % |" in text
    # Without early's first seed, late and dense are compared with it over the other two
    first, *_ = sorted((tmp_path / "runs").glob("*=0.0__*"))
    shutil.rmtree(first)
    fewer = write_report(tmp_path / "fewer", study, runs_dir=tmp_path / "runs")
    assert "| MT3 | early | dense | 0.40 (0.40, 0.40) |" in fewer
    assert "| MT3 | late | early | 0.30 (0.30, 0.30) |" in fewer
    assert "| MT3 | late | early | 36.00 (36.00, 36.00) % |" in fewer
    second, _ = sorted((tmp_path / "runs").glob("*=0.0__*"))
    shutil.rmtree(second)  # one seed in common is no comparison
    alone = write_report(tmp_path / "alone", study, runs_dir=tmp_path / "runs")
    assert "| MT3 | late | - | - |" in alone and "| MT3 | early | - | - |" in alone
    without = write_report(tmp_path / "without", *(tmp_path / "runs").glob("*=0.1__*"))
    assert "No two arms of two seeds." in without


RESULTS = sorted(path.parent for path in (ROOT / "benchmark" / "results").glob("*/results.csv"))
METRICS = ["actor_dormant_ratio", "critic_dormant_ratio", "actor_effective_rank"]
METRICS += ["critic_effective_rank", "fisher_trace"]
UNITS, ERRORS = (100, 100, 1, 1, 1), (0.051, 0.051, 0.51, 0.51, 0.051)


@pytest.mark.parametrize("folder", RESULTS, ids=lambda p: p.name)
def test_the_committed_reports_follow_from_their_results(folder):
    def middle(scores):
        cut = len(scores) // 4
        return sum(sorted(scores)[cut : len(scores) - cut]) / (len(scores) - 2 * cut)

    text = (folder / "report.md").read_text()
    shown = (folder.parent / "README.md").read_text().splitlines()
    curves, score = {}, "normalized_return"
    with open(folder / "results.csv") as file:
        for row in csv.DictReader(file):
            values = {name: float(row[name]) for name in (score, *METRICS)}
            run = curves.setdefault((row["benchmark"], row["arm"]), {}).setdefault(row["seed"], {})
            run.setdefault(row["task"], []).append(values)
    first = {}  # architecture -> its first arm
    for _, arm in curves:
        first.setdefault(arm.split()[0], arm)

    def seed_by_seed(arm, base):
        """The runs of two arms, of the seeds that both have."""
        ours, theirs = curves[row["benchmark"], arm], curves[row["benchmark"], base]
        return [[run[seed] for seed in ours if seed in theirs] for run in (ours, theirs)]

    names, rows = [], []
    for line in text.splitlines():
        cells = line.strip("| ").split(" | ")
        names = cells if line.startswith("| benchmark") else names
        if line.startswith("| MT"):
            rows.append(dict(zip(names, cells, strict=True)))
    compared = len(curves) - len(first) if "Plasticity above" in text else 0
    assert len(rows) == 2 * len(curves) + compared
    for row in rows:
        runs = [list(tasks.values()) for tasks in curves[row["benchmark"], row["arm"]].values()]
        ends = [[task[-1][score] for task in run] for run in runs]
        level = middle([x for run in ends for x in run])
        if "seeds" in row:
            limits = report.interval(report.iqm, np.array(ends), stratified=True)
            interval = "{:.2f}, {:.2f}".format(*limits)
            assert row["seeds"] == str(len(runs))
            assert row["IQM (95 % interval)"] == f"{level:.2f} ({interval})"
            assert f"| {' | '.join(row.values())} |" in shown
            continue
        if "late" not in row:
            names = list(row)[3:]
            for name, metric, unit in zip(names, METRICS, UNITS, strict=True):
                ours, base = (
                    np.array([unit * next(iter(run.values()))[-1][metric] for run in arm])
                    for arm in seed_by_seed(row["arm"], row["against"])
                )
                n = len(ours)
                half = scipy.stats.t.ppf(0.975, n - 1) * (ours - base).std(ddof=1) / n**0.5
                expected = ours.mean() - base.mean() + half * np.array([0, -1, 1])
                shown = [float(number) for number in re.findall(r"-?[\d.]+", row[name])]
                assert shown == pytest.approx(expected, abs=0.011 if unit == 100 else 0.51)
            continue
        against = first[row["arm"].split()[0]]
        if row.get("against", "-") != "-":
            against = row["against"]
        for name, statistic, tail in (
            ("gain", report.difference_of_iqms, 1),
            ("late gain", report.difference_of_iqms, 5),
            ("probability of improvement", report.probability_of_improvement, 1),
        ):
            ours, base = (
                np.array(
                    [
                        [np.mean([x[score] for x in task[-tail:]]) for task in run.values()]
                        for run in arm
                    ]
                )
                for arm in seed_by_seed(row["arm"], against)
            )
            values = statistic(ours, base), *report.interval(statistic, ours, base)
            text = "{:.2f} ({:.2f}, {:.2f})".format(*values)
            assert row.get(name, text) == ("-" if against == row["arm"] and name in row else text)
        seeds = [sum(run) / len(run) for run in ends]
        late = middle([sum(row[score] for row in task[-5:]) / 5 for run in runs for task in run])
        assert row["late"] == f"{late:.2f}"
        assert row["score of each seed"] == ", ".join(f"{seed:.2f}" for seed in seeds)
        assert row["their mean"] == f"{sum(seeds) / len(seeds):.2f}"
        cells = row["dormant"], row["effective rank"], row["Fisher trace"]
        numbers = [float(number) for number in re.findall(r"[\d.]+", " ".join(cells))]
        for number, metric, unit, error in zip(numbers, METRICS, UNITS, ERRORS, strict=True):
            mean = sum(run[0][-1][metric] for run in runs) / len(runs)
            assert number == pytest.approx(unit * mean, abs=error)


def test_a_run_with_nan_is_named_and_never_averaged_in(tmp_path):
    write_log(tmp_path / "good1", seed=1)
    write_log(tmp_path / "good2", seed=2)
    for name, wrong in (
        ("bad", dict(scores=(0.9, float("nan"), 0.9))),
        ("worse", dict(nan_at=200)),
    ):
        write_log(tmp_path / name, seed=3, **wrong)
    text = write_report(tmp_path / "out", tmp_path)
    assert "| MTPPO GMP | 2 | 400 | 0.60 (0.60, 0.60) |" in text
    assert (
        "- bad: NaN or infinity in eval/normalized_return/RedBlueDoors-6x6 from timestep 200"
        in text
    )
    assert "- worse: NaN or infinity in plasticity/" in text
    assert "nan" not in (tmp_path / "out" / "results.csv").read_text()


def test_a_half_finished_run_is_named_and_left_out_until_it_ends(tmp_path):
    write_log(tmp_path / "whole", seed=1)
    write_log(tmp_path / "half", seed=2, until=300)
    text = write_report(tmp_path / "out", tmp_path)
    assert "- half: incomplete: at timestep 300 of 400, evaluated at 200" in text
    assert "| MTPPO GMP | 1 | 400 | 0.60 (no interval: 1 seed) |" in text
    time.sleep(1.1)  # logs are read in the order of their names, which hold the second
    write_log(tmp_path / "half", seed=2, purge=200, scores=(0.9, 0.9, 0.9))
    assert "Nothing." in write_report(tmp_path / "again", tmp_path)
    rows = csv.DictReader((tmp_path / "again" / "results.csv").open())
    resumed = [row["normalized_return"] for row in rows if row["seed"] == "2"]
    assert resumed == ["0.45"] * 3 + ["0.9"] * 3  # not what the first process logged from 200 on


def test_the_latest_measurement_stands_where_there_was_none():
    assert [report.last_value({10: 1.0, 30: 3.0}, t) for t in (5, 10, 29, 30, 40)] == [
        *(None, 1.0, 1.0, 3.0, 3.0)
    ]


def test_figures_show_all_of_every_curve(tmp_path, monkeypatch):
    """Panels of one figure whose values differ a thousandfold, and more arms than colours."""
    figures = {}
    finish = report.finish

    def keep(figure, path):
        figures[path.stem] = figure
        finish(figure, path)
        assert figure.legends[0].get_window_extent().width < figure.bbox.width

    monkeypatch.setattr(report, "finish", keep)
    for i in range(10):
        write_log(tmp_path / "runs" / str(i), sparsity=(i + 1) / 20)
    for name, benchmark in (("b", "MT3"), ("c", "MT5")):
        write_log(tmp_path / "runs" / name, sparsity=0, benchmark=benchmark, seed=1000)
    write_report(tmp_path / "out", tmp_path / "runs")
    panels = figures["plasticity"].axes
    assert len(panels) == 8 and len(figures["learning_curves"].axes) == 2
    for panel in [*panels, *figures["learning_curves"].axes]:
        low, high = panel.get_ylim()
        assert all(low <= y <= high for line in panel.lines for y in line.get_ydata())
    assert [len(panel.lines) for panel in panels] == [11] * 4 + [1] * 4
    assert [len(panel.lines) for panel in figures["learning_curves"].axes] == [11, 1]
    looks = {(line.get_color(), line.get_marker()) for line in panels[0].lines}
    assert len(looks) == 11
    # Dormancy is that of the evaluation shown: step * (i + seed + scores) / 1000
    [point] = figures["dormancy_return"].axes[2].lines
    assert point.get_xdata() == pytest.approx(0.4 * (1000 + 1.8))
    assert point.get_ydata() == pytest.approx(0.6)


def test_arms_have_the_same_colour_in_every_report(tmp_path, monkeypatch):
    """The paper's arms their own; without them, what is called like them."""
    gmp = write_log(tmp_path / "gmp")
    early = write_log(tmp_path / "early", prune_start=0.0)
    fair = write_log(tmp_path / "fair", critic_epochs=8)
    dense = write_log(tmp_path / "dense", sparsity=0)

    def colours(*folders):
        runs = [report.read_run(folder) for folder in folders]
        for run, folder in zip(runs, folders, strict=True):
            run.arm = dict(gmp="MTPPO GMP", dense="MTPPO dense").get(folder.name, "MTPPO GMP, x")
            run.arm += " early" * (folder.name == "early")
        report.choose_styles(runs)
        return [report.COLOURS.index(run.style["color"]) for run in runs]

    assert colours(dense, gmp) == [0, 1] and colours(gmp) == [1]
    assert colours(early, gmp) == [3, 1] and colours(early, fair, dense) == [1, 3, 0]


def test_the_performance_profile_by_hand(tmp_path, monkeypatch):
    figures = {}
    monkeypatch.setattr(report, "finish", lambda figure, path: figures.update({path.stem: figure}))
    write_log(tmp_path / "a", scores=(0.2, 0.3, 0.4))
    write_log(tmp_path / "b", scores=(0.7, 0.8, 0.9), seed=2)
    write_report(tmp_path / "out", tmp_path)
    [line] = figures["performance_profile"].axes[0].lines
    share = dict(zip(line.get_xdata().round(2), line.get_ydata(), strict=True))
    expected = {0: 1, 0.29: 1, 0.31: 0.5, 0.79: 0.5, 0.81: 0, 1: 0}
    assert {level: share[level] for level in expected} == pytest.approx(expected)


def test_dormancy_goes_with_the_score_of_the_same_run(tmp_path, monkeypatch):
    """Arms of different length: a point is a run's own last evaluation."""
    seen = []
    monkeypatch.setattr(report, "describe_correlation", lambda x, y: seen.append((x, y)) or "")
    write_log(tmp_path / "runs" / "dense", sparsity=0, scores=(0.1, 0.1, 0.1))
    write_log(tmp_path / "runs" / "gmp", scores=(0.9, 0.9, 0.9), until=800, total_timesteps=800)
    text = write_report(tmp_path / "out", tmp_path / "runs")
    assert "| MTPPO GMP | 1 | 800 | 1.80 (" in text  # twice its scores, which are those at 400
    (x, y), _ = seen
    assert y == pytest.approx([0.1, 1.8]) and x == pytest.approx([0.4 * 1.3, 0.8 * 3.7])


def test_arms_are_called_by_their_arguments():
    def name(script, **flags):
        args = {k: str(v) for k, v in asdict(script.Args(**flags)).items()}
        return report.paper_arm(args)[1]

    assert name(mtppo_gmp) == "MTPPO GMP" and name(mtppo_set) == "MTPPO SET"
    assert name(mtppo_gmp, sparsity=0) == "MTPPO dense"
    assert name(mtppo_gmp, sparsity=0.99) == "MTPPO GMP 0.99"
    assert name(mtppo_gmp, sparsity=0, weight_decay=1e-6) == "MTPPO weight decay"
    assert name(mtppo_gmp, weight_decay=1e-6) == "MTPPO GMP + weight decay"
    assert name(mtppo_gmp, sparsity=0, layer_norm=True) == "MTPPO LayerNorm"
    assert name(mtppo_gmp, sparsity=0, redo_frequency=5000) == "MTPPO ReDo"
    assert name(mtppo_gmp, sparsity=0, reset_frequency=100_000) == "MTPPO Reset"
    assert name(mtppo_gmp, sparsity=0, weight_decay=0.1) == "MTPPO weight decay 0.1"
    assert name(mtppo_gmp, sparsity=0, redo_frequency=100) == "MTPPO ReDo 100"
    assert name(mtppo_gmp, pcgrad=True) == "MTPPO GMP + PCGrad"
    assert name(moe_sparse) == "MoE GMP" and name(moe_sparse, sparsifier="none") == "MoE dense"
    assert name(moore_sparse, sparsifier="set") == "MOORE SET"
    mtsac = dict(sparsifier="gmp", sparsity="0.95", weight_decay="0.0")
    names = [report.paper_arm(mtsac | dict(prune=p))[1] for p in ("none", "actor", "both")]
    assert names == ["MT-SAC dense", "MT-SAC GMP on the actor", "MT-SAC GMP on both"]


def test_arms_of_one_name_are_told_apart_by_what_differs(tmp_path):
    write_log(tmp_path / "a", prune_scope="layer")
    write_log(tmp_path / "b", prune_scope="global")
    write_log(tmp_path / "c", sparsity=0)
    text = write_report(tmp_path / "out", tmp_path)
    assert "| MTPPO GMP, prune scope layer | 1 |" in text
    assert "| MTPPO GMP, prune scope global | 1 |" in text and "| MTPPO dense | 1 |" in text


def test_tasks_of_ones_own_are_a_benchmark(tmp_path):
    write_log(tmp_path / "a", env_ids=("MiniGrid-LavaGapS7-v0",))
    assert f"| {', '.join(MT3)} | MTPPO GMP | 1 |" in write_report(tmp_path / "out", tmp_path)


def test_studies_that_share_runs_count_them_once(tmp_path):
    runs_dir = tmp_path / "runs"
    a = study_file(tmp_path / "a.toml", ("one name", "mtppo_gmp.py", ""), seeds="[1, 2, 3]")
    b = study_file(tmp_path / "b.toml", ("another", "mtppo_gmp.py", ""), seeds="[1, 2, 3]")
    for run in sweep.read_study(a, runs_dir):
        write_log(run.folder, seed=run.seed)
    text = write_report(tmp_path / "out", runs_dir, a, b, runs_dir=runs_dir)
    assert "\n3 runs. " in text and "| one name | 3 |" in text and "| another | 3 |" in text
    assert "MTPPO GMP" not in text and ", 3 runs" not in text.replace("equal", "")


def one_line_of_error(capsys, function, *args):
    with pytest.raises(SystemExit) as ended:
        function(*args)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


def test_what_cannot_be_reported_is_refused(tmp_path, capsys):
    def error(*runs, **changes):
        args = report.Args(runs=runs, out=tmp_path / "out", **changes)
        return one_line_of_error(capsys, report.report, args)

    assert "no runs given" in error()
    assert "must be a study file, a run folder" in error(tmp_path)
    write_log(tmp_path / "half", until=200)
    assert "none of 1 runs is complete" in error(tmp_path / "half")
    a, b = write_log(tmp_path / "a"), write_log(tmp_path / "b")
    assert "both MTPPO GMP on MT3 with seed 1" in error(a, b)
    assert "--timestep 300: must be an evaluation" in error(a, timestep=300)
    study = study_file(tmp_path / "study.toml", GMP, seeds="[1, 2]")
    for run, scope in zip(sweep.read_study(study, tmp_path), ("layer", "global"), strict=True):
        write_log(run.folder, seed=run.seed, prune_scope=scope)
    differ = error(study, runs_dir=tmp_path)
    assert "GMP: its runs must have the same arguments, they differ in ['prune_scope']" in differ
    assert not (tmp_path / "out").exists()


def test_arguments_without_effect_do_not_make_two_arms(tmp_path):
    write_log(tmp_path / "a", sparsity=0, prune_scope="layer", seed=1)
    write_log(tmp_path / "b", sparsity=0, prune_scope="global", seed=2)
    assert "| MTPPO dense | 2 |" in write_report(tmp_path / "out", tmp_path)


CHANGES = [
    *(dict(actor_lr=0.1), dict(prune_frequency=100), dict(prune_start=0.1), dict(gamma=0.9)),
    *(dict(critic_epochs=8), dict(critic_minibatch_size=256), dict(weight_decay=0.1)),
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_another_experiment_is_not_compared_with_the_papers(changes, tmp_path):
    text = write_report(tmp_path / "out", write_log(tmp_path / "run", unit=1000, **changes))
    assert "| 1 | 400000 | 0.60 (no interval: 1 seed) | - | - |" in text


def test_each_script_has_the_papers_arguments_by_default():
    known = set()
    for script in (mtppo_gmp, mtppo_set, moe_sparse, moore_sparse, mtsac_sparse_metaworld):
        own = report.SAC_ARGS if script is mtsac_sparse_metaworld else report.PPO_ARGS
        usual = report.PAPER_ARGS | own
        args = {name: str(value) for name, value in asdict(script.Args()).items()}
        known |= usual.keys() & args.keys()
        assert {name: args[name] for name in usual if name in args} == {
            name: value for name, value in usual.items() if name in args
        }
    assert known == (report.PAPER_ARGS | report.PPO_ARGS | report.SAC_ARGS).keys()


def test_an_arm_of_many_flags_has_a_folder_of_a_short_name(tmp_path):
    names = ("gamma", "gae-lambda", "clip-coef", "ent-coef", "actor-lr", "critic-lr", "redo-tau")
    flags = ", ".join(f"{name} = 0.{i}5{'1' * 30}" for i, name in enumerate(names, 1))
    arm = "Many", "mtppo_gmp.py", flags
    [run] = sweep.read_study(study_file(tmp_path / "study.toml", arm), tmp_path)
    assert re.fullmatch(r"MT3__mtppo_gmp__[0-9a-f]{16}__1", run.folder.name)
    [again] = sweep.read_study(study_file(tmp_path / "study.toml", arm), tmp_path)
    assert run == again  # the same in every process
    assert sum(word.startswith("--gamma=0.15") for word in run.flags) == 1


# Archive and speed


def test_an_archive_gives_the_same_report_and_counts_as_complete(tmp_path, capsys):
    study = study_file(tmp_path / "study.toml", GMP, seeds="[1, 2, 3]")
    plans = sweep.read_study(study, tmp_path / "runs")
    for plan in plans[:2]:
        scores = (0.1 * plan.seed, 0.5, 0.7)
        write_log(plan.folder, seed=plan.seed, scores=scores, prune_scope="global")
        (plan.folder / "output.txt").write_text("mean  0.5\n\nsum  9.9  100.0%\n")
    write_log(plans[2].folder, seed=3, until=200)  # cut off
    (plans[2].folder / "output.txt").write_text("stopped at timestep 200\n")
    for new in (2, 0):  # the second time, there is nothing to do
        archive.archive(archive.Args(tmp_path / "runs", tmp_path / "logs"))
        assert f"{new} runs archived, {2 - new} were" in capsys.readouterr().out
    for folder in ("runs", "logs"):
        write_report(tmp_path / f"{folder}_report", study, runs_dir=tmp_path / folder)
    for name in ("results.csv", "report.md"):
        text = (tmp_path / "runs_report" / name).read_text().replace("incomplete", "")
        if name == "report.md":  # but for the run that was cut off
            text = text[: text.index("## Left out")]
        assert text in (tmp_path / "logs_report" / name).read_text()
    shutil.rmtree(tmp_path / "runs")
    shutil.copytree(tmp_path / "logs", tmp_path / "runs")
    moved = sweep.read_study(study, tmp_path / "runs")
    assert [sweep.printed_summary(run.folder) for run in moved] == ["0.5", "0.5", None]


def test_a_report_to_a_read_only_file_system_is_refused(tmp_path, monkeypatch, capsys):
    write_log(tmp_path / "a")

    def read_only(*args, **others):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "touch", read_only)
    with pytest.raises(SystemExit) as ended:
        write_report(tmp_path / "out", tmp_path / "a")
    assert ended.value.code == 2 and "(Read-only file system)" in capsys.readouterr().err


def test_archive_and_speed_refuse_what_they_cannot_do(tmp_path, capsys):
    for tool, args, message in (
        (archive.archive, archive.Args(tmp_path, tmp_path / "out"), "holds no complete run"),
        (speed.speed, speed.Args(arms=("PPO",)), "--arms PPO: must be of MTPPO dense, "),
        (speed.speed, speed.Args(rounds=0), "--rounds 0: must be at least 1"),
        (speed.speed, speed.Args(against=tmp_path), "must be a checkout"),
    ):
        with pytest.raises(SystemExit) as ended:
            tool(args)
        out, err = capsys.readouterr()
        assert ended.value.code == 2 and out == "" and message in err and err.count("\n") == 1


def test_speed_prints_phases_shares_and_the_ratio(capsys, monkeypatch):
    small = "mtppo_set", dict(num_steps=200, set_frequency=200), 200
    monkeypatch.setitem(speed.ARMS, "MTPPO SET", small)
    speed.speed(speed.Args(arms=("MTPPO SET",), against=ROOT, rounds=1, iterations=1))
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| MTPPO")]
    name, *phases, total, own, products, ratio = [cell.strip() for cell in rows[0].split("|")[1:-1]]
    assert name == "MTPPO SET" and "other" in rows[1]
    assert sum(map(float, phases)) == pytest.approx(float(total), abs=0.03)
    assert 5 < float(own.strip("%")) < 90 and 5 < float(products.strip("%")) < 90
    assert 0.3 < float(ratio.split()[0]) < 3


# Studies


def study_file(path, *arms, seeds="[1]"):
    """A study of arms (name, script, flags as TOML) on MT3."""
    tables = [
        f'[[arms]]\nname = "{name}"\nscript = "{script}"\nflags = {{ {flags} }}\n'
        for name, script, flags in arms
    ]
    path.write_text(f'benchmarks = ["MT3"]\nseeds = {seeds}\n' + "".join(tables))
    return path


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_the_studies_of_the_repository(path, tmp_path):
    runs = sweep.read_study(path, tmp_path)
    assert len({run.folder for run in runs}) == len(runs)
    assert {run.seed for run in runs} >= {1, 2, 3}


def test_studies_share_their_runs(tmp_path):
    folders = {
        path.stem: {run.folder for run in sweep.read_study(path, tmp_path)} for path in STUDIES
    }
    one, table = folders["experiment1_mt5_mtppo"], folders["table1"]
    three = folders["experiment3_architectures_mt3"]
    assert len(one) == 3 * 10 and one < table
    assert len(three) == 6 * 10 + 3 * 5 and three < table  # SET on five seeds
    for name, seeds in dict(
        prune_scope=5, experiment2_schedule=10, set_readings=5, optimizers=5
    ).items():
        assert len(one & folders[name]) == seeds
    assert len(three & folders["orthogonality"]) == 3 * 5
    assert len(three & folders["sparsity_levels"]) == 3 * 5
    assert not one & folders["fair_critic"]
    assert len(table) == 30 * 3 * (7 + 5 + 5)


def test_the_paper_has_figures_for_every_arm_of_table1(tmp_path):
    paper = report.read_paper()
    runs = sweep.read_study(ROOT / "benchmark" / "studies" / "table1.toml", tmp_path)
    assert {(run.benchmark, run.arm) for run in runs} < paper.keys()
    assert len(paper) == 3 * 21 + 3
    assert all(low <= middle <= high for middle, low, high in paper.values())


BAD_STUDIES = {
    "must be a study file": None,
    "must be TOML": "arms = [",
    "must hold arms, benchmarks and seeds": "seeds = [1]",
    "benchmarks must be a list of names": 'arms = []\nbenchmarks = ["MT3", "MT3"]\nseeds = [1]',
    "seeds must be a list of integers, each once": [GMP, dict(seeds="[1, 1]")],
    "seeds must be a list of integers": [GMP, dict(seeds="3")],
    "must hold at least one [[arms]]": 'arms = []\nbenchmarks = ["MT3"]\nseeds = [1]',
    "an arm must have name, script and maybe flags, seeds and against, given": (
        'benchmarks = ["MT3"]\nseeds = [1]\n[[arms]]\nname = "GMP"'
    ),
    "GMP: against must be the name of another arm": (
        'benchmarks = ["MT3"]\nseeds = [1]\n[[arms]]\nname = "GMP"\nscript = "mtppo_gmp.py"\n'
        'against = "GMP"'
    ),
    "is not a script": [("GMP", "mtppo.py", ""), {}],
    "GMP: mtppo_gmp.py has no --sparsty": [("GMP", "mtppo_gmp.py", "sparsty = 0"), {}],
    "GMP: --seed is not an arm's to give": [("GMP", "mtppo_gmp.py", "seed = 3"), {}],
    "GMP: --device [1]: must be number": [("GMP", "mtppo_gmp.py", "device = [1]"), {}],
    "GMP: --device a/b: must be number": [("GMP", "mtppo_gmp.py", 'device = "a/b"'), {}],
    "GMP: --layer_norm must be written": [("GMP", "mtppo_gmp.py", "layer_norm = true"), {}],
    "GMP: mtsac_sparse_metaworld.py has no benchmark MT3": [
        *(("GMP", "mtsac_sparse_metaworld.py", ""), {}),
    ],
    "two arms are called GMP": [GMP, ("GMP", "mtppo_set.py", ""), {}],
    "again: another arm has the same script and flags": [GMP, ("again", "mtppo_gmp.py", ""), {}],
}


@pytest.mark.parametrize("message", BAD_STUDIES)
def test_bad_studies_are_refused(message, tmp_path, capsys):
    path, bad = tmp_path / "study.toml", BAD_STUDIES[message]
    if isinstance(bad, list):
        *arms, options = bad
        study_file(path, *arms, **options)
    elif bad:
        path.write_text(bad)
    assert message in one_line_of_error(capsys, sweep.read_study, path, tmp_path)


def test_bad_flags_of_a_sweep_are_refused(tmp_path, capsys, monkeypatch):
    path, runs_dir = study_file(tmp_path / "study.toml", GMP), tmp_path / "runs"

    def error(**flags):
        args = sweep.Args(study=path, runs_dir=runs_dir, **flags)
        return one_line_of_error(capsys, sweep.sweep, args)

    assert "--jobs 0: must be at least 1" in error(jobs=0)
    assert "--num-threads 0: must be at least 1" in error(num_threads=0)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "--executor slurm: finds no sbatch" in error(executor="slurm")
    assert not runs_dir.exists()
    runs_dir.touch()
    monkeypatch.undo()
    assert "must be a folder to write to" in error()


def test_a_job_has_a_cpu_for_each_thread(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        submitit.AutoExecutor, "update_parameters", lambda self, **given: asked.append(given)
    )
    for flags in (dict(), dict(num_threads=3), dict(num_threads=3, cpus=5)):
        sweep.make_executor(sweep.Args(study=tmp_path / "s.toml", runs_dir=tmp_path, **flags))
    assert [given["cpus_per_task"] for given in asked] == [1, 3, 5]


# Sweeps

TINY = dict(
    **dict(total_timesteps=1500, num_steps=50, minibatch_size=25, update_epochs=1),
    **dict(eval_frequency=500, eval_episodes=1, plasticity_batch_size=60),
    **dict(plasticity_buffer_size=300, checkpoint_frequency=50),
)
TINY_FLAGS = ", ".join(f"{name.replace('_', '-')} = {value}" for name, value in TINY.items())


def sweep_command(study, runs_dir, *flags):
    words = [sys.executable, ROOT / "benchmark" / "sweep.py", study, "--runs-dir", runs_dir, *flags]
    return [str(word) for word in words]


def run_sweep(study, runs_dir, *flags):
    """A sweep in a working folder of its own: its exit code and output."""
    command = sweep_command(study, runs_dir, *flags)
    ended = subprocess.run(command, cwd=study.parent, capture_output=True, text=True)
    return ended.returncode, ended.stdout + ended.stderr


def scalars(folder):
    """tag -> [(step, value)] of all that must be the same in two equal runs."""
    log = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = [t for t in log.Tags()["scalars"] if not t.startswith("time/") and t != "charts/SPS"]
    return {tag: [(e.step, e.value) for e in log.Scalars(tag)] for tag in tags}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """The scalars of the tiny run, never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    mtppo_gmp.train(mtppo_gmp.Args(**TINY, benchmark="MT3", num_threads=1, run_dir=str(folder)))
    return scalars(folder)


def test_a_failing_arm_stops_no_other_and_studies_share_runs(tmp_path, whole_run):
    good = ("good", "mtppo_gmp.py", TINY_FLAGS)
    study = study_file(tmp_path / "study.toml", ("bad", "mtppo_gmp.py", "gamma = 1.5"), good)
    code, output = run_sweep(study, tmp_path / "runs")
    assert code == 1 and "2 runs: 0 complete, 2 to run" in output
    bad_name = "MT3__mtppo_gmp__gamma=1.5__1"
    failed = rf"^{bad_name} .*NOT COMPLETE.*\n    error: --gamma 1.5: must be in \[0, 1\]$"
    assert re.search(failed, output, re.M) and "1 of 2 runs are not complete" in output
    assert re.search(r"^MT3__mtppo_gmp__check.*__1 .*: finished, final score 0\.\d+$", output, re.M)
    [folder] = [p for p in (tmp_path / "runs").glob("MT3__*") if p.name != bad_name]
    assert scalars(folder) == whole_run

    other = study_file(tmp_path / "other.toml", ("another name", *good[1:]))
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert run_sweep(other, tmp_path / "runs") == (
        *(0, f"1 runs: 1 complete, 0 to run in {tmp_path / 'runs'}\n"),
    )
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    text = write_report(tmp_path / "out", study, other, runs_dir=tmp_path / "runs")
    assert "| MT3 | good | 1 | 1500 |" in text and "| MT3 | another name | 1 | 1500 |" in text
    assert f"- {bad_name}: not started" in text


def wait_for_checkpoint(runs_dir, timestep):
    """The folder of the only run once it has saved this timestep."""
    while True:
        found = list(runs_dir.glob("MT3__*/checkpoint.pt"))
        if found and torch.load(found[0])["timestep"] >= timestep:
            return found[0].parent
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_sweep_goes_on_to_the_same_files(number, tmp_path, whole_run):
    study = study_file(tmp_path / "study.toml", ("good", "mtppo_gmp.py", TINY_FLAGS))
    command = sweep_command(study, tmp_path / "runs")
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with subprocess.Popen(command, cwd=tmp_path, start_new_session=True, **pipe) as process:
        folder = wait_for_checkpoint(tmp_path / "runs", 100)
        # A terminal's Ctrl-C reaches the whole group, a kill the sweep alone
        (os.kill if number == signal.SIGTERM else os.killpg)(process.pid, number)
        output = process.communicate()[0]
    if number != signal.SIGKILL:
        assert process.returncode == 130 and "to go on: the same command" in output
        assert "Traceback" not in output
        assert re.search(r"^stopped at timestep \d+, ", (folder / "output.txt").read_text(), re.M)
        assert torch.load(folder / "checkpoint.pt")["timestep"] < TINY["total_timesteps"]
    code, output = run_sweep(study, tmp_path / "runs")
    assert code == 0 and "1 to run" in output and "finished, final score" in output
    assert scalars(folder) == whole_run
    starts = len(list(folder.glob("events.*")))
    # The run outlived the killed sweep, and the second sweep waited for it
    assert starts == (1 if number == signal.SIGKILL else 2)


def test_a_sweep_that_waits_for_another_one_stops_and_starts_nothing(tmp_path):
    flags = TINY_FLAGS.replace("1500", "60000")
    study = study_file(tmp_path / "study.toml", ("good", "mtppo_gmp.py", flags))
    command = sweep_command(study, tmp_path / "runs")
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    sweeps = [subprocess.Popen(command, cwd=tmp_path, **pipe) for _ in range(2)]
    try:
        folder = wait_for_checkpoint(tmp_path / "runs", 50)
        time.sleep(3)  # the job of either sweep is there, and one waits
        for process in sweeps:
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=30)[0].endswith("the same command again\n")
            assert process.returncode == 130
    finally:
        for process in sweeps:
            process.kill()
    with open(folder / "output.txt") as output:
        fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nothing writes there any more


def test_a_killed_run_is_reported(tmp_path):
    flags = TINY_FLAGS.replace("1500", "15000")
    study = study_file(tmp_path / "study.toml", ("good", "mtppo_gmp.py", flags))
    command = sweep_command(study, tmp_path / "runs")
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        folder = wait_for_checkpoint(tmp_path / "runs", 50)
        subprocess.run(["pkill", "-9", "-f", f"mtppo_gmp.py .*{folder}"], check=True)
        output = process.communicate()[0]
    assert process.returncode == 1 and "mtppo_gmp.py ended with exit code -9" in output


def test_a_slurm_job_that_left_the_queue_has_ended(tmp_path, monkeypatch):
    """Cancelled by hand, or its node failed: it has no result, and none will come."""
    squeue = tmp_path / "squeue"
    squeue.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(submitit.SlurmJob, "done", lambda job: job.job_id == "7_2")
    jobs = [submitit.SlurmJob(tmp_path, f"7_{i}") for i in range(3)]
    squeue.write_text("#!/bin/sh\necho 7_0\n")
    assert sweep.ended_jobs(jobs) == jobs[1:]
    squeue.write_text("#!/bin/sh\nexit 1\n")  # Slurm does not answer
    assert sweep.ended_jobs(jobs) == jobs[2:]


def slurm_runs():
    found = shutil.which("scontrol") and shutil.which("sbatch") and shutil.which("srun")
    return found and b"UP" in subprocess.run(["scontrol", "ping"], capture_output=True).stdout


@pytest.mark.skipif(not slurm_runs(), reason="no Slurm here, or its controller is not running")
def test_the_same_study_on_slurm(tmp_path, whole_run):
    good = ("good", "mtppo_gmp.py", TINY_FLAGS)
    study = study_file(tmp_path / "study.toml", ("bad", "mtppo_gmp.py", "gamma = 1.5"), good)
    code, output = run_sweep(study, tmp_path / "runs", "--executor", "slurm", "--time", "10")
    assert code == 1 and "error: --gamma 1.5: must be" in output and "finished" in output
    [folder] = (tmp_path / "runs").glob("MT3__mtppo_gmp__check*")
    assert scalars(folder) == whole_run
