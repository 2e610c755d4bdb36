"""Sweeps and reports: studies, kills, failing methods, statistics, what is left out."""

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

import analyses  # noqa: E402
import report  # noqa: E402
import sweep  # noqa: E402

STUDIES = sorted((ROOT / "benchmark" / "studies").glob("*.toml"))
MT3 = ("LavaGapS7", "RedBlueDoors-6x6", "MemoryS11")


def one_line_of_error(capsys, function, *args):
    with pytest.raises(SystemExit) as ended:
        function(*args)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


# Statistics


def test_iqm_by_hand():
    assert report.iqm(np.array([0.0, 1, 2, 3, 4, 5, 60, 100])) == 3.5
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
    # The seeds of both are drawn together: what they share does not vary
    assert report.interval(difference, base + 0.25, base) == pytest.approx(0.25)


def test_an_interval_of_few_seeds_holds_the_truth_in_95_percent():
    held = 0
    for scores in np.random.default_rng(0).normal(size=(600, 6)):
        low, high = report.interval(report.iqm, scores, resamples=1000)
        held += low <= 0 <= high
    assert held / 600 == pytest.approx(0.95, abs=0.03)


def test_probability_of_improvement_by_hand():
    ours, base = np.array([0.5, 0.9]), np.array([0.5, 0.7, 0.1])
    # 0.5 wins once and ties once, 0.9 wins thrice
    assert report.probability_of_improvement(ours, base) == pytest.approx((1.5 + 3) / 6)
    assert report.probability_of_improvement(base, ours) == pytest.approx(1.5 / 6)
    u = scipy.stats.mannwhitneyu(ours, base).statistic / 6
    assert report.probability_of_improvement(ours, base) == pytest.approx(u)


def test_the_swap_test_against_scipy():
    rng = np.random.default_rng(0)
    for seeds, random in ((6, 0), (16, 0.005)):  # all swaps, and random ones
        ours, base = rng.random((2, seeds)) + np.array([[0.3], [0.0]])
        expected = scipy.stats.permutation_test(
            (ours, base),
            lambda x, y, axis: (
                scipy.stats.trim_mean(x, 0.25, axis) - scipy.stats.trim_mean(y, 0.25, axis)
            ),
            **dict(permutation_type="samples", vectorized=True, n_resamples=2**seeds),
        ).pvalue
        found = report.swap_test(report.difference_of_iqms, ours, base)
        assert 0 < expected < 0.9 and found == pytest.approx(expected, abs=random or 1e-9)
    assert report.swap_test(report.probability_of_improvement, ours, ours, 0.5) == 1


def test_five_seeds_cannot_show_a_gain_and_six_can():
    for seeds, p, words in ((5, 2 / 32, "5 seeds cannot show it"), (6, 2 / 64, "significant")):
        scores = np.arange(seeds) / 100
        assert report.swap_test(report.difference_of_iqms, scores + 1, scores) == p
        assert report.verdict(p, seeds) == words
    assert report.verdict(0.05, 6) == "not significant"


def test_seeds_needed_to_show_a_gain_of_normal_scores():
    """The middle half's mean of n normal scores has the variance s^2 / (0.83 n)."""
    rng, s = np.random.default_rng(1), 0.2
    needed = (1.96 + 0.84) ** 2 * 2 * s**2 / 0.83 / 0.1**2  # 76
    scores, base = rng.normal(0.5, s, (2, 500))
    found, low, high = map(int, re.findall(r"\d+", report.seeds_needed(scores, base)))
    assert abs(found - needed) <= 10 and low < found < high
    assert report.seeds_needed(scores, scores + 0.3) == "6 (6 to 6)"  # what they share is no spread
    assert report.seeds_needed(10 * scores[:5], base[:5]) == "over 500 (over 500 to over 500)"
    held = 0  # ten seeds say so little that their interval is wide, and holds the number
    for own in rng.normal(0.5, s, (100, 2, 10)):
        _, low, high = re.findall(r"(?:over )?\d+", report.seeds_needed(*own))
        held += int(low) <= needed and ("over" in high or int(high) >= needed)
    assert held >= 85


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
    numbers = re.findall(r"-?\d\.\d\d", report.describe_correlation(x, y))
    assert [float(number) for number in numbers] == pytest.approx([0.6, min(every), max(every)])


# Reports

GMP = ("GMP", "mtppo_gmp.py", "")


