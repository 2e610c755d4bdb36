"""What the repository promises of its files."""

import ast
import csv
import itertools
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import trim_mean

ROOT = Path(__file__).parent.parent
SCRIPTS = [path for path in ROOT.glob("*.py") if path.stem != "plasticity_metrics"]


def test_top_level_holds_nothing_else():
    names = {p.name for p in ROOT.iterdir() if not p.name.startswith(".")}
    passing = {"runs", "report", "build"} | {n for n in names if n.endswith(".egg-info")}
    expected = {"plasticity_metrics.py", "tests", "benchmark"}
    expected |= {"README.md", "LICENSE", "CITATION.cff", "pyproject.toml"}
    assert names - passing == expected | {path.name for path in SCRIPTS}


PAGES = [ROOT / "README.md", *(ROOT / "benchmark").glob("*.md"), *ROOT.glob("benchmark/*/*.md")]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_pages_link_to_what_is_there(path):
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text())
    links = [link for link in links if not link.startswith("https://")]
    assert [link for link in links if not (path.parent / link).exists()] == []


def commands(text):
    """The commands in a page's blocks, without comments."""
    blocks = re.findall(r"^```\n(.*?)^```", text, re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("#")[0] for line in lines if re.match(r"(pip .*&& )?python \w", line)]


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_name_scripts_and_flags_that_exist(path):
    text = path.read_text().split("## Old studies")[0]  # theirs are of another commit
    for command in commands(text):
        script = re.search(r"python (\S+\.py)", command)[1]
        source = (ROOT / script).read_text()
        for flag in re.findall(r"--([a-z-]+)", command):
            field = flag.removeprefix("no-").replace("-", "_")
            assert re.search(rf"^    ({field}|{flag}): ", source, re.M) or flag == "help", command


def test_the_citation_names_version_and_licence_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {project['version']}\n" in citation.replace("cff-version", "")
    assert f"license: {project['license']}\n" in citation and "2508.06871" in citation


