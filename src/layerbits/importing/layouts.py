"""The JSON files of earlier tools, read into one table: what was scored, and how much.

Two layouts are known, of tools around ModelOpt's AutoQuantize. Both tell ``scheme``, ``model``, sometimes ``dataset``,
and ``autoquant_state`` of the search. The **quant manifest** has under ``layer_sensitivity`` a mapping from
``<module>.quant_recipe`` to ``formats``, ``scores`` and ``costs``, and the names of all modules under ``layers``. The
**per-layer report** has there a list of ``layer``, ``num_bits``, ``sensitivity`` and ``size_cost``.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from layerbits.errors import UserError
from layerbits.plain import JsonMapping

MANIFEST, REPORT = "quant manifest", "per-layer report"
_SUFFIX = ".quant_recipe"
_FORMAT = re.compile(r"(?P<name>.*?)\(effective-bits: (?P<bits>[\d.]+)\)")
_UNQUANTIZED = "NONE"


@dataclass(frozen=True)
class Score:
    """One group under one format.

    Attributes:
        module: The linear that stands for the group.
        format: As the file names it; empty where it does not.
        bits: As the tool counted them.
        score: Raw score; NaN where the file has no number.
        weights: Number of weights in the group; 0 where the file does not tell its cost.
    """

    module: str
    format: str
    bits: float
    score: float
    weights: int


@dataclass(frozen=True)
class Table:
    """What one file says; text is empty and numbers are NaN or ``None`` where it says nothing.

    Attributes:
        path: The file.
        digest: SHA-256 of the file.
        layout: :data:`MANIFEST` or :data:`REPORT`.
        scheme: Name of the scheme.
        formats: Names of the formats that were asked for.
        model: Model id or folder, as written.
        target_bits: Budget of the search, as the tool counted bits.
        found_bits: What the search made of it.
        found_score: Raw score of its choice.
        score_samples: Samples to score on.
        dataset: Fields of ``dataset``.
        scores: Groups that could be quantized, under each format.
        modules: Names of all quantized modules; empty where the layout has none.
        unreadable: Entries that could not be read.
    """

    path: Path
    digest: str
    layout: str
    scheme: str
    formats: tuple[str, ...]
    model: str
    method: str
    target_bits: float
    found_bits: float
    found_score: float
    score_samples: int | None
    dataset: JsonMapping
    scores: tuple[Score, ...]
    modules: tuple[str, ...]
    unreadable: int = 0


def collect(path: Path) -> tuple[list[Table], list[str]]:
    """The tables in a file, or in a folder and below.

    A manifest and a report of the same scheme in one folder are one scoring: the manifest is taken, which tells more.

    Args:
        path: File or folder.

    Returns:
        The tables, in the order of their paths, and a line for each file that is none, or says something else.

    Raises:
        UserError: There is no such file or folder, no JSON file in it, or none that can be read.
    """
    if not path.exists():
        raise UserError(f"there is no {path}; give a quant manifest or a per-layer report, or a folder of them")
    files = sorted(path.rglob("*.json")) if path.is_dir() else [path]
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    if not files:
        raise UserError(f"there is no JSON file in {path}; give the folder of quant manifests or per-layer reports")
    tables: dict[tuple[Path, str, str], Table] = {}
    lines = []
    for file in files:
        try:
            table = read(file)
        except UserError as error:
            lines.append(str(error))
            continue
        key = file.parent, table.scheme, table.model
        if key in tables:
            table, other = sorted((tables[key], table), key=lambda t: (t.layout != MANIFEST, t.path))
            lines += _superseded(table, other)
        tables[key] = table
    if not tables:
        more = f" (and {len(lines) - 1} files more)" if len(lines) > 1 else ""
        raise UserError(f"nothing to import: {lines[0]}{more}")
    return list(tables.values()), lines


def read(path: Path) -> Table:
    """One file.

    Raises:
        UserError: It is not JSON, or of no layout that is known here; the message names the file.
    """
    try:
        content = path.read_bytes()
        data = json.loads(content)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON or cut off ({error}); fetch it again") from None
    layers = data.get("layer_sensitivity") if isinstance(data, Mapping) else None
    if isinstance(data, Mapping) and "schema_version" in data:
        if "candidates" in data:
            raise UserError(f"{path} is of LayerBits itself; log it with `layerbits push {path.parent}`")
        raise UserError(
            f"{path} has schema_version {data['schema_version']!r}, which this LayerBits does not read; "
            "upgrade layerbits"
        )
    if isinstance(layers, Mapping):
        layout, entries = MANIFEST, list(_of_manifest(layers))
    elif isinstance(layers, list):
        layout, entries = REPORT, list(_of_report(layers))
    else:
        raise UserError(
            f"{path} is neither a quant manifest nor a per-layer report: it has no layer_sensitivity; leave it out"
        )
    scores = tuple(entry for entry in entries if isinstance(entry, Score))
    if not scores:
        raise UserError(f"{path} has no group with a score under layer_sensitivity; fetch it again or leave it out")
    scheme, state = _mapping(data, "scheme"), _mapping(data, "autoquant_state")
    formats = scheme.get("quant_formats")
    return Table(
        path=path,
        digest=hashlib.sha256(content).hexdigest(),
        layout=layout,
        scheme=_text(scheme.get("name")),
        formats=tuple(_text(name) for name in formats) if isinstance(formats, list) else (),
        model=_text(_mapping(data, "model").get("id")),
        method=_text(scheme.get("auto_quantize_method")),
        target_bits=_number(scheme.get("auto_quantize_bits")),
        found_bits=_number(_mapping(state, "constraints").get("effective_bits")),
        found_score=_number(state.get("score")),
        score_samples=count(scheme.get("auto_quantize_score_size")),
        dataset=_mapping(data, "dataset"),
        scores=scores,
        modules=tuple(_mapping(data, "layers")),
        unreadable=entries.count(None),
    )


def count(value: object) -> int | None:
    """A whole number of something, ``None`` where it is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _of_manifest(layers: JsonMapping) -> Iterator[Score | None]:
    """A score for each format of each group; ``None`` for an entry that cannot be read."""
    for name, entry in layers.items():
        try:
            columns = zip(entry["formats"], entry["scores"], entry["costs"], strict=True)
            for words, score, cost in columns:
                match = _FORMAT.fullmatch(words)
                form, bits = (match["name"], float(match["bits"])) if match else (words, math.nan)
                if form != _UNQUANTIZED:
                    yield Score(name.removesuffix(_SUFFIX), form, bits, _number(score), _weights(cost, bits))
        except (KeyError, TypeError, ValueError):
            yield None


def _of_report(layers: Sequence[JsonMapping]) -> Iterator[Score | None]:
    for entry in layers:
        try:
            name, bits, score = entry["layer"], _number(entry["num_bits"]), _number(entry["sensitivity"])
        except (KeyError, TypeError):
            yield None
            continue
        if bits < 16:  # at 16, nothing could be quantized there
            yield Score(str(name), "", bits, score, _weights(entry.get("size_cost"), bits))


def _weights(cost: object, bits: float) -> int:
    """Weights of a group from ModelOpt's cost of it: weights × bits / 16."""
    weights = _number(cost) * 16 / bits if bits > 0 else math.nan
    return round(weights) if math.isfinite(weights) else 0


def _superseded(table: Table, other: Table) -> list[str]:
    """A line where the file that is left out says something else."""
    mine, theirs = ({s.module: s.score for s in t.scores} for t in (table, other))
    different = sum(mine.get(module) != score for module, score in theirs.items())
    return [f"{other.path} differs in {different} groups from {table.path.name}, which was taken"] if different else []


def _mapping(data: JsonMapping, name: str) -> JsonMapping:
    value = data.get(name)
    return value if isinstance(value, Mapping) else {}


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
