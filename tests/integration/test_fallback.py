"""Formats that ModelOpt alone can calibrate: the search falls back to it and comes to its end."""

import numpy as np
import pytest
import torch

from layerbits.candidates.candidate import resolve_candidate
from layerbits.candidates.formats import QuantPair
from layerbits.candidates.granularity import Overlay
from layerbits.errors import Unsupported
from layerbits.recipes.recipe import load_recipe
from layerbits.recipes.space import lay_out
from layerbits.scoring import onepass, stock
from layerbits.stages.workbench import scored_together

from .recipes_support import stock_search
from .scoring_support import job, loaded, random_segment, tiny_model

FORMATS = {
    "awq_lite": QuantPair("awq", "int4", "fp16", "INT4_AWQ_CFG"),
    "smoothquant": QuantPair("smooth", "int8", "int8", "INT8_SMOOTHQUANT_CFG"),
}


@pytest.mark.parametrize("method", FORMATS)
def test_a_format_that_needs_more_than_ranges_is_scored_by_modelopt(method, tmp_path):
    made = resolve_candidate(FORMATS[method], Overlay("default", {}))
    assert not scored_together(made)
    subject = loaded(tiny_model("llama"))
    ids = random_segment(1, 12).input_ids
    before = subject.model(ids).logits
    wanted = {made.info.name: made.search_config()}
    with pytest.raises(Unsupported, match="calibrated by ModelOpt alone"):
        onepass.score(job(subject, tmp_path / "one", wanted))
    scores = stock.score(job(subject, tmp_path / "stock", wanted))
    assert np.isfinite(scores.raw).all()
    assert (scores.raw > 0).all()
    assert any(scores.chosen[made.info.name])
    assert torch.equal(subject.model(ids).logits, before)


def test_a_recipe_with_such_a_format_takes_its_scores_from_modelopt(tmp_path):
    """Scored alone, the format has the scores that it has in ModelOpt's search of the whole recipe."""
    recipe = load_recipe("general/auto_quantize/w4a8_awq_beta_fp8_at_6p0bits")
    model = tiny_model("llama")
    subject = loaded(model)
    space = lay_out(recipe, model, subject.linears)
    alone = next(c for c in space.candidates if not scored_together(c))
    wanted = {alone.info.name: alone.search_config()}
    scores = stock.score(job(subject, tmp_path, wanted, scored=space.scored))
    _, told = stock_search(recipe, tiny_model("llama"))
    by_name = {slot.name: slot.modules for slot in space.searched}
    raw = {g.modules: scores.raw[i, 0] for i, g in enumerate(scores.groups)}
    for name, found in told.items():
        (score,) = (value for key, value in found.items() if "4.0)" in key)
        assert raw[by_name[name]] == pytest.approx(score, rel=1e-4), name
