"""vLLM on many checkpoints, for benchmarks/serving.py: one process that imports vLLM, and a fork of it per checkpoint.

    PYTHONPATH=tests/serving/vllm_plugin .venv-vllm/bin/python benchmarks/serving_runtime.py WORK FOLDER ...

Reads the texts from WORK/rows.json, writes what vLLM tells of them to WORK/told/NAME.npz and the kernel of each linear
to NAME.kernels.json, or its error to NAME.error. A name that is there already is left alone, so several of these may
share the folders of one GPU. It computes what `vllm serve` does (the same
engine and kernels, bfloat16, eager, one text at a time); a server a checkpoint would import vLLM anew for each, which
takes longer than all else.
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

os.environ.update(
    VLLM_CPU_INT4_W4A8=os.environ.get("VLLM_CPU_INT4_W4A8", "0"),
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_WORKER_MULTIPROC_METHOD="fork",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="ERROR",
)

import numpy as np
import torch
from vllm import LLM, SamplingParams

TOP_K = 1000
KV_CACHE = 1 << 28
"""Bytes of the KV cache on a GPU; a CPU has VLLM_CPU_KVCACHE_SPACE instead."""


def main() -> None:
    """Serves each folder of the command line."""
    work = Path(sys.argv[1])
    rows = json.loads((work / "rows.json").read_text())
    (work / "told").mkdir(exist_ok=True)
    for folder in map(Path, sys.argv[2:]):
        target = work / "told" / f"{folder.name}.npz"
        claim = target.with_suffix(".claimed")
        if target.exists() or target.with_suffix(".error").exists():
            continue
        try:
            claim.touch(exist_ok=False)  # another process has it
        except FileExistsError:
            continue
        pid = os.fork()
        if pid == 0:
            start = time.perf_counter()
            try:
                tell(folder, rows, target)
                print(f"{folder.name}: {time.perf_counter() - start:.0f} s", flush=True)
            except BaseException as error:
                traceback.print_exc()
                target.with_suffix(".error").write_text(f"{type(error).__name__}: {error}")
                print(f"{folder.name}: {type(error).__name__}: {error}", flush=True)
            os._exit(0)
        os.waitpid(pid, 0)


def tell(folder: Path, rows: list[list[int]], target: Path) -> None:
    """Writes position, token and log-probability of what vLLM tells, and the log-probability of the text itself."""
    # given its size, vLLM does not profile the GPU's memory, which others on it would disturb; the share must be free
    memory = {"kv_cache_memory_bytes": KV_CACHE, "gpu_memory_utilization": 0.05} if torch.cuda.is_available() else {}
    llm = LLM(
        model=str(folder),
        dtype="bfloat16",
        max_model_len=max(map(len, rows)) + 1,
        max_logprobs=TOP_K,
        max_num_seqs=1,
        max_num_batched_tokens=max(map(len, rows)) + 1,  # else it warms up with thousands
        enforce_eager=True,
        **memory,
    )
    (found,) = llm.apply_model(kernels)
    target.with_suffix(".kernels.json").write_text(json.dumps(found, indent=1))
    settings = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=TOP_K, detokenize=False, flat_logprobs=True)
    prompts = [{"prompt_token_ids": row} for row in rows]
    parts: dict[str, list[np.ndarray]] = {"row": [], "position": [], "token": [], "logprob": []}
    for number, output in enumerate(llm.generate(prompts, settings, use_tqdm=False)):
        flat = output.prompt_logprobs
        tokens, values = np.asarray(flat.token_ids, np.int64), np.asarray(flat.logprobs, np.float64)
        for position, (start, stop) in enumerate(zip(flat.start_indices, flat.end_indices, strict=True)):
            if position:
                ids, first = np.unique(tokens[start:stop], return_index=True)  # the text's own token may be among them
                parts["row"].append(np.full(len(ids), number))
                parts["position"].append(np.full(len(ids), position - 1))
                parts["token"].append(ids)
                parts["logprob"].append(values[start:stop][first])
    with target.with_suffix(".partial").open("wb") as file:
        np.savez(file, **{key: np.concatenate(value) for key, value in parts.items()})
    target.with_suffix(".partial").rename(target)


def kernels(model: Any) -> dict[str, str]:
    """The kernel that vLLM chose for each linear: the object of a class ``…Kernel`` that its method or scheme holds."""
    found = {}
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        holders = (method, getattr(module, "scheme", None))
        held = [type(value).__name__ for holder in holders if holder is not None for value in vars(holder).values()]
        names = [kind for kind in held if kind.endswith("Kernel")]
        if method is not None:
            found[name] = names[0] if names else type(method).__name__
    return found


if __name__ == "__main__":
    main()
