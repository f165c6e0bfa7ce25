"""vLLM behind :class:`layerbits.serving.check.Engine`.

Written against the documented interface of vLLM (``LLM``, ``SamplingParams``, ``RequestOutput``; docs.vllm.ai, read
2026-11-21); it was not run, as vLLM and a GPU are needed for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from layerbits.serving.check import LogProbs

INSTALL = "pip install 'layerbits[vllm]'"


def missing() -> str:
    """Why vLLM cannot run here, with the mend; empty where it can."""
    if find_spec("vllm") is None:
        return f"vLLM is not installed; {INSTALL} (in an environment of its own: it pins torch)"
    import torch

    if not torch.cuda.is_available():
        return "vLLM serves ModelOpt checkpoints on a GPU and PyTorch sees none; run this on a machine with one"
    return ""


def load(folder: Path, quantization: str) -> VllmEngine:
    """Loads a checkpoint in vLLM; raises what vLLM raises."""
    from vllm import LLM

    # No CUDA graphs: a few prompts do not repay their capture.
    return VllmEngine(LLM(model=str(folder), quantization=quantization, max_model_len=1024, enforce_eager=True))


class VllmEngine:
    """A loaded vLLM."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def logprobs(self, prompts: Sequence[Sequence[int]]) -> LogProbs:
        """As :class:`layerbits.serving.check.Engine`."""
        return [prompt_logprobs(output) for output in self._run(prompts, max_tokens=1, prompt_logprobs=1)]

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[str]:
        """As :class:`layerbits.serving.check.Engine`."""
        return [str(output.outputs[0].text) for output in self._run(prompts, max_tokens=tokens)]

    def _run(self, prompts: Sequence[Sequence[int]], **settings: Any) -> list[Any]:
        from vllm import SamplingParams

        requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        return list(self._llm.generate(requests, SamplingParams(temperature=0.0, **settings)))


def prompt_logprobs(output: Any) -> list[float]:
    """The log-probability of each token of a prompt but the first.

    Args:
        output: A ``RequestOutput``: ``prompt_logprobs`` has ``None`` for the first token, then per token a mapping
            token → ``Logprob`` of the most likely ones and of the token itself.
    """
    rows = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return [float(found[token].logprob) for token, found in rows]
