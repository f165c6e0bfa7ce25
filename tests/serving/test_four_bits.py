"""INT4 weights, as ``served.py`` says; and what vLLM refuses."""

import json

import pytest

from layerbits.serving.environment import find_environment
from layerbits.serving.server import Launch, Refused, serving
from tests.serving.served import PYTHON, ROOT, ServedAsScored, needs_vllm
from tests.unit.test_serving import processes

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_attention_heads": 1}

pytestmark = needs_vllm


class TestFourBits(ServedAsScored):
    schemes = ("int4_w4a16",)


def test_a_checkpoint_that_vllm_refuses_is_told_in_its_words(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": {"quant_method": "nonsense"}}))
    launch = Launch(find_environment(str(PYTHON), ROOT), max_length=64, top_k=4)
    with (
        pytest.raises(Refused, match=r"[Uu]nknown quantization method"),
        serving(launch, tmp_path, "it", tmp_path / "log"),
    ):
        pass
    assert processes(str(tmp_path)) == []
