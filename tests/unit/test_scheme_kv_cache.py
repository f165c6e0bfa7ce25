"""The KV cache of schemes: what they carry, what it costs, and that no budget counts it."""

import json
import math
from dataclasses import replace

import pytest

from layerbits.candidates.kv_cache import KV_FORMATS, kv_formats, kv_name
from layerbits.errors import UserError
from layerbits.results.kv_cache import KvScore
from layerbits.schemes.catalog import SchemeSpec
from layerbits.schemes.kv_cache import toggles
from layerbits.schemes.make import make_schemes
from layerbits.schemes.report import markdown, metrics
from layerbits.schemes.request import SchemeRequest
from layerbits.schemes.scheme import Scheme
from layerbits.schemes.source import combine

SPEC = SchemeSpec("mine", effective_bits=(11.0,))


def priced(result, *formats):
    """A result that scored two blocks in some formats, at 0.25 nats a block and format."""
    scores = [KvScore(name, f"model.layers.{b}.self_attn", b, 1e-6, 0.25) for name in formats for b in range(2)]
    return combine({"run": replace(result, kv_cache=tuple(scores))})


def made(source):
    (scheme,) = make_schemes([SPEC], source)
    return scheme


def test_a_scheme_carries_the_one_format_that_its_run_priced(make_result):
    plain, cached = made(combine({"run": make_result()})), made(priced(make_result(), "fp8"))
    assert (plain.kv_cache, cached.kv_cache) == ("none", "fp8")
    assert (plain.kv_predicted_kl, cached.kv_predicted_kl) == (0.0, 0.5)
    assert (cached.assignment, cached.effective_bits) == (plain.assignment, plain.effective_bits)
    assert cached.predicted_kl == plain.predicted_kl
    assert cached.digest != plain.digest


def test_of_several_none_is_carried_unless_it_is_chosen(make_result):
    source = priced(make_result(), "fp8", "nvfp4")
    assert made(source).kv_cache == "none"
    assert "KV caches of fp8 and nvfp4 were priced" in made(source).notes[0]
    chosen = made(replace(source, kv_cache="nvfp4"))
    assert (chosen.kv_cache, chosen.kv_predicted_kl, chosen.notes) == ("nvfp4", 0.5, ())


def test_what_no_run_priced_has_no_prediction(make_result):
    assert math.isnan(made(replace(priced(make_result(), "fp8"), kv_cache="nvfp4")).kv_predicted_kl)


def test_a_file_keeps_the_cache_and_the_prices(make_result, tmp_path):
    scheme = made(priced(make_result(), "fp8"))
    path = scheme.save(tmp_path / "mine.json")
    data = json.loads(path.read_text())
    assert Scheme.from_json(data) == scheme
    for key in ("kv_cache", "kv_prices"):
        del data[key]  # as a version without caches wrote it
    data["digest"] = replace(scheme, kv_cache="none").digest
    assert Scheme.from_json(data).kv_cache == "none"


@pytest.mark.parametrize(("given", "found"), [("auto", "fp8"), ("none", "none"), ("nvfp4", "nvfp4")])
def test_a_file_is_taken_with_the_cache_that_is_asked_for(make_result, tmp_path, given, found):
    path = made(priced(make_result(), "fp8")).save(tmp_path / "mine.json")
    request = SchemeRequest.from_config({"scheme_files": [str(path)], "kv_cache": given}, tmp_path)
    assert [s.kv_cache for s in request.schemes(None)] == [found]


def test_an_unknown_format_is_named_with_those_that_there_are(tmp_path):
    with pytest.raises(UserError, match="kv_cache=int8 is not known; use one of auto, none, fp8, nvfp4"):
        SchemeRequest.from_config({"scheme_files": ["x.json"], "kv_cache": "int8"}, tmp_path)
    with pytest.raises(UserError, match="kv_cache=int8 is not known; use one of fp8, nvfp4"):
        kv_formats("fp8+int8")


def test_a_toggle_leaves_every_linear_alone(make_result):
    schemes = make_schemes([SPEC, SchemeSpec("random", control="random")], priced(make_result(), "fp8"))
    (toggle,) = toggles(schemes)
    assert (toggle.name, toggle.modules, toggle.effective_bits) == ("kv_fp8", {}, 16.0)
    assert (toggle.predicted_kl, toggle.kv_predicted_kl) == (0.0, 0.5)
    assert toggles([made(combine({"run": make_result()}))]) == []


def test_the_price_is_in_table_and_metrics(make_result):
    scheme = made(priced(make_result(), "fp8"))
    assert metrics([scheme])["scheme/mine/kv_predicted_kl"] == 0.5
    assert "| fp8 | 0.5 |" in markdown([scheme])
    plain = made(combine({"run": make_result()}))
    assert "scheme/mine/kv_predicted_kl" not in metrics([plain])
    assert "KV cache" not in markdown([plain])


def test_settings_of_modelopts_recipes_have_names():
    assert {name: kv_name(settings) for name, settings in KV_FORMATS.items()} == {name: name for name in KV_FORMATS}
    assert kv_name(None) == "none"
    assert kv_name({"num_bits": 8}) is None
    assert kv_name({"num_bits": [2, 1], "block_sizes": {"-1": 16, "type": "dynamic", "scale_bits": [4, 3]}}) == "nvfp4"
