"""Sweeps and reports: studies, kills, failing methods, statistics, what is left out."""

import csv
import fcntl
import itertools
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import analyses
import numpy as np
import pytest
import report
import scipy.stats
import submitit
import sweep
import torch
from matplotlib.figure import Figure
from test_runs import scalars, wait_for
from torch.utils.tensorboard import SummaryWriter

import moe_sparse
import moore_sparse
import mtppo_gmp
import mtppo_set
import mtsac_sparse_metaworld

ROOT = Path(__file__).parent.parent
STUDIES = sorted((ROOT / "benchmark" / "studies").glob("*.toml"))
MT3 = ("LavaGapS7", "RedBlueDoors-6x6", "MemoryS11")


def one_line_of_error(capsys, function, *args):
    with pytest.raises(SystemExit) as ended:
        function(*args)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


def study_file(folder, *methods, file="study.toml", seeds="[1]"):
    """A study of methods (name, script, flags as TOML) on MT3."""
    tables = [
        f'[[methods]]\nname = "{name}"\nscript = "{script}"\nflags = {{ {flags} }}\n'
        for name, script, flags in methods
    ]
    path = folder / file
    path.write_text(f'benchmarks = ["MT3"]\nseeds = {seeds}\n' + "".join(tables))
    return path


# Statistics


def test_iqm_is_the_mean_of_the_middle_half():
    assert report.iqm(np.array([0.0, 1, 2, 3, 4, 5, 60, 100])) == 3.5
    # (timestep, run) -> (timestep,)
    assert report.iqm(np.array([[0.0, 1], [2, 4]])).tolist() == [0.5, 3]


def test_interval_against_every_resample():
    # (timestep, run); the resamples of two seeds are 00, 01, 10 and 11
    assert report.interval(report.iqm, np.array([[0.0, 1], [2, 4]])).T.tolist() == [[0, 1], [2, 4]]
    assert report.interval(report.iqm, np.array([0.1])) is None
    ours, base = np.array([0.3, 0.6, 0.8]), np.array([0.1, 0.2, 0.7])
    draws = [list(draw) for draw in itertools.product(range(3), repeat=3)]
    every = [ours[a].mean() - base[a].mean() for a in draws]  # 3 scores: none is cut
    difference = report.difference_of_iqms
    # From 3 seeds the percentiles are expanded to all there is: 27 resamples
    assert report.interval(difference, ours, base) == pytest.approx([min(every), max(every)])
    # The seeds of both are drawn together: what they share does not vary
    assert report.interval(difference, base + 0.25, base) == pytest.approx(0.25)


def test_an_interval_of_a_mean_is_about_as_wide_as_students():
    scores = np.random.default_rng(0).normal(size=6)
    low, high = report.interval(lambda scores: scores.mean(-1), scores)
    expected = 2 * scipy.stats.t.ppf(0.975, 5) * scores.std(ddof=1) / 6**0.5
    assert high - low == pytest.approx(expected, rel=0.1)  # by normal quantiles 0.76 of it


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
    for seeds, p, words in ((5, 2 / 32, "5 seeds: p is at least 0.06"), (6, 2 / 64, "significant")):
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


def test_correlation_and_its_interval_against_every_resample():
    x, y = np.array([1.0, 2, 3, 4, 5]), np.array([2.0, 3, 1, 5, 4])
    draws = (np.array(draw) for draw in itertools.product(range(5), repeat=5))
    every = [scipy.stats.spearmanr(x[d], y[d]).statistic for d in draws if len(set(d)) > 1]
    numbers = re.findall(r"-?\d\.\d\d", report.describe_correlation(x, y))
    assert [float(number) for number in numbers] == pytest.approx([0.6, min(every), max(every)])
    assert "equal in all runs" in report.describe_correlation(np.zeros(8), np.arange(8.0))
    assert "2 of at least 5 runs" in report.describe_correlation(np.arange(2), np.arange(2))


# Reports

GMP, DENSE = ("GMP", "mtppo_gmp.py", ""), ("dense", "mtppo_gmp.py", "sparsity = 0")


def write_log(folder, scores=(0.5, 0.6, 0.7), until=400, purge=None, nan_at=None, unit=1, **flags):
    """The log of a run of 400 units of timesteps and two evaluations; scores are MT3's."""
    defaults = dict(benchmark="MT3", total_timesteps=400 * unit, num_steps=min(100 * unit, 2000))
    args = mtppo_gmp.Args(**defaults | flags)
    with SummaryWriter(str(folder), purge_step=purge) as writer:
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
                value = float("nan") if step == nan_at else value
                writer.add_scalar(f"plasticity/{name}", value, step)
            if step % (200 * unit) == 0:
                for task, score in zip(MT3, scores, strict=True):
                    score *= step / (400 * unit)
                    writer.add_scalar(f"eval/normalized_return/{task}", score, step)
    return folder


