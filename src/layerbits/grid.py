"""Grids: every pair × granularity × size as a cell that is scored, shared with an equal one, found done, or refused."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import yaml

from layerbits.candidates.candidate import Candidate, check_target, resolve_candidate
from layerbits.candidates.capability import Capability
from layerbits.candidates.formats import QuantPair
from layerbits.candidates.granularity import Overlay
from layerbits.config import Settings
from layerbits.errors import Unsupported, UserError
from layerbits.plain import Composed, JsonObject
from layerbits.results.naming import AXES, run_name
from layerbits.results.result import SensitivityResult
from layerbits.schemes.settings import listed
from layerbits.tracking.log import NotLogged

if TYPE_CHECKING:
    import pandas as pd

    from layerbits.inputs.models import LoadedModel
    from layerbits.stages.plan import Plan
    from layerbits.stages.run import Outcome
    from layerbits.stages.workbench import Workbench

    Checked = tuple[Candidate, Capability]


@dataclass(frozen=True)
class Cell:
    """One combination of a grid."""

    quant_pair: str
    granularity: str
    dataset_size: str

    @property
    def candidate(self) -> str:
        """Name of its candidate."""
        return self.quant_pair if self.granularity == "default" else f"{self.quant_pair}/{self.granularity}"


@dataclass(frozen=True)
class CellOutcome:
    """What became of a cell.

    Attributes:
        status: ``ok``, ``skipped`` (finished in an earlier run), ``alias`` (same configuration as another cell),
            ``unsupported`` (refused with the reason) or ``failed``.
        run_id: The run that holds its result, where there is one.
    """

    cell: Cell
    status: str
    reason: str = ""
    run_id: str = ""
    predicted_kl: float | None = None
    score: float | None = None
    bits: float | None = None
    seconds: float | None = None


class CellLog(Protocol):
    """Where the cells of a grid are logged; may keep nothing."""

    def find(self, cell: str) -> str | None:
        """Run id of a finished run of a cell, given as its digest; ``None`` where there is none."""

    def result(self, cell: Cell, result: SensitivityResult, folder: Path) -> str:
        """Logs a cell's result and returns its run id."""

    def without_result(self, cell: Cell, outcome: str, reason: str, alias_of: str) -> str:
        """Records a cell without a result of its own (``alias_of``: a run id, or empty) and returns its run id."""


def cells(pairs: Sequence[str], granularities: Sequence[str], sizes: Sequence[str]) -> list[Cell]:
    """All combinations, sizes outermost.

    Raises:
        UserError: An axis is empty or names something twice.
    """
    for axis, names in (("quant_pairs", pairs), ("quant_granularities", granularities), ("dataset_sizes", sizes)):
        if not names:
            raise UserError(f"the grid is empty: give at least one value for {axis}")
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise UserError(f"{axis} names {', '.join(twice)} twice; give each once")
    return [Cell(p, g, s) for s, p, g in product(sizes, pairs, granularities)]


def run_names(wanted: Sequence[Cell], model: str) -> dict[Cell, str]:
    """Names of the cells' runs, which begin with what differs in the grid."""
    varied = [axis for axis in AXES if len({getattr(cell, axis) for cell in wanted}) > 1]
    return {c: run_name(model, c.quant_pair, c.granularity, c.dataset_size, varied) for c in wanted}


def axis(value: object, folder: Path, known_sizes: bool = False) -> list[str]:
    """Values of one axis: a list or a comma-separated text; ``all`` stands for every file of a config group.

    Raises:
        UserError: A value is not in the group.
    """
    names = listed(value)
    if known_sizes:
        return names
    known = sorted(p.stem for p in folder.glob("*.yaml"))
    if names == ["all"]:
        # without the experimental pairs, unless they are asked for by name
        return [n for n in known if not yaml.safe_load((folder / f"{n}.yaml").read_text("utf-8")).get("experimental")]
    for name in names:
        if name not in known:
            raise UserError(f"{folder.name}={name} is not known; choose among {', '.join(known)}")
    return names


