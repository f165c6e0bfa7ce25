"""Bytes of exported checkpoints by arithmetic against the files that exports write."""

from dataclasses import replace

import numpy as np
import pytest

from layerbits.checkpoint import label
from layerbits.checkpoint.formats import choose_format
from layerbits.checkpoint.reader import open_checkpoint
from layerbits.checkpoint.sizes import sizes_of, with_sizes
from layerbits.errors import UserError
from layerbits.export import scheme as export
from layerbits.export.plan import plan_export
from layerbits.inputs.loading import empty_model
from layerbits.inputs.models import scored_linears
from layerbits.results.assignment import Assignment
from layerbits.schemes.catalog import SchemeSpec
from layerbits.schemes.make import from_scores
from layerbits.schemes.sizes import GIB, Load
from layerbits.schemes.source import Source

from . import test_export_experts
from .export_support import planned, prepared, saved
from .scoring_support import candidate

NO_LOAD = Load()
EVERY = ("qkv", "o", "gate_up", "down")
FP8, NVFP4 = candidate("wfp8_afp8"), candidate("wfp4_afp16", variant="nvfp4")
INT4, CHANNEL = candidate("wint4_afp16"), candidate("wfp8_afp8", "recipe_match_channel_token")
W4A8 = candidate("wfp4_afp8", variant="nvfp4")  # ModelOpt's format alone


def source_of(scheme):
    """The groups and candidates of a scheme as the source of others."""
    empty = np.ones((len(scheme.groups), len(scheme.candidates)))
    return Source(
        ("run",), scheme.model, scheme.calibration, "gradient", scheme.groups, scheme.candidates, empty, empty,
        "weight", None, scheme.settings, kv_cache=scheme.kv_cache,
    )  # fmt: skip


def sizes_for(plan, load=NO_LOAD):
    resolved = plan.prepared.resolved
    model = empty_model(resolved)
    return sizes_of(resolved, model, scored_linears(model, resolved.spec), source_of(plan.scheme), load)


def written(plan, folder):
    """Bytes of the tensors that an export writes."""
    folder.mkdir()
    export._write(plan, folder, "cpu", None, {})
    return sum(entry.stop - entry.start for entry in open_checkpoint(folder).entries.values())


@pytest.mark.parametrize(
    ("kind", "format", "assigned", "kv_cache"),
    [
        ("llama", "modelopt", dict.fromkeys(EVERY, FP8), "none"),
        ("llama", "modelopt", {"qkv": FP8, "gate_up1": INT4, "down0": INT4}, "fp8"),
        ("llama", "modelopt", dict.fromkeys(EVERY, candidate("wint4_afp16", "w_group32")), "none"),
        ("qwen2_5_vl", "modelopt", {"qkv": CHANNEL, "down": NVFP4}, "none"),
        ("qwen3_vl", "modelopt", {"qkv": candidate("wint8_aint8"), "o": W4A8}, "none"),
        ("llama", "compressed-tensors", {"qkv": INT4, "o": candidate("wint8_afp16"), "down0": NVFP4}, "none"),
        ("qwen3_vl", "compressed-tensors", {"qkv": CHANNEL, "gate_up": candidate("wmxfp8_amxfp8")}, "none"),
        ("qwen2_5_vl", "compressed-tensors", {"o": candidate("wfp4_afp4", variant="nvfp4"), "down": FP8}, "none"),
        ("llama", "compressed-tensors", {"o": candidate("wfp4_afp16"), "down": candidate("wfp8_afp16")}, "none"),
    ],
)
def test_the_bytes_of_a_checkpoint_are_those_of_its_files(tmp_path, kind, format, assigned, kv_cache):
    plan = planned(kind, tmp_path, format=format, kv_cache=kv_cache, **assigned)
    sizes = sizes_for(plan)
    only = replace(sizes, formats={format: sizes.formats[format]})
    assert only.checkpoint(plan.scheme.assignment) == written(plan, tmp_path / "out")


def test_the_bytes_of_experts_are_those_of_the_files(tmp_path):
    plan = test_export_experts.planned("qwen3_moe", tmp_path, FP8)
    sizes = sizes_for(plan)
    assert list(sizes.formats) == ["modelopt"]
    assert sizes.checkpoint(plan.scheme.assignment) == written(plan, tmp_path / "out")


def test_a_tied_head_is_counted_once(tmp_path):
    source = tmp_path / "source"
    ready = prepared(saved("llama", source, tie_word_embeddings=True), source, o=INT4)
    made = plan_export(ready, tmp_path / "exports" / "mine")
    assert sizes_for(made).checkpoint(made.scheme.assignment) == written(made, tmp_path / "out")