def write_log(folder, scores=(0.5, 0.6, 0.7), until=400, purge=None, nan_at=None, unit=1, **flags):
    """The log of a run of 400 units of timesteps and two evaluations; scores are MT3's."""
    defaults = dict(benchmark="MT3", total_timesteps=400 * unit, num_steps=min(100 * unit, 2000))
    args = mtppo_gmp.Args(**defaults | flags)
    with SummaryWriter(str(folder), purge_step=purge) as writer:
        if not purge:
            rows = "".join(f"|{name}|{value}|\n" for name, value in asdict(args).items())
            writer.add_text("args", "|argument|value|\n|-|-|\n" + rows)
        for step in range(purge or 100 * unit, until * unit + 1, 100 * unit):
            writer.add_scalar("sparsity/actor", args.sparsity, step)
            if step == 100 * unit:  # no update of masks follows the last update
                writer.add_scalar("sparsity/actor_grown_kept", 0.5, step)
            writer.add_scalar("sparsity/actor/conv1", 0.5, step)
            writer.add_scalar("losses/explained_variance", float("nan"), step)
            for i, name in enumerate(report.METRICS):
                value = step * (i + args.seed + np.nansum(scores)) / unit / 1000
                writer.add_scalar(
                    f"plasticity/{name}", float("nan") if step == nan_at else value, step
                )
            if step % (200 * unit) == 0:
                for task, score in zip(MT3, scores, strict=True):
                    score *= step / (400 * unit)
                    writer.add_scalar(f"eval/normalized_return/{task}", score, step)
    return folder


def write_report(out, *runs, results=Path("none"), **changes):
    report.report(report.Args(runs=runs, out=out, results=results, **changes))
    return (out / "report.md").read_text()


def rows_of(text):
    """(first two cells of a row of a table, number of the table) -> the cells that follow."""
    rows, table = {}, 0
    for line in re.findall(r"^\|.*\|$", text, re.M):
        cells = line.strip("| ").split(" | ")
        table += line.startswith("| ---")
        rows.setdefault((*cells[:2], table), cells[2:])
    return rows


def test_report_of_two_methods(tmp_path, capsys):
    for seed, shift in ((1, 0.0), (2, 0.3)):
        scores = [x + shift for x in (0.5, 0.5, 0.65)]
        common = dict(seed=seed, unit=1000)
        write_log(tmp_path / "runs" / f"gmp{seed}", scores=scores, **common)
        write_log(tmp_path / "runs" / f"dense{seed}", sparsity=0, scores=(0.1, 0.1, 0.1), **common)
        write_log(tmp_path / "runs" / f"late{seed}", sparsity=0.9, gamma=0.5, **common)
    text = write_report(tmp_path / "out", tmp_path / "runs")
    rows = rows_of(text)
    dense, gmp, late = ("MT3", "MTPPO dense"), ("MT3", "MTPPO GMP"), ("MT3", "MTPPO GMP 0.9")
    assert text.index("MTPPO dense") < text.index("MTPPO GMP")
    assert rows[*dense, 1] == "2;400000;0.10 (0.10, 0.10);0.70 (0.60, 0.76);-;-;-;-".split(";")
    ours = "2;400000;0.70 (0.55, 0.85);0.77 (0.73, 0.80);MTPPO dense;0.60 (0.45, 0.75);0.500"
    assert rows[*gmp, 1] == [*ours.split(";"), "2 seeds cannot show it"]
    # Another experiment than the paper's has no figure of the paper's next to it
    assert rows[*late, 1][2:4] == ["0.60 (0.60, 0.60)", "-"]
    assert "- MTPPO GMP against MTPPO dense: `sparsity` 0.95, not 0\n" in text
    assert "0.9 against MTPPO dense: `gamma` 0.5, not 0.99; `sparsity` 0.9, not 0\n" in text
    # The first evaluation has half the scores of the second: their means are 0.4125 and 0.6375
    assert rows[*gmp, 2][:2] == ["0.55, 0.85", "0.70"]
    assert rows[*gmp, 2][3:6] == ["0.45 (0.34, 0.56)", "0.500", "1.00 (1.00, 1.00)"]
    # The metrics are 0.4 x (i + seed + sum of the scores) at the end, so 0.4 x (i + 3.6) on average
    assert rows[*gmp, 3] == ["144.0 / 184.0 %", "2 / 3", "3.04"]
    assert rows[*gmp, 4][1] == "72.00 (-156.71, 300.71) %, p 0.500"
    assert "Spearman" in text and "| MT3 | MTPPO GMP | 2 | 400000 |" in capsys.readouterr().out
    names = "learning_curves final_returns plasticity dormancy_return".split()
    assert all(f"![]({name}.png)" in text for name in names)
    files = {"report.md", "results.csv", "arguments.json", *(f"{name}.png" for name in names)}
    assert {p.name for p in (tmp_path / "out").iterdir()} == files
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert len(rows) == 3 * 2 * 2  # methods, seeds, evaluations
    assert rows[0] == {
        **dict(method="MTPPO dense", run="dense1", benchmark="MT3", seed="1", timestep="200000"),
        **{f"normalized_return/{task}": "0.05" for task in MT3},
        **dict(actor_dormant_ratio="0.26", critic_dormant_ratio="0.46", fisher_trace="1.06"),
        **dict(actor_effective_rank="0.66", critic_effective_rank="0.86"),
        **dict(actor_sparsity="0", actor_grown_kept="0.5"),
    }
    earlier = write_report(tmp_path / "earlier", tmp_path / "runs", timestep=200_000)
    assert rows_of(earlier)[*dense, 1][1:4] == ["200000", "0.05 (0.05, 0.05)", "-"]


