"""Schemes from synthetic scores: coverage, controls, catalog, exclude lists, files."""

import fnmatch
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from layerbits.candidates.kv_cache import kv_formats
from layerbits.errors import UserError
from layerbits.history.scheme_inputs import load_scores
from layerbits.results.assignment import Assignment
from layerbits.results.naming import scheme_title
from layerbits.schemes import load_scheme
from layerbits.schemes.catalog import SchemeSpec, load_specs
from layerbits.schemes.coverage import block_scores, covered_blocks
from layerbits.schemes.folder import write_schemes
from layerbits.schemes.make import curve, make_schemes
from layerbits.schemes.report import exclude_patterns, exclude_yaml, excludes, markdown, metrics, parameters
from layerbits.schemes.settings import SchemeSettings
from layerbits.schemes.sizes import GIB, Load, Sizes, Stored
from layerbits.schemes.source import combine

CATALOG = Path(__file__).parents[2] / "configs" / "scheme"
RANDOM = SchemeSpec("random", control="random", seeds=(0, 1))
FIRST_LAST = SchemeSpec("first_last", control="first_last")


@pytest.fixture
def source(make_result):
    """Twelve blocks, one INT8 candidate."""
    return combine({"run8": make_result(blocks=12)})


@pytest.fixture
def both(make_result):
    """The same blocks under FP8 and under FP4, from two runs; FP4 hurts four times as much."""
    eight = make_result(blocks=12, pair="wfp8_afp8")
    four = make_result(blocks=12, pair="wfp4_afp16")
    four = replace(four, scores=4 * eight.scores, predicted_kl=4 * eight.predicted_kl)
    return combine({"run8": eight, "run4": four})


def one(source, **spec):
    (scheme,) = make_schemes([SchemeSpec.from_mapping({"name": "mine", **spec})], source)
    return scheme


def blocks_of(scheme):
    return {g.block for g, name in zip(scheme.groups, scheme.assignment, strict=True) if name is not None}


