"""What version 6ca379e wrote is read, and written again, to the byte: ``tests/golden/results`` is of its code.

The Markdown reports are its own but for the names of facts and memory in their tables, which are in words since.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from layerbits.atomic import write_json
from layerbits.report.files import JSON, MANIFEST, MARKDOWN, rebuild
from layerbits.results.manifest import load_manifest, to_manifest
from layerbits.schemes import load_scheme

RESULTS = Path(__file__).parents[1] / "golden" / "results"


@pytest.mark.parametrize("method", ["gradient", "kl_div", "fisher"])
def test_the_report_of_an_earlier_run_is_rebuilt(tmp_path, method):
    rebuild(RESULTS / method / MANIFEST, tmp_path)
    for name in (MARKDOWN, JSON):
        assert (tmp_path / name).read_bytes() == (RESULTS / method / name).read_bytes()


@pytest.mark.parametrize("method", ["gradient", "kl_div", "fisher"])
def test_the_manifest_of_an_earlier_run_comes_back(tmp_path, method):
    write_json(tmp_path / MANIFEST, to_manifest(load_manifest(RESULTS / method)))
    assert (tmp_path / MANIFEST).read_bytes() == (RESULTS / method / MANIFEST).read_bytes()


def test_an_earlier_scheme_comes_back(tmp_path):
    path = shutil.copy(RESULTS / "fisher" / "scheme.json", tmp_path)
    load_scheme(path).save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == Path(path).read_bytes()