@pytest.mark.parametrize("used", [(FP8,), (INT4,), (CHANNEL, INT4), (W4A8, INT4), (W4A8, FP8), (NVFP4, CHANNEL)])
def test_the_format_is_the_one_that_exports_choose(tmp_path, used):
    assigned = dict(zip(EVERY, (FP8, INT4, CHANNEL, NVFP4), strict=True)) | {"o1": W4A8}
    plan = planned("llama", tmp_path, **{k: v for k, v in assigned.items() if k in ("qkv",)})
    every = [made.info for made in (FP8, INT4, CHANNEL, NVFP4, W4A8)]
    source = replace(source_of(plan.scheme), candidates=tuple(every))
    model = empty_model(plan.prepared.resolved)
    linears = scored_linears(model, plan.prepared.resolved.spec)
    sizes = sizes_of(plan.prepared.resolved, model, linears, source, Load())
    infos = [made.info for made in used]
    assert sizes.format_of([info.name for info in infos]) == choose_format(infos, label.AUTO)[0]


def test_a_weight_that_an_export_would_cut_is_not_counted(tmp_path):
    plan = planned("llama", tmp_path, qkv=FP8)
    source = replace(source_of(plan.scheme), candidates=(FP8.info, INT4.info))
    narrow = saved("llama", tmp_path / "narrow", hidden_size=192, num_attention_heads=4, num_key_value_heads=4)
    resolved = prepared(narrow, tmp_path / "narrow", qkv=FP8).resolved
    model = empty_model(resolved)
    sizes = sizes_of(resolved, model, scored_linears(model, resolved.spec), source, Load())
    costs, _ = sizes.costs([0, 1])
    kinds = [group.kind for group in source.groups]
    assert [bool(np.isfinite(c)) for c in costs[:, 1]] == [kind == "down" for kind in kinds]  # 256 columns, not 192
    names = Assignment([INT4.info.name if kind == "qkv" else None for kind in kinds])
    assert sizes.record(names) == {}


@pytest.mark.parametrize(("kv_cache", "bytes_each"), [("none", 2), ("fp8", 1), ("nvfp4", 4.5 / 8)])
def test_the_cache_is_of_all_tokens_of_all_requests(tmp_path, kv_cache, bytes_each):
    plan = planned("llama", tmp_path, qkv=FP8)
    plan = replace(plan, prepared=replace(plan.prepared, scheme=replace(plan.scheme, kv_cache=kv_cache)))
    sizes = sizes_for(plan, Load(context=100, concurrency=3))
    assert sizes.kv_cache == 2 * 2 * 128 * 100 * 3 * bytes_each  # keys and values of two blocks, 4 heads of 32


def test_a_context_beyond_the_models_is_one_line(tmp_path):
    plan = planned("llama", tmp_path, qkv=FP8)
    with pytest.raises(UserError, match=r"context=4096 is longer than the 2,048 positions of the model; use 2048"):
        sizes_for(plan, Load(context=4096))


def test_a_budget_in_gib_is_kept_and_used_up(tmp_path):
    source = tmp_path / "source"
    model = saved("llama", source)
    ready = prepared(model, source, qkv=FP8, o=INT4)
    made = replace(source_of(ready.scheme), settings={"model": {"name": "tiny", "path": str(source)}})
    rng = np.random.default_rng(0)
    scores = rng.lognormal(-6, 1, made.scores.shape)
    found = with_sizes(replace(made, scores=scores, predicted_kl=scores), Load(context=64))
    whole = found.sizes.record(Assignment([None] * 8))["gib"]
    spec = SchemeSpec("mine", budget_gib=(0.8 * whole, 0.7 * whole))
    schemes = from_scores(spec, found)
    for scheme, budget in zip(schemes, spec.budget_gib, strict=True):
        assert 0.9 * budget < scheme.size["gib"] <= budget
        assert scheme.size["gib"] == pytest.approx(scheme.size["weights_gib"] + scheme.size["kv_cache_gib"])
        assert scheme.size["kv_cache_gib"] == 2 * 2 * 128 * 64 * 2 / GIB
    assert schemes[0].score < schemes[1].score
    least = min(found.sizes.record(Assignment([name] * 8))["gib"] for name in found.sizes.candidates)
    with pytest.raises(UserError, match=rf"budget_gib=1e-05 cannot be reached: the least is {least:.4g} GiB"):
        from_scores(SchemeSpec("mine", budget_gib=(1e-5,)), found)


def test_a_model_that_has_changed_is_refused(tmp_path):
    source = tmp_path / "source"
    ready = prepared(saved("llama", source), source, qkv=FP8)
    made = source_of(replace(ready.scheme, settings={"model": {"name": "tiny", "path": str(source)}}))
    other = replace(made, model=replace(made.model, revision="another"))
    with pytest.raises(UserError, match="revision another, the model here is revision"):
        with_sizes(other, Load())
    with pytest.raises(UserError, match="do not say how to load it"):
        with_sizes(replace(made, settings={}), Load())