def uses(path, package):
    """Whether a script imports a package, or needs it for what it imports."""
    name = {"mujoco": "metaworld"}.get(package, package)
    return re.search(rf"^(from|import) .*\b{name}\b", path.read_text(), re.M) is not None


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_pep_723_block_equals_pyproject(path):
    block = re.search(r"^# /// script\n((?:#(?: .*)?\n)+?)# ///$", path.read_text(), re.M)[1]
    inline = tomllib.loads(re.sub(r"^# ?", "", block, flags=re.M))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = [d for d in project["dependencies"] if uses(path, re.match(r"[\w-]+", d)[0])]
    assert inline["dependencies"] == needed
    assert inline["requires-python"] == project["requires-python"]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_a_script_imports_nothing_of_the_repository_but_the_metrics(path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    own = {p.stem for p in ROOT.glob("*.py")} | {"tests", "benchmark"}
    assert imported & own == {"plasticity_metrics"}


def definitions(path):
    """name -> source, decorators included, of every top-level function, class and constant."""
    lines, found = path.read_text().splitlines(), {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = ast.unparse(node.value)
    return found


def argument_fields(path):
    """name -> source, with the comment behind it, of every field of Args."""
    lines = path.read_text().splitlines()
    [args] = [n for n in ast.parse("\n".join(lines)).body if getattr(n, "name", "") == "Args"]
    fields = [node for node in args.body if isinstance(node, ast.AnnAssign)]
    return {node.target.id: lines[node.lineno - 1] for node in fields}


PAIRS = list(itertools.combinations(sorted(SCRIPTS), 2))
# What a script has of its own by design: train reads as its algorithm, Args are compared by field,
# load_agent, which is the same everywhere, needs its tasks and networks
OWN = {"train", "Args", "task_ids", "make_networks"}
# Meta-World's benchmarks and budget (spec, MTMH-SAC): other tasks, and steps counted over all;
# its dense baseline is --prune none
OWN_FLAGS = {"mtsac_sparse_metaworld": {"benchmark", "total_timesteps", "sparsifier"}}
OWN_DEFAULTS = {
    "mtsac_sparse_metaworld": {
        *("actor_lr", "critic_lr", "prune_frequency", "prune_scope", "eval_frequency"),
        *("eval_episodes", "plasticity_frequency", "checkpoint_frequency", "num_threads"),
    }
}


@pytest.mark.parametrize("a, b", PAIRS, ids=lambda p: p.stem)
def test_same_name_same_text(a, b):
    ours, theirs = definitions(a), definitions(b)
    experts = {a.stem, b.stem} == {"moe_sparse", "moore_sparse"}  # whose train is the same
    shared = ours.keys() & theirs.keys() - (OWN - {"train"} if experts else OWN)
    assert len(shared) > 10
    for name in shared:
        assert ours[name] == theirs[name], f"{name} differs"


@pytest.mark.parametrize("a, b", PAIRS, ids=lambda p: p.stem)
def test_same_flag_same_text(a, b):
    def own(of):
        return of.get(a.stem, set()) | of.get(b.stem, set())

    def without_default(text):
        return re.sub(r" = .*  #", "  #", text, count=1)

    ours, theirs = argument_fields(a), argument_fields(b)
    shared = ours.keys() & theirs.keys() - own(OWN_FLAGS)
    assert {"seed", "sparsity", "device", "run_dir", "resume"} <= shared
    for name in shared:
        if name in own(OWN_DEFAULTS):
            assert without_default(ours[name]) == without_default(theirs[name])
        else:
            assert ours[name] == theirs[name], f"--{name} differs"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_the_algorithm_comes_first(path):
    """What follows train is less than what stands before its end; it is short, without nested
    functions."""
    source = path.read_text()
    [train] = [n for n in ast.parse(source).body if getattr(n, "name", "") == "train"]
    assert train.end_lineno - train.lineno <= 100
    assert len(source.splitlines()) - train.end_lineno < train.end_lineno
    nested = (ast.FunctionDef, ast.Lambda, ast.ClassDef)
    assert not any(isinstance(node, nested) for node in ast.walk(train) if node is not train)
    rest = source.splitlines()[train.end_lineno :]
    assert next(line for line in rest if line).startswith("# ======== Support")


def test_tables_of_the_pages_are_those_of_the_reports():
    """A row of a page's table of methods has some of the cells of a report's, in their order."""
    reports = "".join(p.read_text() for p in (ROOT / "benchmark/results").glob("*/report.md"))
    full = [line.split(" | ")[1:] for line in re.findall(r"^\| MT\d.*(?= \|$)", reports, re.M)]
    for page in (ROOT / "README.md", ROOT / "benchmark/results/README.md"):
        text = page.read_text()
        tables = re.findall(r"^\| method \| seeds .*\n\|[-|]+\n((?:\|.*\n)+)", text, re.M)
        rows = [row[2:-2].split(" | ") for table in tables for row in table.splitlines()]
        assert len(rows) > 5
        for row in rows:
            found = (iter(cells) for cells in full if cells[0] == row[0])
            assert any(all(cell in cells for cell in row) for cells in found), row


def results_of(study):
    """method, without its architecture -> run -> its rows, one an evaluation."""
    runs = {}
    with open(ROOT / f"benchmark/results/{study}/results.csv", newline="") as file:
        for row in csv.DictReader(file):
            method = row["method"].split(maxsplit=1)[1]
            runs.setdefault(method, {}).setdefault(row["run"], []).append(row)
    return runs


def test_the_iqm_over_seeds_and_tasks_is_that_of_the_choices():
    iqms = []
    for method, runs in results_of("experiment1_mt5_mtppo").items():
        ends = [run[-1] for run in runs.values()]
        tasks = [name for name in ends[0] if name.startswith("normalized_return/")]
        scores = [float(end[task]) for end in ends for task in tasks]
        assert len(scores) == 30 * 5
        iqms.append(f"{trim_mean(scores, 0.25):.2f} {method}")
    page = (ROOT / "benchmark/choices.md").read_text()
    assert f"experiment 1 {', '.join(iqms)}, not" in page


def test_the_table_of_metaworld_is_that_of_its_results():
    """All columns but that of removed neurons, which needs checkpoints."""
    page = (ROOT / "benchmark/results/README.md").read_text()
    tasks = [f"success_rate/{task}" for task in ("reach", "drawer-close", "window-close")]
    for method, runs in results_of("metaworld_easy").items():
        [row] = re.findall(rf"^\| {method} \| (.*) \|$", page, re.M)
        success = np.array([[[float(at[t]) for t in tasks] for at in own] for own in runs.values()])

        def column(name, runs=runs):
            return np.array([float(own[-1][name]) for own in runs.values()])

        def shown(values):
            return ", ".join(f"{x:.2f}" if x < 100 else f"{x:.0f}" for x in values)

        scores = [success[:, -1].mean(1), success[:, -5:].mean((1, 2))]
        expected = [f"{x.mean():.2f} ({shown(x)})" for x in scores]
        expected += [shown(success[:, -1, i]) for i in range(3)]
        expected += [f"{100 * column('actor_dormant_ratio').mean():.0f} %"]
        ranks = [column(f"{name}_effective_rank").mean() for name in ("actor", "critic")]
        expected += [" / ".join(f"{rank:.0f}" for rank in ranks), shown(column("critic_error"))]
        cells = row.split(" | ")
        assert cells[:6] + cells[7:] == expected
