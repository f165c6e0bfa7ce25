"""Figures: what they show, taken from the drawn objects."""

from __future__ import annotations

from dataclasses import replace

import matplotlib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import LogNorm

from layerbits import figures
from layerbits.figures.style import KIND_STYLES, line_style
from layerbits.results.bootstrap import with_intervals
from layerbits.results.frames import grid, spearman
from layerbits.results.result import KINDS

PAIRS = ("wint8_afp16", "wfp8_afp8", "wfp4_afp16")


def legend_words(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def drawn_lines(ax):
    return [line for line in ax.lines if len(line.get_xdata()) > 2]


@pytest.mark.parametrize(("chosen", "framed"), [([0, 1], 0), ([1, 1], 1)])
def test_a_frame_around_an_unusual_choice_is_named_in_the_legend(chosen, framed):
    shares = np.array([[0.7, 0.3], [0.2, 0.8]])
    figure = figures.choice_strips([0, 1], ["qkv", "qkv"], [None, "wfp8_afp8"], shares, chosen)
    words = ["most draws choose another than the scheme"] * framed
    assert legend_words(figure) == ["unquantized", "wfp8_afp8", *words]
    assert sum(not patch.get_facecolor()[3] for patch in figure.axes[0].patches) == framed


@pytest.fixture
def frame(make_result):
    return figures.tidy(make_result(blocks=6))


@pytest.fixture
def several(make_result):
    """The rows of runs of several candidates, as :func:`layerbits.history.scores` gives them."""
    return pd.concat([figures.tidy(make_result(pair=pair)) for pair in PAIRS], ignore_index=True)


def test_heatmap_shows_every_group_in_its_cell(make_result):
    result = make_result(blocks=6)
    (image,) = figures.heatmap(figures.tidy(result)).axes[0].images
    assert np.array_equal(image.get_array(), result.predicted_kl.reshape(6, 4).T)


def test_heatmap_has_a_panel_per_candidate_under_one_scale(several):
    figure = figures.heatmap(several)
    images = [ax.images[0] for ax in figure.axes if ax.images]
    assert [ax.get_title(loc="left") for ax in figure.axes[:3]] == list(PAIRS)
    assert len({id(image.norm) for image in images}) == 1


def test_heatmap_hatches_and_names_what_is_not_finite(make_result):
    figure = figures.heatmap(figures.tidy(make_result(blocks=6, nonfinite=["B03.down"])))
    hatched = [p.get_xy() for p in figure.axes[0].patches if p.get_hatch()]
    assert hatched == [(2.5, 2.5)]  # lower left corner of block 3, fourth kind
    assert "not finite: B03.down" in legend_words(figure)


def test_heatmap_dots_what_the_recipe_quantized(make_result):
    result = make_result(blocks=6)
    (dots,) = [c for c in figures.heatmap(figures.tidy(result)).axes[0].collections if len(c.get_offsets()) > 5]
    kinds = ["qkv", "o", "gate_up", "down"]
    pairs = zip(result.groups, result.allocation.assignment, strict=True)
    expected = {(g.block, kinds.index(g.kind)) for g, name in pairs if name}
    assert {tuple(at) for at in dots.get_offsets().data.astype(int).tolist()} == expected


def test_heatmap_tells_zero_from_missing(frame):
    frame.loc[frame["layer"] == "B02.o", "predicted_kl"] = 0.0
    figure = figures.heatmap(frame)
    assert [p.get_xy() for p in figure.axes[0].patches] == [(1.5, 0.5)]
    assert "zero or below" in legend_words(figure)


def test_heatmap_gives_lm_head_a_column_of_its_own(make_result):
    cells = grid(figures.tidy(make_result(blocks=3, lm_head=True)), "score")
    assert cells.blocks == (0, 1, 2, None)
    assert cells.present[cells.kinds.index("lm_head")].tolist() == [False, False, False, True]


def test_groups_that_share_a_cell_are_summed():
    rows = [(0, "other", "B00.other", 1.0, True), (0, "other", "B00.other.1", 2.0, False)]
    cells = grid(pd.DataFrame(rows, columns=["block", "kind", "layer", "score", "chosen"]), "score")
    assert cells.values.tolist() == [[3.0]]
    assert not cells.chosen.any()


@pytest.mark.parametrize(("spread", "log"), [(3.0, False), (1e4, True)])
def test_colours_are_logarithmic_where_values_span_decades(frame, spread, log):
    frame["predicted_kl"] = np.geomspace(1.0, spread, len(frame))
    assert isinstance(figures.heatmap(frame).axes[0].images[0].norm, LogNorm) is log


def test_noise_near_zero_does_not_use_up_the_colours(frame):
    frame.loc[0, "predicted_kl"] = 1e-30
    norm = figures.heatmap(frame).axes[0].images[0].norm
    assert norm.vmin == pytest.approx(norm.vmax * 1e-8)


def test_by_layer_draws_a_line_per_kind(make_result):
    result = make_result(blocks=6)
    figure = figures.by_layer(figures.tidy(result))
    lines = drawn_lines(figure.axes[0])
    assert np.array_equal([line.get_ydata() for line in lines], result.predicted_kl.reshape(6, 4).T)
    assert legend_words(figure) == ["qkv", "o", "gate_up", "down"]


def test_kinds_differ_without_colour(frame):
    lines = drawn_lines(figures.by_layer(frame).axes[0])
    assert len({line.get_marker() for line in lines}) == 4
    assert len({str(KIND_STYLES[kind]["linestyle"]) for kind in ("qkv", "o", "gate_up", "down")}) == 4


def test_by_layer_marks_what_is_not_finite_at_the_foot(make_result):
    figure = figures.by_layer(figures.tidy(make_result(blocks=6, nonfinite=["B03.down"])))
    crosses = [line for line in figure.axes[0].lines if line.get_marker() == "x" and len(line.get_xdata())]
    assert [line.get_xdata().tolist() for line in crosses] == [[3.0]]
    assert "not finite: B03.down" in legend_words(figure)


def test_by_layer_marks_zero_where_a_log_axis_cannot_show_it(frame):
    frame.loc[frame["layer"] == "B02.o", "predicted_kl"] = 0.0
    figure = figures.by_layer(frame)
    zeros = [line for line in figure.axes[0].lines if line.get_marker() == "$0$" and len(line.get_xdata())]
    assert [line.get_xdata().tolist() for line in zeros] == [[2.0]]
    assert "zero or below" in legend_words(figure)


def test_overlay_has_a_panel_per_kind_and_a_line_per_run(make_result):
    frames = {name: figures.tidy(make_result(seed=i)) for i, name in enumerate(("one", "two", "three"))}
    figure = figures.overlay(frames, "score")
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["qkv", "o", "gate_up", "down"]
    assert [len(drawn_lines(ax)) for ax in figure.axes] == [3, 3, 3, 3]
    assert legend_words(figure) == ["one", "two", "three"]


def test_overlay_splits_a_frame_of_several_candidates(several):
    figure = figures.overlay({"run": several})
    assert legend_words(figure) == [f"run · {pair}" for pair in PAIRS]


def test_overlay_keeps_forty_lines_apart(frame):
    figure = figures.overlay({str(i): frame for i in range(40)})
    assert len(drawn_lines(figure.axes[0])) == 40
    assert len({tuple(map(str, line_style(i).values())) for i in range(40)}) == 40


def test_overlay_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no frames"):
        figures.overlay({})


def test_ranked_bars_show_the_largest_first(make_result):
    result = make_result(blocks=6)
    ax = figures.ranked_bars(figures.tidy(result), top=7).axes[0]
    largest = np.sort(result.predicted_kl)[::-1][:7]
    assert [bar.get_width() for bar in ax.patches] == largest.tolist()
    names = dict(zip(result.predicted_kl, (g.key for g in result.groups), strict=True))
    assert [t.get_text() for t in ax.get_yticklabels()] == [names[value] for value in largest]


def test_ranked_bars_hatch_what_the_recipe_kept(frame):
    ax = figures.ranked_bars(frame, top=100).axes[0]
    kept = set(frame["layer"][~frame["chosen"]])
    labels = [t.get_text() for t in ax.get_yticklabels()]
    assert {name for name, bar in zip(labels, ax.patches, strict=True) if bar.get_hatch()} == kept
    assert kept


def test_ranked_bars_have_whiskers_where_an_interval_is_known(make_result):
    frame = figures.tidy(make_result(blocks=6)).assign(low=np.nan, high=np.nan)
    frame.loc[frame["layer"] == "B01.down", ["low", "high"]] = 0.001, 0.002
    ax = figures.ranked_bars(frame, top=100).axes[0]
    (whiskers,) = ax.collections
    (at,) = whiskers.get_segments()
    assert at[:, 0].tolist() == [0.001, 0.002]
    assert [t.get_text() for t in ax.get_yticklabels()][int(at[0, 1])] == "B01.down"


def test_ranked_bars_say_the_range_of_each_rank(make_result):
    frame = figures.tidy(with_intervals(make_result(blocks=6)))
    ax = figures.ranked_bars(frame, top=5).axes[0]
    top = frame.iloc[:5]
    ends = zip(top["rank_low"], top["rank_high"], strict=True)
    words = [str(low) if low == high else f"{low}–{high}" for low, high in ends]
    assert [text.get_text() for text in ax.texts] == [*words, "rank"]


def test_one_far_whisker_does_not_flatten_the_bars(make_result):
    frame = figures.tidy(make_result(blocks=6))
    frame = frame.assign(low=frame["predicted_kl"] / 2, high=frame["predicted_kl"] * 2)
    assert figures.ranked_bars(frame, top=5).axes[0].get_xscale() == "linear"
    frame.loc[0, "high"] = frame["predicted_kl"].max() * 1000
    assert figures.ranked_bars(frame, top=5).axes[0].get_xscale() == "log"


def test_ranked_bars_name_what_is_not_finite(make_result):
    figure = figures.ranked_bars(figures.tidy(make_result(nonfinite=["B00.qkv", "B01.o"])), top=100)
    assert "not finite: B00.qkv, B01.o" in legend_words(figure)
    assert len(figure.axes[0].patches) == 22


def test_cumulative_share_marks_the_groups_that_make_most():
    frame = pd.DataFrame(
        {"block": range(4), "kind": "o", "layer": list("abcd"), "score": [1.0, 60.0, 35.0, 4.0], "candidate": "pair"}
    )
    ax = figures.cumulative_share(frame).axes[0]
    assert ax.lines[0].get_ydata().tolist() == [0, 60, 95, 99, 100]
    assert ax.get_legend().get_texts()[0].get_text() == "pair: 2 of 4 groups make 90%"


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=30), st.integers(1, 100))
def test_groups_for_share_is_the_smallest_number_that_reaches_it(values, percent):
    largest_first = sorted(values, reverse=True)
    enough = [n for n in range(len(values) + 1) if sum(largest_first[:n]) * 100 >= percent * sum(values)]
    expected = min(enough) if sum(values) else 0
    # The tenths make sums that floats cannot hold exactly.
    assert figures.groups_for_share(np.array(values) / 10, percent / 100) == expected