def cell_settings(composed: Composed, cell: Cell, configs: Path) -> JsonObject:
    """A composed configuration as it would be for a run of one cell alone.

    Args:
        composed: Of a grid, or of a single run, which stays as it is.
        cell: The cell.
        configs: Folder of the config groups, for a pair or granularity that is not the composed one.

    Raises:
        UserError: There is no such file.
    """
    groups = {"quant_pair": cell.quant_pair, "quant_granularity": cell.granularity}
    changed = {g: _read(configs, g, name) for g, name in groups.items() if composed[g]["name"] != name}
    return {**composed, **changed, "dataset": {**composed["dataset"], "size": cell.dataset_size}}


def run_grid(
    wanted: Sequence[Cell],
    settings: Settings,
    configs: Path,
    log: CellLog,
    root: Path,
    force: bool = False,
    progress: Callable[[int], object] = lambda _n: None,
) -> list[CellOutcome]:
    """Runs the cells of a grid: one pass per size and coverage, the model loaded once.

    Args:
        wanted: From :func:`cells`.
        settings: Everything but pair, granularity and size.
        configs: Folder of the config groups.
        log: Where results and refusals go.
        root: Project folder.
        force: Score finished cells again.
        progress: Called with the number of cells that are done since the last call.

    Returns:
        One outcome per cell, in order.
    """
    grid = _Grid(configs, log, root, force, progress)
    for size in dict.fromkeys(c.dataset_size for c in wanted):
        sized = replace(settings, dataset=replace(settings.dataset, size=size))
        for plan in grid.plans([c for c in wanted if c.dataset_size == size], sized):
            grid.score(plan)
    return [grid.outcomes[c] for c in wanted]


class _Grid:
    """A grid while it runs: what became of its cells so far, and the model once it is loaded."""

    def __init__(self, configs: Path, log: CellLog, root: Path, force: bool, progress: Callable[[int], object]) -> None:
        self.outcomes: dict[Cell, CellOutcome] = {}
        self._configs = configs
        self._log = log
        self._root = root
        self._force = force
        self._progress = progress
        self._aliases: dict[Cell, list[Cell]] = {}
        self._loaded: LoadedModel | None = None

    def plans(self, wanted: Sequence[Cell], settings: Settings) -> list[Plan]:
        """Plans of the cells of one size that are left to score; the others are settled."""
        from layerbits.stages.workbench import scored_together, workbench

        bench = workbench(settings)
        groups: dict[tuple[str, ...], list[Checked]] = {}
        for cell, checked in self._distinct(wanted, settings, bench).items():
            finished = None if self._force else self._log.find(bench.cell(*checked))
            if finished:
                self._settle(CellOutcome(cell, "skipped", f"finished in run {finished}", finished))
            else:
                groups.setdefault(bench.scored(checked[0]), []).append(checked)
        plans = []
        for candidates in groups.values():
            stock = settings.autoquant.engine == "stock"  # one candidate a call, that is what makes it the reference
            together = [c for c in candidates if not stock and scored_together(c[0])]
            alone = [[c] for c in candidates if c not in together]
            plans += [bench.plan(part) for part in [together, *alone] if part]
        return plans

    def _distinct(self, wanted: Sequence[Cell], settings: Settings, bench: Workbench) -> dict[Cell, Checked]:
        """The cells that can be scored, the first of those that are the same; refused ones are settled."""
        distinct: dict[Cell, Checked] = {}
        firsts: dict[tuple[str, tuple[str, ...]], Cell] = {}
        for cell in wanted:
            try:
                candidate = candidate_of(cell, settings, self._configs)
                check_target(candidate, settings.autoquant.effective_bits, settings.autoquant.vision_bits)
                checked = candidate, bench.check(candidate)
            except UserError as error:
                self._refuse(cell, "unsupported" if isinstance(error, Unsupported) else "failed", str(error))
                continue
            first = firsts.setdefault((candidate.info.config_hash, bench.scored(candidate)), cell)
            if first == cell:
                distinct[cell] = checked
            else:
                self._aliases.setdefault(first, []).append(cell)
        return distinct

    def score(self, plan: Plan) -> None:
        """Scores a plan and settles its cells; a failure is that of all of them, and the rest of the grid goes on."""
        from layerbits.stages.run import load_model, run

        size = plan.settings.dataset.size
        mine = {c.info.name: Cell(c.info.quant_pair, c.info.granularity, size) for c, _ in plan.candidates}
        try:
            self._loaded = self._loaded or load_model(plan)
            outcomes = run(plan, self._root, self._loaded)
        except Exception as error:
            self._loaded = None
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            for cell in mine.values():
                self._refuse(cell, "failed", reason)
            return
        for outcome in outcomes:
            self._write(mine[outcome.result.candidate.name], outcome, plan.settings)

    def _write(self, cell: Cell, outcome: Outcome, settings: Settings) -> None:
        """Writes and logs a cell's result; one that the store does not take is on disk, and the grid goes on."""
        from layerbits.stages.write import write

        composed = cell_settings(outcome.result.settings, cell, self._configs)
        result = replace(outcome.result, settings=composed)
        folder = write(replace(outcome, result=result), settings)
        try:
            run_id = self._log.result(cell, result, folder)
        except NotLogged as error:
            self._settle(CellOutcome(cell, "failed", str(error)))
            return
        self._settle(
            CellOutcome(
                cell,
                "ok",
                run_id=run_id,
                predicted_kl=result.total("predicted_kl"),
                score=result.total("scores"),
                bits=result.allocation.effective_bits,
                seconds=sum(result.seconds.values()),
            )
        )

    def _refuse(self, cell: Cell, outcome: str, reason: str) -> None:
        self._settle(CellOutcome(cell, outcome, reason, self._record(cell, outcome, reason, "")))

    def _settle(self, outcome: CellOutcome) -> None:
        """Keeps what became of a cell, and of those that are the same."""
        self.outcomes[outcome.cell] = outcome
        self._progress(1)
        shared = outcome.run_id if outcome.status in ("ok", "skipped") else ""
        for alias in self._aliases.pop(outcome.cell, []):
            reason = f"same configuration as {outcome.cell.candidate}: the overlay changes nothing for this pair"
            self._settle(CellOutcome(alias, "alias", reason, self._record(alias, "skipped", reason, shared)))

    def _record(self, cell: Cell, outcome: str, reason: str, alias_of: str) -> str:
        try:
            return self._log.without_result(cell, outcome, reason, alias_of)
        except UserError as error:  # the store is gone: that must not cost the cells that are left to score
            print(f"warning: {error}", file=sys.stderr, flush=True)
            return ""


