"""What a run makes of the model that it was given, from the command line on tiny checkpoints."""

import pytest
import torch
from mlflow import MlflowClient

from layerbits.results.manifest import load_manifest

from .checkpoint_support import CAPTIONS, WORDS, copied, quantized_to_fp8, save_tokenizer, tensors
from .entries import start
from .scoring_support import knowing, tiny_model

TOKENS = range(len(WORDS) + 2)  # with <unk> and <eos>


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A model that knows its few words, and captions of them."""
    folder = tmp_path_factory.mktemp("given")
    knowing(tiny_model("llama"), TOKENS).bfloat16().save_pretrained(folder / "model")
    save_tokenizer(folder / "model")
    (folder / "captions.txt").write_text("\n".join(CAPTIONS) + "\n")
    return folder


def run(given, folder, model, *arguments, script="sensitivity"):
    """A run on a folder: how it ended, and what the store has of it."""
    store = f"sqlite:///{folder}/mlflow.db"
    pair = "quant_pair=wint8_afp16" if script == "sensitivity" else "quant_pairs=wint8_afp16"
    size = "dataset.size=8" if script == "sensitivity" else "dataset_sizes=8"
    ended = start(
        script, "model=hf", f"model.path={model}", "model.name=tiny", pair, size, "dataset=text_file",
        f"dataset.path={given}/captions.txt", "device=cpu", f"tracking.uri={store}", f"output_root={folder}/out",
        f"autoquant.checkpoint={folder}/search", *arguments,
    )  # fmt: skip
    return ended, MlflowClient(store).search_runs(["1"], order_by=["attributes.start_time DESC"])


def refusal(ended):
    """The one line of a run that was refused."""
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    (line,) = [x for x in ended.stderr.splitlines() if x.startswith("error: ")]
    return line


def test_a_run_tells_how_well_the_unquantized_model_predicts(given, tmp_path):
    ended, (found,) = run(given, tmp_path, given / "model")
    assert ended.returncode == 0, ended.stderr
    loss = found.data.metrics["summary/loss_per_token"]
    assert 2.98 < loss < 5.95
    assert found.data.metrics["summary/not_believable"] == 0
    assert found.data.params["eff.vocabulary"] == "384"
    assert f"the unquantized model loses {loss:.2f} nats per token, guessing ln(384) = 5.95" in ended.stdout
    (manifest,) = (tmp_path / "out").rglob("manifest.json")
    result = load_manifest(manifest)
    assert result.baseline.loss_per_token == loss
    assert any("more than half of the ln(384)" in line for line in result.warnings)
    assert "warning: the unquantized model loses" in ended.stderr


def test_a_model_that_guesses_fails_with_the_likely_reasons(given, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    ended, (found,) = run(given, tmp_path, tmp_path / "model")
    line = refusal(ended)
    assert "no less than the ln(384) = 5.95 that guessing loses" in line
    assert "tokenizer is another model's" in line
    assert found.info.status == "FAILED"
    assert found.data.tags["outcome"] == "failed"
    assert found.data.tags["reason"] in line
    assert not list(tmp_path.rglob("manifest.json"))


def test_random_weights_on_purpose_may_guess(given, tmp_path):
    ended, (found,) = run(given, tmp_path, given / "model", "model.random_weights=true")
    assert ended.returncode == 0, ended.stderr
    assert found.data.metrics["summary/loss_per_token"] > 5.5
    assert found.data.tags["weights"] == "random"


def test_a_cell_of_a_grid_fails_likewise(given, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    _, found = run(given, tmp_path, tmp_path / "model", script="grid")
    (cell,) = [r for r in found if "mlflow.parentRunId" in r.data.tags]
    assert "that guessing loses" in cell.data.tags["reason"]


def test_what_was_dequantized_says_so(given, tmp_path):
    folder = copied(given / "model", tmp_path / "model")
    quantized_to_fp8(folder)
    assert "is already quantized: fp8" in refusal(run(given, tmp_path, folder)[0])
    ended, (found, _) = run(given, tmp_path, folder, "model.dequantize=true")
    assert ended.returncode == 0, ended.stderr
    assert found.data.tags["dequantized"] == "fp8"
    (report,) = (tmp_path / "out").rglob("layer-sensitivity-report.md")
    assert "was dequantized: the scores tell what a second quantization does" in report.read_text()


def test_a_missing_tensor_is_refused_before_the_run_loads_anything(given, tmp_path):
    folder = copied(given / "model", tmp_path / "model")
    tensors(folder, lambda held: held.pop("model.layers.1.mlp.down_proj.weight"))
    ended, (found,) = run(given, tmp_path, folder)
    assert "lacks 1 tensor of the model (model.layers.1.mlp.down_proj.weight)" in refusal(ended)
    assert found.data.tags["outcome"] == "failed"


def test_weights_that_are_no_numbers_are_refused(given, tmp_path):
    folder = copied(given / "model", tmp_path / "model")
    tensors(folder, lambda held: held["model.norm.weight"].fill_(torch.nan))
    ended, _ = run(given, tmp_path, folder)
    assert "loses nan nats per token" in refusal(ended)


def test_excluded_linears_are_not_scored(given, tmp_path):
    ended, (found,) = run(given, tmp_path, given / "model", 'model.exclude=["*.layers.0"]')
    assert ended.returncode == 0, ended.stderr
    assert found.data.params["eff.exclude"] == "*.layers.0"
    assert {k for k in found.data.metrics if k.startswith("score/B00")} == set()
    assert found.data.metrics["summary/groups"] == 4
