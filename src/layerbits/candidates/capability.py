"""Whether a candidate can run here and be served, decided from the configuration and the widths of the linears alone.

What is refused was read in or tried with ModelOpt 0.47 (``nn/modules/tensor_quantizer.py``, ``tensor_quant.py`` and
the kernels behind them); some of it raises there in mid-run, some of it runs and computes something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from layerbits.candidates.candidate import Candidate
from layerbits.candidates.formats import NVFP4_BLOCK
from layerbits.candidates.granularity import TOKEN_GROUP_BACKEND, is_token_group
from layerbits.candidates.linear import E4M3, E8M0, FP4, FP8, INPUT, RANK, WEIGHT, Cfg, block_lengths, is_mx
from layerbits.errors import Unsupported

MX_BLOCKS = (8, 16, 32)
"""Block lengths that ModelOpt's MX kernel is compiled for (``tensor_quant_mx.cu``)."""
GROUP_SIZES = (256, 128, 64, 32, 16)
"""Group sizes to suggest."""
WORDS = {WEIGHT: "weights", INPUT: "activations"}

Linears = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Capability:
    """What running a candidate here means.

    Attributes:
        fp4_numerics: Who computes FP4 and MXFP8: ModelOpt's CUDA kernels, our plain PyTorch, or none of them in it.
        deployable: Whether the layout of its scales is one that a runtime can serve.
        notes: What to know, a line each.
    """

    fp4_numerics: Literal["cuda", "reference", "none"]
    deployable: bool
    notes: tuple[str, ...]


def check(
    candidate: Candidate, linears: Linears, cuda: bool, strict: bool = False, kinds: Mapping[str, str] | None = None
) -> Capability:
    """Checks a candidate before any model is loaded.

    Args:
        candidate: The candidate.
        linears: Covered linears, module name → ``(out_features, in_features)``.
        cuda: Whether ModelOpt's CUDA kernels can be used.
        strict: Refuse what runs but cannot be served.
        kinds: Module name → what it is (:data:`layerbits.results.result.KINDS`), where that is known.

    Raises:
        Unsupported: It cannot run, or cannot be served and ``strict`` is set; the message says what to do instead.
    """
    name = candidate.info.name
    fp4 = False
    hindrances = list(_left_to_16_bits(kinds or {}))
    for quantizer, cfg in candidate.format.linear.stages():
        if reason := _impossible(quantizer, cfg, cuda):
            raise Unsupported(f"{name}: {reason}")
        fp4 = fp4 or cfg.get("num_bits") == FP4 or is_mx(cfg)
        hindrances += _hindrances(quantizer, cfg, linears)
    if strict and hindrances:
        raise Unsupported(f"{name}: {hindrances[0]}; strict=false scores it all the same")
    numerics: Literal["cuda", "reference", "none"] = ("cuda" if cuda else "reference") if fp4 else "none"
    return Capability(numerics, not hindrances, tuple(hindrances))


def _impossible(quantizer: str, cfg: Cfg, cuda: bool) -> str | None:
    """Why ModelOpt 0.47 cannot compute this, with what to do instead; ``None`` where it can."""
    what, bits = WORDS[quantizer], cfg.get("num_bits", 8)
    blocks, lengths = cfg.get("block_sizes") or {}, block_lengths(cfg)
    scale, dynamic = blocks.get("scale_bits"), blocks.get("type") == "dynamic"
    if cfg.get("backend") not in (None, TOKEN_GROUP_BACKEND):
        return _unregistered(cfg["backend"])
    if bits == FP4 and (scale not in (E8M0, E4M3) or None in lengths.values() or not lengths):
        return (
            f"FP4 {what} need block scales (MXFP4: E8M0 per 32, NVFP4: E4M3 per {NVFP4_BLOCK}); ModelOpt has no FP4 "
            "with a scale per tensor, channel or token; use quant_granularity=default"
        )
    if scale == E8M0:
        if not dynamic or set(lengths) != {-1} or lengths[-1] not in MX_BLOCKS:
            return (
                f"MX {what} have one dynamic E8M0 scale per {', '.join(map(str, MX_BLOCKS))} values of a row, not "
                f"{lengths}; use w_group32 or quant_granularity=default"
            )
        if isinstance(bits, int) and bits != 8:
            return f"MX {what} hold floats or 8-bit integers, not INT{bits}; use a group overlay instead of scale_bits"
        if bits not in (FP4, FP8) and not cuda:
            return f"MX {what} other than FP4 and FP8 need ModelOpt's CUDA kernels; use a GPU, or an FP8 or INT8 pair"
        return None
    if scale == E4M3 and bits == FP4:
        if lengths != {-1: NVFP4_BLOCK}:
            return (
                f"NVFP4 has one E4M3 scale per {NVFP4_BLOCK} values and ModelOpt's kernel computes that whatever the "
                f"format says, so {lengths} would be mislabelled; use {{-1: {NVFP4_BLOCK}}} or fp4=mxfp4"
            )
        if not dynamic and quantizer == INPUT:
            return "NVFP4 activations with stored block ranges fit one shape of batch; use the dynamic NVFP4 formats"
        return None
    if scale is not None:
        return (
            f"{what}: scale_bits {scale} with num_bits {bits} is no format of ModelOpt's kernels; leave scale_bits out"
        )
    if isinstance(bits, tuple) and bits != FP8:
        return f"{what}: E{bits[0]}M{bits[1]} runs with MX block scales only; give block_sizes scale_bits e8m0"
    if dynamic and set(lengths.values()) != {None} and not is_token_group(cfg):
        return f"{what}: dynamic blocks along {lengths} are not computed; use one length for dimension -1"
    return _shape_bound(cfg, lengths) if quantizer == INPUT else None


