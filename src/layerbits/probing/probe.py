"""What a scheme does to a model, measured on held-out rows against the unquantized model.

All numbers are over the tokens that the rows' loss mask counts, so that padding has no part in them. The noise floor is
what the unquantized model differs from itself by arithmetic alone; no scheme can be told from it below that.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from layerbits.errors import UserError
from layerbits.inputs.row_shape import check_held_out, check_length
from layerbits.probing.measured import Difference, ProbeResult, Rows, SchemeProbe
from layerbits.results.result import ModelInfo
from layerbits.scoring.settings import check_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from layerbits.inputs.calibration import Batch
    from layerbits.inputs.picture_rows import Reader
    from layerbits.inputs.pictures import Pictured
    from layerbits.probing.apply import Ranges
    from layerbits.probing.unquantized import UnquantizedLogits
    from layerbits.schemes import Scheme
    from layerbits.scoring.precision import Precision

_MAY_KEEP = 0.25  # of the free memory, for quantized weights


def probe_schemes(
    schemes: Sequence[Scheme],
    rows: int,
    batch_size: int,
    device: str,
    root: Path,
    dtype: str = "auto",
    seq_len: int | None = None,
    texts: Mapping[str, Sequence[str]] | None = None,
) -> ProbeResult:
    """Finds the model and the held-out rows of some schemes, and measures them, and each of their KV caches alone.

    Args:
        schemes: Of one model and calibration.
        rows: Held-out rows.
        batch_size: Rows a forward.
        device: ``auto``, ``cpu`` or ``cuda``.
        root: Project folder, for the git commit.
        dtype: What to measure in, one of :data:`layerbits.scoring.settings.DTYPES`.
        seq_len: Tokens a row; ``None`` = as the schemes were scored on.
        texts: Texts of one's own to measure on, of :func:`layerbits.probing.texts.read_texts`; none = what was held
            out.

    Raises:
        UserError: No scheme, schemes of several models, rows longer than the model's positions, or what
            :func:`layerbits.probing.loading.prepare`, :func:`~layerbits.probing.texts.probe_texts`,
            :func:`held_out_rows` and :func:`probe` refuse; all but the last before the weights are loaded.
    """
    from layerbits.probing.loading import prepare_together
    from layerbits.probing.texts import probe_texts
    from layerbits.provenance import provenance
    from layerbits.schemes.kv_cache import toggles

    check_dtype(dtype)
    schemes = [*schemes, *toggles(schemes)]
    prepared = prepare_together(schemes, "probe")
    data = prepared.scheme.calibration
    packing, scored_len, _ = data.row_shape
    length = scored_len if seq_len is None else _checked_length(seq_len, prepared.resolved.config)
    source = probe_texts(prepared.captions, texts)
    reader = None if source.own else prepared.reader
    batches = held_out_rows(source.texts, prepared.tokenizer, packing, length, batch_size, rows, reader)
    what = Rows(source.name, packing, length, sum(b.rows for b in batches), tokens=0, sources=source.in_rows(rows))
    loaded = prepared.load(device)
    return probe(loaded.model, loaded.info, schemes, prepared.calibration, batches, what, provenance(root), dtype)


def _checked_length(seq_len: int, config: PreTrainedConfig) -> int:
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    check_length("seq_len", seq_len)
    if isinstance(most, int) and 0 < most < seq_len:
        raise UserError(f"seq_len={seq_len} is longer than the {most:,} positions of the model; use {most} or less")
    return seq_len


def held_out_rows(
    captions: Sequence[Pictured | str],
    tokenizer: PreTrainedTokenizerBase,
    packing: str,
    seq_len: int,
    batch_size: int,
    rows: int,
    reader: Reader | None = None,
) -> tuple[Batch, ...]:
    """The first rows of held-out captions, in batches; with pictures as many chats, and rows of text after them.

    Args:
        captions: ``CaptionSet.held_out``.
        tokenizer: The model's.
        packing: ``packed`` or ``padded``.
        seq_len: Tokens a row.
        batch_size: Rows a batch.
        rows: Rows to take, a multiple of ``batch_size`` or fewer than one batch.
        reader: How pictures become tokens; ``None`` where there are none.

    Raises:
        UserError: There are no held-out captions, or too few for that many rows.
    """
    from layerbits.inputs.captions import NONE_HELD_OUT
    from layerbits.inputs.datasets import held_out_captions
    from layerbits.inputs.pictures import Pictured
    from layerbits.inputs.rows import rows_of

    if not captions:
        raise UserError(NONE_HELD_OUT)
    check_held_out(rows, batch_size)
    size = min(batch_size, rows)
    shown = [caption for caption in captions if isinstance(caption, Pictured)]
    if reader is not None and shown:
        if len(shown) < rows:
            raise UserError(f"{len(shown)} pictures are held out, not {rows}; set rows={len(shown)} or extend the list")
        texts = held_out_captions(captions)
        pictures = rows_of(shown[:rows], tokenizer, reader, packing, seq_len, size)
        text = rows_of([*shown[:rows], *texts], tokenizer, None, packing, seq_len, size)
        return (*pictures, *text[: rows // size])
    batches = rows_of(captions, tokenizer, None, packing, seq_len, size)[: rows // size]
    found = sum(b.rows for b in batches)
    if found < rows:
        raise UserError(f"the held-out captions fill {found} rows of {seq_len} tokens, not {rows}; set rows={found}")
    return batches


def pictured_captions(batches: Sequence[Batch]) -> int:
    """How many captions of some batches are chats about pictures."""
    return len({int(n) for b in batches for s in b.segments if s.pictures for n in s.sample.unique()})


def probe(
    model: PreTrainedModel,
    info: ModelInfo,
    schemes: Sequence[Scheme],
    calibration: Sequence[Batch],
    batches: Sequence[Batch],
    data: Rows,
    provenance: Mapping[str, str] | None = None,
    dtype: str = "auto",
) -> ProbeResult:
    """Measures schemes, one after the other on one loaded model, which is left as it was.

    Ranges are found in the model's dtype, and quantizers compute in it; all else is measured in ``dtype``. The
    unquantized logits are held meanwhile (tokens × vocabulary), and so is a linear's quantized
    weight from one scheme to the next, where memory allows. Schemes that are the same are measured once.

    Args:
        model: The whole model, as loaded.
        info: What it is; every scheme has to be of this revision.
        schemes: What to measure.
        calibration: Batches for the activation ranges.
        batches: Held-out batches.
        data: What the batches are, for the record; its tokens are counted here.
        provenance: Versions and hardware.
        dtype: What to measure in, one of :data:`layerbits.scoring.settings.DTYPES`.

    Raises:
        UserError: A scheme is of another revision or does not fit the model, the model's logits are not finite, or
            float32 does not fit.
    """
    from layerbits.probing.apply import find_ranges
    from layerbits.scoring.features import kept_features
    from layerbits.scoring.precision import computing, plan_precision

    if not schemes:
        raise UserError("there is no scheme to probe; name at least one")
    for scheme in schemes:
        scheme.check_revision(info.revision)
    clock = time.perf_counter
    with kept_features(model, (*calibration, *batches), {name for scheme in schemes for name in scheme.modules}):
        start = clock()
        ranges = find_ranges(model, schemes, calibration)
        seconds = {"calibrate": clock() - start}
        precision = plan_precision(model, max(s.input_ids.numel() for b in batches for s in b.segments), dtype)
        with computing(model, precision):
            return _measured(model, info, schemes, ranges, batches, data, seconds, dict(provenance or {}), precision)


def _measured(
    model: PreTrainedModel,
    info: ModelInfo,
    schemes: Sequence[Scheme],
    ranges: Ranges,
    batches: Sequence[Batch],
    data: Rows,
    seconds: dict[str, float],
    provenance: dict[str, str],
    precision: Precision,
) -> ProbeResult:
    from layerbits.probing.apply import apply_scheme
    from layerbits.probing.unquantized import UnquantizedLogits
    from layerbits.progress import progress
    from layerbits.scoring.assigned import Made

    clock = time.perf_counter
    start = clock()
    unquantized = UnquantizedLogits(model, batches, data.sources)
    if not unquantized.finite:
        raise UserError("the unquantized model's own logits are not finite; try model.dtype=float32 or bfloat16")
    floor, floor_kind = _noise_floor(model, precision, unquantized)
    seconds["reference"] = clock() - start

    began = clock()
    made: Made | None = {} if weights_fit(model, schemes) else None
    measured: dict[str, tuple[Difference, tuple[float, ...]]] = {}
    probes = []
    for scheme in progress(schemes, "probing"):
        start = clock()
        if scheme.digest not in measured:
            with apply_scheme(model, scheme, ranges, made=made):
                measured[scheme.digest] = unquantized.compare(model)
        difference, captions = measured[scheme.digest]
        probes.append(
            SchemeProbe(
                scheme=scheme.name,
                digest=scheme.digest,
                method=str(scheme.how.get("method", "")),
                control_of=scheme.how.get("reference"),
                effective_bits=scheme.effective_bits,
                predicted_kl=scheme.predicted_kl + scheme.kv_predicted_kl,
                difference=difference,
                caption_kl=captions,
                seconds=clock() - start,
                kv_cache=scheme.kv_cache,
                candidates=tuple(c.name for c in scheme.candidates),
            )
        )
    seconds["probe"] = clock() - began
    return ProbeResult(
        model=info,
        source_run_ids=tuple(dict.fromkeys(run for s in schemes for run in s.source_run_ids)),
        data=replace(data, tokens=unquantized.tokens),
        reference_perplexity=unquantized.perplexity,
        floor=floor,
        floor_kind=floor_kind,
        caption_tokens=unquantized.caption_tokens,
        schemes=tuple(probes),
        seconds=seconds,
        provenance=provenance,
        pictured=pictured_captions(batches),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        dtype=precision.dtype,
        memory={"measure_estimate_gb": precision.estimate_gb, "measure_free_gb": precision.free_gb},
    )


def weights_fit(model: PreTrainedModel, schemes: Sequence[Scheme]) -> bool:
    """Whether the quantized weights of all schemes may stay in memory, each distinct one once."""
    from layerbits.inputs.offload import offloaded
    from layerbits.scoring.memory import free_bytes

    if offloaded(model) is not None:
        return False
    distinct = {(name, info.config_hash) for scheme in schemes for name, info in scheme.modules.items()}
    weights = [p for name, _ in distinct for p in model.get_submodule(name).parameters(recurse=False)]
    wanted = sum(w.numel() * w.element_size() for w in weights)
    return not weights or wanted < _MAY_KEEP * free_bytes(weights[0].device)


def _noise_floor(
    model: PreTrainedModel, precision: Precision, unquantized: UnquantizedLogits
) -> tuple[Difference, str]:
    from layerbits.scoring.precision import computing, plan_precision

    if precision.dtype == "float32":
        difference, _ = unquantized.compare(model, row_by_row=True)
        return difference, "a second unquantized run in float32, row by row instead of in batches"
    try:
        wide = plan_precision(model, unquantized.tokens_at_once, "auto")
    except UserError:  # it does not fit
        difference, _ = unquantized.compare(model, row_by_row=True)
        return difference, f"a second unquantized run in {precision.dtype}, row by row instead of in batches"
    with computing(model, wide):
        difference, _ = unquantized.compare(model)
    return difference, f"the same weights computed in float32 against {precision.dtype}"
