"""What the repository promises of its files."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = [path for path in ROOT.glob("*.py") if path.stem != "plasticity_metrics"]


def test_top_level_holds_nothing_else():
    names = {p.name for p in ROOT.iterdir() if not p.name.startswith(".")}
    passing = {"runs", "build"} | {n for n in names if n.endswith(".egg-info")}
    expected = {"plasticity_metrics.py", "tests", "README.md", "LICENSE", "pyproject.toml"}
    assert names - passing == expected | {path.name for path in SCRIPTS}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_pep_723_block_equals_pyproject(path):
    block = re.search(r"^# /// script\n((?:#(?: .*)?\n)+?)# ///$", path.read_text(), re.M)[1]
    inline = tomllib.loads(re.sub(r"^# ?", "", block, flags=re.M))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert inline["dependencies"] == project["dependencies"]
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
