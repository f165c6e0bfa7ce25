"""A bf16 model measured in float32 on a GPU: every group counts, however it is widened; refined groups too."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from layerbits.inputs.offload import offload
from layerbits.scoring import kl, onepass
from layerbits.scoring.precision import computing, plan_precision
from layerbits.scoring.refine import refine
from layerbits.scoring.replaced import ReplacedLinears
from layerbits.scoring.search import Search
from layerbits.trust.measure import measure_damage
from tests.integration import scoring_support as support

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)


@pytest.fixture(scope="module")
def rows():
    return support.rows([support.random_segment(8, 96, seed=1)], [support.random_segment(8, 96, seed=2, first=160)])


def narrow(kind="llama", streamed=False):
    model = support.tiny_model(kind, num_hidden_layers=4).bfloat16()
    if streamed:
        offload(model, torch.device("cuda"))
        return model
    return model.cuda()


def damage(model, pair, rows, dtype="auto", by_block=False):
    job = support.job(support.loaded(model), Path(), support.configs(pair, device="cuda"), rows)
    search = Search.of(job)
    linears = ReplacedLinears(model, search.names, search.settings)
    linears.calibrate(rows.calib, search.need_logits)
    linears.load_ranges(linears.ranges())
    linears.fix_dtypes()
    how = plan_precision(model, rows.score[0].segments[0].input_ids.numel(), dtype)
    with computing(model, replace(how, by_block=by_block or how.by_block)):
        return measure_damage(model, linears, search, rows.score, disable_one=False)


@pytest.mark.parametrize("pair", ["wfp8_afp8", "wint8_afp16", "wfp4_afp16"])
def test_every_group_counts_in_float32_where_bf16_is_blind(pair, rows):
    wide, own = (damage(narrow(), pair, rows, dtype) for dtype in ("auto", "model"))
    assert (wide.alone.mean > 2 * wide.floor).all()
    assert wide.floor.max() < own.floor.max() / 100


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_whole_block_by_block_and_streamed_measure_the_same(kind, rows):
    whole = damage(narrow(kind), "wfp8_afp8", rows)
    by_block = damage(narrow(kind), "wfp8_afp8", rows, by_block=True)
    streamed = damage(narrow(kind, streamed=True), "wfp8_afp8", rows)
    for other in (by_block, streamed):
        np.testing.assert_allclose(other.alone.mean, whole.alone.mean, rtol=1e-3)


def test_refined_groups_are_those_that_kl_div_measures_in_float32(tmp_path, rows):
    wanted = support.configs("wint8_afp16", device="cuda")
    own = support.job(support.loaded(narrow()), tmp_path / "own", wanted, rows)
    found = refine(own, onepass.score(own), 5)
    wide = support.loaded(narrow().float())
    measured = kl.score(support.job(wide, tmp_path / "wide", wanted, rows, method="kl_div"))
    at = np.isfinite(found.measured_se[:, 0])
    assert at.sum() == 5
    # the weights are quantized in bf16 here and in float32 there
    np.testing.assert_allclose(found.predicted_kl[at, 0], measured.predicted_kl[at, 0], rtol=0.2)
