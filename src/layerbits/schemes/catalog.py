"""Named ways to make a scheme: the files of ``configs/scheme``."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path

import yaml

from layerbits.errors import UserError
from layerbits.plain import JsonMapping
from layerbits.schemes.budgets import check_bits
from layerbits.schemes.controls import KINDS
from layerbits.schemes.coverage import ORDERS

OBJECTIVES = ("score", "predicted_kl")
CONTROLS_ALONE = "controls take their bits from schemes and there are none; name a scheme or set effective_bits"


@dataclass(frozen=True)
class Budget:
    """What a scheme may take at most: bits per weight, GiB of a server's memory, milliseconds of a step of it."""

    bits: float | None = None
    gib: float | None = None
    ms: float | None = None

    @property
    def name(self) -> str:
        """Of the budget, as a part of the names of schemes: ``6``, ``gib_3``, ``ms_4`` or ``6_gib_3_ms_4``."""
        bits = [] if self.bits is None else [f"{self.bits:g}"]
        amounts = (("gib", self.gib), ("ms", self.ms))
        named = "_".join([*bits, *(f"{unit}_{amount:g}" for unit, amount in amounts if amount is not None)])
        return named.replace("+", "")  # of 1e+06: names of schemes have none


@dataclass(frozen=True)
class SchemeSpec:
    """How a scheme is made from scores, or a control from another scheme.

    Attributes:
        effective_bits: Budgets in bits per weight; a scheme each.
        budget_gib: Budgets in GiB of a server's memory; a scheme each, and one for each pair where both are given.
        budget_ms: Budgets in milliseconds of a step, likewise.
        coverage: Share of the blocks that keep the solver's decisions; ``None`` = all, and what is outside of blocks.
        coverage_order: Which blocks those are (:data:`~layerbits.schemes.coverage.ORDERS`).
        candidates: Names or quant pairs that groups may choose among; none = all that the source scored.
        objective: What the solver minimises the sum of: ``score`` (raw) or ``predicted_kl``.
        method: What the scores should have been measured by; another method gets a note.
        score_samples: Captions that they should have been measured on; another number gets a note.
        control: ``random`` or ``first_last``: made for each of the other schemes, with its bits.
        seeds: Of the control, one each.
        vision_bits: Budget of the groups of the vision tower, over which alone it counts, as ``effective_bits`` then
            counts over all others; ``None`` = one budget for all.
    """

    name: str
    effective_bits: tuple[float, ...] = ()
    coverage: float | None = None
    coverage_order: str = ORDERS[0]
    candidates: tuple[str, ...] = ()
    objective: str = OBJECTIVES[0]
    method: str | None = None
    score_samples: int | None = None
    control: str | None = None
    seeds: tuple[int, ...] = (0,)
    budget_gib: tuple[float, ...] = ()
    budget_ms: tuple[float, ...] = ()
    vision_bits: float | None = None

    def __post_init__(self) -> None:
        """Checks the choices.

        Raises:
            UserError: One is not known, or neither a budget nor a control is asked for.
        """
        for key, choices in (("coverage_order", ORDERS), ("objective", OBJECTIVES), ("control", (None, *KINDS))):
            if getattr(self, key) not in choices:
                known = " or ".join(c for c in choices if c)
                raise UserError(f"scheme {self.name}: {key}={getattr(self, key)} is not known; use {known}")
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise UserError(f"scheme name {self.name!r} must be letters, digits, '_', '-' and '.' only")
        if bool(self.effective_bits or self.budget_gib or self.budget_ms) == bool(self.control):
            raise UserError(
                f"scheme {self.name} needs either a budget (effective_bits, budget_gib, budget_ms) or control"
            )
        for bits in self.effective_bits:
            check_bits(f"scheme {self.name}: effective_bits", bits)
        for key, unit in (("budget_gib", "GiB"), ("budget_ms", "milliseconds")):
            if wrong := [b for b in getattr(self, key) if not 0 < b < math.inf]:
                raise UserError(f"scheme {self.name}: {key}={wrong[0]:g} is no number of {unit}; use one above 0")
        if self.vision_bits is not None and self.in_costs:
            key = "budget_gib" if self.budget_gib else "budget_ms"
            raise UserError(
                f"scheme {self.name}: vision_bits={self.vision_bits:g} goes with effective_bits; {key} counts the "
                "tower with everything else"
            )

    @property
    def in_costs(self) -> bool:
        """Whether its budgets count GiB or milliseconds, alone or beside bits."""
        return bool(self.budget_gib or self.budget_ms)

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """What a scheme each is made for."""
        amounts = (self.effective_bits, self.budget_gib, self.budget_ms)
        return tuple(Budget(*each) for each in product(*(several or (None,) for several in amounts)))

    @classmethod
    def from_mapping(cls, mapping: JsonMapping) -> SchemeSpec:
        """Reads the YAML of a scheme; a budget may be a number or a list.

        Raises:
            UserError: A key is unknown, or a value is not one of its choices.
        """
        known = [f.name for f in fields(cls)]
        name = mapping.get("name", "?")
        if unknown := sorted(set(mapping) - set(known)):
            raise UserError(f"scheme {name}: unknown {', '.join(unknown)}; it has the keys {', '.join(known)}")
        values = {**mapping, "name": str(name)}
        try:
            budgets = ((key, float) for key in ("effective_bits", "budget_gib", "budget_ms"))
            for key, kind in (*budgets, ("candidates", str), ("seeds", int)):
                if key in values:
                    given = values[key]
                    several = given if isinstance(given, list | tuple) else [given]
                    values[key] = tuple(kind(value) for value in several)
            for key, kind in (("coverage", float), ("score_samples", int), ("vision_bits", float)):
                if values.get(key) is not None:
                    values[key] = kind(values[key])
        except (TypeError, ValueError):
            raise UserError(f"scheme {name}: {key}={mapping[key]!r} is not a number; correct the file") from None
        return cls(**values)


def load_specs(names: Sequence[str], folder: Path) -> list[SchemeSpec]:
    """Reads schemes by name.

    Args:
        names: File names without ``.yaml``.
        folder: ``configs/scheme``.

    Raises:
        UserError: There is no such file, or it is no scheme.
    """
    specs = []
    for name in names:
        path = folder / f"{name}.yaml"
        if not path.is_file():
            known = sorted(p.stem for p in folder.glob("*.yaml"))
            close = difflib.get_close_matches(name, known) or known
            own = f"{folder.parent.name}/{path.parent.name}/{path.name}"
            raise UserError(f"scheme {name} is not known; choose {', '.join(close)}, or add {own}")
        try:
            data = yaml.safe_load(path.read_text("utf-8"))
        except yaml.YAMLError as error:
            raise UserError(f"{path} is not YAML ({str(error).splitlines()[0]}); correct it") from None
        if not isinstance(data, Mapping):
            raise UserError(f"{path} holds no keys; write name, effective_bits, …")
        specs.append(SchemeSpec.from_mapping({"name": name, **data}))
    return specs
