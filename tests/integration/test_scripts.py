"""Benchmarks and tools, which no other test runs: what they import of the project is there."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(p.relative_to(ROOT) for folder in ("benchmarks", "tools") for p in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_what_a_script_imports_of_the_project_is_there(script):
    tree = ast.parse((ROOT / script).read_text("utf-8"))
    wanted = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0]
    for node in (n for n in wanted if n.module.split(".")[0] in ("layerbits", "tests")):
        module = importlib.import_module(node.module)
        for name in (alias.name for alias in node.names):
            assert hasattr(module, name) or importlib.import_module(f"{node.module}.{name}"), f"{node.module}.{name}"
