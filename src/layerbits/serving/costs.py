"""Measures a table of costs: vLLM's own linears on this card, of every shape of a model in every layout of a run.

vLLM loads blocks of the model with random weights, once for each layout, and so chooses its own kernels.
"""

from __future__ import annotations

import math
import shutil
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from layerbits.checkpoint.config_file import FILE
from layerbits.checkpoint.label import FORMATS, Label
from layerbits.checkpoint.labels import label_or_reason
from layerbits.checkpoint.runtimes import reads
from layerbits.checkpoint.sizes import scored_model
from layerbits.checkpoint.times import Shape, as_fused, fits, group_shapes
from layerbits.errors import UserError
from layerbits.inputs.files import read_json
from layerbits.inputs.models import ResolvedModel
from layerbits.plain import JsonObject
from layerbits.schemes.cost_table import (
    DECODE,
    PLAIN,
    PREFILL,
    CostTable,
    Layout,
    LinearTime,
    Refused,
    Step,
    StepTime,
)
from layerbits.schemes.source import Source
from layerbits.serving import server
from layerbits.serving.server import Launch
from layerbits.serving.settings import CostRequest, SpeedRequest
from layerbits.serving.speed import Speed, TooSlow, measure_speed, run_worker
from layerbits.serving.stand_in import block_count, has_pictures, positions, small_files, write_stand_in

_CACHE = 1 << 28
"""Bytes that the weights of one shape have together at least: more than the caches of cards."""

_GRAPH_TOKENS = 512
"""Up to which vLLM runs steps as CUDA graphs by default."""

_KV_BYTES = 1 << 28
_WARMUP = 3
_CONTEXT = 512
_NEW_TOKENS = 32

_STEADY = 0.03
"""How far apart the medians of one step may be, measured before all linears and after them."""

Steps = list[tuple[Step, Sequence[float]]]
"""Steps and their seconds, one per repeat."""


@dataclass(frozen=True)
class _Model:
    """What is measured of a model.

    Attributes:
        groups: Modules of each group that a step runs, and their shapes.
        layouts: Of the run's candidates, those that vLLM reads.
        blocks: Of the decoder, all of them.
        needed: Blocks that have every shape.
    """

    resolved: ResolvedModel
    dtype: str
    groups: tuple[tuple[tuple[str, ...], tuple[Shape, ...]], ...]
    layouts: Mapping[Layout, Label]
    blocks: int
    needed: int
    positions: int | None

    @classmethod
    def of(cls, source: Source) -> _Model:
        resolved, _, linears = scored_model(source, "layerbits costs")
        shapes = group_shapes(source.groups, linears)
        first: dict[tuple[Shape, ...], int] = {}
        for group, mine in zip(source.groups, shapes, strict=True):
            if mine:
                first.setdefault(mine, group.block or 0)
        layouts = {}
        for info in source.candidates:
            for format in FORMATS:
                label, _ = label_or_reason(info, format)
                if label is not None and reads(label):
                    layouts[(format, label.algo)] = label
        dtype = str(resolved.dtype).removeprefix("torch.")
        config = read_json(small_files(resolved) / FILE)
        return cls(
            resolved,
            "bfloat16" if dtype == "float32" else dtype,
            tuple((group.modules, mine) for group, mine in zip(source.groups, shapes, strict=True) if mine),
            layouts,
            block_count(config),
            1 + max(first.values()),
            positions(config),
        )

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Of single linears, and of those of each group as one."""
        every: dict[Shape, None] = {}
        for _, mine in self.groups:
            every |= dict.fromkeys(mine)
            every[(sum(rows for rows, _ in mine), mine[0][1])] = None
        return tuple(every)

    def measured_blocks(self, on_cpu: bool) -> int:
        """Blocks that are loaded: so many that the weights of the smallest linear do not fit into a card's cache."""
        if on_cpu:
            return self.needed
        smallest = min(rows * columns for _, mine in self.groups for rows, columns in mine) / 2
        return min(self.blocks, self.needed * math.ceil(_CACHE / smallest))

    def fitting(self, label: Label) -> list[tuple[str, ...]]:
        """The groups that a layout stores."""
        return [modules for modules, mine in self.groups if all(fits(label, shape) for shape in mine)]


