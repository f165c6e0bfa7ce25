"""Each notebook, top to bottom, against a store that a small real grid, schemes and a probe have filled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import mlflow
import nbformat
import pytest

from layerbits import history, tracking
from tests.integration.tracking_support import small_result, write_folder

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
ANSWERS = find_spec("lm_eval") is not None
LIMIT = 400_000  # bytes of a committed notebook


def run(command, store, **changes):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "LAYERBITS_"))}
    threads = {"OMP_NUM_THREADS": kept.get("OMP_NUM_THREADS", "2"), "MLFLOW_DISABLE_TELEMETRY": "true"}
    env = {**kept, **threads, "PYTHONPATH": str(ROOT / "src"), "MLFLOW_TRACKING_URI": store, **changes}
    ended = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    return ended


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A grid of the default model on 4 and 8 captions, schemes of one cell, and a probe of one scheme."""
    folder = tmp_path_factory.mktemp("filled")
    uri, out = f"sqlite:///{folder}/mlflow.db", f"output_root={folder}/out"
    pairs, overlays = "wfp8_afp8,wint8_afp16,wint8_aint8", "default,a_per_token_dynamic"
    grid = [f"quant_pairs={pairs}", f"quant_granularities={overlays}", "dataset_sizes=4,8", "autoquant.seq_len=32"]
    run(["experiments/grid.py", *grid, out], uri)
    runs = history.runs(pair="wfp8_afp8", granularity="default", tracking_uri=uri)
    mlflow.set_tracking_uri(None)
    run_id = f"run_id={runs['run_id'].iloc[0]}"
    run(["experiments/scheme.py", run_id, "schemes=fp8_autoquant_full", "pareto=0", out], uri)
    run(["experiments/probe.py", run_id, "schemes=none", "controls=none", "effective_bits=9,12", "rows=2", out], uri)
    if ANSWERS:
        asked = ["schemes=none", "effective_bits=9", "tasks=cloze", "limit=6", "rows=2", out]
        run(["experiments/evaluate.py", run_id, *asked], uri)
    return uri


@pytest.fixture
def bare_store(tmp_path):
    """Two pairs on one model, without schemes, probes or a second granularity."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        uri = tracking.open_store(f"sqlite:///{tmp_path}/mlflow.db", tmp_path)
        tracking.push(write_folder(small_result(), tmp_path / "result"), uri)
        mlflow.set_tracking_uri(None)
    return uri


def executed(name, store, folder, **changes):
    """The notebook after a run in a folder of its own, by the script that `make notebooks` calls."""
    for file in ("execute.py", f"{name}.ipynb"):
        shutil.copy(NOTEBOOKS / file, folder)
    run([folder / "execute.py", name], store, LAYERBITS_CACHE=str(folder / "cache"), **changes)
    return nbformat.read(folder / f"{name}.ipynb", as_version=4)


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def pictures(notebook):
    return [o for o in outputs(notebook) if "image/png" in o.get("data", {})]


def words(notebook):
    texts = [str(o.get("text", "")) + str(o.get("data", {}).get("text/markdown", "")) for o in outputs(notebook)]
    return "\n".join(texts)


@pytest.mark.parametrize(
    ("name", "figures"), [("compare_pairs", 4), ("granularity", 3), ("history", 4), ("schemes", 4)]
)
def test_a_notebook_runs_and_draws(store, tmp_path, name, figures):
    notebook = executed(name, store, tmp_path)
    assert len(pictures(notebook)) == figures
    assert not [o for o in outputs(notebook) if o.get("name") == "stderr"]
    assert str(tmp_path) not in nbformat.writes(notebook)


@pytest.mark.skipif(not ANSWERS, reason="needs the extra `eval`")
def test_answers_runs_and_draws(store, tmp_path):
    assert len(pictures(executed("answers", store, tmp_path))) == 1


def test_answers_says_what_is_missing(bare_store, tmp_path):
    assert "No evaluation is in this experiment." in words(executed("answers", bare_store, tmp_path))


def test_schemes_says_what_is_missing(bare_store, tmp_path):
    said = words(executed("schemes", bare_store, tmp_path))
    assert "No scheme run is in this experiment." in said
    assert "No probe run is in this experiment" in said


@pytest.mark.parametrize("name", NAMES)
def test_committed_notebooks_are_executed_small_and_without_paths(name):
    path = NOTEBOOKS / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < LIMIT
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")
    assert pictures(notebook)
    assert not [o for o in outputs(notebook) if o.output_type == "error" or o.get("name") == "stderr"]
    text = nbformat.writes(notebook)
    assert not [folder for folder in ("/home/", "/root/", "/tmp/", "/work/", "site-packages") if folder in text]


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_take_store_and_experiment_as_parameters(name):
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
    (parameters,) = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    assert "tracking_uri = None" in parameters.source
    assert 'experiment = "layerbits"' in parameters.source
