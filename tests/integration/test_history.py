"""Earlier runs read back from real stores: a SQLite file, and a server that serves it."""

import http.server
import json
import os
import pickle
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.entities import Metric, Param, RunTag

from layerbits import history, tracking
from layerbits.errors import UserError
from layerbits.history import query
from layerbits.history.cache import Cache
from layerbits.results.manifest import sample_frame, to_manifest
from layerbits.tracking import contract
from tests.integration.tracking_support import Server, environment, small_result, write_folder

START = 1_772_600_000_000


@pytest.fixture(autouse=True)
def clean(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "LAYERBITS_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("LAYERBITS_CACHE", str(tmp_path / "cache"))
    yield
    mlflow.set_tracking_uri(None)


@pytest.fixture
def store(made_store, tmp_path):
    """URI of a store of this test's own."""
    (tmp_path / "mlflow.db").write_bytes(made_store.read_bytes())
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture
def client(store):
    client = mlflow.MlflowClient(store)
    client.create_experiment("layerbits", str(Path(store.removeprefix("sqlite:///")).parent / "mlruns"))
    return client


def log(client, result, number=0, end="FINISHED", **changes):
    """A run without artifacts, started ``number`` minutes after the first."""
    experiment = client.get_experiment_by_name("layerbits").experiment_id
    tags = contract.tags(result) | {contract.RESULT_ID: f"{number:032x}", "mlflow.runName": result.run_name} | changes
    at = START + 60_000 * number
    run_id = client.create_run(experiment, at).info.run_id
    client.log_batch(
        run_id,
        [Metric(key, value, at, step) for key, value, step in contract.metrics(result)],
        [Param(*item) for item in contract.parameters(result).items()],
        [RunTag(*item) for item in tags.items() if item[1] is not None],
    )
    if end:
        client.set_terminated(run_id, end, at + 1000)
    return run_id


def varied(number):
    """Results of two models and two pairs in turns."""
    result = small_result(blocks=1, seed=number)
    info = replace(result.candidate, quant_pair=("wint8_afp16", "wfp8_afp8")[number % 2])
    model = replace(result.model, name=("tiny", "o'brien")[number // 2 % 2])
    return replace(result, candidate=info, model=model)


def without_layers(result):
    return dict.fromkeys(contract.layer_tags(result))


@pytest.fixture
def asked(monkeypatch):
    """How many runs each request to the store brought."""
    sizes = []
    search = mlflow.MlflowClient.search_runs

    def counted(*arguments, **options):
        found = search(*arguments, **options)
        sizes.append(len(found))
        return found

    monkeypatch.setattr(mlflow.MlflowClient, "search_runs", counted)
    return sizes


# Runs


def test_runs_are_rows_with_the_latest_first(client, store):
    ids = [log(client, varied(i), i) for i in range(4)]
    frame = history.runs(tracking_uri=store)
    assert list(frame["run_id"]) == ids[::-1]
    row = frame.iloc[-1]
    result = varied(0)
    assert (row["model"], row["quant_pair"], row["dataset_size"]) == ("tiny", "wint8_afp16", "small")
    assert (row["score_sum"], row["effective_bits"]) == (result.total("scores"), 12.0)
    assert row["start_time"] == pd.Timestamp("2026-03-04T04:53:20Z")
    assert (row["groups"], row["calib_samples"]) == (4, 16)


@pytest.mark.parametrize(
    ("filters", "numbers"),
    [
        ({"model": "tiny"}, {0, 1, 4, 5}),
        ({"pair": "wfp8_afp8"}, {1, 3, 5}),
        ({"model": "tiny", "pair": "wfp8_afp8"}, {1, 5}),
        ({"model": "o'brien", "pair": "wint8_afp16"}, {2}),
        ({"granularity": "per-token"}, set()),
        ({"since": "2026-03-04T04:57"}, {4, 5}),
        ({"where": "params.`eff.model` != 'tiny'"}, {2, 3}),
        ({"where": "metrics.`summary/groups` > 4"}, set()),
    ],
)
def test_filters_choose_the_same_runs_cold_and_cached(client, store, filters, numbers):
    ids = [log(client, varied(i), i) for i in range(6)]
    cold = history.runs(tracking_uri=store, **filters)
    assert {ids.index(run_id) for run_id in cold["run_id"]} == numbers
    history.runs(tracking_uri=store)
    pd.testing.assert_frame_equal(history.runs(tracking_uri=store, **filters), cold)


def test_only_complete_results_are_runs_unless_asked(client, store):
    good = log(client, varied(0), 0)
    log(client, varied(1), 1, end="FAILED", outcome="failed")
    log(client, varied(2), 2, end=None)
    client.set_terminated(
        client.create_run(client.get_run(good).info.experiment_id, tags={"outcome": "ok"}).info.run_id
    )
    assert list(history.runs(tracking_uri=store)["run_id"]) == [good]
    assert len(history.runs(tracking_uri=store, outcome="failed")) == 1
    assert len(history.runs(tracking_uri=store, outcome=None)) == 4


def test_a_second_question_reads_no_run_again(client, store, asked):
    for i in range(20):
        log(client, varied(i), i)
    first = history.runs(tracking_uri=store)
    asked.clear()
    pd.testing.assert_frame_equal(history.runs(tracking_uri=store), first)
    assert sum(asked) <= 2
    asked.clear()
    assert len(history.runs(tracking_uri=store, refresh=True)) == 20
    assert sum(asked) >= 20


def test_new_runs_are_added_wherever_they_belong(client, store, asked):
    ids = [log(client, varied(i), i) for i in (0, 2, 4)]
    history.runs(tracking_uri=store)
    ids += [log(client, varied(i), i) for i in (1, 5)]  # the first was started earlier than what is known
    asked.clear()
    frame = history.runs(tracking_uri=store)
    assert set(frame["run_id"]) == set(ids)
    assert frame["start_time"].is_monotonic_decreasing
    assert sum(asked) <= 4


@pytest.mark.parametrize("window", [1000, 6])
@pytest.mark.parametrize("gone", [(), (0,), (7,), (15,), (3, 9, 10)])
def test_deleted_and_restored_runs(client, store, asked, monkeypatch, window, gone):
    monkeypatch.setattr(query, "_WINDOW", window)
    monkeypatch.setattr(query, "_FEW", 2)
    ids = [log(client, varied(i), i // 2) for i in range(16)]  # two at a time start at once
    history.runs(tracking_uri=store)
    for i in gone:
        client.delete_run(ids[i])
    late = log(client, varied(16), 3)
    asked.clear()
    left = {*ids, late} - {ids[i] for i in gone}
    assert set(history.runs(tracking_uri=store)["run_id"]) == left
    for i in gone:
        client.restore_run(ids[i])
    assert set(history.runs(tracking_uri=store)["run_id"]) == {*ids, late}


def test_one_deleted_run_among_many_is_found_without_reading_all(client, store, asked, monkeypatch):
    monkeypatch.setattr(query, "_FEW", 2)
    ids = [log(client, varied(i), i) for i in range(40)]
    history.runs(tracking_uri=store)
    client.delete_run(ids[11])
    asked.clear()
    assert set(history.runs(tracking_uri=store)["run_id"]) == set(ids) - {ids[11]}
    assert sum(asked) < 20
    asked.clear()
    history.runs(tracking_uri=store)
    assert sum(asked) <= 2


def test_a_run_that_is_completed_later_appears(client, store):
    run_id = log(client, varied(0), 0, end="FAILED", outcome="failed")
    assert history.runs(tracking_uri=store).empty
    client.set_tag(run_id, "outcome", "ok")
    client.set_terminated(run_id, "FINISHED")
    assert list(history.runs(tracking_uri=store)["run_id"]) == [run_id]


def test_another_store_at_the_same_address_is_not_mixed_up(client, store, made_store, tmp_path):
    log(client, varied(0), 0)
    assert len(history.runs(tracking_uri=store)) == 1
    (tmp_path / "mlflow.db").write_bytes(made_store.read_bytes())
    client.create_experiment("layerbits", str(tmp_path / "mlruns"))
    assert history.runs(tracking_uri=store).empty


def test_reading_leaves_mlflow_as_it_was(client, store, monkeypatch, tmp_path):
    log(client, varied(0), 0)
    history.runs(tracking_uri=store)
    assert "MLFLOW_TRACKING_URI" not in os.environ
    assert not mlflow.is_tracking_uri_set()
    monkeypatch.chdir(tmp_path)  # where mlflow.db lies
    assert len(history.runs()) == 1


# Scores


def test_scores_are_tidy_and_exact(client, store):
    results = {log(client, varied(i), i): varied(i) for i in range(3)}
    frame = history.scores(history.runs(tracking_uri=store))
    assert list(frame.columns) == [
        *("run_id", "model", "quant_pair", "granularity", "dataset_size", "block", "kind", "layer", "candidate"),
        *("score", "predicted_kl", "bits", "chosen", "rank", "low", "high", "rank_low", "rank_high"),
        *("image_share", "believable"),
    ]
    assert len(frame) == 12
    for run_id, result in results.items():
        part = frame[frame["run_id"] == run_id].reset_index(drop=True)
        rows = pd.DataFrame(result.rows())
        for name in ("kind", "layer", "score", "predicted_kl", "bits", "chosen", "rank"):
            np.testing.assert_array_equal(part[name], rows[name])
        assert list(part["block"]) == list(rows["block"])
        assert set(part["model"]) == {result.model.name}


def test_scores_that_are_not_finite_are_nan_and_last(client, store):
    run_id = log(client, small_result(), 0)
    frame = history.scores([run_id], tracking_uri=store)
    last = frame.iloc[-1]
    assert (last["layer"], last["rank"]) == ("B01.o", 12)
    assert np.isnan(last["score"])
    assert frame["score"].isna().sum() == 1


def test_scores_outside_the_blocks_have_no_block(client, store):
    result = small_result(blocks=1)
    head = replace(result.groups[0], key="lm_head", block=None, kind="lm_head")
    run_id = log(client, replace(result, groups=(head, *result.groups[1:])))
    frame = history.scores([run_id], tracking_uri=store).set_index("layer")
    assert frame.loc["lm_head", "block"] is pd.NA
    assert frame.loc["B00.o", "block"] == 0


def test_scores_that_are_cached_ask_for_nothing(client, store, monkeypatch):
    for i in range(3):
        log(client, varied(i), i)
    frame = history.runs(tracking_uri=store)
    first = history.scores(frame)
    monkeypatch.setattr(mlflow, "MlflowClient", None)
    pd.testing.assert_frame_equal(history.scores(frame), first)
    part = frame[frame["quant_pair"] == "wfp8_afp8"]
    assert set(history.scores(part)["run_id"]) == set(part["run_id"])


def test_scores_of_a_run_without_layer_tags_come_from_its_table(client, store):
    result = small_result()
    run_id = log(client, result, 0, **without_layers(result))
    client.log_text(run_id, contract.table(result), contract.TABLE)
    other = log(client, result, 1)
    frame = history.scores(history.runs(tracking_uri=store))
    parts = [frame[frame["run_id"] == i].drop(columns="run_id").reset_index(drop=True) for i in (run_id, other)]
    pd.testing.assert_frame_equal(*parts)


@pytest.mark.parametrize(
    ("table", "words"),
    [(None, "cannot be read"), (lambda text: text[:-200], "is damaged"), (lambda _: "[]", "damaged")],
)
def test_a_missing_or_damaged_table_is_a_warning_and_the_rest_is_there(client, store, table, words):
    result = small_result()
    bad = log(client, result, 0, **without_layers(result))
    if table:
        client.log_text(bad, table(contract.table(result)), contract.TABLE)
    good = log(client, result, 1)
    runs = history.runs(tracking_uri=store)
    with pytest.warns(UserWarning, match=f"1 runs left out.*{bad}.*{words}"):
        frame = history.scores(runs)
    assert set(frame["run_id"]) == {good}
    with pytest.raises(UserError, match=words):
        history.compare(bad, good, tracking_uri=store)


def test_runs_of_a_later_version_are_listed_with_a_warning_and_without_scores(client, store):
    later = log(client, varied(0), 0, **{"layerbits.schema_version": "99"})
    log(client, varied(1), 1)
    with pytest.warns(UserWarning, match="1 runs were written by a later LayerBits"):
        runs = history.runs(tracking_uri=store)
    assert len(runs) == 2
    with pytest.warns(UserWarning, match=f"{later}.*schema_version 99.*upgrade"):
        assert len(history.scores(runs)) == 4


def test_no_runs_have_no_scores(client, store):
    frame = history.scores(history.runs(tracking_uri=store))
    assert frame.empty
    assert "predicted_kl" in frame


def test_a_run_that_is_not_there_says_so(client, store):
    with pytest.warns(UserWarning, match="no run"):
        assert history.scores(["0" * 32], tracking_uri=store).empty


# Results


class Boom:
    def __reduce__(self):
        return Path.touch, (Path(os.environ["LAYERBITS_CACHE"]).parent / "boom",)


@pytest.fixture
def pushed(store, tmp_path):
    """A result on disk with samples and a pickle that would tell if it was loaded, and its run."""
    samples = np.random.default_rng(0).random((3, 12)).astype(np.float32).astype(float)
    result = small_result(sample_kl=samples, sample_tokens=np.array([5, 6, 7]))
    folder = write_folder(result, tmp_path / "result")
    (folder / "sensitivity").mkdir()
    sample_frame(result).to_parquet(folder / "sensitivity" / "scores.parquet")
    (folder / "autoquant").mkdir()
    (folder / "autoquant" / "autoquant_state.pt").write_bytes(pickle.dumps(Boom()))
    return result, tracking.push(folder, store)


def test_a_result_reads_back_with_its_samples(pushed, store, tmp_path):
    result, run_id = pushed
    found = history.result(run_id, tracking_uri=store)
    assert to_manifest(found) == to_manifest(result)
    np.testing.assert_array_equal(found.sample_kl, result.sample_kl)
    np.testing.assert_array_equal(found.sample_tokens, result.sample_tokens)
    history.scores(history.runs(tracking_uri=store))
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("damage", [None, b"PAR1 and no more"])
def test_a_result_without_readable_samples_is_still_there(pushed, store, tmp_path, damage):
    _, run_id = pushed
    (file,) = (tmp_path / "mlruns").rglob("scores.parquet")
    file.unlink() if damage is None else file.write_bytes(damage)
    with pytest.warns(UserWarning, match="without per-sample scores"):
        found = history.result(run_id, tracking_uri=store)
    assert found.sample_kl is None
    assert found.groups


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "manifest.json.*cannot be read"),
        ('{"groups": [', "is not JSON"),
        ('{"a": 1}', "not a LayerBits manifest"),
        ('{"schema_version": 99}', "upgrade layerbits"),
    ],
)
def test_a_manifest_that_is_none_says_so(pushed, store, tmp_path, text, words):
    _, run_id = pushed
    (file,) = (tmp_path / "mlruns").rglob("manifest.json")
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(UserError, match=words):
        history.result(run_id, tracking_uri=store)


def test_a_result_of_no_run_says_so(client, store):
    with pytest.raises(UserError, match="layerbits history"):
        history.result("../../etc", tracking_uri=store)


# Comparing


def test_compare_counts_ranks_and_ratios(client, store):
    base = small_result(blocks=5)
    scores = np.arange(1.0, 21.0)
    changed = scores.copy()
    changed[[0, 19]] = changed[[19, 0]]
    a, b = (log(client, replace(base, scores=s, predicted_kl=2 * s)) for s in (scores, 3 * changed))
    found = history.compare(a, b, by="score", tracking_uri=store)
    assert (found.comparable, found.groups, found.ratio) == (True, 20, pytest.approx(3))
    assert found.spearman == pytest.approx(1 - 6 * 2 * 19**2 / (20 * (20**2 - 1)))
    assert found.kendall == pytest.approx(1 - 2 * 37 / 190)
    assert found.overlap == {5: 4, 10: 9, 20: 20}
    first = found.movers.iloc[0]
    assert (first["layer"], first["rank_a"], first["rank_b"], first["moved"]) == ("B04.down", 1, 20, 19)
    assert (first["a"], first["b"], first["ratio"]) == (20, 3, 3 / 20)
    assert history.compare(a, b, tracking_uri=store).ratio == pytest.approx(3)
    assert np.isnan(history.compare(a, b, by="rank", tracking_uri=store).ratio)


def test_compare_leaves_out_what_only_one_has(client, store):
    a, b = log(client, small_result(2)), log(client, small_result(3))
    found = history.compare(a, b, tracking_uri=store)
    assert found.notes == ("groups in one of the two only: 4", "groups without a finite predicted_kl: 1")
    assert found.groups == 7


def test_runs_that_do_not_compare_are_not_compared(client, store):
    base = small_result()
    a = log(client, base)
    b = log(client, replace(base, calibration=replace(base.calibration, digest="e" * 64, seq_len=256)))
    found = history.compare(a, b, by="score", tracking_uri=store)
    assert not found.comparable
    assert found.reasons == (f"dataset digest: {'d1' * 6} and {'e' * 12}", "seq len: 128 and 256")
    assert np.isnan([found.spearman, found.kendall, found.ratio]).all()
    assert found.movers.empty
    by_kl = history.compare(a, b, tracking_uri=store)
    assert by_kl.comparable
    assert set(found.reasons) <= set(by_kl.notes)


# Over HTTP


@pytest.fixture(scope="module")
def served(made_store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    (folder / "mlflow.db").write_bytes(made_store.read_bytes())
    server = Server(folder)
    server.start()
    yield server, folder
    server.kill()


def test_a_server_gives_what_its_store_has(served, tmp_path):
    server, folder = served
    embedded = f"sqlite:///{folder}/mlflow.db"
    mlflow.MlflowClient(server.url).create_experiment("layerbits")
    for i in range(101):  # three pages
        log(mlflow.MlflowClient(embedded), varied(i), i)
    result = small_result(seed=5)
    run_id = tracking.push(write_folder(result, tmp_path / "result"), server.url)
    over_http = history.runs(tracking_uri=server.url)
    direct = history.runs(tracking_uri=embedded)
    pd.testing.assert_frame_equal(over_http, direct)
    assert len(over_http) == 102
    pd.testing.assert_frame_equal(history.runs(tracking_uri=server.url), over_http)
    pd.testing.assert_frame_equal(history.scores(over_http), history.scores(direct))
    with pytest.warns(UserWarning, match="per-sample"):
        assert to_manifest(history.result(run_id, tracking_uri=server.url)) == to_manifest(result)


# What goes wrong


def test_a_store_that_is_not_there_is_not_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for uri in (None, "sqlite:///sub/none.db"):
        with pytest.raises(UserError, match="there are no runs at"):
            history.runs(tracking_uri=uri)
    assert not list(tmp_path.rglob("*.db"))


def test_a_missing_experiment_names_the_ones_there_are(client, store):
    with pytest.raises(UserError, match=r"no experiment layerbit in .*; there are: layerbits"):
        history.runs("layerbit", tracking_uri=store)


def test_a_deleted_experiment_says_how_to_restore_it(client, store):
    client.delete_experiment(client.get_experiment_by_name("layerbits").experiment_id)
    with pytest.raises(UserError, match="mlflow experiments restore"):
        history.runs(tracking_uri=store)


def test_a_filter_that_mlflow_does_not_understand_says_so(client, store):
    with pytest.raises(UserError, match="does not understand the filter 'pair is nice'"):
        history.runs(where="pair is nice", tracking_uri=store)


def test_a_server_that_is_not_there_says_so():
    with pytest.raises(UserError, match="does not answer"):
        history.runs(tracking_uri="http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (403, {"error_code": "PERMISSION_DENIED", "message": "no"}, "READ permission"),
        (401, "who are you", "READ permission"),
        (500, {"error_code": "INTERNAL_ERROR", "message": "it broke"}, "cannot be read"),
    ],
)
def test_a_server_that_refuses_the_runs_says_so(status, body, words):
    """It lets everybody see that there is an experiment, and nobody its runs."""
    experiment = {"experiment_id": "1", "name": "layerbits", "lifecycle_stage": "active", "artifact_location": "x"}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            refused = self.path.endswith("/runs/search")
            answer = body if refused else {"experiments": [experiment], "experiment": experiment}
            self.send_response(status if refused else 200)
            self.end_headers()
            self.wfile.write((answer if isinstance(answer, str) else json.dumps(answer)).encode())

        do_GET = do_POST

        def log_message(self, *_):
            pass

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        with pytest.raises(UserError, match=words) as failure:
            history.runs(tracking_uri=f"http://127.0.0.1:{web.server_port}")
    web.shutdown()
    web.server_close()
    assert "\n" not in str(failure.value)


# A cache that several processes write

WRITER = """
import sys
from layerbits.history.cache import Cache
from tests.integration.tracking_support import small_result
from tests.unit.test_history import raw_run
from layerbits.history.rows import row_of
cache, number = Cache("http://server"), int(sys.argv[1])
row = row_of(raw_run(small_result(blocks=1)))
for i in range(10):
    cache.add([{**row, "run_id": f"{number}-{i}"}])
    assert cache.with_groups([f"{number}-{i}"]).num_rows <= 1
    if i % 5 == 4:
        cache.forget([f"{number}-{i}"])
"""


def test_processes_share_the_cache(tmp_path):
    command = [sys.executable, "-c", WRITER]
    env = environment(LAYERBITS_CACHE=str(tmp_path / "cache"))
    processes = [subprocess.Popen([*command, str(n)], env=env) for n in range(3)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0, 0]
    found = Cache("http://server").runs("7")["run_id"].to_pylist()
    assert len(found) == len(set(found))
    # A rewrite by one may take up what another forgets at that moment; nothing that was added may be lost but by
    # being asked for again.
    assert {f"{n}-{i}" for n in range(3) for i in range(10)} >= set(found)
    assert len(found) >= 20