def measure_costs(source: Source, asked: CostRequest, launch: Launch, work: Path) -> CostTable:
    """Measures.

    Args:
        source: Groups and candidates of the runs.
        asked: What to time.
        launch: The environment with vLLM, and further arguments.
        work: Folder for the models that stand in, the answers and vLLM's logs; removed when all is measured.

    Raises:
        UserError: The model cannot be found, has routed experts, or vLLM does not run it even unquantized.
    """
    model = _Model.of(source)
    longest = max(asked.prefill, default=_CONTEXT) + _NEW_TOKENS + 1
    if model.positions is not None and longest > model.positions:
        raise UserError(
            f"prompts of {longest - _NEW_TOKENS - 1} tokens and {_NEW_TOKENS} new ones need {longest} positions, and "
            f"the model has {model.positions}; choose a shorter prefill"
        )
    launch = replace(launch, dtype=model.dtype)
    blocks = model.measured_blocks(launch.environment.on_cpu)
    try:
        device, linears = _linears(model, PLAIN, None, blocks, asked, launch, work)
        counts = _counts(model, {(row.rows, row.columns) for row in linears})
        whole = write_stand_in(work / "whole", model.resolved, model.dtype, model.blocks)
        without = replace(launch, arguments=(*without_weights(model.resolved), *launch.arguments))
        steps = time_steps(whole, asked, without, work)
    except server.Refused as words:
        raise UserError(f"vLLM does not run the unquantized model: {words}; its log is in {work}") from None
    refused = []
    for layout, label in model.layouts.items():
        try:
            linears += _linears(model, layout, label, blocks, asked, launch, work)[1]
        except (server.Refused, TooSlow) as error:  # what was measured of the others is worth more than this one
            slow = f"it was not timed within {launch.seconds:.0f} s (vllm.seconds)"
            reason = slow if isinstance(error, TooSlow) else str(error)
            print(f"vLLM does not run {' '.join(layout)}: {reason}", flush=True)
            refused.append(Refused(*layout, reason))
    try:
        steps = pooled(steps, time_steps(whole, asked, without, work))
    except (server.Refused, UserError) as words:  # what was measured is worth more than a second look
        print(
            f"warning: the unquantized model was timed before the linears alone: {words}", file=sys.stderr, flush=True
        )
    shutil.rmtree(work)
    table = CostTable(
        device=device,
        package=launch.environment.package,
        version=launch.environment.version,
        dtype=model.dtype,
        model=source.model.name,
        revision=source.model.revision,
        context=max(asked.prefill, default=_CONTEXT),
        shapes=tuple((*shape, count) for shape, count in counts.items()),
        linears=tuple(linears),
        steps=(),
        refused=tuple(refused),
    )
    return replace(table, steps=tuple(_with_remainder(table, step, seconds) for step, seconds in steps))


def pooled(before: Steps, after: Steps) -> Steps:
    """Steps of two processes as one; warns where their medians differ by more than 3%.

    Args:
        before: Measured before the linears.
        after: The same steps, measured after them.
    """
    made: Steps = []
    for (step, first), (_, second) in zip(before, after, strict=True):
        one, two = statistics.median(first), statistics.median(second)
        if abs(one - two) > _STEADY * min(one, two):
            print(
                f"warning: {step.name} of the unquantized model took {1000 * one:.4g} ms before the linears and "
                f"{1000 * two:.4g} ms after them, so predicted steps are as far off: measure on a machine that does "
                "nothing else",
                file=sys.stderr,
                flush=True,
            )
        made.append((step, (*first, *second)))
    return made


def in_words(table: CostTable) -> str:
    """The table as Markdown: steps, and milliseconds of each linear with their range."""
    lines = [
        f"Times of {table.model} on {table.where}, {table.dtype}; medians and ranges.",
        "",
        "| step, unquantized | ms | of that not its linears |",
        "|---|---:|---:|",
        *(f"| {one.step} | {_ms(one.median, one.low, one.high)} | {1000 * one.remainder:.4g} |" for one in table.steps),
        "",
        "| linear | layout | kernel | tokens | ms |",
        "|---|---|---|---:|---:|",
    ]
    for row in table.linears:
        layout = " ".join(filter(None, (row.format, row.label)))
        times = _ms(row.median, row.low, row.high)
        lines.append(f"| {row.rows} x {row.columns} | {layout} | {row.kernel} | {row.tokens} | {times} |")
    words = [f"- vLLM does not run {one.format} {one.label}: {one.words}" for one in table.refused]
    return "\n".join([*lines, *(["", *words] if words else [])]) + "\n"


def _ms(median: float, low: float, high: float) -> str:
    return f"{1000 * median:.4g} ({1000 * low:.4g} to {1000 * high:.4g})"