def test_a_method_is_compared_with_the_one_that_its_study_names(tmp_path):
    flags = dict(dense="sparsity = 0", early="prune-start = 0.0", late="prune-start = 0.1")
    methods = [(name, "mtppo_gmp.py", own) for name, own in flags.items()]
    study = study_file(tmp_path / "study.toml", *methods, seeds="[1, 2, 3]")
    study.write_text(study.read_text() + 'against = "early"\n')
    for plan in sweep.read_study(study, tmp_path / "runs"):
        score = dict(dense=0.1, early=0.5, late=0.8)[plan.method] + 0.05 * plan.seed
        own = dict(dense=dict(sparsity=0), early=dict(prune_start=0.0), late=dict(prune_start=0.1))
        write_log(plan.folder, scores=[score] * 3, seed=plan.seed, **own[plan.method])

    def gains(out):
        rows = rows_of(write_report(out, study, runs_dir=tmp_path / "runs"))
        differences = {own[2]: own for own in rows if own[2] == 4}
        found = [rows["MT3", name, 1][4:6] for name in ("early", "late")]
        return found, rows["MT3", "late", 4][:2] if differences else None

    # 400 / 1000 of the sum of three scores apart in every seed
    gain, metric = (
        [["dense", "0.40 (0.40, 0.40)"], ["early", "0.30 (0.30, 0.30)"]],
        ["early", "36.00 (36.00, 36.00) %, p 0.250"],
    )
    assert gains(tmp_path / "out") == (gain, metric)
    # Without early's first seed, late and dense are compared with it over the other two
    first, second, _ = sorted((tmp_path / "runs").glob("*=0.0__*"))
    shutil.rmtree(first)
    assert gains(tmp_path / "fewer") == (gain, ["early", "36.00 (36.00, 36.00) %, p 0.500"])
    shutil.rmtree(second)  # one seed in common is no comparison
    assert gains(tmp_path / "alone") == ([["-", "-"]] * 2, None)


RESULTS = sorted(path.parent for path in (ROOT / "benchmark" / "results").glob("*/results.csv"))