def write_report(out, *runs, results=None, pictures=False, **changes):
    """Its text. Pictures, which take most of the time, are saved only if asked for."""
    with nullcontext() if pictures else mock.patch.object(Figure, "savefig"):
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
    runs = tmp_path / "runs"
    for seed, shift in ((1, 0.0), (2, 0.3)):
        common, scores = dict(seed=seed, unit=1000), [x + shift for x in (0.5, 0.5, 0.65)]
        write_log(runs / f"gmp{seed}", scores, **common)
        write_log(runs / f"dense{seed}", (0.1, 0.1, 0.1), sparsity=0, **common)
        write_log(runs / f"other{seed}", sparsity=0, weight_decay=1e-6, gamma=0.5, **common)
    text = write_report(tmp_path / "out", runs, pictures=True)
    rows = rows_of(text)
    dense, gmp = ("MT3", "MTPPO dense"), ("MT3", "MTPPO GMP")
    assert text.index("MTPPO dense") < text.index("MTPPO GMP")
    assert rows[*dense, 1] == "2;400000;0.10 (0.10, 0.10);0.70 (0.60, 0.76);-;-;-;-".split(";")
    ours = "2;400000;0.70 (0.55, 0.85);0.77 (0.73, 0.80);MTPPO dense;0.60 (0.45, 0.75);0.500"
    assert rows[*gmp, 1] == [*ours.split(";"), "2 seeds: p is at least 0.5"]
    # Another experiment than the paper's has no figure of the paper's next to it
    assert rows["MT3", "MTPPO weight decay", 1][2:4] == ["0.60 (0.60, 0.60)", "-"]
    assert "- MTPPO GMP against MTPPO dense: `sparsity` 0.95, not 0\n" in text
    assert "decay against MTPPO dense: `gamma` 0.5, not 0.99; `weight_decay` 1e-06, not" in text
    # The first evaluation has half the scores of the second: their means are 0.4125 and 0.6375
    assert rows[*gmp, 2][:2] == ["0.55, 0.85", "0.70"]
    assert rows[*gmp, 2][3:6] == ["0.45 (0.34, 0.56)", "0.500", "1.00 (1.00, 1.00)"]
    # The metrics are 0.4 x (i + seed + sum of the scores) at the end, so 0.4 x (i + 3.6) on average
    assert rows[*gmp, 3] == ["144.0 / 184.0 %", "2 / 3", "3.04", "3.44"]
    assert rows[*gmp, 4][1] == "72.00 (-156.71, 300.71) %, p 0.500"
    assert "Spearman" in text and "| MT3 | MTPPO GMP | 2 | 400000 |" in capsys.readouterr().out
    assert "## Runs left out\n\nNone.\n" in text
    files = {"report.md", "results.csv", "arguments.json", *re.findall(r"!\[\]\((.*)\)", text)}
    assert {p.name for p in (tmp_path / "out").iterdir()} == files and len(files) == 7
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert len(rows) == 3 * 2 * 2  # methods, seeds, evaluations
    assert rows[0] == {
        **dict(method="MTPPO dense", run="dense1", benchmark="MT3", seed="1", timestep="200000"),
        **{f"normalized_return/{task}": "0.05" for task in MT3},
        **dict(actor_dormant_ratio="0.26", critic_dormant_ratio="0.46", fisher_trace="1.06"),
        **dict(actor_effective_rank="0.66", critic_effective_rank="0.86", critic_error="1.26"),
        **dict(actor_sparsity="0", actor_grown_kept="0.5"),
    }
    earlier = write_report(tmp_path / "earlier", runs, timestep=200_000)
    assert rows_of(earlier)[*dense, 1][1:4] == ["200000", "0.05 (0.05, 0.05)", "-"]


def test_a_method_is_compared_with_the_one_that_its_study_names(tmp_path):
    flags = dict(dense="sparsity = 0", early="prune-start = 0.0", late="prune-start = 0.1")
    methods = [(name, "mtppo_gmp.py", own) for name, own in flags.items()]
    study = study_file(tmp_path, *methods, seeds="[1, 2, 3]")
    study.write_text(study.read_text() + 'against = "early"\n')
    for plan in sweep.read_study(study, tmp_path / "runs"):
        score = dict(dense=0.1, early=0.5, late=0.8)[plan.method] + 0.05 * plan.seed
        own = dict(dense=dict(sparsity=0), early=dict(prune_start=0.0), late=dict(prune_start=0.1))
        write_log(plan.folder, scores=[score] * 3, seed=plan.seed, **own[plan.method])

    def compared(out, **flags):
        rows = rows_of(write_report(out, study, runs_dir=tmp_path / "runs", **flags))
        gains = [rows["MT3", name, 1][4:6] for name in ("early", "late")]
        return gains, rows.get(("MT3", "late", 4), [])[:2]

    gains = [["dense", "0.40 (0.40, 0.40)"], ["early", "0.30 (0.30, 0.30)"]]
    # 400 / 1000 of the sum of three scores apart in every seed
    assert compared(tmp_path / "a") == (gains, ["early", "36.00 (36.00, 36.00) %, p 0.250"])
    gains_over_late = [["late", "-0.30 (-0.30, -0.30)"], ["-", "-"]]
    assert compared(tmp_path / "other", against="late")[0] == gains_over_late
    # Without early's first seed, late and dense are compared with it over the other two
    first, second, _ = sorted((tmp_path / "runs").glob("*=0.0__*"))
    shutil.rmtree(first)
    assert compared(tmp_path / "b") == (gains, ["early", "36.00 (36.00, 36.00) %, p 0.500"])
    shutil.rmtree(second)  # one seed in common is no comparison
    assert compared(tmp_path / "c") == ([["-", "-"]] * 2, [])


