"""Reading checkpoints: safetensors by the piece, and what their numbers mean."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from layerbits.checkpoint import compressed, reader
from layerbits.checkpoint.compare import error_allowed
from layerbits.checkpoint.dequantize import check_parts, dequantize, quantize_input
from layerbits.checkpoint.modelopt import LABELS
from layerbits.checkpoint.reader import open_checkpoint
from layerbits.errors import UserError
from layerbits.inputs.weights import INDEXES


def checkpoint(folder, tensors, name="model.safetensors"):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / name)
    return open_checkpoint(folder)


def test_rows_and_pieces_give_the_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "PIECE", 20)
    whole = torch.arange(70.0).reshape(10, 7).bfloat16()
    found = checkpoint(tmp_path, {"w": whole, "s": torch.tensor(3.0), "e": torch.empty(0, 4)})
    pieces = list(found.pieces("w"))
    assert pieces == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10)]
    assert torch.equal(torch.cat([found.rows("w", a, b) for a, b in pieces]), whole)
    assert found.rows("s") == 3.0
    assert found.rows("e").shape == (0, 4)


def test_the_digest_knows_values_not_shards(tmp_path):
    one = {"a": torch.ones(3), "b": torch.zeros(2)}
    whole = checkpoint(tmp_path / "whole", one)
    (tmp_path / "two").mkdir()
    save_file({"a": one["a"]}, tmp_path / "two" / "1.safetensors")
    (tmp_path / "two" / INDEXES[0]).write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    parts = checkpoint(tmp_path / "two", {"b": one["b"]}, "2.safetensors")
    other = checkpoint(tmp_path / "other", {**one, "b": torch.tensor([0.0, 1e-45])})
    assert whole.digest() == parts.digest()
    assert whole.digest() != other.digest()


@pytest.mark.parametrize("length", [4, 60, 900])
def test_a_truncated_file_is_one_line(tmp_path, length):
    file = checkpoint(tmp_path, {"w": torch.ones(100, 4)}).entry("w").file
    os.truncate(file, length)
    with pytest.raises(UserError, match=r"model\.safetensors is truncated .* fetch or export it again") as error:
        open_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


def test_a_damaged_header_is_one_line(tmp_path):
    (tmp_path / "model.safetensors").write_bytes((8).to_bytes(8, "little") + b"no json!")
    with pytest.raises(UserError, match="its header is not JSON"):
        open_checkpoint(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "1.safetensors")
    (tmp_path / INDEXES[0]).write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))
    with pytest.raises(UserError, match=r"lacks 1 of the 2 files that its index names .2\.safetensors"):
        open_checkpoint(tmp_path)


def test_a_missing_tensor_is_named(tmp_path):
    with pytest.raises(UserError, match="has no tensor b"):
        checkpoint(tmp_path, {"a": torch.ones(1)}).rows("b")


def test_fp8_is_value_times_scale(tmp_path):
    values = torch.tensor([[1.5, -448.0], [0.001953125, 0.0]]).to(torch.float8_e4m3fn)
    found = checkpoint(tmp_path, {"m.weight": values, "m.weight_scale": torch.tensor(0.5)})
    assert dequantize(found, "m", LABELS["FP8"], 0, 2).tolist() == [[0.75, -224.0], [0.0009765625, 0.0]]


def test_int8_has_a_scale_per_row(tmp_path):
    values = torch.tensor([[1, -128], [127, 3]], dtype=torch.int8)
    found = checkpoint(tmp_path, {"m.weight": values, "m.weight_scale": torch.tensor([2.0, 0.5])})
    assert dequantize(found, "m", LABELS["W8A16"], 0, 2).tolist() == [[2.0, -256.0], [63.5, 1.5]]


def test_int4_packs_two_rows(tmp_path):
    packed = torch.full((1, 128), 0x7 | (0x8 << 4), dtype=torch.uint8)  # rows: 7, -8
    found = checkpoint(tmp_path, {"m.weight": packed, "m.weight_scale": torch.tensor([[1.0], [0.5]])})
    rows = dequantize(found, "m", LABELS["W4A16_AWQ"], 0, 2)
    assert rows.unique(dim=1).tolist() == [[7.0], [-4.0]]


def test_mxfp4_packs_two_columns_below_a_power_of_two(tmp_path):
    packed = torch.full((1, 16), 0x7 | (0x9 << 4), dtype=torch.uint8)  # 6, -0.5
    scale = torch.tensor([[128]], dtype=torch.uint8)  # 2
    found = checkpoint(tmp_path, {"m.weight": packed, "m.weight_scale": scale})
    assert dequantize(found, "m", LABELS["W4A8_MXFP4_FP8"], 0, 1).tolist() == [[12.0, -1.0] * 16]


def test_nvfp4_has_two_scales(tmp_path):
    packed = torch.full((1, 8), 0x2 | (0xF << 4), dtype=torch.uint8)  # 1, -6
    scale = torch.tensor([[1.5]]).to(torch.float8_e4m3fn)
    tensors = {"m.weight": packed, "m.weight_scale": scale, "m.weight_scale_2": torch.tensor(2.0)}
    found = checkpoint(tmp_path, tensors)
    assert dequantize(found, "m", LABELS["NVFP4"], 0, 1).tolist() == [[3.0, -18.0] * 8]


def test_a_scale_of_another_shape_is_refused(tmp_path):
    tensors = {"m.weight": torch.ones(2, 2).to(torch.float8_e4m3fn), "m.weight_scale": torch.ones(2)}
    with pytest.raises(UserError, match=r"m\.weight_scale is torch\.float32 \[2\], the label FP8 means"):
        check_parts(checkpoint(tmp_path, tensors), "m", LABELS["FP8"])


def test_packed_words_hold_eight_columns_low_bits_first(tmp_path):
    label = compressed.find("INT4 per group of 8", "-")
    word = sum((value + 8) << 4 * i for i, value in enumerate((-8, -1, 0, 1, 2, 3, 6, 7))) - 2**32
    tensors = {
        "m.weight_packed": torch.tensor([[word]], dtype=torch.int32),
        "m.weight_scale": torch.tensor([[0.5]], dtype=torch.bfloat16),
        "m.weight_shape": torch.tensor([1, 8]),
    }
    found = checkpoint(tmp_path, tensors)
    check_parts(found, "m", label)
    assert dequantize(found, "m", label, 0, 1).tolist() == [[-4.0, -0.5, 0.0, 0.5, 1.0, 1.5, 3.0, 3.5]]


def test_a_wrong_weight_shape_is_refused(tmp_path):
    tensors = {
        "m.weight_packed": torch.zeros(1, 1, dtype=torch.int32),
        "m.weight_scale": torch.ones(1, 1, dtype=torch.bfloat16),
        "m.weight_shape": torch.tensor([8, 1]),
    }
    with pytest.raises(UserError, match=r"m\.weight_shape is not \[1, 8\]"):
        check_parts(checkpoint(tmp_path, tensors), "m", compressed.find("INT4 per group of 8", "-"))


def test_the_global_scale_of_nvfp4_divides(tmp_path):
    label = compressed.find("NVFP4 per 16", "-")
    packed = torch.full((1, 8), 0x2 | (0xF << 4), dtype=torch.uint8)  # 1, -6
    scale = torch.tensor([[1.5]]).to(torch.float8_e4m3fn)
    tensors = {"m.weight_packed": packed, "m.weight_scale": scale, "m.weight_global_scale": torch.tensor([0.5])}
    assert dequantize(checkpoint(tmp_path, tensors), "m", label, 0, 1).tolist() == [[3.0, -18.0] * 8]


INPUTS = {
    "FP8 per tensor": {"num_bits": (4, 3)},
    "FP8 per token, dynamic": {"num_bits": (4, 3), "block_sizes": {-1: None}, "type": "dynamic"},
    "INT8 per tensor": {"num_bits": 8},
    "INT8 per token, dynamic": {"num_bits": 8, "block_sizes": {-1: None}, "type": "dynamic"},
}
LABELLED = [LABELS["FP8"], LABELS["FP8_PER_CHANNEL_PER_TOKEN"], LABELS["W8A8_SQ_PER_CHANNEL"]]
LABELLED += [compressed.find("INT4 per group of 128", words) for words in INPUTS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("label", LABELLED, ids=lambda label: label.algo)
def test_inputs_are_rounded_as_modelopt_does_bit_for_bit(label, dtype):
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

    x = (torch.randn(4, 33, 128, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    x[0, :3] = 0  # tokens without a range
    quantizer = TensorQuantizer(QuantizerAttributeConfig(**INPUTS[label.inputs]))
    stored = None
    if label.input_scale:
        stored = label.input_scale.stored(torch.tensor(7.0))  # some inputs lie beyond the range
        quantizer.amax = label.input_scale.range(stored)
    assert torch.equal(quantize_input(x, label, stored), quantizer(x))


@pytest.mark.parametrize(
    ("error", "scored", "size", "near"),
    [
        (1.05**2, 1.0, 0.0, True),
        (1.06**2, 1.0, 0.0, False),
        (2.0**-18, 0.0, 1.0, True),  # a weight that was on the grid: what a scale in bfloat16 adds
        (2.0**-16, 0.0, 1.0, False),
    ],
)
def test_a_stored_weight_may_be_off_by_the_rounding_of_its_scale(error, scored, size, near):
    assert error_allowed(error, scored, size) == near
