"""INT8 × INT8 and FP8 × FP8, as ``served.py`` says; and the CPUs that this one can be taken for."""

from pathlib import Path

import pytest
from scipy import stats

from layerbits.answers.evaluation import read_evaluation
from layerbits.checkpoint.processors import WRITTEN
from layerbits.serving.environment import find_environment
from layerbits.serving.processor import ask
from layerbits.serving.server import Launch, serving
from tests.integration.entries import start
from tests.serving.served import PYTHON, ROOT, ServedAsScored, expected, needs_vllm

pytestmark = needs_vllm

NEAR = 3.0
"""Nats of log-odds, from which on two computations of one scheme agree on right or wrong: each rounds activations to
INT8, and the server rounds every output to 16 bits before (largest difference seen: 2.5)."""


class TestEightBits(ServedAsScored):
    schemes = ("int8_w8a8", "fp8_tokens")

    def test_a_served_endpoint_gets_the_verdict_of_the_model_in_memory(self, served, tmp_path):
        pytest.importorskip("lm_eval", reason="needs the extra `eval`")
        if expected("int8_w8a8").state != WRITTEN:
            pytest.skip("this CPU computes INT8 otherwise, so its answers may be others")
        checkpoint = Path(served.runs["int8_w8a8"].data.tags["checkpoint.path"])
        launch = Launch(find_environment(str(PYTHON), ROOT), max_length=256, top_k=4)
        with serving(launch, checkpoint, "int8_w8a8", tmp_path / "vllm.log") as client:
            done = start(
                "evaluate", f"scheme_files={served.folder}/int8_w8a8.json", "tasks=cloze", "limit=16", "rows=0",
                f"endpoint={client.url}", "device=cpu", "tracking=none", f"output_root={tmp_path}",
                LAYERBITS_CACHE=tmp_path / "cache", HF_HOME=tmp_path / "hf",
            )  # fmt: skip
        assert done.returncode == 0, done.stderr
        (folder,) = tmp_path.glob("tmp/evaluation_*")
        found = read_evaluation(folder / "evaluation.json")
        said = {scheme: verdict for (_, scheme), verdict in found.verdicts().items()}
        assert said["served"].words == said["int8_w8a8"].words
        ours, theirs = (next(s for s in found.schemes if s.scheme == name) for name in ("int8_w8a8", "served"))
        pairs = list(zip(ours.tasks["cloze"].answers, theirs.tasks["cloze"].answers, strict=True))
        assert all(a.right == b.right for a, b in pairs if abs(a.log_odds) > NEAR)
        assert stats.spearmanr([a.log_odds for a, _ in pairs], [b.log_odds for _, b in pairs]).statistic > 0.95


class TestStaticFp8(ServedAsScored):
    schemes = ("fp8",)
    plugin = True


@pytest.mark.parametrize(("lesser", "name"), [("avx2", "AVX2"), ("avx512", "AVX-512")])
def test_a_lesser_cpu_multiplies_int8_otherwise(lesser, name):
    has = ask(find_environment(None, ROOT)).flags  # of the CPU itself, whatever one the suite plays
    processor = ask(find_environment(str(ROOT / "tests" / "serving" / "lesser" / lesser), ROOT))
    assert processor.name == (name if "avx512" in has else "AVX2")
    assert processor.int8_exact is False
    assert ("cpu_gemm_wna16" in processor.operators) == ("avx512" in processor.flags)
