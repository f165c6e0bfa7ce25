"""What a scheme does to a model, measured on held-out rows against the unquantized model.

All numbers are over the tokens that the rows' loss mask counts, so that padding has no part in them. The noise floor is
what the unquantized model differs from itself by arithmetic alone; no scheme can be told from it below that.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerbits.errors import UserError
from layerbits.result import ModelInfo
from layerbits.schemes.measured import Difference, ProbeResult, Rows, SchemeProbe

if TYPE_CHECKING:
    from layerbits.calibration import Batch
    from layerbits.schemes import Scheme

_LOGITS_AT_ONCE = 1 << 24  # of each model, in float64: 128 MB


def probe_schemes(schemes: Sequence[Scheme], rows: int, batch_size: int, device: str, root: Path) -> ProbeResult:
    """Finds the model and the held-out rows of some schemes, and measures them.

    Args:
        schemes: Of one model and calibration.
        rows: Held-out rows.
        batch_size: Rows a forward.
        device: ``auto``, ``cpu`` or ``cuda``.
        root: Project folder, for the git commit.

    Raises:
        UserError: No scheme, schemes of several models, or what :func:`layerbits.schemes.loading.prepare`,
            :func:`held_out_rows` and :func:`probe` refuse; all but the last before the weights are loaded.
    """
    from layerbits.provenance import provenance
    from layerbits.schemes.loading import prepare

    if not schemes:
        raise UserError("there is no scheme to probe; name at least one")
    first = schemes[0]
    for scheme in schemes[1:]:
        scheme.check_revision(first.model.revision)
        if scheme.calibration != first.calibration:
            raise UserError(f"{first.name} and {scheme.name} were calibrated differently; probe them apart")
    prepared = prepare(first)
    data = first.calibration
    batches = held_out_rows(
        prepared.captions.held_out, prepared.tokenizer, data.packing, data.seq_len, batch_size, rows
    )
    what = Rows(data.dataset, data.packing, data.seq_len, sum(b.rows for b in batches), tokens=0)
    loaded = prepared.load(device)
    return probe(loaded.model, loaded.info, schemes, prepared.calibration, batches, what, provenance(root))


def held_out_rows(
    captions: Sequence[str], tokenizer: Any, packing: str, seq_len: int, batch_size: int, rows: int
) -> tuple[Batch, ...]:
    """The first rows of held-out captions, in batches.

    Args:
        captions: ``CaptionSet.held_out``.
        tokenizer: The model's.
        packing: ``packed`` or ``padded``.
        seq_len: Tokens a row.
        batch_size: Rows a batch.
        rows: Rows to take, a multiple of ``batch_size`` or fewer than one batch.

    Raises:
        UserError: There are no held-out captions, or too few for that many rows.
    """
    from layerbits.calibration import build_rows

    if not captions:
        raise UserError("the caption list has no held-out captions; use a longer list or a smaller dataset.size")
    if rows < 1:
        raise UserError(f"rows={rows} is nothing to probe on; use 1 or more")
    size = min(batch_size, rows)
    if rows % size:
        raise UserError(f"rows={rows} is not a multiple of batch_size={size}; change one of them")
    batches = build_rows(captions, tokenizer, packing, seq_len, size)[: rows // size]
    found = sum(b.rows for b in batches)
    if found < rows:
        raise UserError(f"the held-out captions fill {found} rows of {seq_len} tokens, not {rows}; set rows={found}")
    return batches


def probe(
    model: Any,
    info: ModelInfo,
    schemes: Sequence[Scheme],
    calibration: Sequence[Batch],
    batches: Sequence[Batch],
    data: Rows,
    provenance: Mapping[str, str] | None = None,
) -> ProbeResult:
    """Measures schemes, one after the other on one loaded model, which is left as it was.

    The unquantized logits are held in host memory meanwhile: tokens × vocabulary in the model's dtype.

    Args:
        model: The whole model, as loaded.
        info: What it is; every scheme has to be of this revision.
        schemes: What to measure.
        calibration: Batches for the activation ranges.
        batches: Held-out batches.
        data: What the batches are, for the record; its tokens are counted here.
        provenance: Versions and hardware.

    Raises:
        UserError: A scheme is of another revision or does not fit the model, or the model's logits are not finite.
    """
    from layerbits.apply import apply_scheme, find_ranges
    from layerbits.scoring.taps import progress

    if not schemes:
        raise UserError("there is no scheme to probe; name at least one")
    for scheme in schemes:
        scheme.check_revision(info.revision)
    clock = time.perf_counter
    start = clock()
    ranges = find_ranges(model, schemes, calibration)
    seconds = {"calibrate": clock() - start}

    start = clock()
    reference = list(_logits(model, batches))
    itself = compare(iter(reference), reference)
    if itself.nonfinite:
        raise UserError("the unquantized model's own logits are not finite; try model.dtype=float32 or bfloat16")
    floor, floor_kind = _noise_floor(model, info, batches, reference)
    seconds["reference"] = clock() - start

    probes = []
    for scheme in progress(schemes, "probing"):
        start = clock()
        with apply_scheme(model, scheme, ranges):
            difference = compare(_logits(model, batches), reference)
        probes.append(
            SchemeProbe(
                scheme.name,
                scheme.digest,
                scheme.is_control,
                scheme.effective_bits,
                scheme.predicted_kl,
                difference,
                clock() - start,
            )
        )
    return ProbeResult(
        model=info,
        source_run_ids=tuple(dict.fromkeys(run for s in schemes for run in s.source_run_ids)),
        data=replace(data, tokens=itself.tokens),
        reference_perplexity=itself.perplexity,
        floor=floor,
        floor_kind=floor_kind,
        schemes=tuple(probes),
        seconds=seconds,
        provenance=dict(provenance or {}),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def compare(logits: Iterator[tuple[Any, Any]], reference: Sequence[tuple[Any, Any]]) -> Difference:
    """Compares logits with those of the unquantized model, in float64.

    Args:
        logits: Per segment ``[n, vocabulary]`` logits and ``[n]`` next tokens.
        reference: The same of the unquantized model.
    """
    import torch

    losses, divergences, agreements = [], [], []
    squares, largest, values, nonfinite = 0.0, 0.0, 0, 0
    for (ours, targets), (theirs, _) in zip(logits, reference, strict=True):
        size = max(1, _LOGITS_AT_ONCE // ours.shape[1])
        for start in range(0, len(ours), size):
            a = ours[start : start + size].double()
            b = theirs[start : start + size].to(a)
            wanted = targets[start : start + size].to(a.device)
            log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
            losses.append(-log_a.gather(1, wanted[:, None])[:, 0].cpu())
            divergences.append((log_b.exp() * (log_b - log_a)).sum(-1).cpu())
            agreements.append((a.argmax(-1) == b.argmax(-1)).cpu())
            error = a - b
            squares += float(error.square().sum())
            largest = max(largest, float(error.abs().max()))
            nonfinite += int((~torch.isfinite(a).all(-1)).sum())
            values += error.numel()
    kl = torch.cat(divergences)
    if nonfinite:
        nan = math.nan
        return Difference(len(kl), nan, nan, nan, nan, nan, nan, nonfinite)
    return Difference(
        tokens=len(kl),
        perplexity=float(torch.cat(losses).mean().exp()),
        kl=float(kl.mean()),
        kl_p99=float(kl.quantile(0.99)),
        top1_agreement=float(torch.cat(agreements).double().mean()),
        logit_mse=squares / values,
        logit_max_error=largest,
    )


def _logits(model: Any, batches: Sequence[Batch], row_by_row: bool = False) -> Iterator[tuple[Any, Any]]:
    """Logits and next tokens of the counted positions, per segment, in host memory."""
    import torch

    from layerbits.scoring.steps import predictions

    with torch.no_grad():
        for batch in batches:
            for segment in batch.segments:
                parts = _single_rows(segment) if row_by_row else [segment]
                found = [predictions(model, part) for part in parts]
                yield torch.cat([f[0] for f in found]).cpu(), torch.cat([f[1] for f in found]).cpu()


def _single_rows(segment: Any) -> list[Any]:
    rows = range(len(segment.input_ids))
    return [
        replace(
            segment,
            input_ids=segment.input_ids[i : i + 1],
            attention_mask=None if segment.attention_mask is None else segment.attention_mask[i : i + 1],
            loss_mask=segment.loss_mask[i : i + 1],
            sample=segment.sample[i : i + 1],
        )
        for i in rows
        if bool(segment.loss_mask[i].any())
    ]


def _noise_floor(
    model: Any, info: ModelInfo, batches: Sequence[Batch], reference: Sequence[tuple[Any, Any]]
) -> tuple[Difference, str]:
    if info.dtype == "float32":
        difference = compare(_logits(model, batches, row_by_row=True), reference)
        return difference, "a second unquantized run in float32, row by row instead of in batches"
    with _in_float32(model):
        difference = compare(_logits(model, batches), reference)
    return difference, f"the same weights computed in float32 against {info.dtype}"


@contextmanager
def _in_float32(model: Any) -> Iterator[None]:
    """The model in float32 and back: widening loses nothing, so the weights return bit for bit."""
    import torch

    narrow = {p: p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32}
    try:
        for parameter in narrow:
            parameter.data = parameter.data.float()
        yield
    finally:
        for parameter, dtype in narrow.items():
            parameter.data = parameter.data.to(dtype)
