"""A scheme: which candidate each group gets, or none, as plain typed data."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

from layerbits.atomic import write_json
from layerbits.candidates.kv_cache import KV_FORMATS, NO_CACHE
from layerbits.errors import UserError
from layerbits.paths import home_path
from layerbits.plain import Composed, JsonMapping
from layerbits.results.assignment import Assignment
from layerbits.results.naming import scheme_title
from layerbits.results.result import CalibrationInfo, CandidateInfo, Group, ModelInfo

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Scheme:
    """An assignment group → candidate or unquantized; shapes: ``G`` groups.

    Attributes:
        name: Short name, part of file names.
        source_run_ids: Runs (or manifest files) whose scores it was made from.
        model: The model that was scored.
        calibration: What the scores, and so the static activation ranges, were taken on.
        groups: ``[G]`` all groups that the search could touch.
        candidates: Those that the assignment uses, in the order of the source.
        assignment: ``[G]`` what each group gets.
        effective_bits: Weight storage bits per weight over all groups.
        effective_bits_modelopt: ModelOpt's own figure; ``None`` where the source does not tell its denominator.
        predicted_kl: Nats per token, summed over the quantized groups; NaN where the source has none.
        score: Raw score summed over the quantized groups.
        how: What it was made by: ``method`` (budget, coverage, random, first_last) and its parameters.
        settings: The ``model``, ``dataset``, ``autoquant`` and ``seed`` settings of the source, to load both again.
        notes: What a reader should know, a line each.
        effective_bits_active: Weight storage bits per weight that a token uses; NaN in a file of an earlier version.
        kv_cache: Format of keys and values (:data:`~layerbits.candidates.kv_cache.KV_FORMATS`), in no bits and sums.
        kv_prices: Such a format → nats per token that it costs, for those that the runs priced.
        size: What it takes of a server's memory and time, as :meth:`layerbits.schemes.source.Source.counted` has it:
            bytes where a budget counted them, milliseconds where a table of costs was named.
    """

    name: str
    source_run_ids: tuple[str, ...]
    model: ModelInfo
    calibration: CalibrationInfo
    groups: tuple[Group, ...]
    candidates: tuple[CandidateInfo, ...]
    assignment: Assignment
    effective_bits: float
    effective_bits_modelopt: float | None
    predicted_kl: float
    score: float
    how: JsonMapping
    settings: Composed = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    effective_bits_active: float = math.nan
    kv_cache: str = NO_CACHE
    kv_prices: Mapping[str, float] = field(default_factory=dict)
    size: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Checks the assignment.

        Raises:
            ValueError: It does not fit the groups and candidates.
        """
        if len(self.assignment) != len(self.groups):
            raise ValueError(f"{len(self.assignment)} assignments for {len(self.groups)} groups")
        if {c.name for c in self.candidates} != self.assignment.used:
            raise ValueError("the candidates are not those that the assignment uses")
        if self.kv_cache not in (NO_CACHE, *KV_FORMATS):
            raise ValueError(f"{self.kv_cache} is no format of the KV cache")

    @property
    def source_run_id(self) -> str:
        """The source runs as one tag, separated by commas."""
        return ",".join(self.source_run_ids)

    @property
    def is_control(self) -> bool:
        """Whether the scores had no say in it."""
        return self.how.get("method") in ("random", "first_last")

    @cached_property
    def modules(self) -> dict[str, CandidateInfo]:
        """Quantized linears: full module name → its candidate, in model order."""
        by_name = {c.name: c for c in self.candidates}
        return {
            module: by_name[name]
            for group, name in zip(self.groups, self.assignment, strict=True)
            if name is not None
            for module in group.modules
        }

    @property
    def exclude(self) -> list[str]:
        """Full names of the linears that the search could quantize and that stay as they are.

        What the search never touched (vision tower, output head, …) is not among them: a model knows those, a record
        of scores does not.
        """
        return [m for g, name in zip(self.groups, self.assignment, strict=True) if name is None for m in g.modules]

    @property
    def title(self) -> str:
        """What it is called beside the schemes of other runs."""
        return scheme_title(self.name, [candidate.name for candidate in self.candidates], self.model.name)

    @property
    def heading(self) -> str:
        """The first line of a file that is made of it."""
        return f"# {self.name} of {self.model.name} (revision {self.model.revision}), scheme digest {self.digest}.\n"

    @property
    def kv_predicted_kl(self) -> float:
        """What its KV cache costs, nats per token; NaN where no run priced that."""
        return 0.0 if self.kv_cache == NO_CACHE else self.kv_prices.get(self.kv_cache, math.nan)

    @cached_property
    def digest(self) -> str:
        """Content hash: model revision, configuration of each quantized linear, KV cache; no name, no numbers."""
        linears = sorted((module, c.config_hash) for module, c in self.modules.items())
        content: list[object] = [self.model.revision, linears]
        if self.kv_cache != NO_CACHE:
            content.append(self.kv_cache)
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def check_revision(self, revision: str) -> None:
        """Checks that a model is the one that was scored.

        Raises:
            UserError: It is another revision.
        """
        if revision != self.model.revision:
            raise UserError(
                f"scheme {self.name} was made from scores of {self.model.name} revision {self.model.revision}, the "
                f"model here is revision {revision}; score this one, or use the model that was scored"
            )

    def to_json(self) -> dict[str, object]:
        """Plain JSON data, with its schema version, digest and exclude list."""
        data = asdict(self)
        for name in ("predicted_kl", "effective_bits_active"):
            data[name] = data[name] if math.isfinite(data[name]) else None
        if not data["size"]:
            del data["size"]
        return {"schema_version": SCHEMA_VERSION, "digest": self.digest, **data, "exclude": self.exclude}

    @classmethod
    def from_json(cls, data: object) -> Scheme:
        """Reads :meth:`to_json`'s data back.

        Raises:
            UserError: Not a scheme, one of a later version, or one that was changed by hand.
        """
        version = data.get("schema_version") if isinstance(data, Mapping) else None
        if not isinstance(data, Mapping) or not isinstance(version, int) or "assignment" not in data:
            raise UserError("not a LayerBits scheme; give the scheme.json that experiments/scheme.py writes")
        if version > SCHEMA_VERSION:
            raise UserError(
                f"scheme has schema_version {version}, this LayerBits reads up to {SCHEMA_VERSION}; upgrade layerbits"
            )
        try:
            calibration = {**data["calibration"], "batch_loss_tokens": tuple(data["calibration"]["batch_loss_tokens"])}
            scheme = cls(
                name=data["name"],
                source_run_ids=tuple(data["source_run_ids"]),
                model=ModelInfo(**data["model"]),
                calibration=CalibrationInfo(**calibration),
                groups=tuple(Group(**{**g, "modules": tuple(g["modules"])}) for g in data["groups"]),
                candidates=tuple(
                    CandidateInfo(**{**c, "adjustments": tuple(c["adjustments"])}) for c in data["candidates"]
                ),
                assignment=Assignment(data["assignment"]),
                effective_bits=data["effective_bits"],
                effective_bits_modelopt=data["effective_bits_modelopt"],
                predicted_kl=_number(data["predicted_kl"]),
                score=data["score"],
                how=data["how"],
                settings=data["settings"],
                notes=tuple(data["notes"]),
                effective_bits_active=_number(data.get("effective_bits_active")),
                kv_cache=data.get("kv_cache", NO_CACHE),
                kv_prices=data.get("kv_prices", {}),
                size=data.get("size", {}),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"scheme is damaged ({error!r}); make it again with experiments/scheme.py") from error
        if scheme.digest != data.get("digest"):
            raise UserError(f"scheme {scheme.name} does not match its digest; make it again with experiments/scheme.py")
        return scheme

    def save(self, path: Path) -> Path:
        """Writes the scheme, whole or not at all."""
        write_json(path, self.to_json())
        return path


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def load_scheme(path: str | Path) -> Scheme:
    """Reads a scheme file.

    Raises:
        UserError: No such file, not JSON, or not a scheme that this version reads.
    """
    path = home_path(path)
    try:
        data = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"no scheme at {path}; give a scheme file that experiments/scheme.py wrote") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}); make the scheme again") from None
    return Scheme.from_json(data)