@pytest.fixture
def with_tower(both):
    """The groups of the last two blocks as those of a vision tower, a fifth as large."""
    groups = [
        replace(g, block=None, kind="vision_fc1", weights=g.weights // 5) if g.block in (10, 11) else g
        for g in both.groups
    ]
    return replace(both, groups=tuple(groups), sample_kl=None)


def bits_over(scheme, tower):
    bits = {c.name: c.bits for c in scheme.candidates}
    mine = [
        (g.weights, 16.0 if name is None else bits[name])
        for g, name in zip(scheme.groups, scheme.assignment, strict=True)
        if (g.kind == "vision_fc1") == tower
    ]
    return sum(w * b for w, b in mine) / sum(w for w, _ in mine)


def test_a_tower_has_a_budget_of_its_own(with_tower):
    low = one(with_tower, effective_bits=6, vision_bits=12)
    assert bits_over(low, tower=False) <= 6.0001
    assert 10 < bits_over(low, tower=True) <= 12.0001
    as_it_is = one(with_tower, effective_bits=6, vision_bits=16)
    assert bits_over(as_it_is, tower=True) == 16
    language = [n for g, n in zip(low.groups, low.assignment, strict=True) if g.kind != "vision_fc1"]
    other = [n for g, n in zip(as_it_is.groups, as_it_is.assignment, strict=True) if g.kind != "vision_fc1"]
    assert language == other  # the tower has no say in the language model
    assert (low.how["vision_bits"], low.how["target_effective_bits"]) == (12, 6)
    assert low.digest != as_it_is.digest
    taken = f"{bits_over(low, tower=False):.3f} and {bits_over(low, tower=True):.3f}"
    assert f"vision_bits=12 over the tower (they take {taken})" in low.notes[-1]


def test_a_shared_budget_is_no_two(with_tower):
    shared = one(with_tower, effective_bits=6)
    assert shared.effective_bits <= 6.0001
    assert bits_over(shared, tower=True) != pytest.approx(6, abs=1e-3)


def test_a_budget_of_a_tower_that_was_not_scored_is_refused(source, with_tower):
    with pytest.raises(UserError, match=r"vision_bits=12, but no vision tower is scored; score"):
        one(source, effective_bits=9, vision_bits=12)
    with pytest.raises(UserError, match="vision_bits=12 goes with effective_bits"):
        one(with_tower, budget_gib=1, vision_bits=12)
    with pytest.raises(UserError, match="vision_bits=2 cannot be reached"):
        one(with_tower, effective_bits=6, vision_bits=2)


def test_a_blocks_score_is_the_sum_of_its_groups(source):
    sums = block_scores(source.groups, source.scores)
    assert sums[3] == pytest.approx(source.scores[12:16].sum())
    assert list(sums) == list(range(12))


def test_the_output_head_is_in_no_block(make_result):
    with_head = make_result(blocks=3, lm_head=True)
    assert list(block_scores(with_head.groups, with_head.scores)) == [0, 1, 2]


@pytest.mark.parametrize("order", ["least_sensitive", "most_sensitive"])
def test_coverage_keeps_blocks_from_one_end_of_the_ranking(source, order):
    kept = covered_blocks(source.groups, source.scores, 0.25, order)
    sums = block_scores(source.groups, source.scores)
    ranked = sorted(sums, key=sums.get, reverse=order == "most_sensitive")
    assert sorted(kept) == sorted(ranked[:3])


@pytest.mark.parametrize(("coverage", "count"), [(0.01, 1), (0.25, 3), (0.29, 3), (0.3, 4), (0.5, 6), (1.0, 12)])
def test_coverage_is_a_share_of_the_blocks(source, coverage, count):
    assert len(covered_blocks(source.groups, source.scores, coverage, "least_sensitive")) == count


@pytest.mark.parametrize("coverage", [0.0, -0.5, 1.5])
def test_a_coverage_that_is_no_share_is_refused(source, coverage):
    with pytest.raises(UserError, match="above 0 and up to 1"):
        one(source, effective_bits=9, coverage=coverage)


def test_coverage_keeps_the_solvers_decisions_and_reverts_the_rest(source):
    whole, part = (one(source, effective_bits=10, coverage=c) for c in (1.0, 0.5))
    kept = set(part.how["blocks"])
    assert len(kept) == 6
    for group, before, after in zip(source.groups, whole.assignment, part.assignment, strict=True):
        assert after == (before if group.block in kept else None)
    assert part.effective_bits > whole.effective_bits


def test_both_readings_of_coverage_are_told_and_differ(source):
    least, most = (
        one(source, effective_bits=10, coverage=0.25, coverage_order=order)
        for order in ("least_sensitive", "most_sensitive")
    )
    assert not set(least.how["blocks"]) & set(most.how["blocks"])
    assert "coverage_order=least_sensitive" in least.notes[0]
    assert "is coverage_order=most_sensitive" in least.notes[0]


def test_the_command_line_may_turn_the_order_around(source):
    settings = settings_of(schemes="fp8_autoquant_top25", coverage_order="most_sensitive")
    assert parameters(settings.specs, source)["eff.coverage_order"] == "most_sensitive"
    assert [spec.name for spec in settings.specs] == ["fp8_autoquant_top25_most_sensitive"]


def test_an_order_that_changes_nothing_leaves_the_name():
    for name, order in (("fp8_autoquant_full", "most_sensitive"), ("fp8_autoquant_top25", "least_sensitive")):
        assert [spec.name for spec in settings_of(schemes=name, coverage_order=order).specs] == [name]


def test_groups_outside_of_blocks_are_unquantized_under_coverage(make_result):
    source = combine({"run": make_result(blocks=4, lm_head=True)})
    scheme = one(source, effective_bits=8, coverage=0.5)
    assert scheme.assignment[-1] is None


@pytest.mark.parametrize("control", [RANDOM, FIRST_LAST])
def test_a_control_has_the_bits_of_its_scheme(source, control):
    spec = SchemeSpec("mine", effective_bits=(9.0, 11.0, 13.0))
    made = make_schemes([spec, control], source)
    by_name = {s.name: s for s in made}
    controls = [s for s in made if s.is_control]
    assert len(controls) == 3 * len(control.seeds)
    for scheme in controls:
        reference = by_name[scheme.how["reference"]]
        step = 8 * min(g.weights for g in source.groups) / sum(g.weights for g in source.groups)
        assert reference.effective_bits <= scheme.effective_bits < reference.effective_bits + step


def test_a_random_control_depends_on_its_seed_alone(source):
    spec = SchemeSpec("mine", effective_bits=(11.0,))
    first, second = (make_schemes([spec, RANDOM], source) for _ in range(2))
    assert [s.assignment for s in first] == [s.assignment for s in second]
    assert first[1].assignment != first[2].assignment


def test_first_last_leaves_the_ends_unquantized(source):
    made = make_schemes([SchemeSpec("mine", effective_bits=(13.0,)), FIRST_LAST], source)
    kept = blocks_of(made[1])
    assert 0 not in kept
    assert 11 not in kept
    assert {5, 6} <= kept


def test_a_control_of_several_candidates_has_the_same_bits(both):
    made = make_schemes([SchemeSpec("mine", effective_bits=(7.0,)), RANDOM], both)
    assert {c.name for c in made[0].candidates} == {"wfp8_afp8", "wfp4_afp16"}
    for scheme in made[1:]:
        assert scheme.effective_bits == pytest.approx(made[0].effective_bits, abs=0.05)
        assert {c.name for c in scheme.candidates} == {"wfp8_afp8", "wfp4_afp16"}


def test_controls_alone_have_no_bits_to_take(source):
    with pytest.raises(UserError, match="controls take their bits from schemes"):
        make_schemes([RANDOM], source)


def test_groups_choose_among_several_candidates(both):
    scheme = one(both, effective_bits=7)
    alone = one(both, effective_bits=8, candidates=["wfp8_afp8"])
    assert {name for name in scheme.assignment if name} == {"wfp8_afp8", "wfp4_afp16"}
    assert scheme.effective_bits <= 7
    assert set(alone.assignment) == {"wfp8_afp8"}
    for group in both.groups:
        assert len({scheme.modules[m].name for m in group.modules if m in scheme.modules}) <= 1


def test_more_candidates_are_never_worse_at_the_same_bits(both):
    for bits in (8.0, 9.0, 12.0):
        free = one(both, effective_bits=bits)
        assert free.score <= one(both, effective_bits=bits, candidates=["wfp8_afp8"]).score


def test_a_candidate_that_is_not_scored_is_named(both):
    with pytest.raises(UserError, match="wint8_aint8 is not scored in run8, run4; it has wfp8_afp8, wfp4_afp16"):
        one(both, effective_bits=9, candidates="wint8_aint8")


def test_an_infeasible_budget_says_the_feasible_range(both):
    with pytest.raises(UserError, match=r"effective_bits=3 cannot be reached: the feasible range is 4\.25 to 16"):
        one(both, effective_bits=3)
    with pytest.raises(UserError, match="8 to 16"):
        one(both, effective_bits=7, candidates="wfp8_afp8")


def test_scores_of_other_calibrations_do_not_mix(make_result):
    eight, four = make_result(pair="wfp8_afp8"), make_result(pair="wfp4_afp16")
    four = replace(four, calibration=replace(four.calibration, digest="0" * 64))
    with pytest.raises(UserError, match="dataset digest: "):
        combine({"run8": eight, "run4": four})


def test_scores_of_another_revision_do_not_mix(make_result):
    eight, four = make_result(pair="wfp8_afp8"), make_result(pair="wfp4_afp16")
    with pytest.raises(UserError, match="model revision: "):
        combine({"run8": eight, "run4": replace(four, model=replace(four.model, revision="other"))})


def test_the_same_candidate_twice_is_refused(make_result):
    with pytest.raises(UserError, match="a and b both scored wint8_afp16"):
        combine({"a": make_result(), "b": make_result()})


def test_a_group_without_a_score_stays_unquantized_and_is_told(make_result):
    scheme = one(combine({"run": make_result(nonfinite=("B01.o",))}), effective_bits=9)
    assert scheme.assignment[[g.key for g in scheme.groups].index("B01.o")] is None
    assert "no finite score for B01.o" in scheme.notes[0]


def test_scores_on_other_captions_than_the_catalog_asks_for_are_told(source):
    scheme = one(source, effective_bits=9, score_samples=96, method="kl_div")
    assert scheme.notes == (
        "made for scores by method=kl_div; these are by gradient",
        "made for scores on 96 captions; these are on 16",
    )


@pytest.mark.parametrize(
    ("name", "bits", "coverage", "samples"),
    [
        ("fp8_autoquant_top25", 13.0, 0.25, 128),
        ("fp8_autoquant_top50", 11.0, 0.5, 128),
        ("fp8_autoquant_full", 9.0, 1.0, 96),
    ],
)
def test_the_shipped_schemes_are_those_of_the_reference_workflow(name, bits, coverage, samples):
    (spec,) = load_specs([name], CATALOG)
    assert (spec.effective_bits, spec.coverage, spec.score_samples) == ((bits,), coverage, samples)
    assert (spec.method, spec.candidates) == ("gradient", ("wfp8_afp8",))
    assert spec.coverage_order == "least_sensitive"


def test_every_shipped_file_is_a_scheme():
    names = [p.stem for p in CATALOG.glob("*.yaml")]
    assert {s.name for s in load_specs(names, CATALOG)} == set(names)


def test_a_users_yaml_is_a_scheme(tmp_path, source):
    (tmp_path / "thrifty.yaml").write_text("effective_bits: [9, 12]\ncoverage: 0.5\ncoverage_order: most_sensitive\n")
    made = make_schemes(load_specs(["thrifty"], tmp_path), source)
    assert [s.name for s in made] == ["thrifty_9", "thrifty_12"]
    assert {s.how["coverage_order"] for s in made} == {"most_sensitive"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("effective_bit: 9", "unknown effective_bit"),
        ("effective_bits: nine", "effective_bits='nine' is not a number"),
        ("effective_bits: 9\ncoverage_order: both", "coverage_order=both is not known"),
        ("coverage: 0.5", "needs either a budget"),
        ("- 9", "holds no keys"),
        ("effective_bits: [9", "is not YAML"),
    ],
)
def test_a_yaml_that_is_no_scheme_is_explained(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_specs(["mine"], tmp_path)


def test_a_misspelt_scheme_suggests_the_nearest():
    with pytest.raises(UserError, match="fp8_autoquant_ful is not known; choose fp8_autoquant_full"):
        load_specs(["fp8_autoquant_ful"], CATALOG)


def test_the_exclude_list_is_what_stays_unquantized(source):
    scheme = one(source, effective_bits=11)
    everything = [m for g in source.groups for m in g.modules]
    assert sorted([*scheme.modules, *scheme.exclude]) == sorted(everything)
    assert yaml.safe_load(exclude_yaml(scheme)) == scheme.exclude


def test_the_short_exclude_list_names_the_same_linears(source):
    scheme = one(source, effective_bits=10, coverage=0.25)
    patterns = exclude_patterns(scheme)
    matched = [m for g in source.groups for m in g.modules if any(fnmatch.fnmatchcase(m, p) for p in patterns)]
    assert matched == scheme.exclude
    assert "model.layers.1.*" in patterns or "model.layers.2.*" in patterns
    assert len(patterns) < len(scheme.exclude) / 2


def test_exclude_lists_are_printed_for_schemes_to_paste(source):
    made = make_schemes([SchemeSpec("mine", effective_bits=(11.0,)), RANDOM], source)
    (line,) = [line for line in excludes(made).splitlines() if ": [" in line]
    assert json.loads(line.removeprefix("mine: ")) == exclude_patterns(made[0])


def test_a_scheme_survives_its_file(source, tmp_path):
    scheme = one(source, effective_bits=11, coverage=0.5)
    again = load_scheme(scheme.save(tmp_path / "mine.json"))
    assert again == scheme
    assert again.digest == scheme.digest


def test_a_scheme_changed_by_hand_is_refused(source, tmp_path):
    path = one(source, effective_bits=11).save(tmp_path / "mine.json")
    data = json.loads(path.read_text())
    at = data["assignment"].index(None)
    path.write_text(
        json.dumps({**data, "assignment": [*data["assignment"][:at], "wint8_afp16", *data["assignment"][at + 1 :]]})
    )
    with pytest.raises(UserError, match="does not match its digest"):
        load_scheme(path)


def test_a_scheme_of_a_later_version_is_refused(source, tmp_path):
    path = one(source, effective_bits=11).save(tmp_path / "mine.json")
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 99'))
    with pytest.raises(UserError, match=r"schema_version 99.*upgrade"):
        load_scheme(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 1, "assignment": []}'])
def test_a_file_that_is_no_scheme_is_refused(tmp_path, text):
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(UserError, match=r"not JSON|not a LayerBits scheme|damaged"):
        load_scheme(tmp_path / "mine.json")


def test_the_digest_is_of_what_is_computed_and_not_of_the_name(source):
    a, b, other = (one(source, effective_bits=bits, name=name) for name, bits in (("a", 11), ("b", 11), ("c", 10)))
    assert a.digest == b.digest != other.digest
    assert "(= a)" in markdown([a, b])


def test_the_digest_tells_model_revisions_apart(source):
    scheme = one(source, effective_bits=11)
    assert replace(scheme, model=replace(scheme.model, revision="other")).digest != scheme.digest


def test_a_model_of_another_revision_is_refused(source):
    with pytest.raises(UserError, match="revision 0123456789abcdef, the model here is revision other"):
        one(source, effective_bits=11).check_revision("other")


def test_a_folder_of_schemes_is_read_back(source, tmp_path):
    spec = SchemeSpec("mine", effective_bits=(9.0, 11.0))
    made = make_schemes([spec, FIRST_LAST], source)
    folder = write_schemes(tmp_path, source, made, curve(spec, source, 5))
    assert [load_scheme(folder / "schemes" / f"{scheme.name}.json") for scheme in made] == made
    assert {p.name for p in folder.iterdir()} == {
        "schemes", "exclude", "modelopt", "llm_compressor", "figures", "schemes.json", "schemes.md", "pareto.json",
    }  # fmt: skip
    assert [p.name for p in (tmp_path / "tmp").iterdir()] == [folder.name]


def test_damage_is_drawn_against_what_several_schemes_cost(source, tmp_path):
    made = make_schemes([SchemeSpec("mine", effective_bits=(9.0, 11.0))], source)
    priced = [replace(scheme, size={"ms": 4.0 + at} | ({} if at else {"gib": 1.0})) for at, scheme in enumerate(made)]
    folder = write_schemes(tmp_path, source, priced)
    assert {p.name for p in (folder / "figures").iterdir()} == {"pareto.png", "pareto_ms.png"}


def test_the_curve_falls_from_the_floor_to_nothing_quantized(source):
    points = curve(SchemeSpec("mine", effective_bits=(9.0,)), source, 9)
    assert points[0]["bits"] == pytest.approx(8)
    assert points[-1]["quantized_groups"] == 0
    scores = [p["score"] for p in points]
    assert scores == sorted(scores, reverse=True)


def test_metrics_are_finite_and_named_by_the_scheme(make_result):
    source = combine({"run": make_result()})
    source = replace(source, predicted_kl=np.full_like(source.predicted_kl, np.nan))
    values = metrics([one(source, effective_bits=11)])
    assert set(values) == {
        f"scheme/mine/{n}" for n in ("bits", "bits_active", "bits_modelopt", "score", "quantized_groups")
    }


def settings_of(**changes):
    config = {
        "run_id": "abc", "schemes": "none", "controls": "none", "effective_bits": "none", "candidates": "all",
        "budget_gib": "none", "context": 0, "concurrency": 1,
        "budget_ms": "none", "step": "decode:1", "costs": "none",
        "objective": "score", "coverage_order": "none", "pareto": 0, "output_root": "outputs",
        "tracking": {"enabled": False, "uri": None, "experiment": "x", "run_name": None, "system_metrics": False},
    }  # fmt: skip
    return SchemeSettings.from_config({**config, **changes}, CATALOG)


def test_budgets_of_the_command_line_are_schemes_of_their_own(both):
    settings = settings_of(effective_bits="6,9", candidates="wfp8_afp8,wfp4_afp16")
    made = make_schemes(settings.specs, both)
    assert [s.name for s in made] == ["bits_6", "bits_9"]
    assert made[0].effective_bits <= 6


def sized(source):
    """The source with the bytes of its bits, in one format; 100 bytes are in no group, and 50 are a KV cache."""
    weights = np.array([g.weights for g in source.groups])[:, None]
    choices = weights * np.array([[c.bits / 8 for c in source.candidates] + [2.0]])
    names = tuple(c.name for c in source.candidates)
    return replace(source, sizes=Sizes(names, {"only": Stored(100, choices, frozenset(names))}, 50, Load()))


def test_a_budget_in_bytes_chooses_as_the_same_budget_in_bits(both):
    found = sized(both)
    weights = sum(g.weights for g in both.groups)
    bits = one(both, effective_bits=7)
    gib = one(found, budget_gib=(weights * 7 / 8 + 150) / GIB)
    assert gib.assignment == bits.assignment
    assert gib.how["target_gib"] == pytest.approx((weights * 7 / 8 + 150) / GIB)
    assert gib.size["weights_gib"] == pytest.approx((weights * gib.effective_bits / 8 + 100) / GIB)
    assert gib.size["gib"] == pytest.approx(gib.size["weights_gib"] + 50 / GIB)


def test_both_budgets_are_kept_and_the_tighter_one_decides(both):
    found, weights = sized(both), sum(g.weights for g in both.groups)
    tight, loose = ((weights * bits / 8 + 150) / GIB for bits in (6, 12))
    assert one(found, effective_bits=12, budget_gib=tight).assignment == one(found, budget_gib=tight).assignment
    assert one(found, effective_bits=6, budget_gib=loose).assignment == one(both, effective_bits=6).assignment


def test_a_budget_that_no_scheme_reaches_names_the_floor_in_its_unit(both):
    found, weights = sized(both), sum(g.weights for g in both.groups)
    least = weights * min(c.bits for c in both.candidates) / 8 + 150
    with pytest.raises(UserError, match=rf"budget_gib=1e-09 .* the least is {least / GIB:.4g} GiB .* the KV cache"):
        one(found, budget_gib=1e-9)
    with pytest.raises(UserError, match="effective_bits=2 cannot be reached: the feasible range"):
        one(found, effective_bits=2, budget_gib=1)


def test_budgets_that_exclude_each_other_name_what_is_left(both):
    found = sized(both)
    assert found.sizes is not None
    only = found.sizes.formats["only"]
    swapped = replace(only, choices=only.choices[:, [1, 0, 2]])  # what has fewer bits has more bytes
    found = replace(found, sizes=replace(found.sizes, formats={"only": swapped}))
    four = min(c.bits for c in both.candidates)
    weights = sum(g.weights for g in both.groups)
    gib = (weights * (four + 1) / 8 + 150) / GIB
    with pytest.raises(UserError, match=rf"effective_bits={four + 0.5:g} and budget_gib=.* the least is .* GiB"):
        one(found, effective_bits=four + 0.5, budget_gib=gib)


def test_budgets_in_gib_have_names_of_their_own(both):
    specs = settings_of(effective_bits="6,9", budget_gib="3,2.5").specs
    assert [s.name for s in specs] == ["bits_6_gib_3", "bits_6_gib_2.5", "bits_9_gib_3", "bits_9_gib_2.5"]
    assert [s.name for s in settings_of(budget_gib="3").specs] == ["gib_3"]


def test_sizes_are_in_the_report_the_metrics_and_the_file(both, tmp_path):
    found, weights = sized(both), sum(g.weights for g in both.groups)
    scheme = one(found, budget_gib=weights / GIB)
    assert "| GiB | of that KV cache |" in markdown([scheme])
    assert metrics([scheme])["scheme/mine/gib"] == scheme.size["gib"]
    assert load_scheme(scheme.save(tmp_path / "scheme.json")).size == scheme.size
    assert "size" not in one(both, effective_bits=9).to_json()


def test_a_candidate_without_an_export_is_not_eligible_for_a_budget_in_gib(both):
    found, weights = sized(both), sum(g.weights for g in both.groups)
    assert found.sizes is not None
    choices = found.sizes.formats["only"].choices.copy()
    choices[:, 1] = np.inf
    found = replace(found, sizes=replace(found.sizes, formats={"only": Stored(100, choices, frozenset())}))
    scheme = one(found, budget_gib=1.7 * weights / GIB)
    assert scheme.assignment.used == {both.candidates[0].name}
    assert any(both.candidates[1].name in note and "cannot be exported" in note for note in scheme.notes)


def test_schemes_of_one_name_are_told_apart_by_what_they_are_made_of(both):
    a, b = (c.name for c in both.candidates)
    assert one(both, effective_bits=9).title == f"mine {a} + {b} {both.model.name}"
    assert scheme_title("bits_5", ("a", "b", "c"), "tiny") == "bits_5 a and 2 more tiny"
    assert scheme_title("unquantized", (), "tiny") == "unquantized tiny"


def test_a_mix_counts_in_the_format_that_every_vllm_reads(both):
    a, b = names = tuple(c.name for c in both.candidates)
    choices = np.ones((len(both.groups), 3))
    first = Stored(10, choices, frozenset(names), alone=frozenset([b]))
    sizes = Sizes(names, {"x": first, "y": Stored(20, choices, frozenset(names))}, 0, Load())
    assert [sizes.format_of(used) for used in ([a], [b], names)] == ["x", "x", "y"]
    assert replace(sizes, formats={"x": first}).format_of(names) == "x"


def test_a_scheme_counts_in_the_format_that_it_is_exported_in(both):
    weights = np.array([g.weights for g in both.groups])[:, None]
    a, b = (c.name for c in both.candidates)
    small, large = weights * np.array([[1.0, 0.5, 2.0]]), weights * np.array([[1.1, 0.6, 2.0]])
    sizes = Sizes(
        (a, b), {"x": Stored(10, large, frozenset([a])), "y": Stored(20, small, frozenset([a, b]))}, 0, Load()
    )
    count = len(both.groups)
    assert (sizes.format_of([a]), sizes.format_of([b]), sizes.format_of([a, b])) == ("x", "y", "y")
    assert sizes.checkpoint(Assignment([a] * count)) == pytest.approx(10 + 1.1 * weights.sum())
    assert sizes.checkpoint(Assignment([a, *[b] * (count - 1)])) == pytest.approx(
        20 + weights[0, 0] + 0.5 * weights[1:].sum()
    )
    costs, rest = sizes.costs([0, 1])
    assert rest == 20  # never less than any of both has
    assert costs[0].tolist() == pytest.approx((weights[0, 0] * np.array([1.1, 0.5, 2.0])).tolist())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"run_id": "none", "effective_bits": "9"}, "set run_id"),
        ({}, "nothing to make"),
        ({"effective_bits": "few"}, "is not a number"),
        ({"pareto": "many"}, "pareto=many is not a whole number"),
        ({"budget_gib": "0"}, "budget_gib=0 is no budget; give a number above 0"),
        ({"budget_gib": "nan"}, "budget_gib=nan is no budget"),
        ({"budget_gib": "3", "context": -1}, "context=-1 is not a number of tokens"),
        ({"budget_gib": "3", "concurrency": 0}, "concurrency=0 is not a number of requests"),
    ],
)
def test_settings_that_make_nothing_are_explained(changes, message):
    with pytest.raises(UserError, match=message):
        settings_of(**changes)


