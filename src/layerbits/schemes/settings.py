"""What ``configs/scheme_run.yaml`` composes to, as typed settings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from layerbits.errors import UserError
from layerbits.paths import names_file, output_folder, split_at_commas
from layerbits.plain import Composed, unset
from layerbits.results.experiment import made_by
from layerbits.results.manifest import check_manifests
from layerbits.results.result import COST_MODELS
from layerbits.schemes.budget_kinds import Counted, Measure, Timed
from layerbits.schemes.budgets import check_bits, tower_budget
from layerbits.schemes.catalog import CONTROLS_ALONE, OBJECTIVES, Budget, SchemeSpec, load_specs
from layerbits.schemes.cost_table import DECODE, MEASURE, CostTable, Step
from layerbits.schemes.kv_cache import AUTO, chosen_cache, kv_choice
from layerbits.schemes.sizes import Load
from layerbits.schemes.source import Source


@dataclass(frozen=True)
class SchemeSettings:
    """Which schemes to make, and from which runs.

    Attributes:
        references: Run ids, result folders or manifests.
        specs: Schemes and controls, by name and by budget.
        base: The candidates and the objective of the budgets and of the Pareto curve.
        cost_model: What budgets count; ``None`` = as in the runs.
        kv_cache: What the schemes do to keys and values; ``auto`` = the one format that the runs priced, if any.
        pareto: Points of the curve; 0 = none.
        load: What budgets in GiB count beside the weights.
        timed: Which milliseconds schemes are given, and what budgets count of them; ``None`` = none.
    """

    references: tuple[str, ...]
    specs: tuple[SchemeSpec, ...]
    base: SchemeSpec
    cost_model: str | None
    pareto: int
    kv_cache: str
    output_root: Path
    load: Load = field(default_factory=Load)
    timed: Timed | None = None

    @property
    def source_name(self) -> str:
        """The sources in a few words."""
        return source_name(self.references)

    def applied(self, source: Source, measure: Measure) -> Source:
        """Recorded scores, to be made into schemes as asked for.

        Args:
            source: Of :attr:`references`.
            measure: Finds the bytes and seconds of schemes.

        Raises:
            UserError: As ``measure``.
        """
        chosen = replace(
            source,
            cost_model=self.cost_model or source.cost_model,
            kv_cache=chosen_cache(self.kv_cache, source.kv_prices),
        )
        counted = Counted(self.load if any(spec.budget_gib for spec in self.specs) else None, self.timed)
        return chosen if counted == Counted() else measure(chosen, counted)

    @classmethod
    def of_budgets(cls, references: Sequence[str], **budgets: str | None) -> SchemeSettings:
        """Settings of the schemes of some budgets and of no others, made as ``configs/scheme_run.yaml`` makes them.

        Args:
            references: Run ids, result folders or manifests.
            budgets: ``effective_bits``, ``budget_gib``, ``context``, … as users write them.

        Raises:
            UserError: As :meth:`from_config`.
        """
        return cls.from_config({**_PLAIN, "run_id": list(references), **budgets}, Path())

    @classmethod
    def from_config(cls, config: Composed, folder: Path) -> SchemeSettings:
        """Reads a resolved configuration.

        Args:
            config: ``configs/scheme_run.yaml``.
            folder: ``configs/scheme``.

        Raises:
            UserError: A scheme is not known, or a value is not one of its choices.
        """
        references = runs_of(config["run_id"])
        candidates = list(dict.fromkeys(listed(config["candidates"])))
        budgets, gib, ms = (_amounts(key, config[key]) for key in ("effective_bits", "budget_gib", "budget_ms"))
        shared = {
            "candidates": [] if candidates == ["all"] else candidates,
            "objective": config["objective"],
            "vision_bits": tower_budget(config.get("vision_bits"), "vision_bits"),
        }
        base = SchemeSpec.from_mapping({"name": "bits", "effective_bits": budgets or [16], **shared})
        named = load_specs(list(dict.fromkeys([*listed(config["schemes"]), *listed(config["controls"])])), folder)
        if not unset(config["coverage_order"]):
            named = [_ordered(spec, config["coverage_order"]) for spec in named]
        if (tower := base.vision_bits) is not None:
            named = [spec if spec.control else replace(spec, vision_bits=tower) for spec in named]
        # A budget has its number in its name even when it is the only one.
        own = []
        if budgets or gib or ms:
            asked = {"name": "bits", "effective_bits": budgets, "budget_gib": gib, "budget_ms": ms, **shared}
            spec = SchemeSpec.from_mapping(asked)
            own = [_of_budget(spec, budget) for budget in spec.budgets]
        specs = (*named, *own)
        points = whole("pareto", config["pareto"])
        if points < 0:
            raise UserError(f"pareto={points} is no number of budgets; use 0 for no curve")
        if not specs and not points:
            raise UserError("nothing to make: name schemes, or set effective_bits, budget_gib, budget_ms or pareto")
        if specs and all(spec.control for spec in specs):
            raise UserError(CONTROLS_ALONE)
        return cls(
            references=tuple(references),
            specs=specs,
            base=base,
            cost_model=_cost_model(config.get("cost_model")),
            pareto=points,
            kv_cache=kv_choice(config.get("kv_cache", AUTO)),
            output_root=output_folder("output_root", config["output_root"]),
            load=_load(config, counted=any(spec.budget_gib for spec in specs)),
            timed=asked_times(config, needed=any(spec.budget_ms for spec in specs)),
        )


USUAL_STEP = Step(DECODE, 1)
"""The step of ``configs/scheme_run.yaml``."""

_PLAIN: Mapping[str, object] = {
    **dict.fromkeys(("schemes", "controls", "coverage_order", "cost_model", "vision_bits"), "none"),
    **{"candidates": "all", "objective": OBJECTIVES[0], "kv_cache": AUTO, "pareto": 0, "output_root": "outputs"},
}
"""What ``configs/scheme_run.yaml`` says beside budgets, without the schemes that it names."""


def _of_budget(spec: SchemeSpec, budget: Budget) -> SchemeSpec:
    """The spec with one of its budgets, and a name that says it."""
    name = budget.name if budget.bits is None else f"{spec.name}_{budget.name}"
    bits, gib, ms = (() if number is None else (number,) for number in (budget.bits, budget.gib, budget.ms))
    return replace(spec, name=name, effective_bits=bits, budget_gib=gib, budget_ms=ms)


def _load(config: Composed, counted: bool) -> Load:
    """What a server keeps beside the weights.

    Args:
        config: With ``context`` and ``concurrency``.
        counted: Whether a budget counts it.

    Raises:
        UserError: It is asked for and no budget counts it, or a number is none.
    """
    load = Load(whole("context", config["context"]), whole("concurrency", config["concurrency"]))
    if load != Load() and not counted:
        raise UserError(
            f"context={load.context} and concurrency={load.concurrency} count in budget_gib alone; set budget_gib, or "
            "leave them out"
        )
    return load


def asked_times(config: Composed, needed: bool = False) -> Timed | None:
    """Which milliseconds schemes are given, where a table of costs is named.

    Args:
        config: With ``costs`` and ``step``.
        needed: Whether a budget counts them.

    Raises:
        UserError: None is named and a budget or the step needs it, or it is a file that is not there, or the step is
            not known or not measured.
    """
    step = Step.parse(str(config.get("step", USUAL_STEP.name)))
    if unset(config.get("costs")):
        needs = "budget_ms" if needed else f"step={step.name}"
        if not needed and step == USUAL_STEP:
            return None
        raise UserError(f"{needs} needs costs=FILE or the id of a run of -e costs; {MEASURE}")
    reference = str(config["costs"])
    if names_file(reference):
        CostTable.load(reference).step(step)
    return Timed(step, reference)


def _amounts(key: str, given: object) -> list[float]:
    """Budgets of the configuration, each once.

    Raises:
        UserError: One is no number above 0.
    """
    amounts: list[float] = []
    for text in listed(given):
        try:
            amounts.append(float(text))
        except ValueError:
            raise UserError(f"{key}={text} is not a number; give one, or several separated by commas") from None
        if key == "effective_bits":
            check_bits(key, amounts[-1])
        elif not 0 < amounts[-1] < math.inf:
            raise UserError(f"{key}={text} is no budget; give a number above 0")
    return list(dict.fromkeys(amounts))


def _cost_model(value: object) -> str | None:
    if unset(value):
        return None
    if value not in COST_MODELS:
        raise UserError(f"cost_model={value} is not known; use one of {', '.join(COST_MODELS)}, or none")
    return str(value)


def _ordered(spec: SchemeSpec, order: str) -> SchemeSpec:
    """The spec with another coverage order; it is another scheme then and says so in its name."""
    if spec.coverage is None or spec.coverage_order == order:
        return spec
    turned = replace(spec, coverage_order=order)
    return replace(turned, name=f"{spec.name}_{order}") if spec.coverage < 1 else turned


def source_name(references: Sequence[str]) -> str:
    """Run ids, files or folders in a few words: the last part of the first, and how many more."""
    if not references:
        return "nothing"
    first = Path(references[0])
    name = first.parent.name if first.name == "manifest.json" else first.stem
    return name if len(references) == 1 else f"{name} and {len(references) - 1} more"


def whole(key: str, value: object) -> int:
    """A whole number of the configuration.

    Raises:
        UserError: It is none.
    """
    try:
        return int(str(value))
    except ValueError:
        raise UserError(f"{key}={value} is not a whole number; give one") from None


def runs_of(value: object) -> list[str]:
    """The runs or result folders that ``run_id`` names.

    Raises:
        UserError: It names none, or a file that is no manifest.
    """
    references = listed_paths(value)
    if not references:
        raise UserError("set run_id to the id of a sensitivity run, or to the folder of its result")
    check_manifests(references)
    return references


def one_run(value: object) -> str:
    """The one run or result folder that ``run_id`` names.

    Raises:
        UserError: It names none, several, or a file that is no manifest.
    """
    references = listed_paths(value)
    if len(references) != 1:
        raise UserError("set run_id to the id of one sensitivity run, or to the folder of its result")
    if made_by(Path(references[0])) is None:  # no checkpoint, behind which its run is found
        check_manifests(references)
    return references[0]


def listed_paths(value: object) -> list[str]:
    """As :func:`listed`, of run ids and paths: a comma inside a path that exists does not separate."""
    if isinstance(value, list | tuple):
        return [str(v) for v in value]
    return [] if unset(value) else split_at_commas(str(value))


def listed(value: object) -> list[str]:
    """Values of a list or a comma-separated text; ``none`` is an empty list."""
    if isinstance(value, list | tuple):
        return [str(v) for v in value]
    return [] if unset(value) else [v for v in (part.strip() for part in str(value).split(",")) if v]
