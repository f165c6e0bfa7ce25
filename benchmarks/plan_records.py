"""What ``layerbits plan`` predicts of passes that were measured: memory by its formula, seconds by its table.

    python benchmarks/plan_records.py            # a table of deviations, no GPU needed
    python benchmarks/plan_records.py --write    # fits the table (src/layerbits/data/step_costs.json) anew

Records of one-pass runs with known shape, candidates and tokens are in ``results/``. The seconds are fitted to those
marked so, by non-negative least squares of relative errors; the others are held against the fit.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from cost import PAIRS, grid_model, least_squares
from one_pass import SIX, TWELVE, configs
from shapes import SHAPES, class_name

from layerbits.inputs.loading import empty_model
from layerbits.inputs.model_spec import ModelSpec
from layerbits.inputs.models import ResolvedModel, scored_linears
from layerbits.planning.table import Card, calibration_work, step_work
from layerbits.scoring.memory import LOGIT, LossBytes, MemoryPlan, Needs, choose
from layerbits.scoring.placement import needs_of
from layerbits.scoring.quantizers import distinct_settings

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
GRID, CARD_BOUND, SAMPLE_STEPS = "2026-11-29-cost-h200.json", 4096, 3
"""Record of ``cost.py``; tokens from which on the card takes longer than the host; calibration batches of a sample."""
ROOM = 149e9
"""What was free on its card, bytes."""
TABLE = ROOT / "src" / "layerbits" / "data" / "step_costs.json"
FIRST, THEN = 14, 16
"""Bytes per logit at the peak of the loss in the code of the records: until 2026-11-21 before ``fisher``, and after it;
the loss now lets its float32 logits go first (:data:`layerbits.scoring.memory.LOGIT`)."""


@dataclass(frozen=True)
class Point:
    """A measured pass.

    Attributes:
        file: Its record, without date and ending. key: Its row there. mode: Memory mode.
        pairs: Candidates. logit: Bytes per logit of its code.
        cards: GPUs that shared the steps. draws: Of ``fisher``.
        fitted: Whether the table's seconds are fitted to it.
    """

    file: str
    key: str
    mode: str
    pairs: tuple[str, ...] = SIX
    logit: int = THEN
    cards: int = 1
    draws: int = 1
    fitted: bool = False


POINTS = (
    Point("21-one-pass-h200", "fast_six", "fast", logit=FIRST),
    Point("21-one-pass-h200", "fast_twelve", "fast", TWELVE, FIRST),
    Point("21-one-pass-h200", "lean_six", "lean", logit=FIRST),
    Point("21-one-pass-h200", "fast_single", "fast", ("wint8_afp16",), FIRST),
    Point("21-fisher-h200", "fisher_4_six_0", "fast", draws=4),
    Point("25-one-pass-h100", "fast_six", "fast"),
    Point("25-one-pass-h100", "fast_twelve", "fast", TWELVE),
    Point("25-one-pass-before-h100", "fast_six", "fast"),
    Point("25-one-pass-h100-x2", "fast_six", "fast", cards=2),
    Point("25-one-pass-h100-x2", "fast_twelve", "fast", TWELVE, cards=2),
    Point("25-offload-8b-h100", "lean", "lean"),
    Point("25-offload-8b-h100", "offload", "offload"),
    Point("25-offload-32b-h100", "lean", "lean"),
    Point("25-offload-32b-h100", "offload", "offload"),
    Point("25-experts-h100", "one_six", "fast"),
    Point("25-experts-h100-x1-of-2", "one_six", "fast"),
    Point("25-experts-h100-x2", "one_six", "fast", cards=2),
    Point("25-experts-order-h100", "one_six", "fast"),
    Point("29-one-pass-h200", "fast_six", "fast", logit=LOGIT, fitted=True),
    Point("29-one-pass-h200", "fast_twelve", "fast", TWELVE, LOGIT, fitted=True),
    Point("29-one-pass-h200", "lean_six", "lean", logit=LOGIT, fitted=True),
    Point("29-one-pass-floor-h200", "fast_six", "fast", logit=LOGIT),
    Point("29-experts-h200", "one_six", "fast", logit=LOGIT, fitted=True),
    Point("29-experts-80gb-h200", "one_six", "fast", logit=LOGIT, fitted=True),
)


@dataclass(frozen=True)
class Held:
    """A measured pass beside what is predicted of it.

    Attributes:
        point: The pass. card: Its GPU.
        gb: Measured peak. told_gb: By the formula, for the bytes per logit of its code.
        seconds: Measured, calibration and scoring. told_seconds: By the table; NaN for a card that it does not have.
    """

    point: Point
    card: str
    gb: float
    told_gb: float
    seconds: float
    told_seconds: float


@dataclass(frozen=True)
class Measured:
    """A point with the numbers of its record."""

    point: Point
    record: dict[str, Any]

    @classmethod
    def of(cls, point: Point) -> Measured:
        """Reads its record."""
        made = cls(point, {})
        return replace(made, record=json.loads((RESULTS / made.file).read_text()))

    @property
    def file(self) -> str:
        """Name of its record."""
        return f"2026-11-{self.point.file}.json"

    @property
    def row(self) -> dict[str, float]:
        """Its numbers."""
        found: dict[str, float] = self.record[self.point.key]
        return found

    @property
    def card(self) -> str:
        """Name of its GPU."""
        return str(self.record["provenance"]["gpu.name"])

    @property
    def steps(self) -> float:
        """Batches that one GPU scored."""
        return float(self.record["arguments"]["steps"]) / self.point.cards

    @property
    def tokens(self) -> int:
        """Tokens of a batch."""
        return int(self.record["arguments"]["rows"]) * int(self.record["arguments"]["length"])

    @property
    def settings(self) -> int:
        """Distinct weight quantizers."""
        return len(_settings(self.point.pairs).weights)

    @property
    def needs(self) -> Needs:
        """What the pass takes by the formula."""
        return _needs(self.record["arguments"]["shape"], self.tokens, self.point.pairs)

    @property
    def memory(self) -> MemoryPlan:
        """How it was run: copies of linears as they fit, of experts none, logits in pieces where its record says so."""
        mode, share = self.point.mode, self.point.logit / LOGIT
        loss = self.needs.loss
        needs = replace(self.needs, loss=LossBytes(int(loss.whole * share), int(loss.piece * share)))
        made = choose(needs, self.row["free_gb"] * 1e9, mode)
        least = self.row.get(f"{mode}_estimate_gb")
        pieces = self.row.get("estimate_gb") == least
        told = needs.device_bytes(mode, made.keep_weights, whole=not pieces)
        return replace(made, pieces=pieces, keep_experts=False, estimate_gb=told / 1e9)

    def told_seconds(self, card: Card) -> float:
        """Of calibration and scoring."""
        found = card.seconds(self.needs, self.memory, self.tokens, len(self.point.pairs), self.settings)
        calibrated = self.steps if _settings(self.point.pairs).need_calibration else 0
        return replace(found, step=found.step * self.point.draws).total(self.steps, calibrated)


@cache
def _settings(pairs: tuple[str, ...]) -> Any:
    return distinct_settings(list(configs(pairs, "cuda").values()))


@cache
def _needs(shape: str, tokens: int, pairs: tuple[str, ...]) -> Needs:
    config = SHAPES[shape]()
    config.architectures = [class_name(config)]
    resolved = ResolvedModel(
        ModelSpec(shape, shape, dtype="bfloat16", random_weights=True), shape, "0", config, torch.bfloat16
    )
    model = empty_model(resolved)
    head = model.get_output_embeddings()
    scored = [n for n in scored_linears(model, resolved.spec) if model.get_submodule(n) is not head]
    return needs_of(resolved, scored, tokens, _settings(pairs))


@cache
def _grid_needs(blocks: int, tokens: int, pairs: tuple[str, ...]) -> Needs:
    resolved = grid_model(blocks)
    names = [n for n in scored_linears(empty_model(resolved), resolved.spec) if n != "lm_head"]
    return needs_of(resolved, names, tokens, _settings(pairs))


def held(card: Card, points: tuple[Point, ...] = POINTS) -> list[Held]:
    """Measured passes beside what is predicted of them.

    Args:
        card: The table.
        points: The passes.
    """
    found = []
    for measured in map(Measured.of, points):
        row = measured.row
        found.append(
            Held(
                measured.point,
                measured.card,
                row["peak_gb"],
                measured.memory.estimate_gb,
                row["seconds_calibrate"] + row["seconds_score"],
                measured.told_seconds(card) if measured.card == card.name else float("nan"),
            )
        )
    return found


@dataclass(frozen=True)
class GridPoint:
    """A point of ``cost.py``, of which seconds of a step are known.

    Attributes:
        row: Its numbers. needs: By the formula. memory: How it was run. settings: Distinct weight quantizers.
    """

    row: dict[str, Any]
    needs: Needs
    memory: MemoryPlan
    settings: int

    @classmethod
    def of(cls, row: dict[str, Any]) -> GridPoint:
        """With the needs of its model."""
        pairs = PAIRS[: row["candidates"]]
        needs = _grid_needs(row["blocks"], row["tokens"], pairs)
        memory = replace(choose(needs, ROOM, row["mode"]), keep_weights=row["keep_weights"])
        return cls(row, needs, memory, len(_settings(pairs).weights))

    @property
    def card_bound(self) -> bool:
        """Whether the card is what takes the time, not the host that launches its kernels."""
        return bool(self.row["tokens"] >= CARD_BOUND)

    @property
    def step_work(self) -> tuple[float, ...]:
        """Kinds of work of a step."""
        return step_work(self.needs, self.memory, self.row["tokens"], self.row["candidates"], self.settings)

    def told_seconds(self, card: Card) -> float:
        """Of a step."""
        found = card.seconds(self.needs, self.memory, self.row["tokens"], self.row["candidates"], self.settings)
        return found.step


def grid() -> list[GridPoint]:
    """The points of the grid."""
    return [GridPoint.of(row) for row in json.loads((RESULTS / GRID).read_text())["points"]]


def fitted(points: tuple[Point, ...] = POINTS, points_of_grid: Sequence[GridPoint] | None = None) -> Card:
    """The table's row from the points that are marked for it and the grid; copies as fast as the slowest record."""
    used = [Measured.of(p) for p in points if p.fitted]
    step, calibrate = [], []
    points_of_grid = grid() if points_of_grid is None else points_of_grid
    for g in (g for g in points_of_grid if g.card_bound):
        step.append((*g.step_work, g.row["seconds"]))
        once = g.needs.weights.count / SAMPLE_STEPS
        calibrate.append((*calibration_work(g.needs, g.row["tokens"]), once, g.row["calibrate_seconds"]))
    for m in used:
        work = step_work(m.needs, m.memory, m.tokens, len(m.point.pairs), m.settings)
        step.append((*(kind * m.steps for kind in work), m.row["seconds_score"]))
        ranges = (*(kind * m.steps for kind in calibration_work(m.needs, m.tokens)), m.needs.weights.count)
        calibrate.append((*ranges, m.row["seconds_calibrate"]))
    records = [m.record for m in map(Measured.of, points)]
    copies = [r["into_host_memory"]["copy_gb_s"] for r in records if "into_host_memory" in r]
    *calibrated, once = least_squares(calibrate)
    return Card(
        name=used[0].card,
        memory_gb=round(max(m.row["free_gb"] for m in used), 1),
        copy_gb_per_second=round(min(copies), 1),
        step=tuple(least_squares(step)),
        launch=(_launch(points_of_grid, "fast"), _launch(points_of_grid, "lean")),
        calibrate=tuple(calibrated),
        once=once,
        records=tuple(f"benchmarks/results/{name}" for name in sorted({GRID, *(m.file for m in used)})),
    )