def test_a_source_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UserError, match="no manifest"):
        load_scores([f"{tmp_path}/nothing"])


def test_a_run_with_measured_groups_does_not_compare_with_one_without(make_result):
    eight, four = make_result(pair="wfp8_afp8"), make_result(pair="wfp4_afp16")
    measured = replace(four, measured_se=np.full(len(four.groups), np.nan))
    with pytest.raises(UserError, match="groups measured: none and some"):
        combine({"run8": eight, "run4": measured})


def test_schemes_controls_and_formats_that_are_typed_twice_are_one():
    twice = settings_of(schemes="fp8_autoquant_full,fp8_autoquant_full", controls="random,random", candidates="a,a")
    assert [spec.name for spec in twice.specs] == ["fp8_autoquant_full", "random"]
    assert twice.base.candidates == ("a",)
    assert kv_formats("fp8+nvfp4+fp8") == ("fp8", "nvfp4")


def test_a_budget_that_is_typed_twice_is_one_and_its_name_has_no_plus():
    plain = {"budget_ms": None, "context": "0", "concurrency": "1", "step": "decode:1", "costs": None}
    made = SchemeSettings.of_budgets(["run"], effective_bits="9,9.0,10", budget_gib="1e30", **plain)
    assert [spec.name for spec in made.specs] == ["bits_9_gib_1e30", "bits_10_gib_1e30"]
