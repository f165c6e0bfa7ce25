"""What a recipe leaves open on a model: its groups, what each may become, and what that costs by ModelOpt's count."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from layerbits.candidates.candidate import Candidate
from layerbits.candidates.formats import plain
from layerbits.candidates.known import candidates_of, modelopt_cost, settings_key
from layerbits.candidates.linear import QUANTIZERS, WEIGHT, Config
from layerbits.errors import UserError
from layerbits.inputs.models import Shapes
from layerbits.recipes.recipe import LoadedRecipe, SearchSpace, setting_of
from layerbits.results.assignment import UNQUANTIZED_BITS
from layerbits.results.result import FloatArray
from layerbits.schemes.solver import Problem
from layerbits.scoring.state import Decision, decisions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Slot:
    """One of ModelOpt's decisions.

    Attributes:
        name: Its key in ModelOpt's ``candidate_stats``.
        modules: Its linears, or an expert module. weights: Number of their weights. attrs: Names of their quantizers.
        choices: Positions of the candidates that it may become.
        allow_no_quant: Whether it may stay as it is.
        fixed: Whether the recipe has decided already; it keeps its format while others are scored.
        baseline: Whether it did so in its ``quantize`` section.
        cost_weight: What its weights count in the budget.
    """

    name: str
    modules: tuple[str, ...]
    weights: int
    attrs: tuple[str, ...] = ()
    choices: tuple[int, ...] = ()
    allow_no_quant: bool = True
    fixed: bool = False
    baseline: bool = False
    cost_weight: float = 1.0

    @property
    def searched(self) -> bool:
        """Whether it has a score: something to choose."""
        return bool(self.choices) and not self.fixed


@dataclass(frozen=True)
class RecipeSpace:
    """A recipe on a model; ``S`` slots, ``C`` candidates.

    Attributes:
        candidates: Its formats, and those of its fixed part.
        configs: The candidates as the recipe spells them.
        costs: ``[C]`` bits per weight by ModelOpt's count.
        notes: What the user should know.
    """

    recipe: LoadedRecipe
    candidates: tuple[Candidate, ...]
    configs: tuple[Config, ...]
    costs: tuple[float, ...]
    slots: tuple[Slot, ...]
    notes: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """``[C]`` names of the candidates."""
        return tuple(c.info.name for c in self.candidates)

    @property
    def searched(self) -> tuple[Slot, ...]:
        """Slots with a score."""
        return tuple(slot for slot in self.slots if slot.searched)

    @property
    def scored(self) -> tuple[str, ...]:
        """Names of the linears with a score."""
        return tuple(module for slot in self.searched for module in slot.modules)

    @property
    def held(self) -> dict[str, int]:
        """Linears that stay quantized while others are scored, with their candidates."""
        return {
            module: slot.choices[0] for slot in self.slots if slot.fixed and slot.choices for module in slot.modules
        }

    def problem(self, raw: FloatArray) -> Problem:
        """The knapsack of a search.

        Args:
            raw: ``[searched slots, C]`` raw scores; not finite = not eligible.
        """
        scores = np.full((len(self.slots), len(self.candidates) + 1), np.inf)
        rows = iter(raw)
        for s, slot in enumerate(self.slots):
            if slot.fixed or not slot.choices:
                scores[s, slot.choices[0] if slot.choices else -1] = 0.0
                continue
            row = next(rows)
            for c in slot.choices:
                scores[s, c] = row[c] if np.isfinite(row[c]) else np.inf
            if slot.allow_no_quant:
                scores[s, -1] = 0.0
        counted = np.array([slot.weights * slot.cost_weight for slot in self.slots], dtype=np.float64)
        if counted.sum() <= 0:
            raise UserError(f"recipe {self.recipe.name}: no weight counts in the budget; correct cost_excluded_layers")
        return Problem(self.names, scores, counted[:, None] / counted.sum() * np.array([*self.costs, UNQUANTIZED_BITS]))

    @property
    def floor(self) -> float:
        """Fewest effective bits, by ModelOpt's count, that the recipe can reach."""
        return self.problem(np.zeros((len(self.searched), len(self.candidates)))).floor

    @property
    def ceiling(self) -> float:
        """Most effective bits that it can take, from which on the budget does not bind."""
        stated = self.problem(np.zeros((len(self.searched), len(self.candidates))))
        return float(np.where(np.isfinite(stated.scores), stated.bits, -np.inf).max(axis=1).sum())


