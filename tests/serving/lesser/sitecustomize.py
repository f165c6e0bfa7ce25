"""Lets vLLM take this CPU for a lesser one: ``LESSER_CPU`` is ``avx2`` or ``avx512`` (without VNNI, BF16 and AMX).

The scripts beside this file put it on the path of vLLM's Python. vLLM asks PyTorch for the instructions of the CPU, and
loads one of its three builds and chooses its kernels by the answer; oneDNN is told by ``ONEDNN_MAX_CPU_ISA``.
"""

import os

if lesser := os.environ.get("LESSER_CPU"):
    import torch

    hidden = ["_is_vnni_supported", "_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_amx_fp16_supported"]
    for name in hidden + (["_is_avx512_supported"] if lesser == "avx2" else []):
        setattr(torch.cpu, name, lambda: False)