RESULTS = sorted(path.parent for path in (ROOT / "benchmark" / "results").glob("*/results.csv"))


@pytest.mark.parametrize("folder", RESULTS, ids=lambda p: p.name)
def test_the_committed_reports_follow_from_their_results(folder):
    """By plain sums over the rows of results.csv."""
    text, runs = (folder / "report.md").read_text(), {}  # (benchmark, method) -> seed -> rows
    with open(folder / "results.csv") as file:
        for row in csv.DictReader(file):
            row["score"] = np.mean([float(x) for name, x in row.items() if "/" in name and x])
            own = runs.setdefault((row["benchmark"], row["method"]), {})
            own.setdefault(int(row["seed"]), []).append(row)

    def scores(own, seeds, evaluations=1):
        return [np.mean([row["score"] for row in own[seed][-evaluations:]]) for seed in seeds]

    def middle(scores):
        cut = len(scores) // 4
        return np.mean(sorted(scores)[cut : len(scores) - cut])

    def compare(cell, values, error=0.00501):
        numbers = re.findall(r"-?[\d.]+", cell)[: len(values)]
        assert [float(number) for number in numbers] == pytest.approx(values, abs=error)

    rows = rows_of(text)
    benchmarks = {benchmark for benchmark, _ in runs}
    shown = [line for line in text.splitlines() if line.split(" | ")[0][2:] in benchmarks]
    assert len(shown) == sum(own[0] in benchmarks for own in rows)
    assert {own[:2] for own in rows if own[0] in benchmarks and own[2] == 1} == runs.keys()
    for (benchmark, method), own in runs.items():
        seeds, timestep, level, _, against, gain, *_ = rows[benchmark, method, 1]
        each, mean, late, late_gain, *_ = rows[benchmark, method, 2]
        ends = scores(own, own)
        assert (seeds, timestep) == (str(len(own)), next(iter(own.values()))[-1]["timestep"])
        compare(level, [middle(ends)])
        compare(each, ends)
        compare(mean, [np.mean(ends)])
        compare(late, [middle(scores(own, own, 5))])
        names = [name for name in report.METRICS if name in own[1][-1]]
        last = [np.mean([float(run[-1][name]) for run in own.values()]) for name in names]
        dormant_cell, rank_cell, *cells = rows[benchmark, method, 3]
        compare(dormant_cell, [100 * share for share in last[:2]], 0.0501)
        compare(rank_cell, last[2:4], 0.51)
        for cell, value in zip(cells, last[4:], strict=True):
            compare(cell, [value], max(0.0501, value / 1000))
        if against == "-":
            continue
        base = runs[benchmark, against]
        both = [seed for seed in own if seed in base]
        for cell, n in ((gain, 1), (late_gain, 5)):
            compare(cell, [middle(scores(own, both, n)) - middle(scores(base, both, n))])
        for cell, name in zip(rows[benchmark, method, 4][1:], names, strict=True):
            unit, error = (100, 0.00501) if "dormant" in name else (1, 0.501)
            x = [unit * (float(own[s][-1][name]) - float(base[s][-1][name])) for s in both]
            half = scipy.stats.t.ppf(0.975, len(x) - 1) * scipy.stats.sem(x)
            compare(cell, [np.mean(x), np.mean(x) - half, np.mean(x) + half], error)


def test_results_stand_for_their_run_folders(tmp_path, capsys):
    """A report and a sweep take from results.csv what it has, and the rest from run folders."""
    study = study_file(tmp_path, GMP, DENSE, seeds="[1, 2]")
    plans, results = sweep.read_study(study, tmp_path / "runs"), tmp_path / "results"

    def report_of(name):
        where = dict(runs_dir=tmp_path / "runs", results=results)
        return write_report(results / name, study, **where, pictures=True)

    for plan in plans[:3]:
        scores, sparsity = (0.1 * plan.seed, 1 / 3, 2 / 3), 0.95 * (plan.method == "GMP")
        write_log(plan.folder, scores, seed=plan.seed, sparsity=sparsity)
    half = report_of("a")
    assert "- dense on MT3, seed 2: not started" in half
    assert rows_of(half)["MT3", "GMP", 1][0] == "2"
    shutil.rmtree(tmp_path / "runs")
    assert report_of("b") == half
    for path in (results / "a").iterdir():
        assert (results / "b" / path.name).read_bytes() == path.read_bytes()
    assert sweep.archived_runs(results) == {plan.folder.name for plan in plans[:3]}
    write_log(plans[3].folder, seed=2, sparsity=0.0)
    shutil.rmtree(results / "b")
    assert rows_of(report_of("a"))["MT3", "dense", 1][0] == "2"
    rows = (results / "a" / "results.csv").read_text()
    fewer = study_file(tmp_path, GMP, file="fewer.toml")
    args = report.Args((fewer,), results / "a", results=results)
    capsys.readouterr()
    lost = one_line_of_error(capsys, report.report, args)
    assert "results.csv: holds MT3__mtppo_gmp__default__2, which is not in this report" in lost
    assert (results / "a" / "results.csv").read_text() == rows