def lay_out(recipe: LoadedRecipe, model: PreTrainedModel, linears: Mapping[str, Shapes]) -> RecipeSpace:
    """Finds what a recipe says of each group of a model.

    Args:
        recipe: The recipe.
        model: Any model, its parameters may be on the meta device.
        linears: Linears and expert modules of its language model, the only ones that are scored.

    Raises:
        UserError: No linear is left to quantize, a group is matched in part or twice, or the budget is infeasible.
    """
    maker = _Maker(recipe, linears)
    groups = decisions(model, recipe.disabled)
    slots = maker.ptq(groups) if recipe.kind == "ptq" else [maker.searched(d) for d in groups]
    weigh = _cost_weights(recipe, model)
    slots = [Slot(**{**vars(slot), "cost_weight": weigh(slot.modules)}) for slot in slots]
    space = RecipeSpace(
        recipe, maker.candidates, tuple(maker.configs), tuple(maker.costs), tuple(slots), tuple(maker.notes())
    )
    if not space.searched:
        patterns = [p for s in recipe.spaces for p in s.patterns] or ["its patterns"]
        raise UserError(
            f"recipe {recipe.name} leaves nothing to score on {type(model).__name__} ({', '.join(patterns)} match no "
            "linear of its language model); it is for another architecture, choose one for this model"
        )
    if recipe.effective_bits is not None and recipe.effective_bits < space.floor - 1e-9:
        raise UserError(
            f"recipe {recipe.name}: effective_bits={recipe.effective_bits:g} cannot be reached on this model; the "
            f"feasible range is {space.floor:.4g} to {space.ceiling:.4g} by ModelOpt's count; set "
            "auto_quantize.constraints.effective_bits in it"
        )
    return space


class _Maker:
    """Collects the candidates of a recipe while its slots are made."""

    def __init__(self, recipe: LoadedRecipe, linears: Mapping[str, Shapes]) -> None:
        self.recipe = recipe
        self.candidates = candidates_of(recipe.formats, recipe.short_name)
        self.configs = list(recipe.formats)
        self.costs = [modelopt_cost(config) for config in recipe.formats]
        self._linears = linears
        self._settings: dict[str, int | None] = {}
        self._matched: set[str] = set()
        self._outside: list[str] = []

    def searched(self, decision: Decision) -> Slot:
        """What a search may do with a decision."""
        modules = decision.modules
        slot = Slot(decision.name, modules, decision.weights, decision.attrs)
        space = self._space_of(modules)
        if not decision.searched:
            return slot
        if not self._linears.keys() >= set(modules):
            self._outside += [m for m in modules if m not in self._linears]
            return slot
        if space is not None:
            fixed = not space.allow_no_quant and len(space.formats) == 1
            return replace(slot, choices=space.formats, allow_no_quant=space.allow_no_quant, fixed=fixed)
        if self.recipe.fixed is None:
            return replace(slot, choices=self.recipe.default)
        settings = {self._setting(module, decision.attrs) for module in modules}
        if len(settings) > 1:
            raise UserError(
                f"recipe {self.recipe.name}: its quantize section gives {', '.join(modules)} different formats, and "
                "they are decided together; put them into one entry of module_search_spaces"
            )
        (at,) = settings
        return replace(slot, choices=() if at is None else (at,), allow_no_quant=False, fixed=True, baseline=True)

    def ptq(self, decisions: Sequence[Decision]) -> list[Slot]:
        """What a PTQ recipe does with each decision; one whose linears differ comes apart."""
        slots = []
        for decision in decisions:
            parts: dict[int | None, list[str]] = {}
            for module in decision.modules:
                at = self._setting(module, decision.attrs)
                if at is not None and module not in self._linears:
                    self._outside.append(module)
                    at = None
                parts.setdefault(at, []).append(module)
            for at, modules in parts.items():
                sizes = [self._linears[m] for m in modules] if len(parts) > 1 else []
                share = sum(rows * width for shapes in sizes for rows, width in shapes) or decision.weights
                slot = Slot(decision.name, tuple(modules), share, decision.attrs, () if at is None else (at,))
                slots.append(slot)
        return slots

    def notes(self) -> list[str]:
        """Patterns that match nothing, and linears outside the language model that the recipe would quantize."""
        notes = []
        patterns = [p for space in self.recipe.spaces for p in space.patterns]
        if idle := [p for p in patterns if p not in self._matched]:
            notes.append(f"recipe {self.recipe.name}: {', '.join(idle)} match no linear of this model")
        if self._outside:
            more = f" and {len(self._outside) - 1} more" if len(self._outside) > 1 else ""
            notes.append(
                f"{self._outside[0]}{more} would be quantized by the recipe and are not part of the language model: "
                "left as they are"
            )
        return notes

    def _space_of(self, modules: Sequence[str]) -> SearchSpace | None:
        matching = []
        for space in self.recipe.spaces:
            hits = [[p for p in space.patterns if fnmatch.fnmatch(m, p)] for m in modules]
            self._matched.update(p for h in hits for p in h)
            if all(hits):
                matching.append(space)
            elif any(hits):
                raise UserError(
                    f"recipe {self.recipe.name}: {', '.join(space.patterns)} match some of {', '.join(modules)}, which "
                    "are decided together; name all of them or none"
                )
        if len(matching) > 1:
            raise UserError(
                f"recipe {self.recipe.name}: {', '.join(modules)} are in {len(matching)} entries of "
                "module_search_spaces; make their patterns disjoint"
            )
        return matching[0] if matching else None

    def _setting(self, module: str, attrs: Sequence[str]) -> int | None:
        """Position of the candidate that the fixed configuration gives a linear; ``None`` = unquantized."""
        assert self.recipe.fixed is not None
        config = module_config(self.recipe.fixed, module, attrs)
        if config is None:
            return None
        key = json.dumps(plain(config), sort_keys=True)
        if key not in self._settings:
            self._settings[key] = self._position(config)
        return self._settings[key]

    def _position(self, config: Config) -> int:
        wanted = settings_key(config)
        for i, known in enumerate(self.configs):
            if settings_key(known) == wanted:
                return i
        self.configs.append(config)
        self.candidates = candidates_of(self.configs, self.recipe.short_name)
        override = (self.recipe.fixed or {}).get("effective_bits")
        weights_alone = {**config, "quant_cfg": [e for e in config["quant_cfg"] if WEIGHT in e["quantizer_name"]]}
        self.costs.append(modelopt_cost(weights_alone) if override is None else float(override))
        return len(self.configs) - 1


