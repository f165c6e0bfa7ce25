"""Checkpoints on disk through the code that loads the real models."""

import copy
import json
import re

import pytest
import torch

from layerbits.errors import UserError
from layerbits.inputs.loading import empty_model, load
from layerbits.inputs.model_spec import ModelSpec
from layerbits.inputs.models import resolve, scored_linears, unscored_patterns

from .checkpoint_support import config, copied
from .scoring_support import candidate, tiny_model


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen2_5_vl", "llama"])
def saved(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = tiny_model(request.param)
    model.save_pretrained(folder)
    return folder, model, request.param


def test_a_saved_checkpoint_computes_what_it_did(saved):
    folder, model, _ = saved
    found = load(resolve(ModelSpec("tiny", str(folder), dtype="float32")), None, "cpu")
    ids = torch.arange(1, 13)[None]
    assert torch.equal(found.model(ids).logits, model(ids).logits)
    assert found.info.architecture == type(model).__name__


def test_the_shape_is_known_without_loading_and_holds_the_language_model_alone(saved):
    folder, _, kind = saved
    spec = ModelSpec("tiny", str(folder))
    linears = scored_linears(empty_model(resolve(spec)), spec)
    prefix = "model.layers." if kind == "llama" else "model.language_model.layers."
    assert {n for n in linears if not n.startswith(prefix)} == {"lm_head"}
    assert len(linears) == 2 * 7 + 1


def test_everything_outside_the_search_is_disabled_by_name(saved):
    _, model, kind = saved
    covered = candidate("wfp8_afp8").format.linear.covers
    scored = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and covered(n)}
    patterns = unscored_patterns(model, scored)
    assert "lm_head" in patterns
    assert ("model.visual.*" in patterns) == (kind != "llama")


def test_the_revision_of_a_folder_follows_its_content(saved, tmp_path):
    folder, model, _ = saved
    model.save_pretrained(tmp_path)
    same = resolve(ModelSpec("tiny", str(tmp_path))).revision
    assert same == resolve(ModelSpec("tiny", str(folder))).revision
    weights = next(tmp_path.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert resolve(ModelSpec("tiny", str(tmp_path))).revision != same


def test_a_tensor_changed_in_the_middle_of_its_file_is_another_revision_and_back_again(saved, tmp_path):
    folder = copied(saved[0], tmp_path / "model")
    before = resolve(ModelSpec("tiny", str(folder))).revision
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    with file.open("r+b") as stream:
        stream.seek(len(whole) // 2)
        stream.write(b"\xff\xff")
    assert resolve(ModelSpec("tiny", str(folder))).revision != before
    file.write_bytes(whole)  # fetched again
    assert resolve(ModelSpec("tiny", str(folder))).revision == before


def test_code_beside_a_model_is_part_of_its_revision(saved, tmp_path):
    folder = copied(saved[0], tmp_path / "model")
    before = resolve(ModelSpec("tiny", str(folder))).revision
    (folder / "modeling_tiny.py").write_text("pass")
    assert resolve(ModelSpec("tiny", str(folder))).revision != before


def without_dtype(folder):
    config(folder, "dtype")
    said = json.loads((folder / "config.json").read_text())
    for part in said.values():
        if isinstance(part, dict):
            part.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(said))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_config_without_a_dtype_leaves_it_to_the_tensors_and_a_note_says_so(saved, name, tmp_path):
    model = copy.deepcopy(saved[1]).bfloat16()
    model.save_pretrained(tmp_path)
    if name != "model.safetensors":
        torch.save(model.state_dict(), tmp_path / name)
        (tmp_path / "model.safetensors").unlink()
    without_dtype(tmp_path)
    resolved = resolve(ModelSpec("tiny", str(tmp_path)))
    (note,) = resolved.warnings
    assert re.search("names no dtype: taken for bfloat16, the dtype of its tensors; model.dtype sets another", note)
    assert load(resolved, None, "cpu").info.dtype == "bfloat16"
    assert empty_model(resolved).dtype == torch.bfloat16


def test_the_dtype_that_is_asked_for_needs_no_note(saved, tmp_path):
    folder = copied(saved[0], tmp_path / "model")
    without_dtype(folder)
    resolved = resolve(ModelSpec("tiny", str(folder), dtype="float16"))
    assert (resolved.dtype, resolved.warnings) == (torch.float16, ())


def test_a_truncated_checkpoint_is_refused(saved, tmp_path):
    saved[1].save_pretrained(tmp_path)
    weights = next(tmp_path.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:2000])
    with pytest.raises(UserError, match="is no whole safetensors file"):
        resolve(ModelSpec("tiny", str(tmp_path)))