def test_runs_with_nan_or_without_their_end_are_named_and_left_out(tmp_path):
    for seed in (1, 2):
        write_log(tmp_path / f"good{seed}", seed=seed)
    write_log(tmp_path / "bad", seed=3, scores=(0.9, float("nan"), 0.9))
    write_log(tmp_path / "worse", seed=3, nan_at=200)
    write_log(tmp_path / "half", seed=3, until=300)
    text = write_report(tmp_path / "out", tmp_path)
    assert "| MTPPO GMP | 2 | 400 | 0.60 (0.60, 0.60) |" in text
    assert "- bad: NaN or infinity in eval/normalized_return/RedBlueDoors-6x6 from" in text
    assert "- worse: NaN or infinity in plasticity/" in text
    assert "- half: incomplete: evaluated until timestep 200 of 400" in text
    assert "nan" not in (tmp_path / "out" / "results.csv").read_text()
    time.sleep(1.1)  # logs are read in the order of their names, which hold the second
    write_log(tmp_path / "half", seed=3, purge=200, scores=(0.9, 0.9, 0.9))
    assert "- half" not in write_report(tmp_path / "again", tmp_path)
    rows = csv.DictReader((tmp_path / "again" / "results.csv").open())
    resumed = [row["normalized_return/LavaGapS7"] for row in rows if row["run"] == "half"]
    assert resumed == ["0.45", "0.9"]  # not what the first process logged from 200 on
    time.sleep(1.1)
    write_log(tmp_path / "half", seed=3, purge=400, total_timesteps=800)
    longer = write_report(tmp_path / "longer", tmp_path)
    assert "- half: incomplete: evaluated until timestep 400 of 800" in longer


def test_a_metric_that_was_not_measured_is_not_compared():
    runs = []
    for method, error in (("dense", 1.0), ("GMP", float("nan"))):
        metrics = {name: np.array([1.0]) for name in report.METRICS}
        metrics["critic_error"] = np.array([error])
        run = report.Run("", method=method, benchmark="MT10", timesteps=[1], metrics=metrics, at=1)
        runs += [replace(run, seed=seed) for seed in (1, 2)]
    row = rows_of(report.plasticity_differences(runs))["MT10", "GMP", 1]
    assert row[-2:] == ["0 (0, 0), p 1.000", "-"]
    for run in runs:
        run.metrics["critic_error"] = np.array([0.25 if run.method == "GMP" else 0.1])
    row = rows_of(report.plasticity_differences(runs))["MT10", "GMP", 1]
    assert row[-1].startswith("0.15 (0.15, 0.15)")


@pytest.fixture
def figures(monkeypatch):
    """name -> figure, of those that are written."""
    kept, finish = {}, report.finish

    def keep(figure, path):
        kept[path.stem] = figure
        finish(figure, path)

    for module in (report, analyses):
        monkeypatch.setattr(module, "finish", keep)
    return kept


def test_figures_show_all_of_every_curve(tmp_path, figures):
    """Panels of one figure whose values differ a thousandfold, more methods than colours."""
    for i in range(10):
        write_log(tmp_path / "runs" / str(i), sparsity=(i + 1) / 20)
    for name, benchmark in (("b", "MT3"), ("c", "MT5")):
        write_log(tmp_path / "runs" / name, sparsity=0, benchmark=benchmark, seed=1000)
    write_report(tmp_path / "out", tmp_path / "runs")
    for figure in figures.values():
        assert figure.legends[0].get_window_extent().width < figure.bbox.width
    panels, curves = figures["plasticity"].axes, figures["learning_curves"].axes
    for panel in [*panels, *curves]:
        low, high = panel.get_ylim()
        assert all(low <= y <= high for line in panel.lines for y in line.get_ydata())
    assert [len(panel.lines) for panel in panels] == [11] * 5 + [1] * 5
    assert [len(panel.lines) for panel in curves] == [11, 1]
    assert len({(line.get_color(), line.get_marker()) for line in panels[0].lines}) == 11
    # Dormancy is that of the evaluation shown: step * (i + seed + scores) / 1000
    [point] = figures["dormancy_return"].axes[2].lines
    assert point.get_xdata() == pytest.approx(0.4 * (1000 + 1.8))
    assert point.get_ydata() == pytest.approx(0.6)