def _shape_bound(cfg: Cfg, lengths: dict[int, int | None]) -> str | None:
    """Why stored activation scales would fit one shape of batch only; ``None`` where they fit any."""
    if is_token_group(cfg):
        return None
    if any(n is not None for n in lengths.values()):
        return (
            "static blocks of activations refuse a batch of another shape (ModelOpt: 'Block-quantization requires a "
            "fixed input shape'); use a_group128, which scales each token's groups on the fly"
        )
    if cfg.get("type", "static") == "static" and _own_dimensions(cfg, RANK[INPUT]) - {RANK[INPUT] - 1}:
        return (
            "a static scale per row or token of activations is bound to the positions of the calibration batch "
            "(another batch raises or is broadcast to a wrong shape); use type: dynamic, as in a_per_token_dynamic"
        )
    return None


def _own_dimensions(cfg: Cfg, rank: int) -> set[int]:
    """Dimensions along which each index has a scale of its own (``axis``, or what whole-dimension blocks leave)."""
    lengths = block_lengths(cfg)
    if lengths:
        return set(range(rank)) - {k % rank for k in lengths} if set(lengths.values()) == {None} else set()
    axis = cfg.get("axis")
    return {a % rank for a in ([axis] if isinstance(axis, int) else axis or ())}


def _hindrances(quantizer: str, cfg: Cfg, linears: Linears) -> Iterator[str]:
    """Why no runtime can serve what runs here, a line each."""
    what, rank = WORDS[quantizer], RANK[quantizer]
    if rank - 1 in _own_dimensions(cfg, rank):
        yield (
            f"{what}: a scale per input channel lies along the dimension that the matmul sums over, where a "
            "low-precision matmul cannot apply it; use a scale per tensor, output channel, token or group"
        )
    for dimension, length in block_lengths(cfg).items():
        if length is None:
            continue
        inputs = dimension % rank == rank - 1
        widths = {n: shape[1 if inputs else 0] for n, shape in linears.items()}
        ragged = {n: w for n, w in widths.items() if w % length}
        if ragged:
            fixed = is_mx(cfg) or cfg.get("num_bits") == FP4
            fitting = [s for s in GROUP_SIZES if not any(w % s for w in widths.values())]
            sizes = f"sizes that would do: {', '.join(map(str, fitting))}" if fitting else "no common size would do"
            advice = "use a format without these blocks" if fixed else sizes
            sides = "inputs" if inputs else "outputs"
            yield f"{what}: groups of {length} do not divide the {sides} of {_named(ragged)}; {advice}"


def _left_to_16_bits(kinds: Mapping[str, str]) -> Iterator[str]:
    """Covered modules that runtimes keep as they are, a line per kind."""
    for kind, what in (("router", "routers"), ("conv", "short convolutions")):
        names = [n for n, k in kinds.items() if k == kind]
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            yield (
                f"{names[0]}{more}: runtimes keep {what} in 16 bits; use a format with ModelOpt's exclusions, such as "
                "FP8_DEFAULT_CFG"
            )


def _named(ragged: Mapping[str, int]) -> str:
    """Linears by width, the first of each by name: ``a.q_proj and 89 more (576)``."""
    parts = []
    for width in sorted(set(ragged.values())):
        names = [n for n, w in ragged.items() if w == width]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        parts.append(f"{names[0]}{more} ({width})")
    return ", ".join(parts)


def _unregistered(backend: str) -> str | None:
    from modelopt.torch.quantization.nn.modules.tensor_quantizer import is_registered_quant_backend

    if is_registered_quant_backend(backend):
        return None
    return f"quantizer backend {backend!r} is not registered with ModelOpt; import what registers it, or leave it out"
