"""The help of the entry scripts."""

import re
import sys
from pathlib import Path

import pytest

from layerbits import entry
from layerbits.keys import known_keys
from layerbits.usage import usage

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "experiments").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_the_help_of_a_script_has_each_of_its_keys_once_with_its_default(script):
    (config,) = re.findall(r'start\(\w+, __file__, "(\w+)"\)', script.read_text())
    text = usage(script, ROOT / "configs", config)
    assert text.startswith(re.match(r'"""(.+)\n', script.read_text())[1])
    own = re.split(r"\n\w+=CHOICE", text.partition("as key=value:")[2])[0]
    listed = re.findall(r"^(\w+):", own, re.MULTILINE)
    groups = set(re.findall(r"^(\w+)=CHOICE", text, re.MULTILINE))
    assert len(listed) == len(set(listed))
    assert {key for key in known_keys(ROOT / "configs", config) if "." not in key} <= set(listed) | groups
    assert "defaults" not in listed


def test_a_value_that_a_later_file_changes_is_the_one_that_counts():
    text = usage(ROOT / "experiments/probe.py", ROOT / "configs", "probe")
    assert re.findall(r"^pareto: .*", text, re.MULTILINE) == [
        "pareto: 0               # budgets of the Pareto curve; 0: no curve"
    ]


def test_help_is_printed_and_nothing_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["probe.py", "--help"])
    entry.start(lambda *_: pytest.fail("ran"), str(ROOT / "experiments/probe.py"), "probe")
    assert "rows: 8 " in capsys.readouterr().out
