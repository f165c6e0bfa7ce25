"""A probe's result as Markdown, figure and folder."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from layerbits.atomic import dated, optional_part, whole_folder, write_json
from layerbits.candidates.kv_cache import NO_CACHE
from layerbits.probing.measured import DECIDED, Difference, ProbeResult
from layerbits.report.wording import rows_words
from layerbits.results.naming import scheme_title
from layerbits.schemes.additivity import factors, points_of
from layerbits.tracking.contract import calibration_data, held_out_data
from layerbits.tracking.made import Data, Measured

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from layerbits.results.result import CalibrationInfo

_OF_THE_SCHEME = ("bits", "predicted_kl")
"""Numbers that no row was needed for."""


def markdown(result: ProbeResult) -> str:
    """A row per scheme, the unquantized model and the noise floor below, and what can be told apart."""
    d, comparisons = result.data, result.comparisons()
    verdicts = Counter(c.verdict for c in comparisons)
    counts = ", ".join(f"{verdicts[v]} {v}" for v in ("confirmed", "contradicted", "undecided"))
    rounding = (
        f"{len(result.above_floor)} of {len(result.schemes)} schemes can be told from the rounding of {result.dtype}; "
        "dtype=float32 tells more."
    )
    measured = "" if result.dtype in ("", result.model.dtype) else f", measured in {result.dtype}"
    single = len(result.caption_tokens) == 1
    captions = "1 caption" if single else f"{len(result.caption_tokens)} captions"
    alone = "; one has none, so no difference can be decided: give more texts, one a line" if single else ""
    lines = [
        *([rounding] if result.dtype not in ("", "float32") else []),
        f"{result.model.name} ({result.model.dtype}{measured}), {d.rows} held-out rows of {d.dataset} "
        f"({rows_words(d.dataset, d.packing, d.seq_len)}), {d.tokens:,} tokens of {captions} counted",
        *([f"Of {len(comparisons)} expected differences (below): {counts}."] if comparisons else []),
        "",
        "| scheme | bits | perplexity | KL (nats/token) | ± SE | p99 KL | predicted KL | measured / predicted | "
        "top-1 agreement | logit MSE | max error |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {s.scheme} | {s.effective_bits:.3f} | {s.difference.perplexity:.4f} | {_kl(s.difference)} | "
            f"{s.predicted_kl:.4g} | {s.additivity:.2f} | {_logits(s.difference)} |"
            for s in result.schemes
        ),
        f"| unquantized | 16 | {result.reference_perplexity:.4f} | | | | | | | | |",
        f"| noise floor | 16 | {result.floor.perplexity:.4f} | {_kl(result.floor)} | | | {_logits(result.floor)} |",
        "",
        f"Noise floor: {result.floor_kind}. Standard errors (SE) are over the captions{alone}.",
        *(f"KV cache {name}: {', '.join(those)}." for name, those in _caches(result).items()),
    ]
    lines += [*_sliced(result), *_by_modality(result)]
    below = [s.scheme for s in result.schemes if s not in result.above_floor]
    lines += [f"Not above the noise floor: {', '.join(below)}."] if below else []
    bad = [f"{s.scheme} ({s.difference.nonfinite} tokens)" for s in result.schemes if s.difference.nonfinite]
    lines += [f"Logits that are not numbers: {', '.join(bad)}."] if bad else []
    if sums := factors(points_of(result.to_json())):
        more = "For other schemes of these bits: `-e scheme -P measured=` this probe."
        lines += ["", *(f"Does it add up? {factor.words}" for factor in sums), more]
    if comparisons:
        lines += [
            "",
            f"On the same tokens; a difference counts from {DECIDED:g} standard errors on:",
            "",
            "| should be lower | should be higher | because | KL difference | ± SE | |",
            "|---|---|---|---|---|---|",
            *(f"| {c.lower} | {c.higher} | {c.why} | {c.kl:.4g} | {c.se:.2g} | {c.verdict} |" for c in comparisons),
        ]
    return "\n".join(lines) + "\n"


def parameters(result: ProbeResult) -> dict[str, str]:
    """What was in force, for the tracking server."""
    data = result.data
    return {
        "eff.model": result.model.name,
        "eff.model_revision": result.model.revision,
        "eff.dtype": result.model.dtype,
        "eff.measured_dtype": result.dtype or result.model.dtype,
        "eff.dataset": data.dataset,
        "eff.packing": data.packing,
        "eff.seq_len": str(data.seq_len),
        "eff.rows": str(data.rows),
        "eff.schemes": ",".join(s.scheme for s in result.schemes),
        "eff.kv_cache": ",".join(_caches(result)) or NO_CACHE,
    }


def data(result: ProbeResult, calibration: CalibrationInfo) -> tuple[Data, ...]:
    """The held-out rows as an MLflow dataset, told apart by how they were cut and how many tokens a caption has.

    Args:
        result: What was measured.
        calibration: What the schemes were scored on; the second dataset, where it is known.
    """
    rows = result.data
    tokens = hashlib.sha256(json.dumps(result.caption_tokens).encode()).hexdigest()
    facts = {"packing": rows.packing, "seq_len": rows.seq_len, "rows": rows.rows, "tokens": rows.tokens}
    held_out = Data(held_out_data(rows.dataset, {**facts, "caption_tokens": tokens}), "evaluation")
    scored = calibration_data(calibration)
    return (held_out,) if scored is None else (held_out, Data(scored, "calibration"))


def measured(result: ProbeResult, data: Sequence[Data]) -> tuple[Measured, ...]:
    """Which of the metrics are of which scheme and data, and what its logged model is searched by.

    Args:
        result: What was measured.
        data: As :func:`data` gives it.
    """
    rows, *others = (one.fields["name"] for one in data)
    scored = others[0] if others else ""
    metrics = result.metrics()
    parts = []
    for one in result.schemes:
        prefix = f"probe/{one.scheme}/"
        name = scheme_title(one.scheme, one.candidates, result.model.name)
        known = [key for key in _OF_THE_SCHEME if f"{prefix}{key}" in metrics]
        for key in known:
            on = scored if key == "predicted_kl" else ""
            parts.append(Measured(name, one.digest, (prefix + key,), on, {key: metrics[prefix + key]}))
        on_rows = tuple(k for k in metrics if k.startswith(prefix) and k.removeprefix(prefix) not in known)
        kl = {"probed_kl": metrics[f"{prefix}kl"]} if f"{prefix}kl" in metrics else {}
        parts.append(Measured(name, one.digest, on_rows, rows, kl))
    return tuple(parts)


def figure(result: ProbeResult) -> Figure:
    """Bits against measured KL with two standard errors, schemes and each kind of control apart."""
    import pandas as pd

    from layerbits.figures import pareto
    from layerbits.figures.settings import own_settings

    schemes = result.schemes
    frame = pd.DataFrame(
        {
            "bits": [s.effective_bits for s in schemes],
            "kl": [s.difference.kl for s in schemes],
            "label": ["schemes" if s.control_of is None else s.method for s in schemes],
        }
    )
    title = f"{result.model.name}: {result.data.tokens:,} held-out tokens, ± {DECIDED:g} SE"
    errors = [DECIDED * s.difference.kl_se for s in schemes]
    with own_settings():
        drawn = pareto(frame, "kl", title=title)
        ax = drawn.axes[0]
        ax.errorbar(
            frame["bits"], frame["kl"], yerr=errors, fmt="none", ecolor="black", elinewidth=0.8, capsize=2, zorder=4
        )
        highest = max((float(kl) + error for kl, error in zip(frame["kl"], errors, strict=True)), default=0.0)
        if math.isfinite(highest) and highest * 1.03 > ax.get_ylim()[1]:
            ax.set_ylim(top=highest * 1.03)  # else the bars would be cut
    return drawn


def write_probe(result: ProbeResult, root: Path) -> Path:
    """Writes ``probe.json``, ``probe.md`` and ``figures/probe.png`` into a folder of its own, whole or not at all.

    Args:
        result: What was measured.
        root: Output root; the folder is made below its ``tmp``.

    Raises:
        UserError: The disk is full or cannot be written.
    """
    final = dated(root, f"probe_{result.model.name}")
    with whole_folder(final) as partial:
        write_json(partial / "probe.json", result.to_json())
        with optional_part("probe.md"):
            (partial / "probe.md").write_text(markdown(result), "utf-8")
        if any(s.difference.kl >= 0 for s in result.schemes):
            with optional_part("figures/probe.png"):
                from layerbits.figures.style import save_png

                save_png(figure(result), partial / "figures" / "probe.png")
    return final


def _caches(result: ProbeResult) -> dict[str, list[str]]:
    """Format of the KV cache → the schemes that have it."""
    schemes: dict[str, list[str]] = {}
    for scheme in result.schemes:
        if scheme.kv_cache != NO_CACHE:
            schemes.setdefault(scheme.kv_cache, []).append(scheme.scheme)
    return schemes


def _by_modality(result: ProbeResult) -> list[str]:
    """KL on the words after pictures beside that on plain text."""
    if not result.pictured:
        return []
    lines = [
        "",
        f"Words after {result.pictured} pictures beside plain text (nats/token, ± SE):",
        "",
        "| scheme | KL after pictures | ± SE | KL on text | ± SE |",
        "|---|---|---|---|---|",
    ]
    for scheme in result.schemes:
        parts = result.by_modality(scheme)
        ends = [parts.get(where, (math.nan, math.nan)) for where in ("pictures", "text")]
        lines.append(f"| {scheme.scheme} | {' | '.join(f'{kl:.4g} | {se:.2g}' for kl, se in ends)} |")
    return [*lines, ""]


def _sliced(result: ProbeResult) -> list[str]:
    """Median and tail of the KL over the tokens, and its mean by position, by confidence and by source."""
    names = [one.name for one in result.floor.slices]
    if not names:
        return []
    lines = [
        "",
        "KL over the tokens, nats: median and tail, then the mean by position in the row, by the largest "
        "probability of the unquantized model, and by source where there are several:",
        "",
        f"| scheme | median | p90 | p99 | {' | '.join(names)} |",
        f"|---|---|---|---|{'---|' * len(names)}",
    ]
    for scheme in result.schemes:
        d = scheme.difference
        cells_by_name = {one.name: f"{one.kl:.3g}" for one in d.slices}
        cells = " | ".join(cells_by_name.get(name, "–") for name in names)
        lines.append(f"| {scheme.scheme} | {d.kl_median:.3g} | {d.kl_p90:.3g} | {d.kl_p99:.3g} | {cells} |")
    return [*lines, ""]


def _kl(difference: Difference) -> str:
    return f"{difference.kl:.4g} | {difference.kl_se:.2g} | {difference.kl_p99:.4g}"


def _logits(difference: Difference) -> str:
    return f"{difference.top1_agreement:.4f} | {difference.logit_mse:.4g} | {difference.logit_max_error:.4g}"