def test_curves_are_iqms_of_scores_and_means_of_metrics(tmp_path, figures):
    runs = []
    for value in (0.1, 0.2, 0.4, 0.9):  # IQM 0.3, mean 0.4
        metrics = {name: np.array([value, 2 * value]) for name in report.METRICS}
        named = dict(method="GMP", architecture="MTPPO", benchmark="MT3", measure="return")
        run = report.Run("", **named, timesteps=[1, 2], metrics=metrics)
        run.style = dict(color="black", label="GMP")
        run.scores = np.array([[value - 0.1, value + 0.1]] * 2)  # (evaluation, task)
        runs.append(run)
    report.plot_learning_curves(runs, tmp_path / "scores.png")
    report.plot_plasticity(runs, tmp_path / "metrics.png")
    assert figures["scores"].axes[0].lines[0].get_ydata() == pytest.approx([0.3, 0.3])
    for panel in figures["metrics"].axes:
        assert panel.lines[0].get_ydata() == pytest.approx([0.4, 0.8])
        assert (panel.get_yscale(), panel.get_ylim()[0]) == ("linear", 0)
    runs[0].metrics["fisher_trace"] = np.full(2, float("nan"))  # not measured
    runs[0].metrics["critic_error"] = np.array([float("nan"), 0.2])  # not at first
    report.plot_plasticity(runs, tmp_path / "metrics.png")
    assert [len(panel.lines) for panel in figures["metrics"].axes] == [1, 1, 1, 0, 1]
    assert figures["metrics"].axes[4].lines[0].get_xydata() == pytest.approx(np.array([[2, 0.8]]))
    assert figures["metrics"].axes[4].lines[0].get_markevery() == 1  # a single point is seen
    for run in runs:
        run.metrics["fisher_trace"] = np.array([1.0, 101.0])  # more than a hundredfold
    report.plot_plasticity(runs, tmp_path / "metrics.png")
    scales = [panel.get_yscale() for panel in figures["metrics"].axes]
    assert scales == ["linear"] * 3 + ["log", "linear"]


def test_methods_have_the_same_colour_in_every_report():
    """The paper's methods their own; without them, what is called like them."""
    gmp, dense, early, fair = "MTPPO GMP", "Dense, 5e-3", "MTPPO GMP, early", "MTPPO GMP, x"
    changed = {early: dict(prune_start="0.0"), fair: dict(critic_epochs="8")}

    def colours(*methods):
        named = [dict(method=name, args=changed.get(name, {})) for name in methods]
        runs = [report.Run("", architecture="MTPPO", **own) for own in named]
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
    names = [name(mtsac_sparse_metaworld, prune=which) for which in ("none", "actor", "both")]
    assert names == ["MT-SAC dense", "MT-SAC GMP on the actor", "MT-SAC GMP on both"]


def test_methods_of_one_name_are_called_by_what_differs(tmp_path):
    for name, flags in dict(a=dict(prune_scope="layer"), b={}, c=dict(sparsity=0)).items():
        write_log(tmp_path / name, **flags)
    # Arguments without effect do not make another method, nor do other tasks
    write_log(tmp_path / "d", sparsity=0, prune_scope="layer", seed=2)
    write_log(tmp_path / "e", env_ids=("MiniGrid-LavaGapS7-v0",))
    text = write_report(tmp_path / "out", tmp_path)
    assert "| MT3 | MTPPO GMP, prune scope layer | 1 |" in text
    assert "| MT3 | MTPPO GMP, prune scope global | 1 |" in text
    assert "| MT3 | MTPPO dense | 2 |" in text
    assert f"| {', '.join(MT3)} | MTPPO GMP, prune scope global | 1 |" in text


def test_what_cannot_be_reported_is_refused(tmp_path, capsys):
    def error(*runs, **changes):
        args = report.Args(runs, tmp_path / "out", results=None, **changes)
        return one_line_of_error(capsys, report.report, args)

    assert "no runs given" in error()
    assert "must be a study file, a run folder" in error(tmp_path)
    write_log(tmp_path / "half", until=200)
    assert "none of 1 runs is complete" in error(tmp_path / "half")
    a, b = write_log(tmp_path / "a"), write_log(tmp_path / "b")
    assert "both MTPPO GMP on MT3 with seed 1" in error(a, b)
    assert "--timestep 300: must be an evaluation" in error(a, timestep=300)
    assert "--against x: must be a method of the runs" in error(a, against="x")
    study = study_file(tmp_path, GMP, seeds="[1, 2]")
    for run, scope in zip(sweep.read_study(study, tmp_path), ("layer", "global"), strict=True):
        write_log(run.folder, seed=run.seed, prune_scope=scope)
    differ = error(study, runs_dir=tmp_path)
    assert "GMP: its runs must have the same arguments, they differ in ['prune_scope']" in differ
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").touch()
    assert "--out" in error(a) and "must be a folder to write to" in error(a)


def test_each_script_has_the_papers_arguments_by_default_and_others_are_not_its_experiment():
    known = set()
    for script in (mtppo_gmp, mtppo_set, moe_sparse, moore_sparse, mtsac_sparse_metaworld):
        sac = script is mtsac_sparse_metaworld
        run = report.Run("", architecture="MT-SAC" if sac else "MTPPO")
        run.args = {name: str(value) for name, value in asdict(script.Args()).items()}
        assert report.is_papers(run)
        own = run.args.keys() & (report.PAPER_ARGS | (report.SAC_ARGS if sac else report.PPO_ARGS))
        for name in own:
            assert not report.is_papers(replace(run, args=run.args | {name: "another"}))
        known |= own
    assert known == (report.PAPER_ARGS | report.PPO_ARGS | report.SAC_ARGS).keys()


