"""Entry points of MLproject against the configurations that they start from."""

from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

ROOT = Path(__file__).parents[2]
ENTRIES = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]

NAMES = ("scheme", "probe", "evaluate", "costs")


@pytest.fixture(params=[(name, "schemes" if name == "scheme" else name) for name in NAMES], ids=NAMES)
def entry(request):
    name, config = request.param
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return ENTRIES[name], compose(config)


def test_every_parameter_is_passed_as_the_key_of_its_name(entry):
    project, config = entry
    command = project["command"].split()
    for name in set(project["parameters"]) - {"overrides"}:
        assert f"{name}={{{name}}}" in command
        assert name in config
    assert "+overrides={overrides}" in command


def test_defaults_are_those_of_the_configuration(entry):
    project, config = entry
    given = {name: p["default"] for name, p in project["parameters"].items() if "default" in p and name != "overrides"}
    assert given == {name: config[name] for name in given}
