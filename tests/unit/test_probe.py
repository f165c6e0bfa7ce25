"""Figures of a probe against numbers worked out by hand, on a model whose logits are a table."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from layerbits.inputs.calibration import Batch, Segment
from layerbits.probing.measured import Comparison, Difference, ProbeResult, Rows, SchemeProbe
from layerbits.probing.report import figure, markdown, write_probe
from layerbits.probing.unquantized import UnquantizedLogits
from layerbits.results.bootstrap import standard_error
from layerbits.results.result import ModelInfo

VOCABULARY = 7


class TableModel(torch.nn.Module):
    """Logits of a token are a row of a table, whatever is around it."""

    def __init__(self, table):
        super().__init__()
        self.embedding = torch.nn.Embedding(len(table), 1)
        self.table = table

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, use_cache, attention_mask=None):
        return SimpleNamespace(logits=self.table[input_ids])


def tables(seed=0, scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(VOCABULARY, VOCABULARY, generator=generator)
    return before, before + scale * torch.randn(VOCABULARY, VOCABULARY, generator=generator)


def batch(rows=3, length=6, padded=0):
    """Rows of two captions each; the last ``padded`` tokens of the last row are padding."""
    ids = torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(rows, length, dtype=torch.bool)
    mask[:, 0] = False
    sample = (2 * torch.arange(rows)[:, None] + (torch.arange(length) >= length // 2)).int()
    attention = None
    if padded:
        mask[-1, -padded:], sample[-1, -padded:] = False, -1
        attention = torch.ones(rows, length, dtype=torch.int64)
        attention[-1, -padded:] = 0
    return Batch((Segment(ids, attention, mask, sample),))


def by_hand(before, after, rows):
    """The same in numpy and float64, token by token; ``Difference`` without its standard error, KL per caption."""
    losses, divergences, same, squares, largest = [], [], [], [], []
    captions = {}
    (segment,) = rows.segments
    for row, mask, owners in zip(segment.input_ids, segment.loss_mask, segment.sample, strict=True):
        for at in range(1, len(row)):
            if not mask[at]:
                continue
            a, b = (table[row[at - 1]].double().numpy() for table in (after, before))
            log_a, log_b = (x - np.log(np.exp(x).sum()) for x in (a, b))
            losses.append(-log_a[row[at]])
            divergences.append((np.exp(log_b) * (log_b - log_a)).sum())
            same.append(a.argmax() == b.argmax())
            squares.append(((a - b) ** 2).mean())
            largest.append(np.abs(a - b).max())
            captions.setdefault(int(owners[at]), []).append(divergences[-1])
    sums = [sum(captions[key]) for key in sorted(captions)]
    tokens = len(losses)
    figures = (tokens, np.exp(np.mean(losses)), np.mean(divergences), np.nan, np.quantile(divergences, 0.99))
    return Difference(*figures, np.mean(same), np.mean(squares), max(largest)), sums


@pytest.mark.parametrize("scale", [1e-3, 0.3, 5.0])
def test_figures_are_those_worked_out_by_hand(scale):
    before, after = tables(scale=scale)
    found, captions = UnquantizedLogits(TableModel(before), [batch()]).compare(TableModel(after))
    expected, sums = by_hand(before, after, batch())
    for name in ("tokens", "perplexity", "kl", "kl_p99", "top1_agreement", "logit_mse", "logit_max_error"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=2e-4), name
    assert captions == pytest.approx(sums, rel=2e-4)


def test_top1_agreement_is_a_share_of_the_tokens():
    before, after = tables(scale=5.0)
    found, _ = UnquantizedLogits(TableModel(before), [batch()]).compare(TableModel(after))
    assert 0 < found.top1_agreement < 1


def test_padding_has_no_part_in_any_figure():
    before, after = tables()
    padded = batch(padded=3)
    expected, sums = by_hand(before, after, padded)
    found, captions = UnquantizedLogits(TableModel(before), [padded]).compare(TableModel(after))
    assert found.tokens == expected.tokens == 3 * 5 - 3
    assert found.kl == pytest.approx(expected.kl, rel=2e-4)
    padded.segments[0].input_ids[-1, -3:] = 0  # other padding, same figures
    again, _ = UnquantizedLogits(TableModel(before), [padded]).compare(TableModel(after))
    assert again == found
    assert captions == pytest.approx(sums, rel=2e-4)


def test_a_model_does_not_differ_from_itself():
    before, _ = tables()
    unquantized = UnquantizedLogits(TableModel(before), [batch()])
    found, _ = unquantized.compare(TableModel(before), row_by_row=True)
    assert (found.kl, found.logit_mse, found.logit_max_error, found.top1_agreement) == (0, 0, 0, 1)
    assert found.perplexity == pytest.approx(unquantized.perplexity)


def test_logits_that_are_no_numbers_are_counted_and_give_no_figures():
    before, after = tables()
    after[2, 3] = math.nan
    found, _ = UnquantizedLogits(TableModel(before), [batch()]).compare(TableModel(after))
    (segment,) = batch().segments
    assert found.nonfinite == int((segment.input_ids[:, :-1] == 2).sum()) > 0
    assert math.isnan(found.kl)
    assert math.isnan(found.perplexity)


def test_the_standard_error_is_the_scatter_over_draws_of_captions():
    rng = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(4000):
        tokens = rng.integers(5, 30, 40)
        sums = rng.normal(tokens * rng.lognormal(-3, 0.5, 40), 0.01)
        mean, error = standard_error(sums, tokens)
        means.append(mean)
        errors.append(error)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.05)


def test_one_caption_has_no_standard_error():
    assert math.isnan(standard_error([1.0], [10])[1])


def made(schemes):
    """A result over 40 captions of 10 tokens; each scheme is (name, bits, KL, control of)."""
    rng = np.random.default_rng(0)
    hard = rng.lognormal(0, 1, 40)
    probes = []
    for name, bits, kl, control_of in schemes:
        sums = 10 * kl * hard / hard.mean() * rng.uniform(0.98, 1.02, 40)
        mean, error = standard_error(sums, [10] * 40)
        figures = Difference(400, 20.0, mean, error, 3 * kl, 0.9, 0.1, 2.0, kl_median=kl / 2, kl_p90=2 * kl)
        method = "random" if control_of else "coverage"
        probes.append(SchemeProbe(name, name, method, control_of, bits, kl / 2, figures, tuple(sums), 1.0))
    floor = Difference(400, 19.0, 1e-9, 1e-10, 1e-8, 1.0, 1e-12, 1e-6, kl_median=1e-10, kl_p90=1e-9)
    info = ModelInfo("tiny", "tiny", "r0", "Tiny", "float32")
    rows = Rows("everyday", "packed", 16, 25, 400)
    return ProbeResult(info, ("abc",), rows, 19.0, floor, "itself", (10,) * 40, tuple(probes))


SCHEMES = [("top25", 14.0, 0.010, None), ("full", 9.0, 0.030, None), ("full.random0", 9.0, 0.036, "full")]


def test_captions_that_are_hard_for_both_do_not_hide_a_difference():
    result = made(SCHEMES)
    control = next(c for c in result.comparisons() if c.why == "control")
    full, random = result.schemes[1:]
    apart = math.hypot(full.difference.kl_se, random.difference.kl_se)
    assert control.kl == pytest.approx(random.difference.kl - full.difference.kl)
    assert control.kl < 2 * apart  # told apart by the pairing alone
    assert control.verdict == "confirmed"


def test_fewer_bits_are_compared_in_their_order():
    (found,) = [c for c in made(SCHEMES).comparisons() if c.why == "fewer bits"]
    assert (found.lower, found.higher, found.verdict) == ("top25", "full", "confirmed")


def test_a_control_that_does_better_contradicts():
    result = made([("full", 9.0, 0.030, None), ("full.random0", 9.0, 0.020, "full")])
    assert [c.verdict for c in result.comparisons()] == ["contradicted"]


@pytest.mark.parametrize("kl", [0.01, -0.01, math.nan])
def test_a_difference_within_its_error_is_undecided(kl):
    assert Comparison("a", "b", "control", kl, 0.006).verdict == "undecided"


def test_additivity_is_measured_over_predicted():
    result = made(SCHEMES)
    assert result.metrics()["probe/full/additivity"] == pytest.approx(2.0, rel=0.05)
    assert json.loads(json.dumps(result.to_json()))["schemes"][0]["additivity"] == pytest.approx(2.0, rel=0.05)


def test_without_a_prediction_there_is_no_additivity():
    result = made(SCHEMES)
    result = replace(result, schemes=tuple(replace(s, predicted_kl=math.nan) for s in result.schemes))
    assert "probe/full/additivity" not in result.metrics()
    assert result.to_json()["schemes"][0]["additivity"] is None


def test_metrics_have_the_documented_names():
    names = set(made(SCHEMES).metrics())
    figures = {"perplexity", "kl", "kl_se", "kl_median", "kl_p90", "kl_p99", "top1_agreement", "logit_mse"}
    figures |= {"logit_max_error"}
    own = figures | {"bits", "predicted_kl", "additivity", "nonfinite"}
    assert {n for n in names if n.startswith("probe/top25/")} == {f"probe/top25/{n}" for n in own}
    above = {"kl_above_scheme", "kl_above_scheme_se"}
    assert {n for n in names if n.startswith("probe/full.random0/")} == {f"probe/full.random0/{n}" for n in own | above}
    assert {n for n in names if n.startswith("probe/floor/")} == {f"probe/floor/{n}" for n in figures}
    assert "probe/unquantized/perplexity" in names


def test_the_table_has_a_row_per_scheme_the_floor_and_the_verdicts():
    text = markdown(made(SCHEMES))
    assert "Of 2 expected differences (below): 2 confirmed, 0 contradicted, 0 undecided." in text
    for start in ("| top25 | 14.000 |", "| full.random0 |", "| noise floor |", "| top25 | full | fewer bits |"):
        assert start in text


def test_a_probe_of_one_caption_says_that_it_decides_nothing():
    several = made(SCHEMES)
    one = replace(
        several,
        caption_tokens=(400,),
        schemes=tuple(replace(s, caption_kl=(sum(s.caption_kl),)) for s in several.schemes),
    )
    assert "Of 2 expected differences (below): 0 confirmed, 0 contradicted, 2 undecided." in markdown(one)
    assert "400 tokens of 1 caption counted" in markdown(one)
    assert "one has none, so no difference can be decided: give more texts" in markdown(one)
    assert "one has none" not in markdown(several)


def test_a_scheme_below_the_floor_is_named():
    assert "Not above the noise floor: tiny." in markdown(made([("tiny", 15.0, 1e-10, None), *SCHEMES]))


def test_the_figure_tells_schemes_from_controls():
    labels = [t.get_text() for t in figure(made(SCHEMES)).legends[0].get_texts()]
    assert {"schemes", "random"} <= set(labels)


def test_no_error_bar_is_cut():
    ax = figure(made(SCHEMES)).axes[0]
    ends = np.concatenate([segment[:, 1] for bars in ax.collections for segment in bars.get_segments()])
    assert ends.max() > max(kl for _, _, kl, _ in SCHEMES)
    assert ax.get_ylim()[1] > ends.max()


def test_a_probe_is_written_whole(tmp_path):
    folder = write_probe(made(SCHEMES), tmp_path)
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert files == {"probe.json", "probe.md", "figures/probe.png"}
    assert [p.name for p in (tmp_path / "tmp").iterdir()] == [folder.name]
