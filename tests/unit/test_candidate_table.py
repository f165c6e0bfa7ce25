import pytest

from layerbits.candidates.description import describe
from layerbits.candidates.shipped import shipped_configs
from tools.docs.candidates import table


def test_the_page_is_current():
    page = shipped_configs().parent / "docs" / "candidates.md"
    assert page.read_text() == table(), "run: python tools/docs/candidates.py > docs/candidates.md"


def test_every_cell_has_a_row():
    rows = [line for line in table().splitlines() if line.startswith("| `")]
    assert len(rows) == (22 + 5) * 15  # the four FP4 pairs have a table for each of MXFP4 and NVFP4
    assert sum("nowhere" in row for row in rows) == sum("refused" in row for row in rows) == 131


@pytest.mark.parametrize(
    ("cfg", "words"),
    [
        (None, "-"),
        ({"num_bits": (4, 3)}, "FP8 per tensor"),
        ({"num_bits": (4, 3), "type": "dynamic"}, "FP8 per tensor, dynamic"),
        ({"num_bits": 8, "axis": 0}, "INT8 per output channel"),
        ({"num_bits": 8, "axis": -1}, "INT8 per channel of the hidden state"),
        ({"num_bits": 8, "axis": (0, 1)}, "INT8 along axis (0, 1)"),
        ({"num_bits": 4, "block_sizes": {-1: 128}}, "INT4 per group of 128"),
        ({"num_bits": (4, 3), "block_sizes": {-1: 128, -2: 64}}, "FP8 per group of 64 x 128"),
        ({"num_bits": 8, "block_sizes": {-1: None}, "type": "dynamic"}, "INT8 per token, dynamic"),
        ({"num_bits": (2, 1), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}}, "MXFP4 per 32"),
        ({"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}, "NVFP4 per 16"),
        (
            [{"num_bits": 4, "block_sizes": {-1: 128}}, {"num_bits": (4, 3)}],
            "INT4 per group of 128, then FP8 per tensor",
        ),
    ],
)
def test_settings_in_words(cfg, words):
    assert describe(cfg) == words
