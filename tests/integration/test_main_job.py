"""The main job from its command line, on the default model, with a SQLite store."""

import json
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from layerbits.results.manifest import load_manifest

from .entries import start

ROOT = Path(__file__).resolve().parents[2]


def sensitivity(*arguments):
    return start("sensitivity", *arguments)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A multirun of two pairs."""
    folder = tmp_path_factory.mktemp("main")
    store = f"sqlite:///{folder}/mlflow.db"
    done = sensitivity(
        "-m", "quant_pair=wint8_afp16,wfp4_afp8", "output_layout=publish",
        f"tracking.uri={store}", f"output_root={folder}/out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    client = MlflowClient(store)
    (experiment,) = [e for e in client.search_experiments() if e.name == "layerbits"]
    return folder, client, client.search_runs([experiment.experiment_id])


def test_a_multirun_is_one_parent_with_a_child_per_pair(pairs):
    children = [r for r in pairs[2] if "mlflow.parentRunId" in r.data.tags]
    assert {r.data.params["eff.quant_pair"] for r in children} == {"wint8_afp16", "wfp4_afp8"}
    assert len(pairs[2]) == 3
    assert {r.info.status for r in pairs[2]} == {"FINISHED"}


def test_a_run_leaves_its_artifacts_scores_and_dataset(pairs):
    (run,) = [r for r in pairs[2] if r.data.params.get("eff.quant_pair") == "wint8_afp16"]
    folders = {a.path for a in pairs[1].list_artifacts(run.info.run_id)}
    assert folders == {"autoquant", "config", "figures", "manifest.json", "quantization", "report", "sensitivity"}
    lines = pairs[1].get_metric_history(run.info.run_id, "predicted_kl_by_layer/down")
    assert [m.step for m in lines] == list(range(30))
    assert run.data.metrics["summary/groups"] == 120
    assert run.inputs.dataset_inputs[0].dataset.name == "everyday-small"


def test_fp4_without_a_gpu_says_whose_numerics_ran(pairs):
    (run,) = [r for r in pairs[2] if r.data.params.get("eff.quant_pair") == "wfp4_afp8"]
    assert run.data.tags["fp4_numerics"] == "reference"
    assert run.data.metrics["summary/effective_bits"] <= 12


def test_the_same_parameters_give_the_same_scores(pairs, tmp_path):
    published = pairs[0] / "out/publish/weight-int8-act-fp16/default/smollm2_135m_wint8_afp16_everyday_small"
    done = sensitivity(
        "quant_pair=wint8_afp16", "tracking=none", f"output_root={tmp_path}", "output_layout=publish",
        f"autoquant.checkpoint={tmp_path}/search",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    again = tmp_path / published.relative_to(pairs[0] / "out")
    np.testing.assert_array_equal(load_manifest(again).scores, load_manifest(published).scores)


def test_report_only_rebuilds_the_report_of_a_manifest(pairs, tmp_path):
    manifest = next((pairs[0] / "out/publish").rglob("manifest.json"))
    done = sensitivity(f"report_only={manifest}", f"output_root={tmp_path}")
    assert done.returncode == 0, done.stderr
    (rebuilt,) = tmp_path.rglob("layer-sensitivity-report.json")
    assert json.loads(rebuilt.read_text()) == json.loads(
        (manifest.parent / "report/layer-sensitivity-report.json").read_text()
    )


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("quant_pair=wfp9_afp8", "quant_pair=wfp9_afp8 is not known; did you mean"),
        ("model=nope", "model=nope is not known"),
        ("dataset.size=huge", "dataset.size=huge is not known"),
        ("autoquant.effective_bits=5", "the floor of wfp8_afp8 is 8"),
        ("autoquant.effective_bits=17", "effective_bits=17 cannot be reached"),
        ("quant_pair.format=NO_SUCH_CFG", "NO_SUCH_CFG"),
        ("tracking.uri=http://127.0.0.1:9", "does not answer"),
    ],
)
def test_bad_input_ends_with_one_line_and_status_2(argument, message, tmp_path):
    done = sensitivity(argument, f"output_root={tmp_path}", *([] if "uri" in argument else ["tracking=none"]))
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("content", [None, "{}"], ids=["missing", "no weights"])
def test_a_folder_that_is_no_checkpoint_is_refused(content, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    done = sensitivity("model=hf", f"model.path={tmp_path}", "tracking=none")
    assert done.returncode == 2
    assert "checkpoint" in done.stderr.splitlines()[-1]
