"""An evaluation from its command line, on a tiny checkpoint, with a SQLite store."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
from mlflow import MlflowClient

from layerbits import history
from layerbits.answers import endpoint, rows
from layerbits.history.evaluated import answers_of
from layerbits.results.manifest import load_manifest
from layerbits.tracking.contract import DIGEST_TAG

from .completions import completions
from .entries import ROOT, environment, start
from .scoring_support import small_checkpoint, tiny_model

pytest.importorskip("lm_eval", reason="needs the extra `eval`")

TASK = """
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: right
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a tiny model, its evaluation on a task of ours and on one of a folder."""
    folder = tmp_path_factory.mktemp("evaluate")
    small_checkpoint(folder / "model", num_hidden_layers=3)
    store = [f"tracking.uri=sqlite:///{folder}/mlflow.db", f"output_root={folder}/out"]
    scored = start(
        "sensitivity", "model=hf", f"model.path={folder}/model", "model.dtype=float32", "quant_pair=wint4_afp16",
        "autoquant.seq_len=32", "dataset.size=32", *store,
    )  # fmt: skip
    assert scored.returncode == 0, scored.stderr
    client = MlflowClient(store[0].partition("=")[2])
    (source_run,) = client.search_runs(["1"])
    tasks = folder / "tasks"
    tasks.mkdir()
    documents = [
        {"question": f"Number {i} is", "choices": [" red", " green", " blue"], "right": i % 3} for i in range(20)
    ]
    (tasks / "colours.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    (tasks / "colours.yaml").write_text(TASK.replace("FILE", str(tasks / "colours.jsonl")))
    made = start("scheme", f"run_id={source_run.info.run_id}", "schemes=none", "effective_bits=5,8", *store)
    assert made.returncode == 0, made.stderr
    done = start(
        "evaluate", f"run_id={source_run.info.run_id}", "schemes=none", "effective_bits=5,8", "tasks=cloze,colours",
        f"task_path={tasks}", "limit=16", "margin=0.2", "rows=2", "predict=true", *store,
        LAYERBITS_CACHE=folder / "cache", HF_HOME=folder / "hf",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (made,) = client.search_runs(["1"], "tags.`layerbits.kind` = 'evaluation'")
    return {
        "folder": folder,
        "store": store,
        "source": source_run,
        "run": made,
        "text": done.stdout,
        "log": done.stderr,
        "client": client,
    }


def test_both_tasks_are_put_to_both_schemes(run):
    metrics = run["run"].data.metrics
    for task in ("cloze", "colours"):
        assert metrics[f"eval/{task}/documents"] == 16
        for scheme in ("bits_5", "bits_8"):
            before, after = metrics[f"eval/{task}/unquantized/accuracy"], metrics[f"eval/{task}/{scheme}/accuracy"]
            assert metrics[f"eval/{task}/{scheme}/difference"] == pytest.approx(after - before)
            assert metrics[f"eval/{task}/{scheme}/log_odds_low"] < metrics[f"eval/{task}/{scheme}/log_odds_high"]
            assert metrics[f"eval/{task}/{scheme}/kl"] > 0
    assert metrics["eval/cloze/bits_5/kl"] > metrics["eval/cloze/bits_8/kl"]


def test_predicted_changes_follow_the_measured_ones(run):
    metrics = run["run"].data.metrics
    for task in ("cloze", "colours"):
        assert metrics[f"eval/{task}/bits_8/predicted_spearman"] > 0.5
    (file,) = run["folder"].glob("out/tmp/evaluation_*/layers.csv")
    rows = [line.split(",")[:2] for line in file.read_text().splitlines()[1:]]
    assert len({layer for _, layer in rows}) == len(rows) / 2 >= 6  # both tasks, each group that a scheme quantizes


def test_the_run_says_what_was_asked_and_of_what(run):
    data = run["run"].data
    assert data.tags["source_run_id"] == run["source"].info.run_id
    assert data.tags["outcome"] == "ok"
    assert data.params["eff.tasks"] == "cloze,colours"
    assert data.params["eff.limit"] == "16"
    assert data.params["eff.batch_size"] == "16"  # eval_batch_size=auto, with room for all
    assert data.params["eff.harness"] == "0.4.13"
    assert "exact McNemar" in data.tags["mlflow.note.content"]
    assert "cloze: 16 documents, which show a loss of" in run["text"]


def test_a_log_file_has_no_bars_of_the_harness(run):
    assert "evaluating: 100%" in run["log"]
    assert "requests:" not in run["log"]
    assert "Tokenizing" not in run["log"]
    assert "\x1b" not in run["log"]


def test_the_documents_are_tables_of_the_run(run, monkeypatch):
    assert json.loads(run["run"].data.tags["mlflow.loggedArtifacts"])[0]["type"] == "table"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", run["store"][0].partition("=")[2])
    frame = run["client"].load_table("1", "documents/bits_5.json", [run["run"].info.run_id])
    assert len(frame) == 32
    assert set(frame["task"]) == {"cloze", "colours"}


def test_what_was_asked_is_an_input_of_the_run(run):
    inputs = {i.dataset.name: i for i in run["run"].inputs.dataset_inputs}
    assert set(inputs) == {"cloze", "colours"}
    assert json.loads(inputs["colours"].dataset.profile) == {"documents": 16, "metric": "acc,none"}
    assert [tag.value for tag in inputs["cloze"].tags] == ["evaluation"]


def test_metrics_are_linked_to_their_scheme_and_task(run):
    models = run["client"].search_logged_models(["1"])
    tags = run["run"].data.tags
    by_digest = {m.tags["layerbits_digest"]: m for m in models}
    assert len(models) == len(by_digest) == 3  # two schemes and the unquantized model
    linked = {m.key: m for m in by_digest[tags["mlflow.layerbits.scheme.bits_5"]].metrics}
    found = linked["eval/colours/bits_5/difference"]
    assert found.value == run["run"].data.metrics["eval/colours/bits_5/difference"]
    inputs = {i.dataset.name: i.dataset.digest for i in run["run"].inputs.dataset_inputs}
    assert (found.dataset_name, found.dataset_digest) == ("colours", inputs["colours"])
    assert found.run_id == run["run"].info.run_id
    assert linked["eval/colours/bits_5/kl"].dataset_name is None  # KL is of captions
    assert not any("bits_8" in key for key in linked)


def test_the_report_of_a_scheme_has_the_verdict(run):
    tags = run["run"].data.tags
    said = {name: tags[f"mlflow.layerbits.verdict.{name}"] for name in ("bits_5", "bits_8")}
    schemes = ["scheme", f"run_id={run['source'].info.run_id}", "schemes=none", *run["store"]]
    assert start(*schemes, "effective_bits=8").returncode == 0
    later, earlier = run["client"].search_runs(["1"], "tags.`layerbits.kind` = 'schemes'")
    for name, words in said.items():
        assert f"- {name}: {words}" in earlier.data.tags["mlflow.note.content"]  # made before the evaluation
    assert f"- bits_8: {said['bits_8']}" in later.data.tags["mlflow.note.content"]
    newest = max(run["folder"].glob("out/tmp/schemes_*"))
    assert f"- bits_8: {said['bits_8']}" in (newest / "schemes.md").read_text()


@pytest.fixture(scope="module")
def card(run):
    """The model card of an export of an evaluated scheme."""
    exports = run["folder"] / "exports"
    done = start(
        "export", f"run_id={run['source'].info.run_id}", "schemes=none", "effective_bits=8", "device=cpu",
        f"export_root={exports}", *run["store"],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return exports / "bits_8" / "README.md"


def test_the_model_card_of_an_export_has_the_verdict(run, card):
    metrics, text = run["run"].data.metrics, card.read_text()
    for row in answers_of(run["store"][0].partition("=")[2], "1", run["run"].data.tags[f"{DIGEST_TAG}bits_8"]):
        before, after = (metrics[f"eval/{row['task']}/{name}/accuracy"] for name in ("unquantized", "bits_8"))
        assert f"| {row['task']} | 16 | {100 * before:.1f}% | {100 * after:.1f}% | {row['verdict']} |" in text
    assert "Measured on held-out rows" not in text


def test_a_later_probe_is_in_the_model_card(run, card):
    done = start(
        "probe", f"run_id={run['source'].info.run_id}", "schemes=none", "effective_bits=8", "rows=2", *run["store"],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"model card: {card}" in done.stdout
    (probed,) = run["client"].search_runs(["1"], "tags.`layerbits.kind` = 'probe'")
    kl = probed.data.metrics["probe/bits_8/kl"]
    said = f"Measured on held-out rows, the scheme on the model in memory: {kl:.4g} nats per token.\n\n## Answers\n"
    assert said in card.read_text()


def test_a_later_evaluation_is_in_the_model_card(run, card):
    card.write_text(card.read_text().replace("| cloze | 16 |", "| of an earlier one |") + "My own words.\n")
    done = evaluate(run, "tasks=cloze", "limit=16")
    assert done.returncode == 0, done.stderr
    text = card.read_text()
    assert "| cloze | 16 |" in text
    assert "of an earlier one" not in text
    assert text.endswith("My own words.\n")


def test_history_gives_the_answers_of_a_scheme(run):
    uri, data = run["store"][0].partition("=")[2], run["run"].data
    found = answers_of(uri, "1", data.tags["mlflow.layerbits.scheme.bits_5"])
    assert [row["task"] for row in found] == ["cloze", "colours"]
    for row in found:
        assert row["difference"] == data.metrics[f"eval/{row['task']}/bits_5/difference"]
        assert row["unquantized"] == data.metrics[f"eval/{row['task']}/unquantized/accuracy"]
        assert f"{row['task']}: {row['verdict']}" in data.tags["mlflow.layerbits.verdict.bits_5"]
        assert "margin of 20 points" in row["verdict"]
    assert answers_of(uri, "1", "of no scheme") == []


def test_history_has_a_row_per_task_and_scheme(run):
    frame = history.evaluations("layerbits", tracking_uri=run["store"][0].partition("=")[2])
    assert set(zip(frame["task"], frame["scheme"], strict=True)) == {
        (task, scheme) for task in ("cloze", "colours") for scheme in ("bits_5", "bits_8", "unquantized")
    }
    assert frame.loc[frame["scheme"] == "bits_5", "digest"].notna().all()


def test_what_was_kept_for_a_killed_job_is_gone(run):
    assert not list((run["folder"] / "cache" / "answers").glob("*"))


def evaluate(run, *arguments):
    """An evaluation of one scheme of the run, without rows."""
    return start(
        "evaluate", f"run_id={run['source'].info.run_id}", "schemes=none", "effective_bits=8", "rows=0", *arguments,
        *run["store"], HF_HOME=run["folder"] / "hf", LAYERBITS_CACHE=run["folder"] / "cache",
    )  # fmt: skip


def test_a_served_model_gets_the_verdict_of_the_model_in_memory(run):
    with completions(run["folder"] / "model") as url:
        done = evaluate(run, "tasks=cloze,sums_written", "limit=12", f"endpoint={url}", "num_fewshot=0")
    assert done.returncode == 0, done.stderr
    newest = max(run["folder"].glob("out/tmp/evaluation_*"))
    plain = json.loads((newest / "evaluation.json").read_text())
    (served,) = [s for s in plain["schemes"] if s["scheme"] == "served"]
    for task in ("cloze", "sums_written"):
        ours, theirs = (each[task]["answers"] for each in (plain["unquantized"], served["tasks"]))
        assert [a["said"] for a in theirs] == [a["said"] for a in ours]
    odds = [[a["log_odds"] for a in each["cloze"]["answers"]] for each in (plain["unquantized"], served["tasks"])]
    assert odds[1] == pytest.approx(odds[0], abs=1e-3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"endpoint_model": "other"}, "serves tiny, and there is no other; set endpoint_model"),
        ({"weights": "random"}, "the endpoint serves another model"),
        ({"echo": False}, "must give log-probabilities of the prompt (echo)"),
        ({"waits": 3}, "as vLLM does, within 1 s a request"),
    ],
)
def test_an_endpoint_of_something_else_is_refused(run, tmp_path, change, words, monkeypatch):
    if "waits" in change:
        monkeypatch.setattr(endpoint, "_SECONDS", 1)
    folder = run["folder"] / "model"
    if "weights" in change:
        shutil.copytree(folder, tmp_path / "model")
        folder = tmp_path / "model"
        vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
        tiny_model("llama", vocab_size=vocabulary, num_hidden_layers=3).save_pretrained(folder)
    with completions(folder, echo=change.get("echo", True), waits=change.get("waits", 0)) as url:
        asked = [f"endpoint_model={change['endpoint_model']}"] if "endpoint_model" in change else []
        done = evaluate(run, "tasks=cloze", "limit=12", f"endpoint={url}", *asked)
    check_refused(run, done, words)


def test_an_endpoint_that_is_not_there_is_refused(run):
    check_refused(run, evaluate(run, "tasks=cloze", "endpoint=http://127.0.0.1:9"), "does not answer as an OpenAI-comp")


def test_a_killed_evaluation_goes_on_with_what_it_lacks(run, tmp_path):
    cache, asked = tmp_path / "cache" / "answers", ("effective_bits=5,8", "tasks=cloze,colours", "limit=16")
    command = [
        sys.executable, "experiments/evaluate.py", f"run_id={run['source'].info.run_id}", "schemes=none", *asked,
        f"task_path={run['folder']}/tasks", "rows=0", *run["store"], f"output_root={tmp_path}",
    ]  # fmt: skip
    variables = environment(HF_HOME=run["folder"] / "hf", LAYERBITS_CACHE=tmp_path / "cache")
    job = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while job.poll() is None and len(finished := list(cache.glob("*/[!.]*.json"))) < 3:
        time.sleep(0.002)
    job.kill()  # SIGKILL, after one of two tasks of the first scheme
    assert job.wait() == -signal.SIGKILL
    assert 3 <= len(finished) < 6
    for file in finished:  # so that they are told from answers that are asked anew
        data = json.loads(file.read_text())
        for answer in data["answers"]["answers"]:
            answer["said"] = "kept"
        file.write_text(json.dumps(data))
    done = start("evaluate", *command[2:], **variables)
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.glob("tmp/evaluation_*")
    plain = json.loads((folder / "evaluation.json").read_text())
    models = [plain["unquantized"], *(scheme["tasks"] for scheme in plain["schemes"])]
    told = [task["answers"] for model in models for task in model.values()]
    assert sum(all(a["said"] == "kept" for a in answers) for answers in told) == len(finished)
    uncut = json.loads(min(run["folder"].glob("out/tmp/evaluation_*/evaluation.json")).read_text())
    for ours, theirs in zip(plain["schemes"], uncut["schemes"], strict=True):
        for task, answers in ours["tasks"].items():
            assert [a["log_odds"] for a in answers["answers"]] == [
                a["log_odds"] for a in theirs["tasks"][task]["answers"]
            ]
    assert not list(cache.glob("*"))
    (left,) = run["client"].search_runs(["1"], "attributes.status = 'RUNNING'")  # which `layerbits reap` ends
    run["client"].set_terminated(left.info.run_id, "KILLED")


def check_refused(run, done, words):
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert words in line
    assert not run["client"].search_runs(["1"], "attributes.status = 'RUNNING'")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("tasks=cloz",), "task cloz is not known; did you mean cloze"),
        (("tasks=none",), "tasks names no task"),
        (("tasks=cloze", "limit=5"), "5 documents of cloze cannot show any difference in 1 comparisons"),
        (("tasks=cloze", "chat_template=true"), "has no chat template"),
        (("tasks=cloze", "margin=3"), "must be a share between 0 and 1"),
        (("tasks=cloze", "task_path=/no/such"), "is no folder"),
        (("tasks=empty",), "task empty has no documents"),
        (("tasks=elsewhere",), "the data of task elsewhere (/no/such/data) cannot be had here"),
        (("tasks=long",), "and the model takes"),
        (("tasks=graded",), "none of which says right or wrong"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_line(run, arguments, words):
    tasks = run["folder"] / "bad_tasks"
    tasks.mkdir(exist_ok=True)
    rows = {
        "empty": [],
        "long": [{"question": "word " * 6000, "choices": ["a", "b"], "right": 0}] * 8,
        "graded": [{"question": "one", "answer": "two"}] * 8,
    }
    for name, documents in rows.items():
        (tasks / f"{name}.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
        text = TASK.replace("FILE", str(tasks / f"{name}.jsonl")).replace("task: colours", f"task: {name}")
        (tasks / f"{name}.yaml").write_text(text)
    (tasks / "elsewhere.yaml").write_text(
        TASK.replace("task: colours", "task: elsewhere").replace("dataset_path: json", "dataset_path: /no/such/data")
    )
    (tasks / "graded.yaml").write_text(
        TASK.replace("FILE", str(tasks / "graded.jsonl"))
        .replace("task: colours", "task: graded")
        .replace("output_type: multiple_choice", "output_type: generate_until\ngeneration_kwargs: {max_gen_toks: 2}")
        .replace("doc_to_choice: choices\n", "")
        .replace("doc_to_target: right", "doc_to_target: answer")
        .replace("metric: acc, aggregation: mean", "metric: bleu, aggregation: bleu")
    )
    if not any(a.startswith("task_path") for a in arguments):
        arguments = (*arguments, f"task_path={tasks}")
    check_refused(run, evaluate(run, *arguments), words)


@pytest.mark.parametrize("method", ["gradient", "fisher", "kl_div"])
def test_layers_are_scored_for_a_task(run, tmp_path, method):
    assert rows.main(["sums", str(tmp_path / "rows.jsonl"), "--first", "960"]) == 0
    done = start(
        "sensitivity", "model=hf", f"model.path={run['folder']}/model", "model.dtype=float32", "quant_pair=wint4_afp16",
        "dataset=task", f"dataset.path={tmp_path}/rows.jsonl", "dataset.size=16", f"autoquant.method={method}",
        "autoquant.seq_len=320", "autoquant.draws=1", "model.random_weights=true", "tracking=none",
        f"output_root={tmp_path}/out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "out" / "tmp").iterdir()
    result = load_manifest(folder)
    assert (result.calibration.dataset, result.calibration.calib_samples) == ("task", 16)
    assert 16 <= result.calibration.loss_tokens <= 6 * 16  # of the answers, not of the prompts
    assert (result.scores > 0).all()