def test_a_method_of_long_flags_has_a_folder_of_a_short_name(tmp_path):
    study = study_file(tmp_path, ("long", "mtppo_gmp.py", 'device = "' + "x" * 181 + '"'))
    [run] = sweep.read_study(study, tmp_path)
    assert run.folder.name == "MT3__mtppo_gmp__108ec975da096313__1"  # in every process
    assert run.flags[-1] == "--device=" + "x" * 181


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
    solved = rows_of(analyses.solved_tasks(runs))["MT1", "SET", 1]
    assert solved == ["a", "1 of 3", "0.20", "2", "2"]
    assert rows_of(analyses.fisher_traces(runs))["MT1", "SET", 1] == ["20", "5", "10", "2 of 3"]
    kept = rows_of(analyses.grown_kept(runs))["MT1", "SET", 1]
    assert kept == ["60.0 %", "20.0 %", "60.0 %", "20.0 %"]
    runs[0].metrics["actor_grown_kept"] = np.array([nan] * 3)  # no SET
    assert ("MT1", "SET", 1) not in rows_of(analyses.grown_kept(runs))


def test_the_picture_of_learning_rates_shows_each_methods_means(tmp_path, figures, capsys):
    values, runs = np.array([0.1, 0.2, 0.4, 0.9]), []  # of four seeds: IQM 0.3, mean 0.4
    for row, rate in itertools.product(("MTPPO dense", "MTPPO SET", "MoE dense"), (1, 2)):
        for value in rate * values:
            ends = dict(actor_effective_rank=value, actor_dormant_ratio=value)
            metrics = {name: np.array([9, end]) for name, end in ends.items()}  # (evaluation,)
            scores = np.array([[9, 9], [value - 0.1, value + 0.1]])  # (evaluation, task)
            args = dict(actor_lr=str(rate))
            runs.append(report.Run("", row=row, args=args, scores=scores, metrics=metrics))
    analyses.plot_learning_rates(runs, tmp_path / "rates.png")
    assert (tmp_path / "rates.png").stat().st_size > 10_000
    panels = figures["rates"].axes
    for panel, centre in zip(panels, (0.3, 0.4, 40), strict=True):
        for line, label in zip(panel.lines, ("dense", "SET"), strict=True):
            assert line.get_label() == label
            assert line.get_ydata() == pytest.approx([centre, 2 * centre])
    [(_, low), (_, high)] = panels[1].collections[1].get_segments()[0]
    expected = scipy.stats.t.interval(0.95, 3, 0.4, scipy.stats.sem(values))
    assert (low, high) == pytest.approx(expected)
    runs[0].benchmark = "MT3"
    refused = one_line_of_error(capsys, analyses.plot_learning_rates, runs, tmp_path / "no.png")
    assert "must be given runs of one benchmark" in refused


@pytest.mark.parametrize("script", [mtppo_gmp, moe_sparse], ids=lambda s: s.__name__)
def test_neurons_are_counted_as_a_run_measures_them(script, tmp_path, capsys):
    args = script.Args(**TINY, benchmark="MT3", run_dir=str(tmp_path / "a"), dormant_tau=0.5)
    script.train(args)
    state = torch.load(tmp_path / "a" / "checkpoint.pt")
    networks = script.make_networks(args)
    obs = state["buffer"]["observations"][:, :20]
    for name, network in networks.items():
        network.load_state_dict(state[name])
    masks = networks["critic"].masks
    for mask in (masks["conv2"][3], masks["head_hidden"][1], masks["head_output"][1:]):
        mask.zero_()
    expected = script.measure_plasticity(networks, obs, args)
    for name, network in networks.items():
        counts, heads = analyses.count_neurons(network, obs, args.dormant_tau)
        dormant, alive, every = sum(counts.values())
        assert dormant / alive == pytest.approx(expected[f"plasticity/{name}_dormant_ratio"])
        sizes = {n: network.get_submodule(n).bias.numel() for n in network.layers if n in counts}
        assert {layer: count[2] for layer, count in counts.items()} == sizes and dormant > 0
    assert heads == [1, 2, 3] and counts["conv2"][1] < counts["conv2"][2]
    assert counts["head_hidden"][1] <= 2 * 128
    analyses.analyses(analyses.Args((tmp_path, tmp_path / "a")))
    assert "GMP | 1 | actor |" in capsys.readouterr().out
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    refused = one_line_of_error(capsys, analyses.analyses, analyses.Args((tmp_path,)))
    assert "on MT3 with seed 1" in refused


# Studies


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_the_studies_of_the_repository(path, tmp_path):
    runs = sweep.read_study(path, tmp_path)
    assert len({run.folder for run in runs}) == len(runs)
    assert {run.seed for run in runs} >= {1, 2, 3}
    sweep.check_flags(runs)


def test_a_flag_may_be_a_list_of_texts(tmp_path):
    flags = 'env-names = ["reach-v3", "push-v3"], prune = "none"'
    path = study_file(tmp_path, ("two", "mtsac_sparse_metaworld.py", flags))
    [run] = sweep.read_study(path, tmp_path)
    assert run.flags[4:] == ["--env-names", "reach-v3", "push-v3", "--prune=none"]
    assert "__env-names=reach-v3+push-v3,prune=none__" in run.folder.name