@pytest.mark.parametrize("folder", RESULTS, ids=lambda p: p.name)
def test_the_committed_reports_follow_from_their_results(folder):
    """By plain sums over the rows of results.csv."""

    def middle(scores):
        cut = len(scores) // 4
        return sum(sorted(scores)[cut : len(scores) - cut]) / (len(scores) - 2 * cut)

    def close(shown, value, error):
        assert float(re.match(r"-?[\d.]+", shown)[0]) == pytest.approx(value, abs=error)

    runs = {}  # (benchmark, method) -> seed -> rows
    with open(folder / "results.csv") as file:
        for row in csv.DictReader(file):
            own = runs.setdefault((row["benchmark"], row["method"]), {})
            own.setdefault(int(row["seed"]), []).append(row)

    def scores(own, seeds, evaluations=1):
        found = []
        for seed in seeds:
            tasks = [[float(x) for k, x in row.items() if "/" in k and x] for row in own[seed]]
            found.append(np.mean([sum(x) / len(x) for x in tasks[-evaluations:]]))
        return found

    text = (folder / "report.md").read_text()
    rows = rows_of(text)
    assert len(re.findall(r"^\| MT.*\|$", text, re.M)) == sum(own[0][:2] == "MT" for own in rows)
    assert {own[:2] for own in rows if own[2] == 1 and own[0][:2] == "MT"} == runs.keys()
    for (benchmark, method), own in runs.items():
        seeds, timestep, level, _, against, gain, *_ = rows[benchmark, method, 1]
        ends = scores(own, own)
        assert (seeds, timestep) == (str(len(own)), next(iter(own.values()))[-1]["timestep"])
        close(level, middle(ends), 0.00501)
        each, mean, late, late_gain, *_ = rows[benchmark, method, 2]
        assert each == ", ".join(f"{score:.2f}" for score in ends)
        close(mean, np.mean(ends), 0.00501)
        close(late, middle(scores(own, own, 5)), 0.00501)
        last = {k: np.mean([float(run[-1][k]) for run in own.values()]) for k in report.METRICS}
        shown = re.findall(r"[\d.]+", " ".join(rows[benchmark, method, 3]))
        for number, (name, value) in zip(shown, last.items(), strict=True):
            close(
                number,
                100 * value if "dormant" in name else value,
                0.51 if "rank" in name else 0.0501,
            )
        if against == "-":
            continue
        base = runs[benchmark, against]
        both = [seed for seed in own if seed in base]
        for shown, n in ((gain, 1), (late_gain, 5)):
            close(shown, middle(scores(own, both, n)) - middle(scores(base, both, n)), 0.00501)
        for shown, name in zip(rows[benchmark, method, 4][1:], report.METRICS, strict=True):
            x = [float(own[s][-1][name]) - float(base[s][-1][name]) for s in both]
            half = scipy.stats.t.ppf(0.975, len(x) - 1) * np.std(x, ddof=1) / len(x) ** 0.5
            numbers = re.findall(r"-?[\d.]+", shown)[:3]
            for number, value in zip(numbers, (0, -half, half), strict=True):
                value, unit = (
                    np.mean(x) + value,
                    (100, 0.00501) if "dormant" in name else (1, 0.501),
                )
                close(number, unit[0] * value, unit[1])


def test_results_stand_for_their_run_folders(tmp_path, capsys):
    """A report and a sweep take from results.csv what it has, and the rest from run folders."""
    study = study_file(
        tmp_path / "study.toml", GMP, ("dense", "mtppo_gmp.py", "sparsity = 0"), seeds="[1, 2]"
    )
    plans, results = sweep.read_study(study, tmp_path / "runs"), tmp_path / "results"

    def report_of(name):
        return write_report(results / name, study, runs_dir=tmp_path / "runs", results=results)

    def files(name):
        return {path.name: path.read_bytes() for path in (results / name).iterdir()}

    for plan in plans[:3]:
        sparsity = 0.95 * (plan.method == "GMP")
        write_log(
            plan.folder, seed=plan.seed, scores=(0.1 * plan.seed, 1 / 3, 2 / 3), sparsity=sparsity
        )
    half = report_of("a")
    assert (
        "- dense on MT3, seed 2: not started" in half and rows_of(half)["MT3", "GMP", 1][0] == "2"
    )
    shutil.rmtree(tmp_path / "runs")
    assert report_of("b") == half and files("a") == files("b")
    assert sweep.archived_runs(results) == {plan.folder.name for plan in plans[:3]}
    write_log(plans[3].folder, seed=2, sparsity=0.0)
    shutil.rmtree(results / "b")
    assert rows_of(report_of("a"))["MT3", "dense", 1][0] == "2"
    rows = (results / "a" / "results.csv").read_text()
    fewer = study_file(tmp_path / "fewer.toml", GMP, seeds="[1]")
    args = report.Args((fewer,), results / "a", results=results)
    capsys.readouterr()
    lost = one_line_of_error(capsys, report.report, args)
    assert "results.csv: holds MT3__mtppo_gmp__default__2, which is not in this report" in lost
    assert (results / "a" / "results.csv").read_text() == rows


def test_a_run_with_nan_is_named_and_never_averaged_in(tmp_path):
    for seed in (1, 2):
        write_log(tmp_path / f"good{seed}", seed=seed)
    write_log(tmp_path / "bad", seed=3, scores=(0.9, float("nan"), 0.9))
    write_log(tmp_path / "worse", seed=3, nan_at=200)
    text = write_report(tmp_path / "out", tmp_path)
    assert "| MTPPO GMP | 2 | 400 | 0.60 (0.60, 0.60) |" in text
    assert "- bad: NaN or infinity in eval/normalized_return/RedBlueDoors-6x6 from" in text
    assert "- worse: NaN or infinity in plasticity/" in text
    assert "nan" not in (tmp_path / "out" / "results.csv").read_text()


