"""The shipped models: each file composes to a specification under its own name."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from layerbits.inputs.model_spec import ModelSpec

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = sorted(p.stem for p in (CONFIGS / "model").glob("*.yaml") if p.stem != "hf")


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_named_as_its_file_and_says_what_it_is(name):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("sensitivity", [f"model={name}"])
    spec = ModelSpec.from_mapping(OmegaConf.to_container(config.model))
    assert spec.name == name
    assert spec.path
    assert (CONFIGS / "model" / f"{name}.yaml").read_text().startswith("# ")
