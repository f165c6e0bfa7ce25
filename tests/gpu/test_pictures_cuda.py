"""Pictures on a GPU: one pass against stock in bf16, in each memory mode, with and without the vision tower."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from layerbits.inputs.calibration import Calibration
from layerbits.inputs.drawn import embedded
from layerbits.inputs.loading import load
from layerbits.inputs.models import ModelSpec, load_tokenizer, resolve, vision_linears
from layerbits.inputs.picture_rows import Reader, picture_batches
from layerbits.inputs.processor import load_processor
from layerbits.results.result import VISION_KINDS
from layerbits.scoring import onepass, stock
from tests.families import build_with_processor
from tests.integration import scoring_support as support

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

PAIR = "wfp8_afp8"
PICTURES = 8


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl", "gemma3"])
def subject(request, tmp_path_factory):
    """A tiny model in bf16 on the GPU, and its rows: together, and each a segment of its own."""
    folder = tmp_path_factory.mktemp(request.param)
    build_with_processor(request.param, Path(folder))
    resolved = resolve(ModelSpec(request.param, str(folder), dtype="bfloat16"))
    tokenizer = load_tokenizer(resolved)
    reader = Reader.of(load_processor(resolved, tokenizer), resolved.config)
    made = {}
    for apart in (False, True):
        batches = picture_batches(embedded(PICTURES), replace(reader, apart=apart), 4, range(PICTURES))
        made[apart] = Calibration(batches, batches, PICTURES, ())
    return load(resolved, tokenizer, "cuda"), made


def test_a_pass_over_pictures_equals_stock(subject, tmp_path):
    model, rows = subject
    wanted = support.configs(PAIR, device="cuda")
    one = onepass.score(support.job(model, tmp_path / "one", wanted, rows[False]))
    reference = stock.score(support.job(model, tmp_path / "stock", wanted, rows[False]))
    np.testing.assert_allclose(one.raw, reference.raw, rtol=1e-3)
    at_images = one.sample_image_kl.sum(axis=0)[:, 0] > 0
    assert (at_images == support.reached_from_images(one.groups, rows[False])).all()


@pytest.mark.parametrize("memory", ["fast", "lean"])
def test_a_tower_is_scored_as_stock_scores_it(subject, memory, tmp_path):
    model, rows = subject
    whole = replace(model, linears={**model.linears, **vision_linears(model.model)})
    wanted = support.configs(PAIR, device="cuda")
    one = onepass.score(support.job(whole, tmp_path / "one", wanted, rows[True], memory=memory))
    reference = stock.score(support.job(whole, tmp_path / "stock", wanted, rows[True]))
    np.testing.assert_allclose(one.raw, reference.raw, rtol=1e-3)
    assert {g.kind for g in one.groups} >= {"vision_qkv", "vision_out", "vision_fc1", "vision_fc2", "qkv", "down"}
    assert all(g.block is None for g in one.groups if g.kind in VISION_KINDS)
