"""A table of an earlier tool as our results, one per format."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np

from layerbits.errors import UserError
from layerbits.importing.layouts import Score, Table, count
from layerbits.report import write_report
from layerbits.results.assignment import Assignment
from layerbits.results.result import Allocation, CalibrationInfo, CandidateInfo, Group, ModelInfo, SensitivityResult
from layerbits.scoring.groups import named_groups

_PAIR = re.compile(r"w(?P<weight>(?:fp|int)\d+)_a(?P<activation>(?:fp|int)\d+)(?=_|$)")
PRESETS = {
    "FP8_DEFAULT_CFG": ("fp8", "fp8"),
    "INT8_DEFAULT_CFG": ("int8", "int8"),
    "INT8_WEIGHT_ONLY_CFG": ("int8", "fp16"),
    "INT4_BLOCKWISE_WEIGHT_ONLY_CFG": ("int4", "fp16"),
    "W4A16_NVFP4_CFG": ("fp4", "fp16"),
    "W4A8_NVFP4_FP8_CFG": ("fp4", "fp8"),
    "W4A8_MXFP4_FP8_CFG": ("fp4", "fp8"),
}
"""Weight and activation precision of ModelOpt's presets that are a quant pair of ours."""
_CUSTOM = re.compile(r"CUSTOM_\d+")  # ModelOpt's name for a configuration that is none of its presets
_OUTSIDE = re.compile(r"(?:^|\.)(?:visual|vision\w*|audio\w*|\w*projector|merger)\.")
_LEAVES = {"q_proj": ("k_proj", "v_proj"), "gate_proj": ("up_proj",)}


def results(table: Table) -> list[SensitivityResult]:
    """One result per format of a table: the groups of the language model with their raw scores.

    Linears of a vision or audio part are left out and counted in a warning, as is everything that is not known.

    Raises:
        UserError: No group of a language model is left, or the file has one score per group for several formats.
    """
    inside = [score for score in table.scores if not _OUTSIDE.search(score.module)]
    if not inside:
        raise UserError(f"{table.path} has no linear of a language model; leave it out")
    forms = list(dict.fromkeys(score.format for score in inside))
    if forms == [""] and len(table.formats) > 1:
        raise UserError(
            f"{table.path} has one score per layer for {len(table.formats)} formats; import the quant manifest of "
            f"{table.scheme or 'that scheme'} instead"
        )
    return [_result(table, [s for s in inside if s.format == form], forms) for form in forms]


class Source(Protocol):
    """What a result was imported from."""

    @property
    def path(self) -> Path:
        """The file."""

    @property
    def digest(self) -> str:
        """SHA-256 of it."""


def write(result: SensitivityResult, table: Source, root: Path) -> Path:
    """Writes the folder of an imported result, the same one for the same file, with the file itself under ``source``.

    Args:
        result: One of :func:`results`.
        table: What it comes from.
        root: Output root.

    Raises:
        UserError: The disk is full or cannot be written.
    """
    name = re.sub(r"[^\w.-]+", "_", f"{result.model.name}_{result.candidate.name}")
    folder = root / "imported" / f"{name}-{table.digest[:12]}"
    try:
        write_report(result, folder)
        (folder / "source").mkdir(exist_ok=True)
        shutil.copyfile(table.path, folder / "source" / table.path.name)
    except OSError as error:
        raise UserError(f"cannot write {folder} ({error.strerror}); free space or set output_root") from None
    return folder


def _result(table: Table, scores: Sequence[Score], forms: Sequence[str]) -> SensitivityResult:
    info = _candidate(table, scores[0], alone=len(forms) == 1)
    groups = _groups(table, scores)
    raw = np.array([score.score for score in scores])
    order = sorted(range(len(groups)), key=lambda i: math.inf if groups[i].block is None else groups[i].block or 0)
    return SensitivityResult(
        model=ModelInfo(_slug(table.model), table.model, "", "", ""),
        calibration=_calibration(table.dataset, table.score_samples),
        method=table.method,
        engine="",
        seed=None,
        device="",
        groups=tuple(groups[i] for i in order),
        candidate=info,
        scores=raw[order],
        predicted_kl=np.full_like(raw, np.nan),
        allocation=Allocation(table.target_bits, Assignment(), math.nan, table.found_bits, table.found_score),
        tags={
            "source": "imported",
            "import.layout": table.layout,
            "import.file": table.path.name,
            "import.sha256": table.digest,
            "import.scheme": table.scheme,
        },
        warnings=tuple(_warnings(table, scores, info, len(forms))),
    )