def test_pareto_front_leaves_out_what_is_beaten():
    frame = pd.DataFrame({"bits": [4, 8, 8, 9], "score": [9.0, 2.0, 5.0, 3.0], "label": list("abcd")})
    front = figures.pareto(frame).axes[0].lines[-1]
    assert front.get_xdata().tolist() == [4, 8]
    assert front.get_ydata().tolist() == [9, 2]


def test_pareto_joins_budgets_but_not_repeats():
    frame = pd.DataFrame({"bits": [4, 8, 8, 8], "score": [9.0, 2.0, 5.0, 3.0], "label": ["a", "a", "b", "b"]})
    joined, repeats = figures.pareto(frame).axes[0].lines[:2]
    assert (joined.get_linestyle(), repeats.get_linestyle()) == ("-", "None")


def test_saved_pictures_keep_the_brightest_cell(frame, tmp_path):
    from PIL import Image

    from layerbits.figures.style import save_png

    frame["predicted_kl"] = 1e-3
    frame.loc[0, "predicted_kl"] = 1.0  # one cell of 24 has the colour of the top
    image = Image.open(save_png(figures.heatmap(frame), tmp_path / "map.png")).convert("RGB")
    top = np.array([253, 231, 55])  # cividis
    assert np.abs(np.asarray(image).reshape(-1, 3).astype(int) - top).max(axis=1).min() <= 8


