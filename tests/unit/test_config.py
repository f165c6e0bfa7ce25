"""The configuration as typed settings."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from layerbits.config import Settings

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture(scope="module")
def composed():
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return OmegaConf.to_container(compose("sensitivity"), resolve=True)


def test_a_name_that_looks_like_a_number_is_a_name(composed):
    config = {
        **composed,
        "model": {**composed["model"], "name": 500, "path": 7, "revision": 1234567},
        "dataset": {**composed["dataset"], "name": 12},
        "tracking": {**composed["tracking"], "experiment": 2026, "run_name": 1e3},
    }
    settings = Settings.from_config(config)
    names = (settings.model.name, settings.model.path, settings.model.revision, settings.dataset.name)
    assert names == ("500", "7", "1234567", "12")
    assert (settings.tracking.experiment, settings.tracking.run_name) == ("2026", "1000.0")
    assert settings.run_name.endswith(" 500")
