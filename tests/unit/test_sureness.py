"""How sure a scheme is: captions drawn again, on scores whose noise is known."""

from dataclasses import replace

import numpy as np
import pytest

from layerbits.results.assignment import UNQUANTIZED
from layerbits.schemes.catalog import SchemeSpec
from layerbits.schemes.folder import write_schemes
from layerbits.schemes.make import make_schemes
from layerbits.schemes.report import markdown, metrics
from layerbits.schemes.solver import pareto, relaxed
from layerbits.schemes.source import combine
from layerbits.schemes.sureness import by_group, in_words, sureness


def spec(name="mine", budget=10.0, **more):
    return SchemeSpec.from_mapping({"name": name, "effective_bits": budget, "objective": "predicted_kl", **more})


def noisy(make_result, noise, samples=64, blocks=8, pairs=("wint8_afp16",)):
    """A source whose captions scatter around equal shares by a factor."""
    rng = np.random.default_rng(0)
    runs = {}
    for pair in pairs:
        result = make_result(blocks=blocks, samples=samples, pair=pair)
        shares = rng.lognormal(0, noise, (samples, *result.predicted_kl.shape)) if noise else np.ones((samples, 1))
        runs[pair] = replace(result, sample_kl=shares / shares.sum(axis=0) * result.predicted_kl)
    return combine(runs)


@pytest.fixture(scope="module")
def doubtful(make_result):
    """A source with much scatter, and how sure a scheme of it is."""
    source = noisy(make_result, 1.0)
    return source, sureness([spec()], source)


def test_captions_that_agree_leave_no_doubt(make_result):
    (found,) = sureness([spec()], noisy(make_result, 0.0))
    assert found.stable == len(found.chosen)
    assert found.regret == pytest.approx(0, abs=1e-12)
    assert found.needed < found.captions
    assert found.unsure == []


def test_shares_are_of_all_draws_and_the_scheme_is_what_most_of_them_choose(doubtful):
    _, (found,) = doubtful
    np.testing.assert_allclose(found.shares.sum(axis=1), 1)
    assert (found.agreement > 0.5).mean() > 0.8
    assert 0 < found.stable < len(found.chosen)
    assert found.unsure[0] == found.layers[int(np.argmin(found.agreement))]


def test_more_scatter_means_less_sure_and_more_regret(make_result):
    calm, wild = (sureness([spec()], noisy(make_result, noise))[0] for noise in (0.2, 1.5))
    assert calm.stable > wild.stable
    assert 0 <= calm.regret < wild.regret <= wild.regret_high
    assert calm.needed < wild.needed


def test_the_captions_that_are_needed_are_a_number_of_their_own(make_result):
    few = noisy(make_result, 1.0, samples=40)
    many = replace(
        few, sample_kl=np.tile(few.sample_kl / 4, (4, 1, 1)), sample_tokens=np.tile(few.sample_tokens, 4)
    )  # four times as many of the same captions: the same scatter of one, half the scatter of the mean
    needed = [sureness([spec()], source)[0].needed for source in (few, many)]
    assert needed[1] == pytest.approx(needed[0], rel=0.5)


def test_coverage_and_several_formats_are_drawn_too(make_result):
    source = noisy(make_result, 1.0, pairs=("wint8_afp16", "wfp4_afp16"))
    half, whole = sureness([spec("half", 6.0, coverage=0.5), spec("whole", 6.0)], source, draws=25)
    assert half.choices == ("wint8_afp16", "wfp4_afp16", None)
    assert half.shares[:, -1].mean() > whole.shares[:, -1].mean()  # half of the blocks stay unquantized
    schemes = make_schemes([spec("half", 6.0, coverage=0.5)], source)
    names = [half.choices[k] for k in half.chosen]
    assert names == list(schemes[0].assignment)


def test_a_run_without_shares_of_captions_says_nothing(make_result):
    source = combine({"run": make_result(samples=0)})
    assert sureness([spec()], source) == []
    assert "How sure" not in markdown(make_schemes([spec()], source), [])


def test_a_control_has_nothing_to_be_sure_of(doubtful):
    control = SchemeSpec("random", control="random")
    assert len(sureness([spec(), control], doubtful[0], draws=5)) == 1


def test_report_metrics_and_figure(doubtful, tmp_path):
    source, sure = doubtful
    made = make_schemes([spec()], source)
    folder = write_schemes(tmp_path, source, made, sure=sure)
    assert "## How sure" in (folder / "schemes.md").read_text()
    assert (folder / "figures" / "stability_mine.png").stat().st_size > 1000
    assert (folder / "stability.json").exists()
    found = metrics(made, sure)
    assert found["scheme/mine/stable_groups"] == sure[0].stable
    assert found["scheme/mine/regret"] == pytest.approx(sure[0].regret)


def test_the_relaxed_choice_is_near_the_optimum_and_within_the_budget():
    rng = np.random.default_rng(1)
    scores = np.exp(rng.normal(0, 1, (20, 40, 2)))
    scores[:, :, 1] *= 5
    weights, bits, budget = rng.uniform(1, 3, 40), {"eight": 8.0, "four": 4.25}, 7.0
    for values, choice in zip(scores, relaxed(scores, [*bits.values()], weights, budget), strict=True):
        (best,) = pareto(values, bits, weights, [budget])
        picked = choice != UNQUANTIZED
        spent = np.average(np.where(picked, np.array([*bits.values()])[choice], 16.0), weights=weights)
        total = values[np.flatnonzero(picked), choice[picked]].sum()
        assert spent <= budget + 1e-6
        assert best.score <= total + 1e-9
        assert total < 1.15 * best.score


def test_frames_for_the_command_line(doubtful):
    found = sureness([spec("bits", [9.0, 11.0])], doubtful[0], draws=10)
    assert list(in_words(found)["scheme"]) == ["bits_9", "bits_11"]
    groups = by_group(found)
    assert len(groups) == 2 * len(found[0].layers)
    np.testing.assert_allclose(groups["wint8_afp16"] + groups["unquantized"], 1)
    first = groups.iloc[0]
    assert first["agreement"] == pytest.approx(first[first["chosen"]])