def test_pareto_says_how_many_points_a_log_axis_cannot_show():
    frame = pd.DataFrame({"bits": [4, 8, 16, 16], "kl": [9.0, 0.2, 0.0, np.nan], "label": "pair"})
    figure = figures.pareto(frame, "kl")
    assert figure.axes[0].get_yscale() == "log"
    assert any(words.startswith("2 not shown") for words in legend_words(figure))


def test_pareto_without_a_usable_row_is_refused():
    with pytest.raises(ValueError, match="no row"):
        figures.pareto(pd.DataFrame({"bits": [8.0], "score": [np.nan], "label": ["a"]}))


def test_rank_change_joins_each_group_at_its_ranks(frame):
    other = frame.assign(rank=frame["rank"].iloc[::-1].to_numpy())
    figure = figures.rank_change(frame, other, ("before", "after"), top=24)
    ends = {tuple(line.get_ydata()) for line in figure.axes[0].lines}
    assert ends == {(rank, 25 - rank) for rank in range(1, 25)}
    assert "Spearman -1.00" in figure.axes[0].get_xlabel()


def test_rank_change_tells_the_rank_of_a_group_beyond_the_top(frame):
    other = frame.assign(rank=(frame["rank"] + 9) % 24 + 1)
    words = [t.get_text() for t in figures.rank_change(frame, other, ("a", "b"), top=5).axes[0].texts]
    first = frame["layer"][frame["rank"] == 1].item()
    assert f"1  {first}" in words
    assert f"11  {first}" in words
    assert "beyond 5" in words


