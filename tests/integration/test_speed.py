"""Speed of a checkpoint, measured in a process that takes a known time without being vLLM."""

import json
import math
import sys
from pathlib import Path

import pytest

from layerbits.errors import UserError
from layerbits.serving.environment import find_environment
from layerbits.serving.server import Launch, Refused
from layerbits.serving.settings import SpeedRequest
from layerbits.serving.speed import GIB, measure_speed

FAKE = Path(__file__).parents[1] / "unit" / "fake_vllm"
PREFILL, STEP = 2e-4, 4e-3  # seconds of a prompt's token and of a step, as the fake takes them
ASKED = SpeedRequest(batches=(1, 4), prompt_tokens=50, new_tokens=10, repeats=3)


@pytest.fixture
def python(tmp_path):
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH={FAKE} exec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return find_environment(str(script), Path())


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 64}))
    return folder


def test_what_is_measured_are_prefill_steps_memory_and_cache(python, checkpoint, tmp_path):
    found = measure_speed(Launch(python), checkpoint, "it", ASKED, tmp_path / "work")
    assert found.weights_gib == 16 * 32 * 4 / GIB  # a weight that two linears share counts once
    assert found.kv_cache_tokens == 160
    assert not found.graphs
    for timing in found.timings:
        assert len(timing.prefill) == len(timing.decode) == 3
        assert min(timing.prefill) >= timing.batch * 50 * PREFILL
        assert timing.decode_ms == pytest.approx(1000 * STEP, rel=0.5)  # the time of the prefill is not in it


def test_weights_that_a_kernel_keeps_out_of_sight_are_not_known(python, checkpoint, tmp_path):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    (checkpoint / "config.json").write_text(json.dumps({**shape, "num_hidden_layers": 1}))
    seen = measure_speed(Launch(python), checkpoint, "it", ASKED, tmp_path / "seen")
    assert seen.weights_gib * GIB == 2 * (64 * 32 + 32 * 32 + 128 * 32 + 32 * 64) + 4 * 4  # bfloat16, and a scale each
    packed = Launch(python, arguments=("--mode", "packed"))
    assert math.isnan(measure_speed(packed, checkpoint, "it", ASKED, tmp_path / "packed").weights_gib)


def test_an_engine_that_does_not_start_is_refused_in_its_words(python, checkpoint, tmp_path):
    with pytest.raises(Refused, match="ValueError: no such kernel"):
        measure_speed(Launch(python, arguments=("--mode", "dies")), checkpoint, "it", ASKED, tmp_path / "work")


def test_an_engine_that_never_ends_is_stopped(python, checkpoint, tmp_path):
    launch = Launch(python, arguments=("--mode", "never"), seconds=2)
    with pytest.raises(UserError, match=r"vLLM was not timed within 2 s .* raise vllm\.seconds"):
        measure_speed(launch, checkpoint, "it", ASKED, tmp_path / "work")
