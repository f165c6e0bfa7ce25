"""What each memory mode would take of a run, and the command that runs it; no weights are loaded."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from layerbits.errors import Unsupported, UserError
from layerbits.plain import JsonObject
from layerbits.planning.table import Card, Seconds

if TYPE_CHECKING:
    from layerbits.candidates.candidate import Candidate
    from layerbits.candidates.capability import Capability
    from layerbits.planning.sample import Work
    from layerbits.scoring.memory import Needs
    from layerbits.scoring.quantizers import QuantizerSettings
    from layerbits.stages.plan import Plan

MODES = ("fast", "lean", "offload")


@dataclass(frozen=True)
class Row:
    """One memory mode.

    Attributes:
        mode: The mode.
        device_gb: Peak memory of the device. host_gb: Host memory for the weights.
        step_seconds: Seconds to score a batch. total_seconds: Of the pass: calibration and every batch.
        fits: Whether this machine has both, with a word why not; ``?`` where it has no GPU to ask.
    """

    mode: str
    device_gb: float
    host_gb: float
    step_seconds: float
    total_seconds: float
    fits: str


@dataclass(frozen=True)
class Forecast:
    """What ``layerbits plan`` prints.

    Attributes:
        model: Its name. model_gb: Its weights.
        candidates: How many are scored together. steps: Batches. tokens: Of the largest batch.
        how: Where the seconds come from, in words.
        rows: One a mode.
        best: The mode that ``memory=auto`` would take, ``""`` where none fits.
        command: The command that runs it.
        refused: Candidates that cannot run here, with the reason.
        refine: ``autoquant.refine``, whose time is not in the seconds; 0 = off.
    """

    model: str
    model_gb: float
    candidates: int
    steps: int
    tokens: int
    how: str
    rows: tuple[Row, ...]
    best: str
    command: str
    refused: tuple[str, ...]
    refine: int | str = 0


def forecast(overrides: Sequence[str], configs: Path) -> Forecast:
    """Plans a grid from a command line of configuration keys.

    Args:
        overrides: As ``experiments/grid.py`` takes them; ``quant_pair=…`` means this pair alone.
        configs: Folder of the config groups.

    Raises:
        UserError: Whatever can be known to fail before a model is loaded.
    """
    planned, refused = _planned(overrides, configs)
    spec = planned.settings.autoquant
    if spec.engine == "stock" or spec.method == "kl_div":
        raise Unsupported("plan knows one pass with method=gradient or fisher, not autoquant.engine=stock or kl_div")
    work, needs, settings = _work(planned)
    free, host = _free(planned)
    costs, how = _costs(work, needs, settings, free)
    calibration = planned.calibration
    calibrated = len(calibration.calib) if settings.need_calibration else 0
    rows = []
    for mode in MODES:
        if mode not in costs:
            continue
        seconds, device_gb = costs[mode]
        host_gb = needs.host_bytes / 1e9 if mode == "offload" else 0.0
        total = seconds.total(len(calibration.score), calibrated)
        rows.append(Row(mode, device_gb, host_gb, seconds.step, total, _fits(device_gb, host_gb, free, host)))
    best = next((r.mode for r in rows if r.fits == "yes"), "")
    return Forecast(
        model=planned.settings.model.name,
        model_gb=needs.model.whole / 1e9,
        candidates=len(planned.candidates),
        steps=len(calibration.score),
        tokens=sum(rows * length for rows, length in work.shapes),
        how=how,
        rows=tuple(rows),
        best=best,
        command=_command(overrides, best),
        refused=tuple(refused),
        refine=spec.refine,
    )


def in_words(prediction: Forecast) -> str:
    """A table with what is around it."""
    lines = [
        f"{prediction.model}: {prediction.model_gb:.1f} GB of weights, "
        f"{_counted(prediction.candidates, 'candidate')} in one pass, "
        f"{_counted(prediction.steps, 'step')} of up to {prediction.tokens} tokens",
        f"seconds: {prediction.how}",
        "",
        f"{'memory':8}  {'device GB':>9}  {'host GB':>8}  {'s a step':>9}  {'the pass':>10}  fits here",
    ]
    for row in prediction.rows:
        lines.append(
            f"{row.mode:8}  {_number(row.device_gb):>9}  {row.host_gb:8.1f}  {_number(row.step_seconds):>9}  "
            f"{_duration(row.total_seconds):>10}  {row.fits}"
        )
    if any(row.fits == "?" for row in prediction.rows):
        lines.append("?: there is no GPU here whose free memory could be compared; on the CPU: device=cpu")
    if prediction.refine:
        lines.append(
            f"not in these seconds: autoquant.refine={prediction.refine}, which measures groups after the pass (auto: "
            "at most a quarter of what method=kl_div takes)"
        )
    lines += ["", f"run it with: {prediction.command}"]
    lines += [f"refused: {line}" for line in prediction.refused]
    return "\n".join(lines)


def _counted(count: int, word: str) -> str:
    return f"{count} {word}{'' if count == 1 else 's'}"


def _planned(overrides: Sequence[str], configs: Path) -> tuple[Plan, list[str]]:
    from layerbits.candidates.candidate import check_target
    from layerbits.config import Settings
    from layerbits.grid import axis, candidate_of, cells
    from layerbits.stages.workbench import scored_together, workbench

    composed = _composed(overrides, configs)
    axes = {key: composed.pop(key) for key in ("quant_pairs", "quant_granularities", "dataset_sizes", "force")}
    settings = Settings.from_config(composed)
    sizes = axis(axes["dataset_sizes"], configs, known_sizes=True)
    wanted = cells(
        axis(axes["quant_pairs"], configs / "quant_pair"),
        axis(axes["quant_granularities"], configs / "quant_granularity"),
        sizes[-1:],  # passes over the sizes run one after the other
    )
    settings = replace(settings, dataset=replace(settings.dataset, size=sizes[-1]))
    bench = workbench(settings)
    checked: dict[str, tuple[Candidate, Capability]] = {}
    refused = []
    for cell in wanted:
        try:
            candidate = candidate_of(cell, settings, configs)
            check_target(candidate, settings.autoquant.effective_bits, settings.autoquant.vision_bits)
            if not scored_together(candidate):
                raise Unsupported("it needs ModelOpt's own calibration, one candidate a pass")
            checked.setdefault(candidate.info.config_hash, (candidate, bench.check(candidate)))
        except UserError as error:
            refused.append(f"{cell.candidate}: {error}")
    if not checked:
        raise UserError(f"no candidate can be planned ({refused[0]})")
    first = bench.scored(next(iter(checked.values()))[0])
    together = [pair for pair in checked.values() if bench.scored(pair[0]) == first]
    return bench.plan(together), refused


def _composed(overrides: Sequence[str], configs: Path) -> JsonObject:
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    from layerbits.entry import check_choices
    from layerbits.keys import composition_error
    from layerbits.overrides import LISTS, as_typed

    for override in overrides:
        if "=" not in override:
            raise UserError(f"{override} is no setting; give key=value, for instance model=qwen3_vl_4b_instruct")
    pairs = [(_SINGLE.get(key, key), value) for key, _, value in (o.partition("=") for o in overrides)]
    check_choices([f"{key}={value}" for key, value in pairs if key not in LISTS], configs)
    given = [as_typed(f"{key}={value}") for key, value in pairs]
    try:
        with initialize_config_dir(str(configs), version_base="1.3"):
            config = compose("grid", overrides=given)
            composed: JsonObject = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
            return composed
    except HydraException as error:
        raise composition_error(error, configs, "grid") from None


_SINGLE = {"quant_pair": "quant_pairs", "quant_granularity": "quant_granularities", "dataset.size": "dataset_sizes"}


def _work(planned: Plan) -> tuple[Work, Needs, QuantizerSettings]:
    from layerbits.inputs.patches import most_patches
    from layerbits.planning.sample import Work
    from layerbits.scoring.placement import needs_of
    from layerbits.scoring.quantizers import distinct_settings
    from layerbits.stages.run import runtime_configs

    configs = runtime_configs(planned)
    largest = max(planned.calibration.score, key=lambda b: sum(s.input_ids.numel() for s in b.segments))
    shapes = [(int(s.input_ids.shape[0]), int(s.input_ids.shape[1])) for s in largest.segments]
    spec = planned.settings.autoquant
    work = Work(planned.resolved, planned.scored, configs, shapes, spec.method, spec.draws, planned.device)
    tokens = max(rows * length for rows, length in shapes)
    settings = distinct_settings(list(configs.values()))
    patches = most_patches((s for b in planned.calibration.score for s in b.segments), planned.resolved.config)
    return work, needs_of(planned.resolved, planned.scored, tokens, settings, patches), settings


def _free(planned: Plan) -> tuple[float, float]:
    """Free memory of what computes (NaN where a GPU would and there is none) and of the host, in bytes."""
    import torch

    from layerbits.scoring.memory import free_bytes, free_host_bytes

    host = float(free_host_bytes())
    if planned.settings.device == "cpu":
        return host, host
    cards = [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if planned.device == "cuda" else []
    return max((float(free_bytes(card)) for card in cards), default=math.nan), host


def _costs(
    work: Work, needs: Needs, settings: QuantizerSettings, free: float
) -> tuple[dict[str, tuple[Seconds, float]], str]:
    """Mode → seconds and GB of the device; and how they were found."""
    from layerbits.planning.sample import estimate
    from layerbits.scoring.memory import choose

    modes = [m for m in MODES if m != "offload" or needs.model.block]
    if math.isnan(free):
        card = Card.read()
        how = f"from a table, for {card.name} (no GPU here; device=cpu measures this CPU)"
        return {mode: _from_table(mode, work, needs, settings, card) for mode in modes}, how
    costs = {}
    for mode in modes:
        memory = choose(needs, free, mode)
        try:
            cost = estimate(work, memory)
            seconds, measured = Seconds(cost.seconds, cost.calibrate_seconds, 0.0), cost.device_gb
        except UserError:
            seconds, measured = Seconds(math.nan, math.nan, math.nan), math.nan
        costs[mode] = (seconds, measured if math.isfinite(measured) else memory.estimate_gb)
    where = "GPU" if work.device == "cuda" else "CPU"
    return costs, f"measured on this {where} with a few blocks of the same shape and random weights"


def _from_table(mode: str, work: Work, needs: Needs, settings: QuantizerSettings, card: Card) -> tuple[Seconds, float]:
    from layerbits.scoring.memory import choose

    memory = choose(needs, card.memory_gb * 1e9, mode)
    tokens = sum(rows * length for rows, length in work.shapes)
    seconds = card.seconds(needs, memory, tokens, len(work.configs), len(settings.weights))
    draws = work.draws if work.method == "fisher" else 1
    return replace(seconds, step=seconds.step * draws), memory.estimate_gb


def _fits(device_gb: float, host_gb: float, free: float, host: float) -> str:
    from layerbits.scoring.memory import HEADROOM

    if host_gb * 1e9 > host:
        return f"no: {host / 1e9:.0f} GB of host memory are free"
    if math.isnan(free):
        return "?"
    if device_gb * 1e9 > HEADROOM * free:
        return f"no: {free / 1e9:.0f} GB of GPU memory are free"
    return "yes"


def _command(overrides: Sequence[str], best: str) -> str:
    own = ("model", "quant_pairs", "quant_granularities", "dataset", "dataset_sizes", "seed", "fp4", "force")
    parts, rest = ["mlflow run . --env-manager local --experiment-name layerbits -e grid"], []
    for override in overrides:
        key, _, value = override.partition("=")
        key = _SINGLE.get(key, key)
        if key in own:
            parts.append(f"-P {key}={shlex.quote(value)}")
        else:
            rest.append(override)
    if best and not any(r.startswith("autoquant.memory=") for r in rest):
        rest.append(f"autoquant.memory={best}")
    if rest:
        parts.append(f"-P overrides={shlex.quote(shlex.join(rest))}")
    return " ".join(parts)


def _number(value: float) -> str:
    return "?" if math.isnan(value) else f"{value:.3g}" if value < 10 else f"{value:.1f}"


def _duration(seconds: float) -> str:
    if math.isnan(seconds):
        return "?"
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