def test_a_half_finished_run_is_named_and_left_out_until_it_ends(tmp_path):
    write_log(tmp_path / "whole", seed=1)
    write_log(tmp_path / "half", seed=2, until=300)
    text = write_report(tmp_path / "out", tmp_path)
    assert "- half: incomplete: evaluated until timestep 200 of 400" in text
    assert "| MTPPO GMP | 1 | 400 | 0.60 (no interval: 1 seed) |" in text
    time.sleep(1.1)  # logs are read in the order of their names, which hold the second
    write_log(tmp_path / "half", seed=2, purge=200, scores=(0.9, 0.9, 0.9))
    assert "\nNone.\n" in write_report(tmp_path / "again", tmp_path)
    rows = csv.DictReader((tmp_path / "again" / "results.csv").open())
    resumed = [row["normalized_return/LavaGapS7"] for row in rows if row["seed"] == "2"]
    assert resumed == ["0.45", "0.9"]  # not what the first process logged from 200 on


def test_figures_show_all_of_every_curve(tmp_path, monkeypatch):
    """Panels of one figure whose values differ a thousandfold, more methods than colours."""
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


def test_methods_have_the_same_colour_in_every_report(tmp_path):
    """The paper's methods their own; without them, what is called like them."""
    gmp = write_log(tmp_path / "gmp", unit=1000)
    early = write_log(tmp_path / "early", prune_start=0.0, unit=1000)
    fair = write_log(tmp_path / "fair", critic_epochs=8, unit=1000)
    dense = write_log(tmp_path / "dense", sparsity=0, unit=1000)

    def colours(*folders):
        runs = [report.read_log(folder) for folder in folders]
        for run, folder in zip(runs, folders, strict=True):
            names = dict(gmp="MTPPO GMP", dense="Dense, 5e-3", early="MTPPO GMP, early")
            run.method = names.get(folder.name, "MTPPO GMP, x")
        report.choose_styles(runs)
        return [report.COLOURS.index(run.style["color"]) for run in runs]

    assert colours(dense, gmp) == [0, 1] and colours(gmp) == [1]
    assert colours(early, gmp) == [3, 1] and colours(early, fair, dense) == [1, 3, 0]