def _linears(
    model: _Model, layout: Layout, label: Label | None, blocks: int, asked: CostRequest, launch: Launch, work: Path
) -> tuple[str, list[LinearTime]]:
    """The card, and the times of all shapes in one layout.

    Raises:
        Refused: vLLM does not load it, or leaves all of it unquantized; in its words.
    """
    name = "-".join(filter(None, layout))
    labels = {} if label is None else {module: label for modules in model.fitting(label) for module in modules}
    if label is not None and not labels:
        return "", []
    folder = write_stand_in(work / name, model.resolved, model.dtype, blocks, labels)
    longest = max(128, *asked.tokens)
    arguments = [
        *("--model", str(folder), "--dtype", model.dtype, "--enforce-eager", "--max-num-seqs", "1"),
        *("--max-model-len", "128", "--max-num-batched-tokens", str(longest)),
        *([] if launch.environment.on_cpu else ["--kv-cache-memory-bytes", str(_KV_BYTES)]),
        *without_weights(model.resolved),
        *launch.arguments,
    ]
    data = {
        "arguments": arguments,
        "shapes": model.shapes,
        "tokens": asked.tokens,
        "graph_tokens": _GRAPH_TOKENS,
        "warmup": _WARMUP,
        "repeats": asked.repeats,
    }
    answer = run_worker(launch, data, name, work)
    rows = [_row(row, layout) for row in answer["linears"] if row["quantized"] == (label is not None)]
    if not rows:
        raise server.Refused("it loads, and has no linear of the model's shapes in this layout")
    return str(answer["device"]), rows


def _row(row: JsonObject, layout: Layout) -> LinearTime:
    seconds = row["seconds"]
    times = (statistics.median(seconds), min(seconds), max(seconds))
    return LinearTime(row["rows"], row["columns"], *layout, row["kernel"], row["tokens"], *times, row["graph"])


def time_steps(folder: Path, asked: CostRequest, launch: Launch, work: Path) -> Steps:
    """Seconds of the steps of a whole model; decode steps follow the longest prompt.

    Args:
        folder: What vLLM loads.
        asked: Which steps.
        launch: The environment, and arguments of the engine.
        work: Folder for answers and vLLM's logs.

    Raises:
        Refused: vLLM ended; in its own words.
        UserError: It was not done in ``launch.seconds``, or other work left a step no time.
    """
    repeats = max(3, asked.repeats // 5)
    steps: Steps = []
    longest = max(asked.prefill, default=_CONTEXT)
    for length in sorted({*asked.prefill, longest}):
        decoding = asked.batches if length == longest else ()
        batches = tuple(sorted({1, *decoding})) if length in asked.prefill else decoding
        request = SpeedRequest(batches, length, _NEW_TOKENS if decoding else 1, repeats)
        speed = measure_speed(launch, folder, f"{folder.name} after {length} tokens", request, work)
        if decoding and speed.disturbance:
            print(f"warning: {speed.disturbance}", file=sys.stderr, flush=True)
        steps += _of_speed(speed, length in asked.prefill, decoding)
    return steps


def _of_speed(speed: Speed, prefill: bool, decoding: Sequence[int]) -> Steps:
    steps: Steps = []
    for timing in speed.timings:
        if prefill and timing.batch == 1:
            steps.append((Step(PREFILL, speed.prompt_tokens), timing.prefill))
        if timing.batch in decoding:
            if math.isnan(timing.decode_ms):
                raise UserError(
                    f"a decode step at batch {timing.batch} took no time that can be told: other work ran beside it; "
                    "measure it again on an idle machine"
                )
            steps.append((Step(DECODE, timing.batch), timing.decode))
    return steps


def _with_remainder(table: CostTable, step: Step, seconds: Sequence[float]) -> StepTime:
    median = statistics.median(seconds)
    linears = sum(count * table.seconds(shape, PLAIN, step.tokens) for shape, count in table.counts.items())
    return StepTime(step.name, median, min(seconds), max(seconds), median - linears)


def _counts(model: _Model, known: set[Shape]) -> Counter[Shape]:
    """How many linears of each shape a step runs, as vLLM fuses them.

    Raises:
        UserError: vLLM has no such linear.
    """
    counts: Counter[Shape] = Counter()
    for modules, mine in model.groups:
        found = as_fused(mine, known)
        if found is None:
            raise UserError(
                f"vLLM has no linear of {', '.join(modules)} alone, so its time is not known; score the model without "
                f"it (model.exclude=[{modules[0]}], or model.lm_head=false for the output head)"
            )
        counts.update(found)
    return counts


def without_weights(resolved: ResolvedModel) -> tuple[str, ...]:
    """Arguments of an engine on a folder without weights."""
    pictures = ("--language-model-only",) if has_pictures(read_json(small_files(resolved) / FILE)) else ()
    trust = ("--trust-remote-code",) if resolved.spec.trust_remote_code else ()
    return ("--load-format", "dummy", "--skip-tokenizer-init", *pictures, *trust)