def test_rank_change_marks_a_group_that_one_run_lacks(frame):
    first = frame["layer"][frame["rank"] == 1].item()
    figure = figures.rank_change(frame, frame[frame["layer"] != first], ("a", "b"), top=5)
    assert f"–  {first}" in [t.get_text() for t in figure.axes[0].texts]


def test_rank_change_refuses_several_candidates(frame, several):
    with pytest.raises(ValueError, match="select the rows of one"):
        figures.rank_change(frame, several, ("a", "b"))


def test_scatter_tells_agreement_of_the_points_that_can_be_drawn():
    x = np.array([1.0, 2.0, 4.0, 8.0, np.nan, 3.0])
    y = np.array([1.0, 3.0, 4.5, 80.0, 1.0, 0.0])
    figure = figures.scatter_agreement(x, y, list("abcdef"))
    words = [t.get_text() for t in figure.axes[0].texts]
    assert any("4 points, Spearman 1.00\nwithin a factor of 2: 75%" in w and "2 left out" in w for w in words)
    assert "d" in words  # the only one off by more than a factor of two
    assert not {"a", "b", "c"} & set(words)


def test_scatter_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no pair"):
        figures.scatter_agreement(np.array([np.nan]), np.array([1.0]))


def test_rank_correlation_writes_numbers_and_hatches_gaps():
    matrix = pd.DataFrame([[1.0, 0.42, np.nan], [0.42, 1.0, -0.3], [np.nan, -0.3, 1.0]], list("abc"), list("abc"))
    ax = figures.rank_correlation(matrix).axes[0]
    assert [t.get_text() for t in ax.texts] == ["1.00", "0.42", "0.42", "1.00", "-0.30", "-0.30", "1.00"]
    assert len([p for p in ax.patches if p.get_hatch()]) == 2


def test_spearman_counts_ranks_not_values():
    assert spearman(np.array([1.0, 2.0, 3.0]), np.array([1.0, 10.0, 1000.0])) == pytest.approx(1.0)
    assert np.isnan(spearman(np.array([1.0, 2.0, 3.0]), np.ones(3)))


def test_save_figures_writes_small_pngs(make_result, tmp_path):
    paths = figures.save_figures(make_result(blocks=36), tmp_path / "figures")
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == sorted(p.name for p in paths)
    assert [p.name for p in paths] == ["heatmap.png", "by_layer.png", "ranked.png", "cumulative.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") and p.stat().st_size < 150_000 for p in paths)


def test_figures_of_a_result_without_a_single_number_can_be_drawn(make_result, tmp_path):
    result = make_result(blocks=2)
    empty = np.full_like(result.scores, np.nan)
    assert len(figures.save_figures(replace(result, scores=empty, predicted_kl=empty), tmp_path)) == 4


