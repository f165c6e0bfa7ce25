"""A disk that fills up while something is written: one line, nothing half-written, and freed it goes on."""

from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import mlflow
import numpy as np
import pytest

from layerbits import tracking
from layerbits.errors import UserError
from layerbits.export.job import ExportSettings, run_exports
from layerbits.export.scheme import export_scheme, is_exported
from layerbits.results.manifest import load_manifest
from layerbits.scoring import onepass, stock
from layerbits.stages.run import Outcome
from layerbits.stages.write import write
from tests.unit.conftest import synthetic

from .export_support import planned
from .scoring_support import candidate, configs, job, loaded, tiny_model
from .tracking_support import small_result, write_folder

pytest_plugins = ["tests.integration.disks"]

FULL = "No space left on device"


@pytest.fixture(scope="module")
def subject():
    return loaded(tiny_model("llama"))


@pytest.mark.parametrize("left", [0, 4096, 8192, 12288])
def test_a_search_checkpoint(subject, disk, tmp_path, left):
    wanted = configs("wfp8_afp8")
    expected = onepass.score(job(subject, tmp_path / "elsewhere", wanted))
    disk.fill(left)
    search = disk.folder / "search"
    with pytest.raises(UserError, match=f"cannot write the search checkpoint in .*{FULL}"):
        onepass.score(job(subject, search, wanted))
    assert not [name for name in disk.holds() if name.endswith(".partial")]
    disk.free()
    np.testing.assert_array_equal(onepass.score(job(subject, search, wanted)).raw, expected.raw)


@pytest.mark.parametrize("left", [8192, 20480])
def test_the_checkpoint_of_modelopts_own_search(subject, disk, tmp_path, left):
    wanted = configs("wfp8_afp8")
    expected = stock.score(job(subject, tmp_path / "elsewhere", wanted))
    disk.fill(left)
    search = disk.folder / "search"
    with pytest.raises(UserError, match="cannot write the search checkpoint in "):
        stock.score(job(subject, search, wanted))
    assert not [name for name in disk.holds() if name.endswith((".partial", ".pt"))]
    disk.free()
    np.testing.assert_array_equal(stock.score(job(subject, search, wanted)).raw, expected.raw)


# In the order of writing: scores, manifest, a figure, ModelOpt's state, which is the last.
@pytest.mark.parametrize("missing", ["all", "manifest", "figure", "state"])
def test_a_result(disk, tmp_path, missing):
    settings = SimpleNamespace(output_root=tmp_path / "whole", output_layout="tmp")
    outcome = Outcome(synthetic(), {"best": list(range(1000))})
    whole = write(outcome, settings)
    size = sum(-(-path.stat().st_size // 4096) * 4096 for path in whole.rglob("*") if path.is_file())
    disk.fill({"all": 0, "manifest": 16384, "figure": size // 2, "state": size - 4096}[missing])
    settings.output_root = disk.folder / "out"
    with pytest.raises(UserError, match=f"cannot write .*{FULL}.*; free space or set output_root"):
        write(outcome, settings)
    assert disk.holds() in ([], ["out", "out/tmp"])
    disk.free()
    folder = write(outcome, settings)
    np.testing.assert_array_equal(load_manifest(folder).scores, outcome.result.scores)
    assert {path.name for path in folder.rglob("*")} == {path.name for path in whole.rglob("*")}


@pytest.mark.parametrize("share", [0.2, 0.95, 1.02])  # in the middle of the weights, in other files, in the report
def test_an_export(disk, tmp_path, share):
    disk.resize("100m")  # plans ask for more than is needed
    fp8 = candidate("wfp8_afp8")
    plan = planned("llama", tmp_path, disk.folder / "exports" / "mine", qkv=fp8, down=fp8)
    whole = export_scheme(planned("llama", tmp_path, tmp_path / "whole", qkv=fp8, down=fp8), "cpu")
    size = sum(-(-path.stat().st_size // 4096) * 4096 for path in whole.folder.iterdir())
    disk.fill(int(share * size))
    with pytest.raises(UserError, match=f"cannot write .*/mine.* .*{FULL}.*; free space or name"):
        export_scheme(plan, "cpu")
    assert disk.holds() in ([], ["exports"])
    disk.free()
    made = export_scheme(plan, "cpu")
    assert made.proof.record.weights == whole.proof.record.weights


@pytest.mark.parametrize("left", [0, 65536, 262144])
def test_the_store(disk, tmp_path, monkeypatch, made_store, left):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    result = small_result()
    folder = write_folder(result, tmp_path / "result")
    (folder / "figures" / "heatmap.png").write_bytes(bytes(300_000))
    (disk.folder / "mlflow.db").write_bytes(made_store.read_bytes())
    store = tracking.open_store(None, disk.folder)
    opened = []

    def logged():
        with tracking.start_run("x", system_metrics=False) as session:
            opened.append(session.run_id)
            disk.fill(left)
            tracking.log_result(session, result, folder)

    with pytest.raises(tracking.NotLogged, match=f"log it later with: layerbits push {folder} ") as told:
        logged()
    assert "full" in str(told.value) or FULL in str(told.value)
    assert "\n" not in str(told.value)
    assert mlflow.active_run() is None  # MLflow would say FINISHED at exit
    disk.free()
    assert tracking.push(folder, store, run_id=opened[0]) == opened[0]
    client = mlflow.MlflowClient(store)
    run = client.get_run(opened[0])
    mlflow.set_tracking_uri(None)
    assert (run.info.status, run.data.tags["outcome"], "reason" in run.data.tags) == ("FINISHED", "ok", False)
    heatmap = disk.folder / "mlruns" / "layerbits" / opened[0] / "artifacts" / "figures" / "heatmap.png"
    assert heatmap.stat().st_size == 300_000


def test_exports_that_were_done_before_the_disk_was_full_are_not_in_the_way(tmp_path):
    fp8 = candidate("wfp8_afp8")
    plan = planned("llama", tmp_path, tmp_path / "exports" / "mine", qkv=fp8)
    export_scheme(plan, "cpu")
    settings = ExportSettings(plan.target.parent, tmp_path, "auto", "cpu", None, 0, False, None)
    again = Mock(side_effect=lambda *_: pytest.fail("exported again"))
    run_exports([plan.scheme], settings, again)
    again.log_earlier.assert_called_once_with(plan.scheme, plan.target)
    assert not is_exported(plan.target, replace(plan.scheme, kv_cache="fp8"), "auto")
    another = planned("llama", tmp_path / "another", down=fp8).scheme
    assert not is_exported(plan.target, another, "auto")