def candidate_of(cell: Cell, settings: Settings, configs: Path) -> Candidate:
    """The candidate of a cell.

    Raises:
        UserError: Its pair or granularity is none, or they do not go together.
    """
    return resolve_candidate(
        QuantPair.from_mapping(_read(configs, "quant_pair", cell.quant_pair)),
        Overlay.from_mapping(_read(configs, "quant_granularity", cell.granularity)),
        settings.fp4,
        settings.experimental,
    )


def _read(configs: Path, group: str, name: str) -> Mapping[str, object]:
    file = configs / group / f"{name}.yaml"
    try:
        values: dict[str, object] = yaml.safe_load(file.read_text("utf-8"))
        return values
    except FileNotFoundError:
        raise UserError(f"{group}={name} is not in {configs / group} any more; add {file.name} there") from None


def summary(outcomes: Sequence[CellOutcome]) -> pd.DataFrame:
    """The grid as a pandas table, one row a cell."""
    import pandas as pd

    return pd.DataFrame(
        {
            "pair": [o.cell.quant_pair for o in outcomes],
            "granularity": [o.cell.granularity for o in outcomes],
            "size": [o.cell.dataset_size for o in outcomes],
            "status": [o.status for o in outcomes],
            "predicted_kl": [o.predicted_kl for o in outcomes],
            "score": [o.score for o in outcomes],
            "bits": [o.bits for o in outcomes],
            "pass_seconds": [o.seconds for o in outcomes],
            "reason": [o.reason for o in outcomes],
            "run_id": [o.run_id for o in outcomes],
        }
    ).astype(dict.fromkeys(("predicted_kl", "score", "bits", "pass_seconds"), float))