def test_figures_show_raw_scores_where_no_predicted_kl_is_known(make_result, tmp_path, monkeypatch):
    from layerbits.figures import run

    values = []
    monkeypatch.setattr(
        run, "heatmap", lambda frame, value, **kw: values.append(value) or figures.heatmap(frame, value)
    )
    result = make_result(blocks=2)
    figures.save_figures(replace(result, predicted_kl=np.full_like(result.scores, np.nan)), tmp_path)
    assert values == ["score"]


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense"])
def test_a_backend_of_the_environment_does_not_matter(python, monkeypatch, tmp_path, backend):
    """A notebook hands its own to every command."""
    monkeypatch.setenv("MPLBACKEND", backend)
    monkeypatch.setenv("HOME", str(tmp_path / "missing"))
    code = (
        "import sys; sys.modules['matplotlib_inline'] = None\n"
        "import pandas as pd; from pathlib import Path; from layerbits import figures\n"
        "from layerbits.figures.style import save_png\n"
        "frame = pd.DataFrame({'bits': [4.0, 8.0], 'label': ['a', 'a'], 'kl': [0.5, 0.01]})\n"
        "print(save_png(figures.pareto(frame, 'kl'), Path(sys.argv[1])).stat().st_size > 1000)"
    )
    assert python(code, tmp_path / "a.png") == ["True"]


def test_settings_of_the_process_do_not_matter_and_stay(make_result, tmp_path):
    plain = [p.read_bytes() for p in figures.save_figures(make_result(), tmp_path / "plain")]
    with matplotlib.rc_context({"text.usetex": True, "axes.facecolor": "black", "font.size": 30}):
        again = [p.read_bytes() for p in figures.save_figures(make_result(), tmp_path / "again")]
        assert matplotlib.rcParams["text.usetex"]
    assert again == plain


def test_a_figure_that_cannot_be_drawn_leaves_the_others_and_a_warning(make_result, tmp_path, monkeypatch, capsys):
    from layerbits.figures import run

    def broken(*_args, **_kw):
        raise RuntimeError("no such font")

    monkeypatch.setattr(run, "ranked_bars", broken)
    written = figures.save_figures(make_result(), tmp_path)
    assert [path.stem for path in written] == ["heatmap", "by_layer", "cumulative"]
    assert capsys.readouterr().err == "warning: figures/ranked.png is left out (RuntimeError: no such font)\n"


def test_rows_of_several_runs_in_one_frame_are_refused(frame):
    with pytest.raises(ValueError, match="a layer twice"):
        figures.heatmap(pd.concat([frame, frame]))


def test_a_missing_column_is_named(frame):
    with pytest.raises(ValueError, match="lacks the columns kl"):
        figures.heatmap(frame, "kl")


def test_history_frames_with_nullable_blocks_are_read(frame):
    frame["block"] = frame["block"].astype("Int64")
    frame.loc[frame["layer"] == "B00.o", "block"] = pd.NA
    assert grid(frame, "score").blocks[-1] is None


@pytest.mark.parametrize(
    ("pair", "most"), [("wint8_afp16", "B00.down"), ("wfp8_afp8", "B04.gate_up"), ("wfp4_afp16", "B00.down")]
)
def test_published_tables_draw_with_their_known_top(published, pair, most):
    frame = figures.tidy(published(f"qwen3_vl_4b_lm_medium/{pair}"))
    ax = figures.ranked_bars(frame, "score").axes[0]
    assert ax.get_yticklabels()[0].get_text() == most
    assert grid(frame, "score").values.shape == (5, 37)  # the output head was scored too


def test_pareto_marks_what_a_runtime_serves_on_the_scale_of_the_damage():
    frame = pd.DataFrame({"bits": [4.0, 8.0], "label": ["a", "a"], "kl": [0.5, 0.01], "served_kl": [0.6, np.nan]})
    served = figures.pareto(frame, "kl")
    (marks,) = [line for line in served.axes[0].lines if line.get_marker() == "D"]
    assert marks.get_xydata().tolist() == [[4.0, 0.6]]
    assert "as served, measured\nin a runtime" in legend_words(served)
    by_score = figures.pareto(frame.rename(columns={"kl": "score"}), "score")
    assert not any(line.get_marker() == "D" for line in by_score.axes[0].lines)


def test_kinds_are_told_apart_by_colour_and_without_it():
    assert [*KIND_STYLES] == [*KINDS]
    assert len({style["color"] for style in KIND_STYLES.values()}) == len(KINDS)
    assert len({(style["marker"], str(style["linestyle"])) for style in KIND_STYLES.values()}) == len(KINDS)
