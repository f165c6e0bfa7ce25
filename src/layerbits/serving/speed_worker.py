"""Times vLLM on a checkpoint: runs in vLLM's own Python, so it imports nothing of this project.

``python speed_worker.py REQUEST.json ANSWER.json``: one engine in this process, every batch size one after the other,
with CUDA graphs where vLLM makes them. Prompts are random tokens; no prefix is cached, no text is made of the answer.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn
    from vllm import LLM

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine here: its model can be asked, and no pipe is timed


def main(request: Path, answer: Path) -> None:
    """Reads what to time, and writes what was measured.

    Args:
        request: JSON with ``arguments`` (vLLM's command line), ``batches``, ``prompt_tokens``, ``new_tokens``,
            ``warmup`` and ``repeats``.
        answer: JSON with ``device``, ``weights_bytes``, ``kv_cache_tokens``, ``graphs`` and, per batch size,
            ``prefill`` and ``decode``: seconds of a prefill of the batch, and of one decode step, one per repeat.
    """
    asked = json.loads(request.read_text())
    llm = _engine(asked["arguments"])
    config = llm.llm_engine.vllm_config
    cache = config.cache_config
    tokens = getattr(cache, "kv_cache_size_tokens", None) or cache.num_gpu_blocks * cache.block_size
    measured = {
        "device": _device(),
        "weights_bytes": sum(llm.apply_model(_weights_bytes)),
        "kv_cache_tokens": tokens,
        "graphs": not config.model_config.enforce_eager,
        "points": [_time(llm, batch, asked) for batch in asked["batches"]],
    }
    answer.write_text(json.dumps(measured))


def _engine(arguments: list[str]) -> LLM:
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    try:
        from vllm.utils.argparse_utils import FlexibleArgumentParser
    except ImportError:  # before 0.12
        from vllm.utils import FlexibleArgumentParser
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    engine = EngineArgs.from_cli_args(parser.parse_args(arguments))
    return LLM(**{field.name: getattr(engine, field.name) for field in dataclasses.fields(engine) if field.init})


def _weights_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers; storage that several share counts once."""
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _time(llm: LLM, batch: int, asked: dict[str, int]) -> dict[str, object]:
    """Prefill: a request of one new token. A decode step: what each further one takes."""
    new = asked["new_tokens"]
    pairs = []
    for _ in range(asked["warmup"] + asked["repeats"]):
        first = _seconds(llm, batch, asked["prompt_tokens"], 1)
        pairs.append((first, (_seconds(llm, batch, asked["prompt_tokens"], 1 + new) - first) / new))
    kept = pairs[asked["warmup"] :]
    return {"batch": batch, "prefill": [first for first, _ in kept], "decode": [step for _, step in kept]}


def _seconds(llm: LLM, batch: int, prompt: int, new: int) -> float:
    from vllm import SamplingParams

    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    prompts = [{"prompt_token_ids": random.choices(range(vocabulary), k=prompt)} for _ in range(batch)]
    sampling = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    llm.generate(prompts, sampling, use_tqdm=False)
    return time.perf_counter() - start


if __name__ == "__main__":
    random.seed(0)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
