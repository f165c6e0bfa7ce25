"""Measured schemes and the factor that they give to sums of predictions."""

import json

import pytest

from layerbits.errors import UserError
from layerbits.history.scheme_inputs import load_factors
from layerbits.schemes.additivity import Point, expected, factors, points_of
from layerbits.schemes.catalog import SchemeSpec
from layerbits.schemes.make import make_schemes
from layerbits.schemes.report import markdown, metrics
from layerbits.schemes.source import combine

PAIR = ("wint8_afp16",)


def point(bits, predicted, ratio, candidates=PAIR):
    return Point(f"bits_{bits}", candidates, bits, predicted, predicted * ratio, 0.01 * predicted)


def test_schemes_that_agree_give_their_factor_with_no_error_but_their_own():
    (found,) = factors([point(9, 0.1, 0.8), point(11, 0.05, 0.8), point(13, 0.02, 0.8)])
    assert found.at(10) == pytest.approx(0.8)
    assert found.error == pytest.approx(0.0126, abs=1e-3)  # 0.01 of the predicted is that of the measured KL
    assert (found.bits, found.schemes) == ((9, 11, 13), 3)
    assert found.left_out == (pytest.approx(0.2231, abs=1e-3), pytest.approx(0, abs=1e-9))


def test_the_factor_follows_the_budget_and_its_error_is_what_lies_beside_the_line():
    (found,) = factors([point(9, 0.1, 1.0), point(11, 0.05, 2.0), point(13, 0.02, 4.0), point(12, 0.03, 3.5)])
    assert found.at(9) == pytest.approx(1)
    assert found.at(10) == pytest.approx(2**0.5)
    assert found.error > 0.1
    assert found.left_out[1] < found.left_out[0]
    assert "1.00 to 4.00 times" in found.words


def test_two_budgets_are_too_few_and_pairs_are_kept_apart():
    other = ("wfp8_afp8",)
    assert factors([point(9, 0.1, 0.8), point(11, 0.05, 0.8), point(11, 0.05, 0.7)]) == []
    found = factors([point(b, 0.1, r, c) for c, r in ((PAIR, 0.8), (other, 1.3)) for b in (9, 10, 11)])
    assert {f.candidates: round(f.at(10), 6) for f in found} == {PAIR: 0.8, other: 1.3}


@pytest.fixture
def schemes(make_result):
    source = combine({"run": make_result(blocks=12)})
    specs = [SchemeSpec.from_mapping({"name": f"bits_{b}", "effective_bits": b}) for b in (9, 11, 14)]
    return make_schemes(specs, source)


def test_a_scheme_within_the_measured_bits_has_an_expected_kl_beside_its_sum(schemes):
    known = factors([point(9, 0.1, 0.5), point(10, 0.1, 0.5), point(12, 0.02, 0.55)])
    kl, error = expected(schemes[1], known)
    assert kl == pytest.approx(schemes[1].predicted_kl * known[0].at(schemes[1].effective_bits))
    assert 0 < error < kl
    assert expected(schemes[2], known) is None  # more bits than any that was measured
    text = markdown(schemes, known=known)
    assert "expected by measured schemes" in text
    assert known[0].words in text
    assert metrics(schemes, known=known)["scheme/bits_11/expected_kl"] == pytest.approx(kl)
    assert "expected" not in markdown(schemes)


def record(count, revision="0123456789abcdef", control=None):
    return {
        "model": {"revision": revision},
        "schemes": [
            {
                "scheme": f"s{i}",
                "candidates": list(PAIR),
                "effective_bits": 9.0 + i,
                "predicted_kl": 0.1,
                "control_of": control if i == 0 else None,
                "kv_cache": "none",
                "difference": {"kl": 0.08, "kl_se": None},
            }
            for i in range(count)
        ],
    }


def test_controls_are_no_points():
    assert [p.scheme for p in points_of(record(3, control="s1"))] == ["s1", "s2"]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (record(2), "probe three budgets or more"),
        (record(3, revision="other"), "probed revision other"),
        ({"model": {"revision": "0123456789abcdef"}}, "no record of a probe"),
    ],
)
def test_a_probe_that_says_too_little_is_refused(tmp_path, data, words):
    (tmp_path / "probe.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=words):
        load_factors(str(tmp_path), None, "0123456789abcdef")


def test_a_folder_without_a_probe_is_refused(tmp_path):
    with pytest.raises(UserError, match="no probe at"):
        load_factors(str(tmp_path / "x"), None, "r")
    (tmp_path / "probe.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load_factors(str(tmp_path), None, "r")
