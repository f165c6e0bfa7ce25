"""The main job, a plan and a grid on a GPU, from their command lines."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
pytest.importorskip("mlflow")

from layerbits import cli
from layerbits.scoring.memory import free_bytes
from tests.integration.checkpoint_support import CAPTIONS, save_tokenizer
from tests.integration.entries import start_process
from tests.integration.scoring_support import tiny_model


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """A tiny random model in bf16, and a store."""
    folder = tmp_path_factory.mktemp("gpu")
    tiny_model("llama", hidden_size=256, num_hidden_layers=6).bfloat16().save_pretrained(folder / "model")
    save_tokenizer(folder / "model")
    (folder / "captions.txt").write_text("\n".join(CAPTIONS) + "\n")
    return [
        "model=hf", f"model.path={folder / 'model'}", "model.name=tiny", "model.dtype=bfloat16",
        "model.random_weights=true", "dataset=text_file", f"dataset.path={folder / 'captions.txt'}", "dataset.size=8",
        f"output_root={folder / 'out'}", f"tracking.uri=sqlite:///{folder / 'mlflow.db'}",
    ]  # fmt: skip


@pytest.mark.parametrize("memory", ["auto", "offload"])
def test_the_main_job_scores_on_the_gpu(memory, arguments, tmp_path):
    done = start_process("sensitivity", *arguments, f"autoquant.memory={memory}", LAYERBITS_CACHE=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "run ok" in done.stdout


def test_a_grid_shares_its_pass(arguments, tmp_path):
    done = start_process(
        "grid",
        *arguments[:-3],
        *arguments[-2:],
        "dataset_sizes=8",
        "quant_pairs=wfp4_afp8,wint8_aint8",
        LAYERBITS_CACHE=tmp_path,
    )
    assert done.returncode == 0, done.stderr


def test_a_plan_measures_a_few_blocks(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["plan", *arguments[:8], "quant_pairs=wfp4_afp8,wfp8_afp8"])
    assert not exit.value.code
    assert "measured on this GPU" in capsys.readouterr().out


def test_a_card_without_a_number_is_the_current_one():
    named, bare = (free_bytes(torch.device(name)) for name in (f"cuda:{torch.cuda.current_device()}", "cuda"))
    assert bare == pytest.approx(named, rel=0.01)
