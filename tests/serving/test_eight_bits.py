"""INT8 × INT8 and FP8 × FP8, as ``served.py`` says; and the CPUs that this one can be taken for."""

import pytest

from layerbits.serving.environment import find_environment
from layerbits.serving.processor import ask
from tests.serving.served import ROOT, ServedAsScored, needs_vllm

pytestmark = needs_vllm


class TestEightBits(ServedAsScored):
    schemes = ("int8_w8a8", "fp8_tokens")


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
