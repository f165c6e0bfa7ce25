"""What vLLM computes of a label on a generation of GPUs."""

import pytest

from layerbits.checkpoint.gpus import AMPERE, BLACKWELL, GENERATIONS, HOPPER, TARGETS, generation, kernel
from layerbits.checkpoint.label import COMPRESSED, MODELOPT
from layerbits.checkpoint.processors import MISSING, OTHERWISE, UNKNOWN, WRITTEN
from layerbits.errors import UserError
from layerbits.export.target import find_target


@pytest.mark.parametrize("algo", ["NVFP4-NVFP4", "MXFP4-MXFP4", "MXFP4-FP8_TOKEN", "MXFP8-MXFP8"])
def test_hopper_leaves_activations_of_block_formats_in_16_bits(algo):
    found = kernel(COMPRESSED, algo, HOPPER)
    assert found.computed.state == OTHERWISE
    assert "Marlin" in found.name


@pytest.mark.parametrize("algo", ["FP8_CHANNEL-FP8_TOKEN", "INT8_CHANNEL-INT8_TOKEN", "INT4_GROUP64-A16", "NVFP4-A16"])
def test_hopper_computes_others_as_written(algo):
    assert kernel(COMPRESSED, algo, HOPPER).computed.state == WRITTEN


def test_blackwell_computes_nvfp4_and_refuses_int8():
    assert kernel(MODELOPT, "NVFP4", BLACKWELL).computed.state == WRITTEN
    assert kernel(COMPRESSED, "INT8_CHANNEL-INT8_TOKEN", BLACKWELL).computed.state == MISSING


def test_ampere_has_no_fp8():
    assert kernel(COMPRESSED, "FP8_CHANNEL-FP8_TOKEN", AMPERE).computed.state == OTHERWISE


def test_another_version_of_vllm_is_not_known():
    assert kernel(MODELOPT, "NVFP4", HOPPER, "0.27.0").computed.state == UNKNOWN


def test_every_label_was_asked_on_hopper(exportable_rows):
    labels = {(label.format, label.algo) for row in exportable_rows for label in row.known}
    assert [key for key in sorted(labels) if kernel(*key, HOPPER).computed.state == UNKNOWN] == []


def test_every_answer_has_its_source(exportable_rows):
    labels = {(label.format, label.algo) for row in exportable_rows for label in row.known}
    answers = [kernel(*key, where) for key in labels for where in GENERATIONS]
    assert all(answer.source for answer in answers if answer.computed.state != UNKNOWN)


@pytest.mark.parametrize(
    ("capability", "name"), [((8, 0), "Ampere"), ((8, 9), "Ada"), ((9, 0), "Hopper"), ((12, 0), "Blackwell")]
)
def test_the_generation_of_a_compute_capability(capability, name):
    assert generation(capability) == name


def test_every_named_gpu_has_a_generation():
    assert set(TARGETS.values()) <= set(GENERATIONS)


def test_a_target_is_a_gpu_by_name():
    assert find_target("H200") == HOPPER
    assert find_target("none") is None


def test_an_unknown_target_is_refused():
    with pytest.raises(UserError, match="target=tpu is not known; use a100"):
        find_target("tpu")
