"""``MLproject`` repeats what the configuration says, for MLflow's own forms: it must say the same."""

import re
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[2]
ENTRY_POINTS = yaml.safe_load((ROOT / "MLproject").read_text("utf-8"))["entry_points"]
GROUPS = ("model", "quant_pair", "quant_granularity", "dataset")
NOTHING = (None, "none")


def parts_of(name):
    """The script of an entry point, and parameter → key of the configuration."""
    command = ENTRY_POINTS[name]["command"]
    (script,) = re.findall(r"experiments/(\w+)\.py", command)
    return script, {parameter: key for key, parameter in re.findall(r"(\S+)=\{(\w+)\}", command)}


def composed(script):
    """The defaults of a script, and the choice of each config group."""
    (name,) = re.findall(r'start\(\w+, __file__, "(\w+)"\)', (ROOT / "experiments" / f"{script}.py").read_text("utf-8"))
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        config = compose(name, return_hydra_config=True)
    return config, dict(config.hydra.runtime.choices)


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_defaults_are_those_of_the_configuration(name):
    script, keys = parts_of(name)
    config, choices = composed(script)
    for parameter, said in ENTRY_POINTS[name]["parameters"].items():
        key = keys[parameter]
        if key == "+overrides" or "default" not in said:
            continue
        default = choices.get(key) if key in GROUPS else OmegaConf.select(config, key, throw_on_missing=False)
        if said["default"] in NOTHING:
            assert default in NOTHING, (name, parameter)
        else:
            assert yaml.safe_load(str(said["default"])) == yaml.safe_load(str(default)), (name, parameter)


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_every_parameter_reaches_the_script(name):
    _, keys = parts_of(name)
    assert set(keys) == set(ENTRY_POINTS[name]["parameters"])


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_numbers_have_the_type_of_a_number(name):
    types = {"int": int, "float": float, "string": str, "path": str}
    for parameter, said in ENTRY_POINTS[name]["parameters"].items():
        assert type(said.get("default", "")) is types[said["type"]] or said["type"] == "path", parameter


def test_the_page_of_parameters_says_the_same():
    page = (ROOT / "docs" / "parameters.md").read_text("utf-8").split("## One run")[1].split("\n## ")[0]
    said = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", page, flags=re.MULTILINE))
    assert said == {name: str(one["default"]) for name, one in ENTRY_POINTS["main"]["parameters"].items()}