def test_studies_share_their_runs(tmp_path):
    folders = {p.stem: {run.folder for run in sweep.read_study(p, tmp_path)} for p in STUDIES}
    one, table = folders["experiment1_mt5_mtppo"], folders["table1"]
    three, others = folders["experiment3_architectures_mt3"], folders["interventions"]
    assert len(one) == 3 * 30 and len(three) == 6 * 10 + 3 * 5  # SET on five seeds
    assert len(others) == 7 * 10 and len(folders["mt7"]) == 3 * 10
    assert one | three | others | folders["mt7"] < table
    shared = dict(interventions=30, prune_scope=5, experiment2_schedule=10, set_readings=5)
    shared |= dict(optimizers=5, fair_critic=0, stress=0)
    assert {name: len(one & folders[name]) for name in shared} == shared
    assert len(three & folders["orthogonality"]) == len(three & folders["sparsity_levels"]) == 15
    assert len(table) == 30 * 3 * (7 + 5 + 5)


def test_the_paper_has_figures_for_every_method_of_table1(tmp_path):
    paper = report.read_paper()
    runs = sweep.read_study(ROOT / "benchmark" / "studies" / "table1.toml", tmp_path)
    assert {(run.benchmark, run.method) for run in runs} < paper.keys()
    assert len(paper) == 3 * 21 + 3
    assert all(low <= middle <= high for middle, low, high in paper.values())


REST = '\nbenchmarks = ["MT3"]\nseeds = [1]\n'
BAD_STUDIES = {  # message -> text, or methods
    "must be a study file": None,
    "must be TOML": "methods = [",
    "must hold methods, benchmarks and seeds": "seeds = [1]",
    "benchmarks must be a list of names": "methods = []" + REST.replace("]", ', "MT3"]', 1),
    "seeds must be a list of integers, each once": "methods = []" + REST.replace("[1]", "[1, 1]"),
    "seeds must be a list of integers": "methods = []" + REST.replace("[1]", "3"),
    "must hold at least one [[methods]]": "methods = []" + REST,
    "a method has name, script and maybe flags": 'methods = [{name = "GMP"}]' + REST,
    "GMP: against must be the name of another method": (
        'methods = [{name = "GMP", script = "mtppo_gmp.py", against = "GMP"}]' + REST
    ),
    "is not a script": [("GMP", "mtppo.py", "")],
    "GMP: --seed is not a method's to give": [("GMP", "mtppo_gmp.py", "seed = 3")],
    "GMP: --device [1]: must be number": [("GMP", "mtppo_gmp.py", "device = [1]")],
    "GMP: --device a/b: must be number": [("GMP", "mtppo_gmp.py", 'device = "a/b"')],
    "GMP: --layer_norm must be written": [("GMP", "mtppo_gmp.py", "layer_norm = true")],
    "two methods are called GMP": [GMP, ("GMP", "mtppo_set.py", "")],
    "again: another method has the same script": [GMP, ("again", "mtppo_gmp.py", "")],
    # Names that figures would not show, or could not
    "'_dense': a name must be letters": [("_dense", "mtppo_gmp.py", "")],
    "'a $$ b': a name must be letters": [("a $$ b", "mtppo_gmp.py", "")],
    "'MTPPO ': a name must be letters": [("MTPPO ", "mtppo_gmp.py", "")],
    "'a | b': a name must be letters": [("a | b", "mtppo_gmp.py", "")],
}


@pytest.mark.parametrize("message, bad", BAD_STUDIES.items(), ids=BAD_STUDIES)
def test_bad_studies_are_refused(message, bad, tmp_path, capsys):
    study = tmp_path / "study.toml"
    if isinstance(bad, list):
        study_file(tmp_path, *bad)
    elif bad:
        study.write_text(bad)
    assert message in one_line_of_error(capsys, sweep.read_study, study, tmp_path)


def test_flags_are_checked_by_the_script_before_the_first_run(tmp_path, capsys):
    for script, flags, message in (
        ("mtppo_gmp.py", "total-timesteps = 2e2", "parsing --total-timesteps"),
        ("mtppo_gmp.py", "sparsty = 0", "--sparsty"),
        ("mtsac_sparse_metaworld.py", "", "invalid choice 'MT3'"),
    ):
        study = study_file(tmp_path, GMP, ("bad", script, flags))
        with pytest.raises(SystemExit) as ended:
            sweep.sweep(sweep.Args(study, runs_dir=tmp_path / "runs"))
        out, err = capsys.readouterr()
        assert ended.value.code == 2 and out == "" and not (tmp_path / "runs").exists()
        assert f"error: bad: {script} refuses its flags" in err and message in err


def test_bad_flags_of_a_sweep_are_refused(tmp_path, capsys, monkeypatch):
    path, runs_dir = study_file(tmp_path, GMP), tmp_path / "runs"

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


def test_a_job_has_a_cpu_for_each_thread(tmp_path):
    study, asked = tmp_path / "study.toml", []
    with mock.patch("submitit.AutoExecutor") as executor:
        for flags in (dict(), dict(num_threads=3), dict(num_threads=3, cpus=5)):
            sweep.make_executor(sweep.Args(study, runs_dir=tmp_path, **flags))
            asked.append(executor().update_parameters.call_args.kwargs["cpus_per_task"])
    assert asked == [1, 3, 5]