def _launch(points: list[GridPoint], mode: str) -> float:
    """The least that the host took for a block."""
    seconds = [g.row["seconds"] / g.row["blocks"] for g in points if g.row["mode"] == mode and not g.card_bound]
    return float(f"{min(seconds):.4g}")


def main() -> None:
    """Prints the table of deviations as Markdown; with ``--write`` fits first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        TABLE.write_text(json.dumps(asdict(fitted()), indent=1) + "\n")
    card = Card.read()
    columns = ("record", "row", "peak GB", "predicted", "off", "seconds", "predicted", "off", "")
    print("| " + " | ".join(columns) + " |\n|---|---|---:|---:|---:|---:|---:|---:|---|")
    for h in held(card):
        told = h.told_seconds
        time = f"{told:.2f} | {told / h.seconds - 1:+.0%}" if told == told else "– | –"
        memory = f"{h.gb:.1f} | {h.told_gb:.1f} | {h.told_gb / h.gb - 1:+.1%}"
        used = "fitted" if h.point.fitted else ""
        print(f"| 11-{h.point.file} | `{h.point.key}` | {memory} | {h.seconds:.2f} | {time} | {used} |")
    columns = ("blocks", "candidates", "tokens", "mode", "seconds a step", "predicted", "off")
    print("\n| " + " | ".join(columns) + " |\n|---:|---:|---:|---|---:|---:|---:|")
    for g in grid():
        row, told = g.row, g.told_seconds(card)
        point = f"{row['blocks']} | {row['candidates']} | {row['tokens']} | `{row['mode']}`"
        print(f"| {point} | {row['seconds']:.3f} | {told:.3f} | {told / row['seconds'] - 1:+.0%} |")


if __name__ == "__main__":
    main()
