"""Validates a run: measures what its scores predict, on rows that they have not seen."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from layerbits.atomic import dated, optional_part, whole_folder, write_json
from layerbits.errors import UserError
from layerbits.results.result import VISION_KINDS, FloatArray, SensitivityResult
from layerbits.stages.run import load_model, scoring_job
from layerbits.trust.agreement import Captions
from layerbits.trust.kv_cache import wanted_scores
from layerbits.trust.reproduce import plan_of_run
from layerbits.trust.settings import ValidateSettings
from layerbits.trust.validation import ABOVE_FLOOR, HeldOut, Prediction, Validation, markdown

if TYPE_CHECKING:
    from layerbits.scoring.job import ScoringJob
    from layerbits.scoring.replaced import ReplacedLinears
    from layerbits.scoring.search import Search


def validate(
    reference: str, result: SensitivityResult, settings: ValidateSettings, configs: Path, root: Path
) -> Validation:
    """Measures the groups of a run one by one, and compares.

    Args:
        reference: Run id or path, for the record.
        result: The run's result, of one candidate.
        settings: How to.
        configs: Folder of the config groups.
        root: Project folder, for the git commit.

    Raises:
        UserError: As :func:`layerbits.trust.reproduce.plan_of_run`; or there are too few held-out captions, the model's
            groups differ, or float32 does not fit.
    """
    from layerbits.probing.probe import held_out_rows
    from layerbits.provenance import provenance
    from layerbits.scoring.precision import computing, plan_precision
    from layerbits.scoring.search import Search
    from layerbits.trust.measure import kv_caches, measure_damage, measure_kv
    from layerbits.trust.rankers import IN_NATS, OF_TOWERS, rank

    priced = wanted_scores(reference, result.kv_cache, settings.kv_cache)
    planned = plan_of_run(reference, result, settings.device, configs)
    data, seq_len = planned.settings.dataset, planned.settings.autoquant.seq_len
    held_out = planned.captions.held_out
    both = held_out_rows(
        held_out, planned.tokenizer, data.packing, seq_len, settings.batch_size, settings.rows, planned.reader
    )
    batches = [b for b in both if any(s.pictures for s in b.segments)] or list(both)
    plain = [b for b in both if b not in batches]
    clock = time.perf_counter
    start = clock()
    loaded = load_model(planned)
    seconds = {"load": clock() - start}
    job = scoring_job(planned, loaded, Path())
    search = Search.of(job)
    if [g.key for g in search.groups] != [g.key for g in result.groups]:
        raise UserError(f"the groups of {reference} are not those of this model; score it again")

    model = loaded.model
    precision = plan_precision(model, max(s.input_ids.numel() for b in batches for s in b.segments), settings.dtype)
    print(f"measuring in {precision.words}", flush=True)
    start = clock()
    linears = calibrated_linears(job, search)
    linears.fix_dtypes()
    caches = kv_caches(model, priced, loaded.info.language_model, job.calibration.calib)
    seconds["calibrate"] = clock() - start
    with computing(model, precision):
        start = clock()
        damage = measure_damage(model, linears, search, batches, settings.disable_one)
        on_text = measure_damage(model, linears, search, plain, False).alone if plain else None
        seconds["measure"] = clock() - start
        start = clock()
        kv = measure_kv(model, caches, priced, batches, ABOVE_FLOOR * float(damage.floor.max()))
        seconds["kv_cache"] = clock() - start

    measured = 0 if result.measured_se is None else int(np.isfinite(result.measured_se).sum())
    how = f"{result.method}, {measured} groups measured" if measured else result.method
    own = Prediction(how, result.predicted_kl, True, _captions(result), math.nan)
    rankers = settings.rankers
    if any(group.kind in VISION_KINDS for group in search.groups):
        rankers = tuple(name for name in rankers if name in OF_TOWERS)
        if less := [name for name in settings.rankers if name not in rankers]:
            print(f"{', '.join(less)} cannot score a vision tower and are left out", flush=True)
    rankings = [rank(name, job, linears, search) for name in rankers]
    seconds["rank"] = sum(r.seconds for r in rankings)
    again = next((r.predicted for r in rankings if r.name == result.method), None) if measured == 0 else None
    return Validation(
        source_run_id=reference,
        model=loaded.info,
        candidate=result.candidate.name,
        config_hash=result.candidate.config_hash,
        groups=search.groups,
        data=HeldOut(data.name, data.packing, seq_len, sum(b.rows for b in batches)),
        predictions=(
            replace(own, name=f"this run ({own.name})"),
            *(Prediction(r.name, r.predicted, r.name in IN_NATS, r.samples, r.seconds) for r in rankings),
        ),
        measured=damage.alone,
        loss_change=damage.loss_change,
        all_but=None if damage.all_but is None else damage.all_but.mean,
        together=damage.together_mean,
        floor=damage.floor,
        repeated=math.nan if again is None else _largest_difference(again, result.predicted_kl),
        seconds=seconds,
        provenance=provenance(root),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        kv=kv,
        dtype=precision.dtype,
        memory={"measure_estimate_gb": precision.estimate_gb, "measure_free_gb": precision.free_gb},
        on_text=on_text,
    )


def write_validation(result: Validation, root: Path) -> Path:
    """Writes ``validation.json``, ``.md``, ``.csv`` and the scatter plot into a folder of its own, whole or not at all.

    Raises:
        UserError: The disk is full or cannot be written.
    """
    final = dated(root, f"validation_{result.model.name}_{result.candidate}")
    with whole_folder(final) as partial:
        write_json(partial / "validation.json", result.to_json())
        with optional_part("validation.md"):
            (partial / "validation.md").write_text(markdown(result), "utf-8")
        pd.concat([result.frame(), *(one.frame() for one in result.kv)]).to_csv(partial / "validation.csv", index=False)
        with optional_part("figures/validation.png"):
            _draw(result, partial / "figures" / "validation.png")
    return final


def _draw(result: Validation, path: Path) -> None:
    """The scatter plot, where any group is on it."""
    from layerbits.figures import scatter_agreement
    from layerbits.figures.style import save_png

    frame = result.frame()
    counted = frame[frame["status"] == "ok"]
    if not ((counted["predicted_kl"] > 0) & (counted["measured_kl"] > 0)).any():
        return
    drawn = scatter_agreement(
        counted["predicted_kl"].to_numpy(),
        counted["measured_kl"].to_numpy(),
        names=counted["layer"].tolist(),
        kinds=counted["kind"].tolist(),
        title=f"{result.model.name} {result.candidate}: each group quantized alone",
    )
    save_png(drawn, path)


def calibrated_linears(job: ScoringJob, search: Search) -> ReplacedLinears:
    """The scored linears of a job, with their ranges found on its calibration rows."""
    from layerbits.scoring.replaced import ReplacedLinears

    linears = ReplacedLinears(job.loaded.model, search.names, search.settings)
    linears.calibrate(job.calibration.calib, search.need_logits)
    linears.load_ranges(linears.ranges())
    return linears


def _captions(result: SensitivityResult) -> Captions | None:
    if result.sample_kl is None or result.sample_tokens is None:
        return None
    tokens = result.sample_tokens.astype(float)
    return Captions(result.sample_kl * tokens.sum(), tokens)


def _largest_difference(again: FloatArray, before: FloatArray) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        difference = np.abs(again - before) / np.abs(before)
    return float(np.nanmax(difference))
