"""Fixtures that need no model: a synthetic result, and published tables as results."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

import layerbits
from layerbits.importing import read, results
from layerbits.results.assignment import Assignment
from layerbits.results.result import (
    Allocation,
    CalibrationInfo,
    CandidateInfo,
    Group,
    ModelInfo,
    NonFinite,
    SensitivityResult,
)

PUBLISHED = Path(__file__).parents[3] / "shared" / "reference" / "published"
MODULES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
WEIGHTS = {"qkv": 1_000, "o": 600, "gate_up": 3_000, "down": 1_500, "lm_head": 30_000}
TYPICAL = {"qkv": 1e-4, "o": 3e-4, "gate_up": 4e-3, "down": 2e-3, "lm_head": 6e-3}  # predicted KL, nats per token
QUANTIZERS = {
    "int8": ({"num_bits": 8, "axis": 0}, 8.0),
    "fp8": ({"num_bits": [4, 3], "axis": None}, 8.0),
    "fp4": ({"num_bits": [2, 1], "block_sizes": {"-1": 32, "type": "dynamic", "scale_bits": [8, 0]}}, 4.25),
}


@pytest.fixture(scope="session")
def make_result() -> Callable[..., SensitivityResult]:
    """A factory of synthetic results, consistent in itself: samples sum to the predicted KL, bits to the recipe."""
    return synthetic


@pytest.fixture(scope="session")
def published() -> Callable[[str], SensitivityResult]:
    """A factory of results from published tables: ``published("qwen3_vl_4b_lm_medium/wfp8_afp8")``."""
    if not PUBLISHED.is_dir():
        pytest.skip("the published tables are not here")
    return from_table


@pytest.fixture(scope="session")
def exportable_rows() -> tuple[object, ...]:
    """The table of what is exported."""
    from tools.docs.exportable import exportable

    return exportable()


@pytest.fixture(scope="session")
def python() -> Callable[..., list[str]]:
    """Runs code in a fresh interpreter that finds the library; returns the lines that it prints."""

    def run(code: str, *arguments: object) -> list[str]:
        env = {**os.environ, "PYTHONPATH": str(Path(layerbits.__file__).parents[1])}
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout.splitlines()

    return run


def synthetic(
    blocks: int = 6,
    pair: str = "wint8_afp16",
    samples: int = 16,
    lm_head: bool = False,
    nonfinite: Sequence[str] = (),
    method: str = "gradient",
    target_bits: float = 10.0,
    seed: int = 0,
) -> SensitivityResult:
    """A result as a run on a small decoder would give.

    Args:
        blocks: Decoder blocks, of four groups each.
        pair: Quant pair of the candidate.
        samples: Calibration samples; 0 = the engine kept no per-sample scores.
        lm_head: Whether the output head is a group as well.
        nonfinite: Group keys whose score overflowed.
        method: ``gradient`` or ``kl_div``.
        target_bits: Budget of the allocation.
        seed: Of the numbers.
    """
    rng = np.random.default_rng(seed)
    groups = [
        Group(f"B{b:02d}.{kind}", b, kind, tuple(f"model.layers.{b}.{m}" for m in modules), WEIGHTS[kind])
        for b in range(blocks)
        for kind, modules in MODULES.items()
    ]
    if lm_head:
        groups.append(Group("lm_head", None, "lm_head", ("lm_head",), WEIGHTS["lm_head"]))
    info = candidate(pair)
    depth = np.array([1.0 if g.block is None else 0.4 + 2.0 * (g.block / blocks - 0.5) ** 2 for g in groups])
    base = np.array([TYPICAL[g.kind] for g in groups]) * depth * rng.lognormal(0.0, 0.6, len(groups))
    harm = {4.25: 30.0}.get(info.bits, 1.0) * (1.0 if info.activation_precision == "fp16" else 8.0)
    kl = base * harm * rng.lognormal(0.0, 0.3, len(groups))
    parts = rng.gamma(2.0, size=(max(samples, 1), *kl.shape))
    sample_kl = parts / parts.sum(axis=0) * kl
    for key in nonfinite:
        at = [g.key for g in groups].index(key)
        kl[at], sample_kl[:, at] = np.nan, np.nan
    tokens, batches = 512, 4
    # Equal batches of N tokens: KL = N / 2B · raw (gradient), raw / (B N) (kl_div).
    raw = kl * (2 * batches / tokens if method == "gradient" else batches * tokens)
    return SensitivityResult(
        model=ModelInfo("tiny_llama", "org/tiny-llama", "0123456789abcdef", "LlamaForCausalLM", "float32"),
        calibration=CalibrationInfo(
            dataset="everyday",
            size="small",
            digest="5f0c" * 16,
            packing="packed",
            seq_len=128,
            batch_size=4,
            calib_samples=16,
            score_samples=16,
            calib_rows=16,
            score_rows=16,
            loss_tokens=batches * tokens,
            batch_loss_tokens=(tokens,) * batches,
            padding_share=0.02,
        ),
        method=method,
        engine="onepass" if samples else "stock",
        seed=seed,
        device="cpu",
        groups=tuple(groups),
        candidate=info,
        scores=raw,
        predicted_kl=kl,
        allocation=allocation(groups, raw, info, target_bits),
        sample_kl=sample_kl if samples else None,
        sample_tokens=np.full(samples, batches * tokens // samples) if samples else None,
        nonfinite=tuple(NonFinite(key, info.name, detail="overflow") for key in nonfinite),
        settings={"quant_pair": pair, "seed": seed},
        provenance={"python": "3.11.2", "version.layerbits": "0.1.0", "version.modelopt": "0.47.0"},
        seconds={"load": 1.5, "calibrate": 2.25, "score": 4.0, "solve": 0.01},
        memory={"peak_rss_gb": 1.75},
        tags={"deployable": "true"},
        created="2025-01-02T03:04:05+00:00",
    )


def candidate(pair: str) -> CandidateInfo:
    """A candidate of a pair such as ``wint8_afp16``, with a ModelOpt configuration of its kind."""
    weight, activation = (part[1:] for part in pair.split("_"))
    cfg, bits = QUANTIZERS[weight]
    entries = [{"quantizer_name": "*", "enable": False}, {"quantizer_name": "*weight_quantizer", "cfg": cfg}]
    if activation != "fp16":
        cfg_in, _ = QUANTIZERS[activation]
        entries.append({"quantizer_name": "*input_quantizer", "cfg": {**cfg_in, "axis": None}})
    return CandidateInfo(
        name=pair,
        quant_pair=pair,
        granularity="default",
        format_name=f"{weight.upper()}_{activation.upper()}_CFG",
        weight_precision=weight,
        activation_precision=activation,
        config={"quant_cfg": entries, "algorithm": "max"},
        config_hash=pair.encode().hex()[:16],
        bits=bits,
        bits_modelopt=float(int(bits)),
    )


def allocation(groups: Sequence[Group], raw: np.ndarray, info: CandidateInfo, target_bits: float) -> Allocation:
    """Quantizes the least sensitive groups until the budget holds."""
    total, stored, chosen = sum(g.weights for g in groups), 0.0, [None] * len(groups)
    order = np.argsort(np.where(np.isfinite(raw), raw, np.inf), kind="stable")
    stored = 16.0 * total
    for at in order:
        if stored / total <= target_bits:
            break
        chosen[at] = info.name
        stored += (info.bits - 16.0) * groups[at].weights
    quantized = [i for i, name in enumerate(chosen) if name]
    share = sum(groups[i].weights for i in quantized) / total
    return Allocation(
        target_bits=target_bits,
        assignment=Assignment(chosen),
        effective_bits=stored / total,
        effective_bits_modelopt=16 + (info.bits_modelopt - 16) * share,
        score=float(np.nansum(raw[quantized])),
    )


def from_table(name: str) -> SensitivityResult:
    """A published per-layer table, as it is imported."""
    (result,) = results(read(PUBLISHED / name / "per-layer-sensitivity.json"))
    return result
