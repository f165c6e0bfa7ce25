"""Cells of a grid: combinations, axes and the summary."""

from pathlib import Path

import pytest

from layerbits.errors import UserError
from layerbits.grid import Cell, CellOutcome, axis, cells, run_names, summary

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def test_every_combination_is_a_cell_and_sizes_come_outermost():
    found = cells(["a", "b"], ["default"], ["small", "large"])
    assert [(c.dataset_size, c.quant_pair) for c in found] == [
        ("small", "a"),
        ("small", "b"),
        ("large", "a"),
        ("large", "b"),
    ]


def test_the_default_granularity_is_not_part_of_a_candidates_name():
    assert Cell("wfp8_afp8", "default", "small").candidate == "wfp8_afp8"
    assert Cell("wfp8_afp8", "w_group64", "small").candidate == "wfp8_afp8/w_group64"


@pytest.mark.parametrize("empty", range(3))
def test_an_empty_axis_is_an_error_that_names_it(empty):
    axes = [["x"], ["y"], ["z"]]
    axes[empty] = []
    with pytest.raises(UserError, match=("quant_pairs", "quant_granularities", "dataset_sizes")[empty]):
        cells(*axes)


def test_a_pair_given_twice_is_an_error_that_names_it():
    with pytest.raises(UserError, match="quant_pairs names a twice"):
        cells(["a", "b", "a"], ["default"], ["small"])


def test_all_means_every_pair_that_is_not_experimental():
    names = axis("all", CONFIGS / "quant_pair")
    assert len(names) == 18
    assert not any(name.endswith("aint4") for name in names)


def test_an_unknown_value_is_an_error_that_lists_the_known_ones():
    with pytest.raises(UserError, match=r"quant_pair=wfp9 is not known; choose among .*wfp8_afp8"):
        axis("wfp8_afp8,wfp9", CONFIGS / "quant_pair")


def test_the_summary_has_a_row_a_cell_and_no_number_where_nothing_was_measured():
    table = summary(
        [
            CellOutcome(
                Cell("a", "default", "small"), "ok", run_id="1", predicted_kl=0.5, score=1.0, bits=8.0, seconds=2
            ),
            CellOutcome(Cell("b", "default", "small"), "unsupported", "no kernel"),
        ]
    )
    assert table["status"].tolist() == ["ok", "unsupported"]
    assert table["predicted_kl"].isna().tolist() == [False, True]


@pytest.mark.parametrize(
    ("axes", "name"),
    [
        ((["a", "b"], ["default", "g"], ["small", "medium"]), "b small g tiny"),
        ((["a", "b"], ["default", "g"], ["small"]), "b g small tiny"),
        ((["b"], ["default", "g"], ["small"]), "g b small tiny"),
        ((["b"], ["g"], ["small"]), "b small g tiny"),
    ],
)
def test_names_of_runs_begin_with_what_differs(axes, name):
    wanted = cells(*axes)
    names = run_names(wanted, "tiny")
    assert names[Cell("b", "g", "small")] == name
    assert len({*names.values()}) == len(wanted)
