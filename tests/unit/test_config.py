"""The configuration as typed settings."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from layerbits.config import Settings
from layerbits.errors import UserError

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


@pytest.fixture
def with_tower(composed):
    """The configuration of a run that scores a vision tower, with some keys of ``autoquant``."""

    def config(vision=True, **autoquant):
        return {
            **composed,
            "model": {**composed["model"], "vision": vision},
            "dataset": {**composed["dataset"], "name": "image_text"},
            "autoquant": {**composed["autoquant"], **autoquant},
        }

    return config


@pytest.mark.parametrize(("written", "bits"), [("none", None), (None, None), (12, 12.0), ("9.5", 9.5)])
def test_a_tower_may_have_a_budget_of_its_own(with_tower, written, bits):
    assert Settings.from_config(with_tower(vision_bits=written)).autoquant.vision_bits == bits


def test_a_record_from_before_towers_had_budgets_is_read(with_tower):
    config = with_tower()
    del config["autoquant"]["vision_bits"]
    assert Settings.from_config(config).autoquant.vision_bits is None


def test_a_tower_budget_that_means_nothing_is_refused(with_tower):
    with pytest.raises(UserError, match=r"autoquant\.vision_bits=many is not a number; give bits per weight"):
        Settings.from_config(with_tower(vision_bits="many"))
    with pytest.raises(UserError, match=r"autoquant\.vision_bits=12 is the budget of a vision tower, which model"):
        Settings.from_config(with_tower(vision=False, vision_bits=12))
    with pytest.raises(UserError, match="a recipe has one budget, which counts the vision tower too; use"):
        Settings.from_config({**with_tower(vision_bits=12), "recipe": "mine"})


def test_a_word_that_means_no_is_not_taken_for_true():
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        typed = OmegaConf.to_container(compose("sensitivity", ["model.trust_remote_code=no"]), resolve=True)
    assert typed["model"]["trust_remote_code"] == "no"  # a word to Hydra, true to Python
    with pytest.raises(UserError, match=r"model\.trust_remote_code=no is not known; use true or false"):
        Settings.from_config(typed)
