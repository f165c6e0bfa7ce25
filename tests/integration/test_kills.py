"""Two of the moments of ``tests.integration.kills``, in scoring and in logging, on a tiny model; more by hand."""

import shutil
import subprocess
import sys

from layerbits.inputs import smollm2
from tests.integration.scoring_support import everyday_tokens, knowing, tiny_model
from tests.integration.tracking_support import ROOT, environment


def test_runs_that_were_killed_come_out_the_same_when_started_again(tmp_path):
    model = tmp_path / "model"
    knowing(tiny_model("llama", vocab_size=49_152), everyday_tokens()).save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(smollm2.checkpoint() / name, model)
    command = [sys.executable, "-m", "tests.integration.kills", "--moments", "2", "--seed", "2"]
    command += ["model=hf", f"model.path={model}", "model.dtype=float32"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 equal" in done.stdout