def _candidate(table: Table, score: Score, alone: bool) -> CandidateInfo:
    """The format, as far as the file names it."""
    named = bool(score.format) and not _CUSTOM.fullmatch(score.format)
    asked = table.formats[0] if alone and len(table.formats) == 1 else ""
    form = score.format if named else asked or score.format
    match = _PAIR.match(table.scheme) if alone else None
    weight, activation = (match["weight"], match["activation"]) if match else PRESETS.get(form, ("", ""))
    pair = f"w{weight}_a{activation}" if weight else ""
    return CandidateInfo(
        name=pair or form or "unnamed",
        quant_pair=pair,
        # A preset's own name says that nothing was laid over it.
        granularity="default" if named else "",
        format_name=form,
        weight_precision=weight,
        activation_precision=activation,
        config={},
        config_hash="",
        bits=math.nan,
        bits_modelopt=score.bits,
    )


def _groups(table: Table, scores: Sequence[Score]) -> tuple[Group, ...]:
    named = {score.module for score in table.scores}
    there = set(table.modules) - named
    fused = []
    for score in scores:
        stem, _, leaf = score.module.rpartition(".")
        others = (f"{stem}.{other}" for other in _LEAVES.get(leaf, ()))
        # ModelOpt names a group by its first linear; those that it fuses are quantized, but have no entry of their own.
        fused.append(((score.module, *(name for name in others if name in there)), score.weights))
    head = next((score.module for score in scores if score.module.rpartition(".")[2] == "lm_head"), None)
    return named_groups(None, fused, head)


def _calibration(dataset: Mapping[str, object], score_samples: int | None) -> CalibrationInfo:
    def text(name: str) -> str:
        value = dataset.get(name)
        return value if isinstance(value, str) else ""

    return CalibrationInfo(
        dataset=text("name"),
        size=text("size"),
        digest="",
        packing="",
        seq_len=count(dataset.get("calib_seq_len")),
        batch_size=count(dataset.get("batch_size")),
        calib_samples=count(dataset.get("num_calib_samples")),
        score_samples=score_samples,
        calib_rows=None,
        score_rows=None,
        loss_tokens=None,
        batch_loss_tokens=(),
        padding_share=math.nan,
    )


def _warnings(table: Table, scores: Sequence[Score], info: CandidateInfo, forms: int) -> list[str]:
    lines = [
        f"imported from {table.path.name} ({table.layout}): what it does not say is not known, calibration and storage "
        "bits among it"
    ]
    if not info.granularity:
        lines.append(f"the file does not say which configuration {info.name} is: its granularity is not known")
    if outside := [s.score for s in table.scores if _OUTSIDE.search(s.module) and s.format == scores[0].format]:
        lines.append(
            f"{len(outside)} groups outside the language model are left out; their scores sum to {sum(outside):.4g}"
        )
    if forms > 1:
        lines.append(
            f"{forms} formats were scored in one call of mtq.auto_quantize, which may have lowered scores to those of "
            "another format"
        )
    if unknown := sum(not score.weights for score in scores):
        lines.append(f"the number of weights of {unknown} groups is not known and counted as 0")
    if table.unreadable:
        lines.append(f"{table.unreadable} entries of the file could not be read and are left out")
    return lines


def _slug(model: str) -> str:
    """A model's name as our configurations write it: ``qwen3_vl_4b_instruct`` of ``…/Qwen3-VL-4B-Instruct``."""
    return re.sub(r"[^a-z0-9]+", "_", PurePosixPath(model).name.lower()).strip("_") or "unknown"