def module_config(config: Config, module: str, attrs: Sequence[str]) -> Config | None:
    """What ``mtq.quantize`` would give one module, as a configuration with bare names; ``None`` = not its weight.

    Args:
        config: A ModelOpt configuration; entries may name modules, the last that matches wins.
        module: Full name of the linear, or of the expert module.
        attrs: Names of its quantizers.

    Raises:
        UserError: An expert module's projections would get different settings.
    """
    entries: list[Config] = [{"quantizer_name": "*", "enable": False}]
    for quantizer in QUANTIZERS:
        settings: list[Config | list[Config] | None] = []
        for attr in (a for a in attrs if a.endswith(quantizer)):
            setting = setting_of(config, f"{module}.{attr}")
            if setting not in settings:
                settings.append(setting)
        if len(settings) > 1:
            raise UserError(f"the projections of {module} get different formats, and they are decided together")
        if settings[0] is not None:
            entries.append({"quantizer_name": f"*{quantizer}", "cfg": settings[0]})
        elif quantizer == WEIGHT:
            return None
    return {"quant_cfg": entries, "algorithm": config["algorithm"]}


def _cost_weights(recipe: LoadedRecipe, model: PreTrainedModel) -> Callable[[Sequence[str]], float]:
    """ModelOpt's cost weight of a group, by its own cost model."""
    from modelopt.torch.quantization._auto_quantize_cost import (
        get_auto_quantize_cost_model,
        normalize_auto_quantize_constraints,
    )

    if recipe.kind == "ptq":
        return lambda _modules: 1.0
    try:
        normal = normalize_auto_quantize_constraints(model, recipe.stock_arguments()["constraints"])
    except ValueError as error:
        raise UserError(f"recipe {recipe.name}: {error} Set it under auto_quantize.constraints") from None
    cost_model = get_auto_quantize_cost_model(normal["cost_model"])
    return lambda modules: cost_model.module_cost_weight(modules, normal.get("cost", {}))
