"""What vLLM's build for CPUs computes of a label on a processor: as written, otherwise, or not at all.

It chooses one of three libraries and its kernels by the instructions of the CPU. What those do is in its source
(``vllm/platforms/cpu.py``, ``vllm/model_executor/kernels/linear``), and ``docs/processors.md`` has what was measured.
:mod:`layerbits.serving.processor` asks the CPU at hand.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from layerbits.checkpoint.label import Label
from layerbits.checkpoint.runtimes import VERSION, reads
from layerbits.plain import JsonMapping, JsonObject

DATA = Path(__file__).parents[1] / "data" / "processors.json"

WRITTEN, OTHERWISE, MISSING, UNKNOWN = "as written", "otherwise", "missing", "not known"

SATURATES = (
    "without VNNI, oneDNN adds the products of two neighbouring columns in 16 bits, which saturates, so large outputs "
    "come out too small"
)
UNREAD_SCALE = "on a CPU with AMX vLLM leaves the input scale of the files unread and rounds the inputs per token"
UNROUNDED = "on a CPU with AMX but without its FP8 instructions vLLM leaves the inputs in 16 bits"

NO_KERNEL = "vLLM has no kernel for it on CPUs"

_INT8_LINEAR, _INT4_LINEAR, _FP8_LINEAR = "onednn_scaled_mm", "cpu_gemm_wna16", "fp8_scaled_mm_cpu"
_FP8_ROUNDING, _FP8_ACTIVATION = "static_scaled_fp8_quant", "silu_and_mul_quant"
_FP8_STATIC = ("FP8", "FP8_TENSOR-FP8_TENSOR", "FP8_TENSOR-FP8_TOKEN")
_BY_PYTORCH = (
    "FP8_PER_CHANNEL_PER_TOKEN",
    "FP8_CHANNEL-FP8_TOKEN",
    "INT4_CHANNEL-INT8_TOKEN",
    "INT4_GROUP128-INT8_TOKEN",
)
"""Computed by operators of PyTorch itself, which every CPU has."""

OFFERS = {
    "INT8_CHANNEL-INT8_TOKEN": "wint8_aint8/recipe_match_channel_token",
    "FP8_CHANNEL-FP8_TOKEN": "wfp8_afp8/recipe_match_channel_token",
    "INT4_GROUP64-A16": "wint4_afp16/w_group64",
}
"""Labels of compressed-tensors that serve a model well, the most usual first, and the candidates that have them."""


@dataclass(frozen=True)
class Processor:
    """A CPU with a build of vLLM on it.

    Attributes:
        machine: ``x86_64``, ``aarch64``, …
        version: Of vLLM.
        flags: Of ``avx2``, ``avx512``, ``avx512_bf16``, ``amx``, ``amx_fp8``, those that PyTorch and vLLM report.
        operators: What the library that vLLM loads here has, without ``_C::``; one that is only declared is none.
        int8_exact: Whether one INT8 linear came out as the exact integer product; ``None`` = it could not be run.
    """

    machine: str
    version: str
    flags: frozenset[str]
    operators: frozenset[str]
    int8_exact: bool | None

    @classmethod
    def from_json(cls, record: JsonMapping) -> Processor:
        """Reads what :meth:`to_json` wrote."""
        sets = {name: frozenset(record[name]) for name in ("flags", "operators")}
        return cls(record["machine"], record["version"], int8_exact=record["int8_exact"], **sets)

    def to_json(self) -> JsonObject:
        """Plain JSON data."""
        return {key: sorted(v) if isinstance(v, frozenset) else v for key, v in asdict(self).items()}

    @property
    def name(self) -> str:
        """Its class, as the tables of ``docs/processors.md`` have it."""
        if self.machine != "x86_64":
            return self.machine
        if "amx" in self.flags:
            return "AMX"
        lanes = "AVX-512" if "avx512" in self.flags else "AVX2" if "avx2" in self.flags else "no AVX2"
        return f"{lanes} with VNNI" if self.int8_exact else lanes


@dataclass(frozen=True)
class Computed:
    """What a processor makes of a label.

    Attributes:
        state: :data:`WRITTEN`, :data:`OTHERWISE`, :data:`MISSING` or :data:`UNKNOWN`.
        how: What is computed instead, or what is missing.
    """

    state: str
    how: str = ""

    def __str__(self) -> str:
        return f"{self.state}: {self.how}" if self.how else self.state


@dataclass(frozen=True)
class Figures:
    """What a serve check found on a processor; KL divergences in nats per token, as ``docs/tracking.md`` has them.

    Attributes:
        scheme: In words.
        label: Of its quantized linears.
        outcome: The verdict. tokens: Compared.
        ratio, t: By what it was found: ``serve/ratio``, and t of the linear that deviates most.
        served, restored, rounded, noise: The damage as served, of the files, with both rounded; the runtime's noise.
    """

    scheme: str
    label: str
    outcome: str
    tokens: int
    ratio: float
    t: float
    served: float
    restored: float
    rounded: float
    noise: float


@dataclass(frozen=True)
class Record:
    """A processor that was asked, and what was found on it.

    Attributes:
        source: The machine, and whether it is of the class or was limited to it; when.
        found: Label → :data:`WRITTEN`, :data:`OTHERWISE` or :data:`MISSING`, as measured.
        checks: Serve checks of SmolLM2-135M.
    """

    processor: Processor
    source: str
    found: Mapping[str, str]
    checks: tuple[Figures, ...]


def records() -> list[Record]:
    """The classes of processors that were asked, the least first."""
    data = json.loads(DATA.read_text())
    return [
        Record(Processor.from_json(r["processor"]), r["source"], r["found"], tuple(Figures(**c) for c in r["checks"]))
        for r in data
    ]


def computed(label: Label, processor: Processor) -> Computed:
    """What vLLM on a processor computes of the linears with a label."""
    return computed_as(label.algo, processor) if reads(label) else Computed(MISSING, "vLLM has no scheme for it")


def computed_as(algo: str, processor: Processor) -> Computed:
    """The same of a label that vLLM reads on some device, by its name."""
    if processor.version != VERSION or processor.machine != "x86_64":
        return Computed(UNKNOWN, f"only vLLM {VERSION} on x86-64 was measured")
    if algo in _BY_PYTORCH:
        return Computed(WRITTEN)
    if algo in _FP8_STATIC:
        return _fp8(algo, processor)
    weights, _, inputs = algo.partition("-")
    if weights.startswith("INT4") and inputs == "A16":
        return _needs(processor, _INT4_LINEAR)
    if weights.startswith("INT8") and inputs.startswith("INT8"):
        return _int8(processor, inputs)
    return Computed(MISSING, NO_KERNEL)


def instead(processor: Processor, but: Iterable[str] = ()) -> str:
    """What to score and export so that vLLM on a processor computes it as written; empty where nothing is known.

    Args:
        processor: The CPU.
        but: Labels that are not meant.
    """
    for algo, candidate in OFFERS.items():
        if algo not in but and computed_as(algo, processor).state == WRITTEN:
            pair, _, granularity = candidate.partition("/")
            return f"this CPU serves quant_pair={pair} quant_granularity={granularity} as scored"
    return ""


def _needs(processor: Processor, *operators: str) -> Computed:
    lacks = [name for name in operators if name not in processor.operators]
    if not lacks:
        return Computed(WRITTEN)
    return Computed(MISSING, f"vLLM's library for it has no operator {' and '.join(lacks)}")


def _int8(processor: Processor, inputs: str) -> Computed:
    if "amx" in processor.flags:
        return Computed(WRITTEN) if inputs == "INT8_TOKEN" else Computed(OTHERWISE, UNREAD_SCALE)
    there = _needs(processor, _INT8_LINEAR)
    if there.state == MISSING or processor.int8_exact:
        return there
    return (
        Computed(UNKNOWN, "its INT8 product could not be run")
        if processor.int8_exact is None
        else Computed(OTHERWISE, SATURATES)
    )


def _fp8(algo: str, processor: Processor) -> Computed:
    if (
        algo == "FP8"
        and "amx" in processor.flags
        and "amx_fp8" not in processor.flags
        and _FP8_LINEAR in processor.operators
    ):
        return Computed(OTHERWISE, UNROUNDED)
    return _needs(processor, _FP8_ROUNDING, _FP8_ACTIVATION)
