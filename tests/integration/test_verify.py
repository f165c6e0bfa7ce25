"""Past runs repeated from their record, on a tiny checkpoint, with a SQLite store."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from mlflow import MlflowClient

from layerbits import history
from layerbits.errors import UserError
from layerbits.inputs.captions import load_captions
from layerbits.results.manifest import load_manifest
from layerbits.scoring.settings import check_device
from layerbits.trust.reproduce import load_run
from layerbits.trust.verification import BOUNDS, DEVICES, bound_of, check, compare, verify

from .entries import start
from .scoring_support import small_checkpoint
from .tracking_support import small_result

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A grid of two candidates on a text file's captions, none of which is the composed default of a single run."""
    folder = tmp_path_factory.mktemp("verify")
    small_checkpoint(folder / "model", num_hidden_layers=3)
    lines = load_captions("everyday", "small").captions
    (folder / "captions.txt").write_text("\n".join([*lines, "one more caption to hold out"]) + "\n")
    store = [f"tracking.uri=sqlite:///{folder}/mlflow.db", f"output_root={folder}/out"]
    done = start(
        "grid", "model=hf", f"model.path={folder}/model", "model.name=tiny", "model.dtype=float32",
        "quant_pairs=wint4_afp16", "quant_granularities=default,w_group64", "dataset_sizes=16",
        "dataset=text_file", f"dataset.path={folder}/captions.txt",
        "autoquant.seq_len=32", f"autoquant.checkpoint={folder}/search", *store,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    uri = store[0].partition("=")[2]
    ids = history.runs(tracking_uri=uri).set_index("granularity")["run_id"].to_dict()
    return {"folder": folder, "store": store, "uri": uri, "ids": ids, "client": MlflowClient(uri)}


@pytest.fixture(scope="module")
def verified(scored):
    """The verification of one of its cells from the command line."""
    done = start("verify", f"run_id={scored['ids']['w_group64']}", *scored["store"])
    (run,) = scored["client"].search_runs(["1"], "tags.`layerbits.kind` = 'verify'")
    return done, run


@pytest.fixture
def folder(scored, tmp_path):
    """A copy of a finished result to tamper with."""
    (found,) = (scored["folder"] / "out" / "tmp").glob("wint4_afp16_*w_group64*")
    return Path(shutil.copytree(found, tmp_path / "result"))


def again(reference, scored, tmp_path, bound="auto", device="recorded"):
    before = load_run(str(reference), scored["uri"])
    return verify(str(reference), before, bound_of(bound), device, CONFIGS, tmp_path / "out", ROOT)


def test_a_cell_of_a_grid_comes_out_identical_alone(verified):
    done, run = verified
    assert done.returncode == 0, done.stderr
    assert "identical: the 12 scores" in done.stdout
    assert run.data.metrics["verify/identical"] == 1
    assert run.data.metrics["verify/largest_relative_difference"] == 0


def test_the_verification_is_linked_and_is_no_sensitivity_run(scored, verified):
    _, run = verified
    assert run.data.tags["source_run_id"] == scored["ids"]["w_group64"]
    assert run.info.status == "FINISHED"
    assert run.info.run_id not in set(history.runs(tracking_uri=scored["uri"], refresh=True)["run_id"])


def test_the_new_result_is_logged_with_the_comparison(scored, verified):
    client, run_id = scored["client"], verified[1].info.run_id
    assert {a.path for a in client.list_artifacts(run_id)} == {"result", "run.json", "verify.json", "verify.md"}
    data = json.loads(Path(client.download_artifacts(run_id, "verify.json")).read_text())
    assert set(data["same"]) == {"model revision", "captions", "configuration"}
    assert data["passed"]


def test_the_record_of_a_cell_is_its_own_configuration(scored, folder):
    composed = yaml.safe_load((folder / "config" / "composed.yaml").read_text())
    assert (composed["quant_pair"]["name"], composed["quant_granularity"]["name"]) == ("wint4_afp16", "w_group64")
    assert composed["dataset"]["size"] == "16"


def test_a_tampered_score_is_reported_and_fails_the_run(scored, folder):
    data = json.loads((folder / "manifest.json").read_text())
    layer = data["layers"][4]
    layer["score"] *= 1.01
    (folder / "manifest.json").write_text(json.dumps(data))
    done = start("verify", f"run_id={folder}", *scored["store"])
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert layer["layer"] in line
    assert "differ by up to 0.0099 relative" in line
    run = scored["client"].search_runs(["1"], f"tags.source_run_id = '{folder}'")[0]
    assert (run.info.status, run.data.tags["outcome"]) == ("FAILED", "failed")
    assert run.data.metrics["verify/largest_relative_difference"] == pytest.approx(0.01 / 1.01)


def test_a_wider_bound_lets_a_small_difference_pass(scored, folder, tmp_path):
    data = json.loads((folder / "manifest.json").read_text())
    data["layers"][0]["score"] *= 1 + 1e-6
    (folder / "manifest.json").write_text(json.dumps(data))
    found, _ = again(folder, scored, tmp_path, "1e-5")
    check(found)
    assert not found.identical
    assert found.largest == pytest.approx(1e-6, rel=1e-3)


def test_a_run_does_not_take_up_the_steps_that_it_should_repeat(scored, folder, tmp_path):
    steps = {p: p.stat().st_mtime_ns for p in (scored["folder"] / "search").rglob("*")}
    again(folder, scored, tmp_path)
    assert steps == {p: p.stat().st_mtime_ns for p in (scored["folder"] / "search").rglob("*")}
    (written,) = (tmp_path / "out" / "tmp").glob("verify_*")
    assert load_manifest(written / "result").tags["resumed"] == "false"


@pytest.mark.parametrize(
    ("part", "field", "name"),
    [("calibration", "digest", "captions"), ("model", "revision", "model revision")],
)
def test_what_has_changed_is_named_before_anything_is_scored(part, field, name, scored, folder, tmp_path):
    data = json.loads((folder / "manifest.json").read_text())
    data[part][field] = "0123456789abcdef"
    (folder / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=f"{name} \\(was 0123456789abcdef, is "):
        again(folder, scored, tmp_path)
    assert not (tmp_path / "out").exists()


def test_captions_that_changed_on_disk_are_named(scored, folder, tmp_path):
    data = json.loads((folder / "manifest.json").read_text())
    other = tmp_path / "captions.txt"
    other.write_text((scored["folder"] / "captions.txt").read_text().replace("a", "e"))
    data["settings"]["dataset"]["path"] = str(other)
    (folder / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="captions"):
        again(folder, scored, tmp_path)


def test_an_imported_run_cannot_be_repeated(scored, folder):
    data = json.loads((folder / "manifest.json").read_text())
    data["settings"] = {}
    (folder / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="does not say how it was made"):
        load_run(str(folder), None)


@pytest.mark.parametrize("bound", ["-1", "nan", "much"])
def test_a_bound_that_is_none_is_refused(bound):
    with pytest.raises(UserError, match=f"bound={bound}"):
        bound_of(bound)


def test_an_unknown_device_is_refused():
    with pytest.raises(UserError, match="device=tpu"):
        check_device("tpu", DEVICES)


def test_a_run_of_another_device_is_held_to_the_bound_of_a_gpu(scored, folder, tmp_path):
    data = json.loads((folder / "manifest.json").read_text())
    data["device"] = "cuda"
    (folder / "manifest.json").write_text(json.dumps(data))
    found, _ = again(folder, scored, tmp_path, device="cpu")
    assert found.bound == BOUNDS["cuda"]
    assert found.changed["device"] == ("cuda", "cpu")


def test_a_score_that_became_infinite_is_beyond_every_bound():
    before = small_result()
    scores = before.scores.copy()
    scores[0] = np.nan
    found = compare("run", before, replace(before, scores=scores), 1e9)
    assert found.layer == before.groups[0].key
    assert not found.passed
    assert json.dumps(found.to_json(), allow_nan=False)


def test_ranks_that_changed_are_listed_largest_move_first():
    before = small_result()
    found = compare("run", before, replace(before, scores=np.where(np.isfinite(before.scores), 1, np.inf)), 0)
    moves = [abs(m.after - m.before) for m in found.moved]
    assert moves == sorted(moves, reverse=True)
    assert moves[0] > 0


def test_versions_that_changed_are_told():
    before = small_result()
    after = replace(before, provenance={**before.provenance, "version.torch": "9.9"})
    found = compare("run", before, after, 0)
    assert found.changed == {"version.torch": ("2.13.0", "9.9")}
    assert "2.13.0 → 9.9" in found.markdown()
    assert found.identical
