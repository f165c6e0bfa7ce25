"""Times vLLM on a checkpoint: runs in vLLM's own Python, so it imports nothing of this project.

``python speed_worker.py REQUEST.json ANSWER.json``: one engine in this process, every batch size one after the other,
with CUDA graphs where vLLM makes them. Prompts are random tokens; no prefix is cached, no text is made of the answer.
Or, where the request names shapes, the linear layers of the model, each alone: as vLLM made them, by its kernels.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn
    from vllm import LLM

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine here: its model can be asked, and no pipe is timed


def main(request: Path, answer: Path) -> None:
    """Reads what to time, and writes what was measured.

    Args:
        request: JSON with ``arguments`` (vLLM's command line), ``batches``, ``prompt_tokens``, ``new_tokens``,
            ``warmup`` and ``repeats``; or ``shapes``, ``tokens`` and ``graph_tokens`` beside ``arguments``, ``warmup``
            and ``repeats``.
        answer: JSON with ``device``, ``weights_bytes`` (or null), ``kv_cache_tokens``, ``graphs`` and, per batch size,
            ``prefill`` and ``decode``: seconds of a prefill of the batch, and of one decode step, one per repeat. Or
            ``device`` and ``linears``, see :func:`_linears`.
    """
    asked = json.loads(request.read_text())
    llm = _engine(asked["arguments"])
    if "shapes" in asked:
        shapes = {(rows, columns) for rows, columns in asked["shapes"]}
        linears = _linears(llm, shapes, asked["tokens"], asked)
        answer.write_text(json.dumps({"device": _device(), "linears": linears}))
        return
    config = llm.llm_engine.vllm_config
    cache = config.cache_config
    tokens = getattr(cache, "kv_cache_size_tokens", None) or cache.num_gpu_blocks * cache.block_size
    parts = llm.apply_model(_weights_bytes)
    measured = {
        "device": _device(),
        "weights_bytes": None if None in parts else sum(parts),
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


def _weights_bytes(model: nn.Module) -> int | None:
    """Bytes of a model's parameters and buffers; storage that several share counts once.

    Returns:
        ``None`` where a linear has less than two bits a weight: vLLM's kernels for CPUs pack weights into memory of
        their own, of which its modules know nothing.
    """
    from vllm.model_executor.layers.linear import LinearBase

    for module in model.modules():
        if isinstance(module, LinearBase):
            rows = getattr(module, "output_size_per_partition", module.output_size)
            columns = getattr(module, "input_size_per_partition", module.input_size)
            if 4 * sum(t.nbytes for t in (*module.parameters(), *module.buffers())) < rows * columns:
                return None
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


def _linears(
    llm: LLM, shapes: set[tuple[int, int]], counts: Sequence[int], asked: dict[str, int]
) -> list[dict[str, object]]:
    """Times the linears of some shapes.

    Returns:
        Per shape, kernel and number of tokens: ``rows``, ``columns``, ``kernel``, ``quantized``, ``tokens``, ``graph``
        and ``seconds``, one per repeat: of one linear, the mean over all that are alike, called one after the other.
    """
    from vllm.forward_context import set_forward_context

    config = llm.llm_engine.vllm_config

    def timed(model: nn.Module) -> list[dict[str, object]]:
        import torch

        rows = []
        with torch.inference_mode(), set_forward_context(None, config):
            for (shape, kernel, quantized), alike in _alike(model, shapes).items():
                about = {"rows": shape[0], "columns": shape[1], "kernel": kernel, "quantized": quantized}
                for tokens in counts:
                    x = _inputs(model, config.model_config.dtype, tokens, shape[1])
                    seconds, graph = _time_linears(alike, x, asked)
                    rows.append({**about, "tokens": tokens, "graph": graph, "seconds": seconds})
        return rows

    return llm.apply_model(timed)[0]


def _alike(
    model: nn.Module, shapes: set[tuple[int, int]]
) -> dict[tuple[tuple[int, int], str, bool], list[Callable[[torch.Tensor], object]]]:
    """The linears of some shapes, those of one shape and kernel together."""
    from vllm.model_executor.layers.linear import LinearBase

    found: dict[tuple[tuple[int, int], str, bool], list[Callable[[torch.Tensor], object]]] = {}
    for module in model.modules():
        if isinstance(module, LinearBase) and (shape := (module.output_size, module.input_size)) in shapes:
            quantized = "Unquantized" not in type(module.quant_method).__name__
            found.setdefault((shape, _kernel(module), quantized), []).append(module)
    return found


def _kernel(module: nn.Module) -> str:
    """The object of a class ``…Kernel`` that the method or the scheme of a linear has, else the method."""
    method = module.quant_method
    holders = (method, getattr(module, "scheme", None))
    inside = [type(value).__name__ for holder in holders if holder is not None for value in vars(holder).values()]
    return next((name for name in inside if name.endswith("Kernel")), type(method).__name__)


def _inputs(model: nn.Module, dtype: torch.dtype, tokens: int, columns: int) -> torch.Tensor:
    import torch

    return torch.randn(tokens, columns, dtype=dtype, device=next(model.parameters()).device)


def _time_linears(
    alike: Sequence[Callable[[torch.Tensor], object]], x: torch.Tensor, asked: dict[str, int]
) -> tuple[list[float], bool]:
    """Seconds of one of some linears, one per repeat, and whether they ran as a CUDA graph.

    With several blocks the weights of one are out of the card's cache when its turn comes again, as they are in a step.
    """
    import torch

    def once() -> None:
        for linear in alike:
            linear(x)

    for _ in range(asked["warmup"]):
        once()
    if not x.is_cuda:
        return [_wall(once) / len(alike) for _ in range(asked["repeats"])], False
    torch.cuda.synchronize()
    graph = _captured(once) if len(x) <= asked["graph_tokens"] else None
    run = once if graph is None else graph.replay
    for _ in range(asked["warmup"]):
        run()
    return [_on_card(run) / len(alike) for _ in range(asked["repeats"])], graph is not None


def _captured(once: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
    """The calls as a graph; ``None`` where a kernel cannot be captured."""
    import torch

    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            once()
    except RuntimeError as error:
        print(f"no CUDA graph: {error}", flush=True)
        torch.cuda.synchronize()
        return None
    return graph


def _on_card(run: Callable[[], None]) -> float:
    import torch

    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def _wall(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


if __name__ == "__main__":
    random.seed(0)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
