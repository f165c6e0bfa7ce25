"""Each notebook, top to bottom, against a store that a small real grid, schemes and a probe have filled."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from importlib.util import find_spec

import mlflow
import nbformat
import pytest

from layerbits import history, tracking
from tests.integration.entries import ROOT, environment, start
from tests.integration.scoring_support import small_checkpoint
from tests.integration.tracking_support import small_result, write_folder

NOTEBOOKS = ROOT / "notebooks"
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
ANSWERS = find_spec("lm_eval") is not None
LIMIT = 400_000  # bytes of a committed notebook


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A grid of a tiny model on 4 and 8 captions, schemes of one cell, a probe of two, an evaluation of one."""
    folder = tmp_path_factory.mktemp("filled")
    uri = f"sqlite:///{folder}/mlflow.db"
    places = [f"tracking.uri={uri}", f"output_root={folder}/out"]
    small_checkpoint(folder / "model", num_hidden_layers=3)

    def run(script, *arguments):
        ended = start(script, *arguments, *places, LAYERBITS_CACHE=folder / "cache", HF_HOME=folder / "hf")
        assert ended.returncode == 0, ended.stderr

    tiny = ["model=hf", f"model.path={folder}/model", "model.dtype=float32", "autoquant.seq_len=32"]
    pairs, overlays = "wfp8_afp8,wint8_afp16,wint8_aint8", "default,a_per_token_dynamic"
    run("grid", *tiny, f"quant_pairs={pairs}", f"quant_granularities={overlays}", "dataset_sizes=4,8")
    runs = history.runs(pair="wfp8_afp8", granularity="default", tracking_uri=uri)
    mlflow.set_tracking_uri(None)
    run_id = f"run_id={runs['run_id'].iloc[0]}"
    run("scheme", run_id, "schemes=fp8_autoquant_full", "budget_gib=1", "pareto=0")
    run("probe", run_id, "schemes=none", "controls=none", "effective_bits=9,12", "rows=2")
    if ANSWERS:
        run("evaluate", run_id, "schemes=none", "effective_bits=9", "tasks=cloze", "limit=6", "rows=2")
    return uri


@pytest.fixture(scope="module")
def bare_store(tmp_path_factory):
    """Two pairs on one model, without schemes, probes or a second granularity."""
    tmp_path = tmp_path_factory.mktemp("bare")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        uri = tracking.open_store(f"sqlite:///{tmp_path}/mlflow.db", tmp_path)
        tracking.push(write_folder(small_result(), tmp_path / "result"), uri)
        mlflow.set_tracking_uri(None)
    return uri


def execute(names, store, folder):
    """Notebooks after a run in a folder of their own, by the script that `make notebooks` calls."""
    for file in ("execute.py", *(f"{name}.ipynb" for name in names)):
        shutil.copy(NOTEBOOKS / file, folder)
    variables = environment(
        MLFLOW_TRACKING_URI=store,
        LAYERBITS_CACHE=folder / "cache",
        OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "2"),
    )
    ended = subprocess.run(
        [sys.executable, folder / "execute.py", *names],
        cwd=ROOT, env=variables, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return {name: nbformat.read(folder / f"{name}.ipynb", as_version=4) for name in names}


@pytest.fixture(scope="module")
def executed(store, tmp_path_factory):
    """Folder, and all notebooks after a run on the filled store."""
    folder = tmp_path_factory.mktemp("executed")
    return folder, execute([name for name in NAMES if ANSWERS or name != "answers"], store, folder)


@pytest.fixture(scope="module")
def executed_on_little(bare_store, tmp_path_factory):
    """Two notebooks after a run on two pairs alone."""
    return execute(["answers", "schemes"], bare_store, tmp_path_factory.mktemp("little"))


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def pictures(notebook):
    return [o for o in outputs(notebook) if "image/png" in o.get("data", {})]


def words(notebook):
    texts = [str(o.get("text", "")) + str(o.get("data", {}).get("text/markdown", "")) for o in outputs(notebook)]
    return "\n".join(texts)


@pytest.mark.parametrize(
    ("name", "figures"), [("answers", 1), ("compare_pairs", 4), ("granularity", 3), ("history", 4), ("schemes", 5)]
)
def test_a_notebook_runs_and_draws(executed, name, figures):
    folder, notebooks = executed
    if name not in notebooks:
        pytest.skip("needs the extra `eval`")
    notebook = notebooks[name]
    assert len(pictures(notebook)) == figures
    assert not [o for o in outputs(notebook) if o.get("name") == "stderr"]
    assert str(folder) not in nbformat.writes(notebook)


def test_answers_says_what_is_missing(executed_on_little):
    assert "No evaluation is in this experiment." in words(executed_on_little["answers"])


def test_schemes_says_what_is_missing(executed_on_little):
    said = words(executed_on_little["schemes"])
    assert "No scheme run is in this experiment." in said
    assert "No probe run is in this experiment" in said


@pytest.mark.parametrize("name", NAMES)
def test_committed_notebooks_are_executed_small_and_without_paths(name):
    path = NOTEBOOKS / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < LIMIT
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    digest = runpy.run_path(str(NOTEBOOKS / "execute.py"))["digest"]
    assert notebook.metadata["executed"] == digest(notebook), f"run: python notebooks/execute.py {name}"
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
