"""Grids: every pair × granularity × size as a cell that is scored, shared with an equal one, found done, or refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from layerbits.candidates.candidate import Candidate, check_target, resolve_candidate
from layerbits.candidates.capability import Capability
from layerbits.candidates.formats import QuantPair
from layerbits.candidates.granularity import Overlay
from layerbits.config import Settings
from layerbits.errors import Unsupported, UserError
from layerbits.results.naming import AXES, run_name
from layerbits.results.result import SensitivityResult

if TYPE_CHECKING:
    from layerbits.inputs.models import LoadedModel
    from layerbits.stages.plan import Plan
    from layerbits.stages.run import Outcome


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


@dataclass(frozen=True)
class Log:
    """How a grid talks to the tracking store; all of it may be left out for a grid that only writes files.

    Attributes:
        find: Cell id → run id of a finished run, ``None`` where there is none.
        result: Logs a cell's result and returns its run id.
        cell: Records a cell without a result of its own (name, outcome, reason, parameters, run id of its alias).
    """

    find: Callable[[str], str | None]
    result: Callable[[Cell, SensitivityResult, Path], str]
    cell: Callable[[Cell, str, str, str], str]


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


def axis(value: Any, folder: Path, known_sizes: bool = False) -> list[str]:
    """Values of one axis: a list or a comma-separated text; ``all`` stands for every file of a config group.

    Raises:
        UserError: A value is not in the group.
    """
    names = [v.strip() for v in value.split(",")] if isinstance(value, str) else [str(v) for v in value]
    names = [n for n in names if n]
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


def cell_settings(composed: Mapping[str, Any], cell: Cell, configs: Path) -> dict[str, Any]:
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
    log: Log,
    root: Path,
    force: bool = False,
    progress: Callable[[int], None] = lambda _n: None,
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
    outcomes: dict[Cell, CellOutcome] = {}
    loaded: LoadedModel | None = None

    def done(outcome: CellOutcome) -> None:
        outcomes[outcome.cell] = outcome
        progress(1)

    for size in dict.fromkeys(c.dataset_size for c in wanted):
        sized = replace(settings, dataset=replace(settings.dataset, size=size))
        shared: dict[str, list[Cell]] = {}
        for job in _passes([c for c in wanted if c.dataset_size == size], sized, configs, log, force, done, shared):
            loaded = _run_pass(job, loaded, configs, log, root, done, shared)
    return [outcomes[c] for c in wanted]


def _passes(
    wanted: Sequence[Cell],
    settings: Settings,
    configs: Path,
    log: Log,
    force: bool,
    done: Callable[[CellOutcome], None],
    shared: dict[str, list[Cell]],
) -> Iterator[Plan]:
    """Plans of the cells of one size that are left to score; settles the others on the way."""
    from layerbits.stages.workbench import scored_together, workbench

    bench = workbench(settings)
    firsts: dict[tuple[str, tuple[str, ...]], tuple[Cell, Candidate, Capability]] = {}
    for cell in wanted:
        try:
            candidate = candidate_of(cell, settings, configs)
            check_target(candidate, settings.autoquant.effective_bits)
            capability = bench.check(candidate)
        except UserError as error:
            status = "unsupported" if isinstance(error, Unsupported) else "failed"
            done(CellOutcome(cell, status, str(error), log.cell(cell, status, str(error), "")))
            continue
        first, *_ = firsts.setdefault(
            (candidate.info.config_hash, bench.scored(candidate)), (cell, candidate, capability)
        )
        if first != cell:
            shared.setdefault(first.candidate, []).append(cell)
    groups: dict[tuple[str, ...], list[tuple[Candidate, Capability]]] = {}
    for (_, scored), (cell, candidate, capability) in firsts.items():
        found = None if force else log.find(bench.cell(candidate, capability))
        if found:
            done(CellOutcome(cell, "skipped", f"finished in run {found}", found))
            _settle_aliases(cell, found, shared, log, done)
        else:
            groups.setdefault(scored, []).append((candidate, capability))
    for candidates in groups.values():
        stock = settings.autoquant.engine == "stock"  # one candidate a call, that is what makes it the reference
        together = [c for c in candidates if not stock and scored_together(c[0])]
        alone = [[c] for c in candidates if c not in together]
        for part in [together, *alone] if together else alone:
            yield bench.plan(part)


def _run_pass(
    plan: Plan,
    loaded: LoadedModel | None,
    configs: Path,
    log: Log,
    root: Path,
    done: Callable[[CellOutcome], None],
    shared: dict[str, list[Cell]],
) -> LoadedModel | None:
    """Scores a plan and records each of its candidates; a failure is recorded for all of them."""
    from layerbits.stages.run import load_model, run
    from layerbits.stages.write import write

    mine = {
        c.info.name: Cell(c.info.quant_pair, c.info.granularity, plan.settings.dataset.size) for c, _ in plan.candidates
    }
    try:
        loaded = loaded or load_model(plan)
        found: list[Outcome] = run(plan, root, loaded)
    except Exception as error:  # the rest of the grid goes on
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        for cell in mine.values():
            done(CellOutcome(cell, "failed", reason, log.cell(cell, "failed", reason, "")))
            _settle_aliases(cell, "", shared, log, done)
        return None
    for outcome in found:
        cell = mine[outcome.result.candidate.name]
        result = replace(outcome.result, settings=cell_settings(outcome.result.settings, cell, configs))
        run_id = log.result(cell, result, write(replace(outcome, result=result), plan.settings))
        done(
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
        _settle_aliases(cell, run_id, shared, log, done)
    return loaded


def _settle_aliases(
    cell: Cell, run_id: str, shared: dict[str, list[Cell]], log: Log, done: Callable[[CellOutcome], None]
) -> None:
    for alias in shared.pop(cell.candidate, []):
        reason = f"same configuration as {cell.candidate}: the overlay changes nothing for this pair"
        done(CellOutcome(alias, "alias", reason, log.cell(alias, "skipped", reason, run_id)))


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


def _read(configs: Path, group: str, name: str) -> Mapping[str, Any]:
    file = configs / group / f"{name}.yaml"
    try:
        values: dict[str, Any] = yaml.safe_load(file.read_text("utf-8"))
        return values
    except FileNotFoundError:
        raise UserError(f"{group}={name} is not in {configs / group} any more; add {file.name} there") from None


def summary(outcomes: Sequence[CellOutcome]) -> Any:
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
