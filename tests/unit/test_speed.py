"""Speed of a checkpoint in vLLM: what is asked, and what the numbers are made of."""

import json
from pathlib import Path

import pytest
import yaml

from layerbits import figures
from layerbits.errors import UserError
from layerbits.schemes.cost_table import Step
from layerbits.serving import costs
from layerbits.serving.measure import USUAL
from layerbits.serving.server import Launch
from layerbits.serving.settings import CostRequest, SpeedRequest
from layerbits.serving.speed import Ratio, Speed, Speeds, Timing, measure_speed

ROOT = Path(__file__).parents[2]


def speed(gib=1.0, tokens=1000, prefill=(0.1, 0.2, 0.4), decode=(0.002, 0.001, 0.003)):
    return Speed("card", gib, tokens, True, 100, (Timing(8, prefill, decode),))


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 64}))
    return folder


def test_prefill_counts_the_tokens_of_the_whole_batch_and_its_median_time():
    assert speed().metrics("speed")["speed/batch_8/prefill_tokens_per_second"] == pytest.approx(8 * 100 / 0.2)


def test_a_decode_step_is_the_median_in_milliseconds():
    assert speed().metrics("speed")["speed/batch_8/decode_ms"] == pytest.approx(2.0)


def test_the_report_says_how_many_times_better_the_checkpoint_is():
    lines = Speeds(speed(gib=0.5, tokens=3000), speed(decode=(0.004,))).markdown()
    assert "| weights, GiB | 0.500 | 1.000 | 2.00 |" in lines
    assert "| KV cache, tokens | 3,000 | 1,000 | 3.00 |" in lines
    assert "| decode step at batch 8, ms | 2.00 (1.00 to 3.00) | 4.00 (4.00 to 4.00) | 2.00 (1.33 to 4.00) |" in lines
    assert lines[-1] == "Where the brackets of the last column hold 1, the two are not told apart."


def test_models_are_told_apart_where_their_rounds_do_not_overlap():
    assert str(Ratio.of((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))) == "2.50 (1.33 to 6.00)"
    assert not Ratio.of((1.0, 2.0, 3.0), (4.0, 5.0, 6.0)).unsure
    assert not Ratio.of((4.0, 5.0, 6.0), (1.0, 2.0, 3.0)).unsure
    assert Ratio.of((1.0, 2.0, 3.0), (2.5, 4.0, 5.0)).unsure
    assert not Ratio.of((1.0, -2.0), (4.0, 5.0)).unsure


def test_steps_that_other_work_disturbed_are_told_and_what_is_no_time_is_left_out():
    calm, noisy = speed(decode=(0.002, 0.003, 0.0035)), speed(decode=(0.002, 0.001, 0.0031))
    assert (calm.disturbance, noisy.disturbance[:24]) == ("", "Decode steps at batch 8 ")
    assert noisy.metrics("speed")["speed/batch_8/decode_ms"] == pytest.approx(2.0)
    turned = speed(decode=(-0.004, -0.001, 0.009))
    assert "speed/batch_8/decode_ms" not in turned.metrics("speed")
    lines = Speeds(calm, turned).markdown()
    assert "| decode step at batch 8, ms | 3.00 (2.00 to 3.50) | not known (-4.00 to 9.00) | – |" in lines
    assert f"The unquantized model: {turned.disturbance}" in lines
    assert turned.disturbance.endswith("other work ran beside them, so time it again on an idle machine.")


def test_a_table_of_costs_has_no_step_that_other_work_left_no_time(monkeypatch, tmp_path, capsys):
    def timed(decode):
        monkeypatch.setattr(costs, "measure_speed", lambda *_: speed(decode=decode))
        return costs.time_steps(tmp_path, CostRequest((8,), ()), Launch(None), tmp_path)

    assert timed((0.002, 0.001, 0.0031)) == [(Step("decode", 8), (0.002, 0.001, 0.0031))]
    assert capsys.readouterr().err.startswith("warning: Decode steps at batch 8 differ by more than one takes")
    with pytest.raises(UserError, match="a decode step at batch 8 took no time that can be told"):
        timed((-0.004, -0.001, 0.009))


def test_weights_that_vllm_does_not_show_are_left_out():
    packed = Speeds(speed(gib=float("nan")), speed(gib=float("nan")))
    assert not any(key.endswith("weights_gib") for key in packed.metrics())
    assert "| weights, GiB | not known | not known | – |" in packed.markdown()


def test_a_checkpoint_that_was_timed_alone_has_its_numbers_and_the_reason():
    alone = Speeds(speed(gib=0.5), alone="vLLM refused it")
    assert alone.metrics() == speed(gib=0.5).metrics("speed")
    lines = alone.markdown()
    assert "| weights, GiB | 0.500 |" in lines
    assert lines[-1] == "The unquantized model was not timed: vLLM refused it"


def test_the_command_line_times_what_the_configuration_has_as_defaults():
    config = yaml.safe_load((ROOT / "configs" / "serve_check.yaml").read_text())["speed"]
    assert SpeedRequest.from_config(config) is None
    assert SpeedRequest.from_config({**config, "measure": True}) == USUAL


def test_a_batch_that_is_no_number_is_named():
    config = {"measure": True, "batches": "1,two", "prompt_tokens": 8, "new_tokens": 8, "repeats": 1}
    with pytest.raises(UserError, match=r"speed\.batches=two is not a positive whole number"):
        SpeedRequest.from_config(config)


def test_prompts_beyond_the_positions_are_refused_before_vllm_is_started(checkpoint, tmp_path):
    asked = SpeedRequest((1,), 60, 10, 1)
    with pytest.raises(UserError, match="need 71 positions, and checkpoint has 64"):
        measure_speed(Launch(None), checkpoint, "it", asked, tmp_path / "work")


def test_a_pareto_figure_has_the_cost_that_is_asked_for(frame):
    drawn = figures.pareto(frame, "kl", "decode_ms")
    assert drawn.axes[0].get_xlabel() == "Decode step in vLLM, ms"
    assert drawn.axes[0].lines[0].get_xdata().tolist() == [2.0, 3.0]


@pytest.fixture
def frame():
    import pandas as pd

    return pd.DataFrame({"bits": [4, 8, 16], "kl": [0.3, 0.1, 0.0], "decode_ms": [2.0, 3.0, None], "label": "a"})