def test_runs_of_unequal_length_are_not_compared(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(report, "describe_correlation", lambda x, y: seen.append((*x, *y)) or "")
    for seed in (1, 2):
        runs, scores = tmp_path / "runs", (0.1 * seed,) * 3
        write_log(runs / f"dense{seed}", sparsity=0, seed=seed, scores=scores)
        longer = dict(until=800, total_timesteps=800)
        write_log(runs / f"gmp{seed}", seed=seed, scores=scores, **longer)
    text = write_report(tmp_path / "out", runs)
    # At 800, GMP has twice its scores; a panel shows runs of one length, at their own ends
    assert rows_of(text)["MT3", "MTPPO GMP", 1] == "2;800;0.30 (0.20, 0.40);-;-;-;-;-".split(";")
    assert seen[0] == pytest.approx((0.4 * 1.3, 0.4 * 2.6, 0.1, 0.2))
    assert seen[2] == pytest.approx((0.8 * 1.3, 0.8 * 2.6, 0.2, 0.4))
    same = write_report(tmp_path / "same", runs, timestep=400)
    assert rows_of(same)["MT3", "MTPPO GMP", 1][4:6] == ["MTPPO dense", "0.00 (0.00, 0.00)"]
    assert "`sparsity` 0.95, not 0; `total_timesteps` 800, not 400" in same


def test_methods_are_called_by_their_arguments():
    def name(script, **flags):
        args = {k: str(v) for k, v in asdict(script.Args(**flags)).items()}
        return report.paper_method(args)[1]

    assert name(mtppo_gmp) == "MTPPO GMP" and name(mtppo_set) == "MTPPO SET"
    assert name(mtppo_gmp, sparsity=0) == "MTPPO dense"
    assert name(mtppo_gmp, sparsity=0.99) == "MTPPO GMP 0.99"
    assert name(mtppo_gmp, weight_decay=1e-6) == "MTPPO GMP + weight decay"
    assert name(mtppo_gmp, sparsity=0, layer_norm=True) == "MTPPO LayerNorm"
    assert name(mtppo_gmp, sparsity=0, redo_frequency=5000) == "MTPPO ReDo"
    assert name(mtppo_gmp, sparsity=0, reset_frequency=100_000) == "MTPPO Reset"
    assert name(mtppo_gmp, sparsity=0, weight_decay=0.1) == "MTPPO weight decay 0.1"
    assert name(mtppo_gmp, pcgrad=True) == "MTPPO GMP + PCGrad"
    assert name(moe_sparse) == "MoE GMP" and name(moe_sparse, sparsifier="none") == "MoE dense"
    assert name(moore_sparse, sparsifier="set") == "MOORE SET"
    mtsac = dict(sparsifier="gmp", sparsity="0.95", weight_decay="0.0")
    names = [report.paper_method(mtsac | dict(prune=p))[1] for p in ("none", "actor", "both")]
    assert names == ["MT-SAC dense", "MT-SAC GMP on the actor", "MT-SAC GMP on both"]


def test_methods_of_one_name_are_called_by_what_differs(tmp_path):
    for name, flags in dict(a=dict(prune_scope="layer"), b={}, c=dict(sparsity=0)).items():
        write_log(tmp_path / name, **flags)
    # Arguments without effect do not make another method
    write_log(tmp_path / "d", sparsity=0, prune_scope="layer", seed=2)
    text = write_report(tmp_path / "out", tmp_path)
    assert "| MTPPO GMP, prune scope layer | 1 |" in text
    assert "| MTPPO GMP, prune scope global | 1 |" in text and "| MTPPO dense | 2 |" in text


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
    assert "on 3 runs\n" in text and "| one name | 3 |" in text and "| another | 3 |" in text
    assert "MTPPO GMP" not in text and "(3 of at least 5 runs)" in text


def test_what_cannot_be_reported_is_refused(tmp_path, capsys):
    def error(*runs, **changes):
        args = report.Args(runs, tmp_path / "out", results=tmp_path / "none", **changes)
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
    (tmp_path / "out").touch()
    assert "--out" in error(a) and "must be a folder to write to" in error(a)


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


def test_a_method_of_many_flags_has_a_folder_of_a_short_name(tmp_path):
    names = ("gamma", "gae-lambda", "clip-coef", "ent-coef", "actor-lr", "critic-lr", "redo-tau")
    flags = ", ".join(f"{name} = 0.{i}5{'1' * 30}" for i, name in enumerate(names, 1))
    method = "Many", "mtppo_gmp.py", flags
    [run] = sweep.read_study(study_file(tmp_path / "study.toml", method), tmp_path)
    assert re.fullmatch(r"MT3__mtppo_gmp__[0-9a-f]{16}__1", run.folder.name)
    [again] = sweep.read_study(study_file(tmp_path / "study.toml", method), tmp_path)
    assert run == again  # the same in every process
    assert sum(word.startswith("--gamma=0.15") for word in run.flags) == 1


# Analyses


def test_solved_and_lost_tasks_traces_and_grown_weights_by_hand():
    nan, runs = float("nan"), []
    for seed, scores, trace, kept in (
        (1, [0.9, 0.6, 0.2], [1, 10, 4], [nan, 0.9, 0.1]),
        (2, [0.6, 0.3, 0.1], [3, 20, 14], [0.7, 0.5, 0.3]),
        (3, [0.5, 0.3, 0.0], [2, 30, 12], [0.5, 0.5, 0.2]),
    ):
        metrics = dict(fisher_trace=trace, actor_grown_kept=kept, critic_grown_kept=kept)
        metrics = {name: np.array(values) for name, values in metrics.items()}
        named = dict(method="SET", benchmark="MT1", seed=seed, tasks=["a"], timesteps=[1, 5, 8])
        runs.append(report.Run("", **named, scores=np.array([scores]).T, metrics=metrics))
    # 0.1 is not solved; 0.5 was not learned
    assert rows_of(analyses.solved_tasks(runs))["MT1", "SET", 1] == ["a", "1 of 3", "0.20", "2"]
    assert rows_of(analyses.fisher_traces(runs))["MT1", "SET", 1] == ["20", "5", "10", "2 of 3"]
    kept = rows_of(analyses.grown_kept(runs))["MT1", "SET", 1]
    assert kept == ["60.0 %", "20.0 %", "60.0 %", "20.0 %"]
    runs[0].metrics["actor_grown_kept"] = np.array([nan] * 3)  # no SET
    assert ("MT1", "SET", 1) not in rows_of(analyses.grown_kept(runs))


@pytest.mark.parametrize("script", [mtppo_gmp, moe_sparse], ids=lambda s: s.__name__)
def test_neurons_are_counted_as_a_run_measures_them(script, tmp_path, capsys):
    args = script.Args(**TINY, benchmark="MT3", run_dir=str(tmp_path / "a"), dormant_tau=0.5)
    script.train(args)
    state = torch.load(tmp_path / "a" / "checkpoint.pt")
    networks = script.make_networks(args)
    obs = state["buffer"]["observations"][:, :20]
    for name, network in networks.items():
        network.load_state_dict(state[name])
    critic = networks["critic"]
    for mask in (
        critic.masks["conv2"][3],
        *(critic.masks[f"head_{x}"][1] for x in ("hidden", "output")),
    ):
        mask.zero_()
    critic.masks["head_output"][2].zero_()
    expected = script.measure_plasticity(networks, obs, args)
    for name, network in networks.items():
        counts, heads = analyses.count_neurons(network, obs, args.dormant_tau)
        dormant, alive, every = sum(counts.values())
        assert dormant / alive == pytest.approx(expected[f"plasticity/{name}_dormant_ratio"])
        sizes = {n: network.get_submodule(n).bias.numel() for n in network.layers if n in counts}
        assert {layer: count[2] for layer, count in counts.items()} == sizes and dormant > 0
    assert heads == [1, 2, 3] and counts["conv2"][1] < counts["conv2"][2]
    assert counts["head_hidden"][1] <= 2 * 128
    analyses.analyses(analyses.Args((tmp_path,)))
    assert "GMP | 1 | actor |" in capsys.readouterr().out


# Speed


# Studies


def study_file(path, *methods, seeds="[1]"):
    """A study of methods (name, script, flags as TOML) on MT3."""
    tables = [
        f'[[methods]]\nname = "{name}"\nscript = "{script}"\nflags = {{ {flags} }}\n'
        for name, script, flags in methods
    ]
    path.write_text(f'benchmarks = ["MT3"]\nseeds = {seeds}\n' + "".join(tables))
    return path


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_the_studies_of_the_repository(path, tmp_path):
    runs = sweep.read_study(path, tmp_path)
    assert len({run.folder for run in runs}) == len(runs)
    assert {run.seed for run in runs} >= {1, 2, 3}
    sweep.check_flags(runs)


def test_studies_share_their_runs(tmp_path):
    folders = {
        path.stem: {run.folder for run in sweep.read_study(path, tmp_path)} for path in STUDIES
    }
    one, table = folders["experiment1_mt5_mtppo"], folders["table1"]
    three, others = folders["experiment3_architectures_mt3"], folders["interventions"]
    assert len(one) == 3 * 30 and len(three) == 6 * 10 + 3 * 5  # SET on five seeds
    assert len(others) == 7 * 10 and len(folders["mt7"]) == 3 * 10
    assert one | three | others | folders["mt7"] < table
    for name, shared in dict(
        **dict(interventions=30, prune_scope=5, experiment2_schedule=10, set_readings=5),
        **dict(optimizers=5, fair_critic=0, stress=0),
    ).items():
        assert len(one & folders[name]) == shared
    assert len(three & folders["orthogonality"]) == len(three & folders["sparsity_levels"]) == 15
    assert len(table) == 30 * 3 * (7 + 5 + 5)


def test_the_paper_has_figures_for_every_method_of_table1(tmp_path):
    paper = report.read_paper()
    runs = sweep.read_study(ROOT / "benchmark" / "studies" / "table1.toml", tmp_path)
    assert {(run.benchmark, run.method) for run in runs} < paper.keys()
    assert len(paper) == 3 * 21 + 3
    assert all(low <= middle <= high for middle, low, high in paper.values())


HEAD = 'benchmarks = ["MT3"]\nseeds = [1]\n'
BAD_STUDIES = {
    "must be a study file": None,
    "must be TOML": "methods = [",
    "must hold methods, benchmarks and seeds": "seeds = [1]",
    "benchmarks must be a list of names": 'methods = []\nbenchmarks = ["MT3", "MT3"]\nseeds = [1]',
    "seeds must be a list of integers, each once": [GMP, dict(seeds="[1, 1]")],
    "seeds must be a list of integers": [GMP, dict(seeds="3")],
    "must hold at least one [[methods]]": HEAD + "methods = []",
    "a method has name, script and maybe flags": HEAD + '[[methods]]\nname = "GMP"',
    "GMP: against must be the name of another method": (
        HEAD + '[[methods]]\nname = "GMP"\nscript = "mtppo_gmp.py"\nagainst = "GMP"'
    ),
    "is not a script": [("GMP", "mtppo.py", ""), {}],
    "GMP: --seed is not a method's to give": [("GMP", "mtppo_gmp.py", "seed = 3"), {}],
    "GMP: --device [1]: must be number": [("GMP", "mtppo_gmp.py", "device = [1]"), {}],
    "GMP: --device a/b: must be number": [("GMP", "mtppo_gmp.py", 'device = "a/b"'), {}],
    "GMP: --layer_norm must be written": [("GMP", "mtppo_gmp.py", "layer_norm = true"), {}],
    "two methods are called GMP": [GMP, ("GMP", "mtppo_set.py", ""), {}],
    "again: another method has the same script": [GMP, ("again", "mtppo_gmp.py", ""), {}],
    # Names that figures would not show, or could not
    "'_dense': a name must be letters": [("_dense", "mtppo_gmp.py", ""), {}],
    "'a $$ b': a name must be letters": [("a $$ b", "mtppo_gmp.py", ""), {}],
    "'MTPPO ': a name must be letters": [("MTPPO ", "mtppo_gmp.py", ""), {}],
    "'a | b': a name must be letters": [("a | b", "mtppo_gmp.py", ""), {}],
}


@pytest.mark.parametrize("message", BAD_STUDIES)
def test_bad_studies_are_refused(message, tmp_path, capsys):
    path, bad = tmp_path / "study.toml", BAD_STUDIES[message]
    if isinstance(bad, list):
        *methods, options = bad
        study_file(path, *methods, **options)
    elif bad:
        path.write_text(bad)
    assert message in one_line_of_error(capsys, sweep.read_study, path, tmp_path)


def test_flags_are_checked_by_the_script_before_the_first_run(tmp_path, capsys):
    for script, flags, message in (
        ("mtppo_gmp.py", "total-timesteps = 2e2", "parsing --total-timesteps"),
        ("mtppo_gmp.py", "sparsty = 0", "--sparsty"),
        ("mtsac_sparse_metaworld.py", "", "invalid choice 'MT3'"),
    ):
        study = study_file(tmp_path / "study.toml", GMP, ("bad", script, flags))
        with pytest.raises(SystemExit) as ended:
            sweep.sweep(sweep.Args(study, runs_dir=tmp_path / "runs"))
        out, err = capsys.readouterr()
        assert ended.value.code == 2 and out == "" and not (tmp_path / "runs").exists()
        assert f"error: bad: {script} refuses its flags" in err and message in err


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
    assert "must be a folder to write to" in error()


def test_the_error_of_a_run_is_shown_whole():
    box = ["╭─ Value error ─╮", *(f"│ {i} │" for i in range(12)), "x.py ended with exit code 2"]
    old = "$ x.py\nerror: of an earlier start\nx.py ended with exit code 1\n"
    text = old + "$ x.py --resume\ntimestep 100: score 0.1\n" + "\n".join(box)
    assert sweep.error_lines(text) == "\n".join(f"    {line}" for line in box)
    killed = "$ x.py\n1\n2\n3\nx.py ended with exit code -9\n"
    assert sweep.error_lines(killed).split() == "2 3 x.py ended with exit code -9".split()


def test_a_job_has_a_cpu_for_each_thread(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", classmethod(lambda cls: 1))
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
    words = [sys.executable, ROOT / "benchmark" / "sweep.py", study, "--runs-dir", runs_dir]
    words += ["--results", "none", *flags]
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


def test_a_failing_method_stops_no_other_and_studies_share_runs(tmp_path, whole_run):
    good = ("good", "mtppo_gmp.py", TINY_FLAGS)
    bad = ("bad", "mtppo_gmp.py", "critic-lr = 1e38, num-steps = 50, minibatch-size = 50")
    study = study_file(tmp_path / "study.toml", bad, good)
    code, output = run_sweep(study, tmp_path / "runs", "--jobs", "2")
    assert code == 1 and "2 runs: 0 complete, 2 to run" in output
    bad_name = "MT3__mtppo_gmp__critic-lr=1e+38,minibatch-size=50,num-steps=50__1"
    failed = r"NOT COMPLETE\n    .*error.*\n(    .*\n)*    mtppo_gmp.py ended with exit code \d$"
    assert re.search(rf"^{re.escape(bad_name)} .*{failed}", output, re.M)
    assert "1 of 2 runs are not complete" in output
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
    assert "- bad on MT3, seed 1: incomplete" in text


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
        assert process.returncode == 130 and "the same command goes on" in output
        assert "Traceback" not in output
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
            assert "the same command goes on" in process.communicate(timeout=30)[0]
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
        wait_for_checkpoint(tmp_path / "runs", 50)
        children = Path(f"/proc/{process.pid}/task").glob("*/children")
        [child] = [int(pid) for path in children for pid in path.read_text().split()]
        os.kill(child, signal.SIGKILL)
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
    study = study_file(tmp_path / "study.toml", ("good", "mtppo_gmp.py", TINY_FLAGS))
    code, output = run_sweep(study, tmp_path / "runs", "--executor", "slurm", "--time", "10")
    assert code == 0 and "finished, final score" in output
    [folder] = (tmp_path / "runs").glob("MT3__mtppo_gmp__check*")
    assert scalars(folder) == whole_run