# Sweeps

TINY = dict(
    **dict(total_timesteps=1500, num_steps=50, minibatch_size=25, update_epochs=1),
    **dict(eval_frequency=500, eval_episodes=1, plasticity_batch_size=60),
    **dict(plasticity_buffer_size=300, checkpoint_frequency=50),
)
TINY_FLAGS = ", ".join(f"{name.replace('_', '-')} = {value}" for name, value in TINY.items())
GOOD = ("good", "mtppo_gmp.py", TINY_FLAGS)
LONG = ("long", "mtppo_gmp.py", TINY_FLAGS.replace("1500", "60000"))


def start_sweep(study, *flags):
    """A sweep to runs/ beside the study."""
    words = [ROOT / "benchmark" / "sweep.py", study, "--runs-dir", study.parent / "runs"]
    return subprocess.Popen(
        [sys.executable, *words, "--results", "None", *flags],
        **dict(cwd=study.parent, start_new_session=True, text=True),
        **dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT),
    )


def run_sweep(study, *flags):
    """Its exit code and output."""
    process = start_sweep(study, *flags)
    output = process.communicate()[0]
    return process.returncode, output


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """The scalars of the tiny run, never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    mtppo_gmp.train(mtppo_gmp.Args(**TINY, benchmark="MT3", num_threads=1, run_dir=str(folder)))
    return scalars(folder)


def test_a_failing_method_stops_no_other_and_studies_share_runs(tmp_path, whole_run):
    bad = ("bad", "mtppo_gmp.py", "critic-lr = 1e38, num-steps = 50, minibatch-size = 50")
    study, runs = study_file(tmp_path, bad, GOOD), tmp_path / "runs"
    code, output = run_sweep(study, "--jobs", "2")
    assert code == 1 and "2 runs: 0 complete, 2 to run" in output
    failed = r"NOT COMPLETE\n    .*error.*\n(    .*\n)*    mtppo_gmp.py ended with exit code \d$"
    assert re.search(rf"^MT3__mtppo_gmp__critic-lr=.*__1 .*{failed}", output, re.M)
    assert "1 of 2 runs are not complete" in output
    assert re.search(r"^MT3__mtppo_gmp__check.*__1 .*: finished, final score 0\.\d+$", output, re.M)
    [folder] = runs.glob("MT3__mtppo_gmp__check*")
    assert scalars(folder) == whole_run

    other = study_file(tmp_path, ("another name", *GOOD[1:]), file="other.toml")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert run_sweep(other) == (0, f"1 runs: 1 complete, 0 to run in {runs}\n")
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    text = write_report(tmp_path / "out", runs, study, other, runs_dir=runs)
    assert "\nRuns: 1. " in text and "(1 of at least 5 runs)" in text and "MTPPO GMP" not in text
    for name in ("good", "another name"):
        assert re.search(rf"^\| MT3 \| {name} \| 1 \| 1500 \| .*no interval: 1 seed", text, re.M)
    assert "- bad on MT3, seed 1: incomplete" in text


def wait_for_checkpoint(study, timestep, process):
    """The folder of the only run once it has saved this timestep."""
    [run] = sweep.read_study(study, study.parent / "runs")
    wait_for(run.folder, timestep, process)
    return run.folder


def test_a_stopped_sweep_goes_on_to_the_same_files(tmp_path, whole_run):
    study = study_file(tmp_path, GOOD)
    with start_sweep(study) as process:
        folder = wait_for_checkpoint(study, 100, process)
        process.terminate()
        output = process.communicate()[0]
    assert process.returncode == 130 and "the same command goes on" in output
    assert "Traceback" not in output
    assert torch.load(folder / "checkpoint.pt")["timestep"] < TINY["total_timesteps"]
    with start_sweep(study) as process:
        wait_for_checkpoint(study, 200, process)
        process.kill()  # the sweep alone: its run goes on, and the next sweep waits for it
    code, output = run_sweep(study)
    assert code == 0 and "1 to run" in output and "finished, final score" in output
    assert scalars(folder) == whole_run
    assert len(list(folder.glob("events.*"))) == 2


def test_a_sweep_that_waits_for_another_one_stops_and_starts_nothing(tmp_path):
    study = study_file(tmp_path, LONG)
    sweeps = [start_sweep(study), start_sweep(study)]
    try:
        folder = wait_for_checkpoint(study, 50, sweeps[0])
        time.sleep(2)  # the job of either sweep is there, and one waits
        for process in sweeps:
            process.send_signal(signal.SIGINT)
            assert "the same command goes on" in process.communicate(timeout=30)[0]
            assert process.returncode == 130
    finally:
        for process in sweeps:
            process.kill()
    with open(folder / "output.txt") as output:
        fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nothing writes there any more


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
    code, output = run_sweep(study_file(tmp_path, GOOD), "--executor", "slurm", "--time", "10")
    assert code == 0 and "finished, final score" in output
    [folder] = (tmp_path / "runs").glob("MT3__mtppo_gmp__check*")
    assert scalars(folder) == whole_run
