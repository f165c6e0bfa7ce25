"""``layerbits plan``: what a run would take, from shapes, a table or a few blocks; no weights are loaded."""

import json
import math
import re

import pytest
import torch

from layerbits import cli
from layerbits.inputs import loading, models
from layerbits.inputs.model_spec import ModelSpec
from layerbits.inputs.models import ResolvedModel
from layerbits.planning import sample
from layerbits.planning.plan import forecast
from layerbits.planning.sample import Cost, Work, estimate, measure
from layerbits.scoring.memory import choose
from layerbits.scoring.placement import needs_of
from tests.integration.scoring_support import CONFIGS, configs, tiny_model


@pytest.fixture
def plan(capsys, monkeypatch):
    """Runs the command; returns (status, stdout, stderr)."""

    def no_weights(*_arguments, **_options):
        raise AssertionError("a plan must load no weights")

    monkeypatch.setattr(loading, "load", no_weights)

    def run(*arguments):
        with pytest.raises(SystemExit) as exit:
            cli.main(["plan", *arguments])
        return exit.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def work():
    config = tiny_model("llama").config
    config.num_hidden_layers, config.architectures = 6, ["LlamaForCausalLM"]
    resolved = ResolvedModel(ModelSpec("tiny", "tiny", dtype="float32"), "tiny", "0", config, torch.float32)
    names = tuple(n for n in models.scored_linears(loading.empty_model(resolved), resolved.spec) if n != "lm_head")
    return Work(resolved, names, configs("wint8_afp16"), [(2, 16), (1, 9)], "gradient", 1, "cpu")


def test_the_table_has_every_mode_and_the_command(plan):
    status, out, _ = plan("quant_pairs=wfp8_afp8,wint8_afp16", "autoquant.batch_size=4")
    assert status == 0
    assert "2 candidates in one pass" in out
    assert [line.split()[0] for line in out.splitlines()[4:7]] == ["fast", "lean", "offload"]
    assert "mlflow run . --env-manager local --experiment-name layerbits -e grid" in out
    assert "-P quant_pairs=wfp8_afp8,wint8_afp16 -P overrides=" in out
    assert "autoquant.batch_size=4" in out


def test_one_of_a_thing_and_what_cannot_be_compared_are_said(plan):
    _, out, _ = plan("quant_pair=wint8_afp16")
    assert "1 candidate in one pass, 1 step of up to" in out
    unknown = any(line.rstrip().endswith("?") for line in out.splitlines()[4:7])
    assert unknown == ("?: there is no GPU here whose free memory could be compared" in out)


def test_what_the_seconds_leave_out_is_said(plan):
    _, out, _ = plan("quant_pair=wint8_afp16", "autoquant.refine=auto")
    assert "not in these seconds: autoquant.refine=auto" in out


def test_json_is_strict(plan):
    _, out, _ = plan("quant_pair=wint8_afp16", "--format", "json")
    found = json.loads(out)
    assert found["candidates"] == 1
    rows = {row["mode"]: row for row in found["rows"]}
    assert rows["fast"]["device_gb"] > rows["lean"]["device_gb"] > rows["offload"]["device_gb"]
    assert rows["offload"]["host_gb"] > rows["lean"]["host_gb"] == 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["model=nothing"], r"model=nothing is not known"),
        (["quant_pairs=wfp9"], r"quant_pair=wfp9 is not known"),
        (["autoquant.memroy=lean"], r"autoquant.memroy"),
        (["fast"], r"fast is no setting; give key=value"),
        (["autoquant.method=kl_div"], r"plan knows one pass with method=gradient or fisher"),
        (["quant_pairs=wfp8_aint4"], r"no candidate can be planned \(wfp8_aint4"),
    ],
)
def test_bad_input_is_one_line(plan, arguments, says):
    status, out, err = plan(*arguments)
    assert (status, out) == (2, "")
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert re.search(says, line), err


def test_the_estimate_follows_the_line_of_two_small_models(work, monkeypatch):
    seen = []

    def measured(_work, _memory, blocks):
        seen.append(blocks)
        return Cost(1.0 + blocks, 0.5 * blocks, 2.0 + 3 * blocks)

    monkeypatch.setattr(sample, "measure", measured)
    needs = needs_of(work.resolved, work.scored, 32)
    assert estimate(work, choose(needs, 1e12, "lean")) == Cost(7.0, 3.0, 20.0)
    assert seen == [2, 4]


@pytest.mark.parametrize("mode", ["fast", "lean", "offload"])
def test_a_few_blocks_are_scored_without_a_bar(work, mode, capsys):
    found = measure(work, choose(needs_of(work.resolved, work.scored, 32), 1e12, mode), 2)
    assert 0 < found.calibrate_seconds + found.seconds < 60
    assert math.isnan(found.device_gb)
    assert "batch" not in capsys.readouterr().err


def test_device_cpu_is_measured_here(monkeypatch):
    monkeypatch.setattr(sample, "measure", lambda _work, _memory, blocks: Cost(0.1 * blocks, 0.01 * blocks, math.nan))
    found = forecast(["quant_pair=wint8_afp16", "device=cpu"], CONFIGS)
    assert "measured on this CPU" in found.how
    assert [round(row.step_seconds, 6) for row in found.rows] == [3.0, 3.0, 3.0]
    assert [row.fits for row in found.rows] == ["yes", "yes", "yes"]
    assert found.best == "fast"
