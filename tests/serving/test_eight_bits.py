"""INT8 × INT8 and FP8 × FP8, as ``served.py`` says."""

from tests.serving.served import ServedAsScored, needs_vllm

pytestmark = needs_vllm


class TestEightBits(ServedAsScored):
    schemes = ("int8_w8a8", "fp8")
