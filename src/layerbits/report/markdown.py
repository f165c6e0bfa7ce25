"""The report as GitHub-style Markdown, and the ten-line note of a run page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from layerbits.frames import Intervals
from layerbits.report.content import MOST, json_report
from layerbits.report.wording import modules_words
from layerbits.result import SensitivityResult

FIGURES = {
    "heatmap": "by block and kind",
    "by_layer": "along the blocks",
    "ranked": "most sensitive groups",
    "cumulative": "how many groups make most of the damage",
}
"""Files that :func:`layerbits.figures.save_figures` writes, with their captions."""
_LISTED = 10
_ENDS = ("low", "high")


def markdown_report(result: SensitivityResult, intervals: Intervals | None = None) -> str:
    """The whole report; figures are linked as ``../figures/<name>.png``.

    Args:
        result: What was measured.
        intervals: (group key, candidate name) → ends of the predicted KL; adds the columns low and high.
    """
    data = json_report(result, intervals)
    parts = [
        [f"# Layer sensitivity: {data['run_name']}"],
        _attention(data["attention"]),
        _headline(data),
        _figures(),
        *(_ranking(data, c) for c in data["candidates"]),
        _recipe(data["recipe"], several=len(data["candidates"]) > 1, layers=data["candidates"][0]["layers"]),
        _run(data),
        _reading(data["method"], intervals is not None),
        _cost(data),
    ]
    return "\n\n".join(block for part in parts for block in part) + "\n"


def note(result: SensitivityResult) -> str:
    """Ten lines of Markdown for the run page: what was run, total, bits, the top five."""
    data = json_report(result)
    recipe, calibration, several = data["recipe"], data["calibration"], len(data["candidates"]) > 1
    formats = ", ".join(dict.fromkeys(c["format_name"] for c in data["candidates"]))
    count = len(data["attention"])
    warned = f" **{count} warning{'s' * (count > 1)}: read the report first.**" if count else ""
    lines = [
        f"**{data['run_name']}** ({formats}): {data['method']}, {data['engine']}, {data['device']}, "
        f"seed {data['seed']}.{warned}",
        f"{calibration['dataset']} {calibration['size']}: {calibration['score_samples']} captions, "
        f"{calibration['score_rows']} rows, {calibration['loss_tokens']:,} loss tokens",
        f"Effective bits {recipe['effective_bits']:.3f} (ModelOpt counts {recipe['effective_bits_modelopt']:.3f}), "
        f"target {recipe['target_bits']:g}: {recipe['quantized_groups']} of {recipe['groups']} groups quantized",
    ]
    for c in data["candidates"]:
        kl, name = c["predicted_kl_sum"], _kl_name(data["method"])
        total = f"{name} not known" if kl is None else f"{name} {_n(kl)} nats/token over all groups"
        top = "; top " + ", ".join(f"`{x['layer']}`" for x in c["layers"][:3]) if several else ""
        lines.append(f"{c['name']}: {total}, raw score {_n(c['score_sum'])}{top}")
    if not several:
        (c,) = data["candidates"]
        lines.append(f"{_shares(c)}; {c['groups_for_most'] or '–'} of {recipe['groups']} groups make {MOST:.0%}")
        lines += [f"**{x['rank']}** `{x['layer']}` {_n(_value(x))} ({_p(x['share'])})" for x in c["layers"][:5]]
    return "\n".join(f"- {line}" for line in lines)


def _attention(sentences: Sequence[str]) -> list[str]:
    if not sentences:
        return []
    return ["\n".join(["> **Read this first**", ">", *(f"> - {s}" for s in sentences)])]


def _headline(data: Mapping[str, Any]) -> Iterator[str]:
    recipe, kl = data["recipe"], _kl_name(data["method"])
    yield "## In short"
    rows = []
    for c in data["candidates"]:
        few = f"{c['groups_for_most'] or '–'} of {recipe['groups']}"
        rows.append([c["name"], _n(c["predicted_kl_sum"]), _n(c["score_sum"]), _shares(c), few])
    titles = [
        "candidate",
        f"total {kl} (nats/token)",
        "total raw score",
        "share by kind",
        f"groups that make {MOST:.0%}",
    ]
    yield _table(titles, rows)
    yield "Totals and shares are over all groups, as if every group were quantized; shares are of the raw score."
    counts = "; ".join(f"{c['name']} {c['bits']:g} (ModelOpt {c['bits_modelopt']:g})" for c in data["candidates"])
    yield (
        f"**Effective bits {recipe['effective_bits']:.3f}** for a target of {recipe['target_bits']:g}: the solver "
        f"quantized {recipe['quantized_groups']} of {recipe['groups']} groups. ModelOpt counts "
        f"{recipe['effective_bits_modelopt']:.3f} for the same choice. Ours is weight storage per weight, block scales "
        "included, over the groups of this search. ModelOpt's takes the smaller of weight and activation bits, leaves "
        "block scales out unless the format declares them, and divides by the layers outside the search as well. Per "
        f"quantized weight: {counts}."
    )


def _figures() -> Iterator[str]:
    # Links, not images: MLflow's viewer cannot resolve a relative image, which would show as broken.
    yield "Figures: " + ", ".join(f"[{caption}](../figures/{name}.png)" for name, caption in FIGURES.items())


def _ranking(data: Mapping[str, Any], c: Mapping[str, Any]) -> Iterator[str]:
    kl, several = _kl_name(data["method"]), len(data["candidates"]) > 1
    title = f" under {c['name']}" if several else ""
    usable = [x for x in c["layers"] if x["score"] is not None]
    most, least = usable[:_LISTED], usable[_LISTED:][-_LISTED:][::-1]
    ends = [e for e in _ENDS if c["layers"] and e in c["layers"][0]]
    titles = ["rank", "group", "modules", f"{kl} (nats/token)", *ends, "raw score", "share", "recipe"]

    def row(x: Mapping[str, Any]) -> list[str]:
        values = [_n(x["predicted_kl"]), *(_n(x[e]) for e in ends), _n(x["score"]), _p(x["share"])]
        return [str(x["rank"]), f"`{x['layer']}`", modules_words(x["modules"]), *values, _status(x["chosen"], several)]

    yield f"## Most sensitive groups{title}"
    yield _table(titles, map(row, most)) if most else "No group has a finite score."
    if least:
        yield f"## Least sensitive groups{title}"
        yield _table(titles, map(row, least))
    yield f"## By kind of linear{title}"
    yield _table(
        ["kind", "groups", "weights", f"{kl} (nats/token)", "raw score", "share", "quantized"],
        [
            [
                k["kind"],
                str(k["groups"]),
                f"{k['weights']:,}",
                _n(k["predicted_kl"]),
                _n(k["score"]),
                _p(k["share"]),
                f"{k['quantized']} of {k['groups']}",
            ]
            for k in c["kinds"]
        ],
    )


def _recipe(recipe: Mapping[str, Any], several: bool, layers: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    names = recipe["unquantized_modules"]
    yield "## Recipe"
    if several:
        picks = [x["chosen"] for x in layers]
        counts = {name: picks.count(name) for name in dict.fromkeys(picks)}
        yield _table(["candidate", "groups"], [[_status(n, True), str(k)] for n, k in counts.items()])
    if not names:
        yield "Every group is quantized: the exclude list is empty."
        return
    yield (
        f"Left unquantized, {len(names)} modules, as an exclude list. Linears outside this search (such as an output "
        "head or a vision tower that was not asked for) are not listed and stay unquantized too."
    )
    yield f"```json\n{json.dumps(names, indent=0)}\n```"


def _run(data: Mapping[str, Any]) -> Iterator[str]:
    model, cal = data["model"], data["calibration"]
    lineage = f", language model `{model['language_model']}`" if model["language_model"] else ""
    padding = f"{cal['padding_share']:.1%} of the scored tokens are padding"
    yield "## What was run"
    yield _facts(
        [
            ["model", f"{model['name']} (`{model['source']}`), revision `{model['revision']}`"],
            ["architecture", f"{model['architecture']}, {model['dtype']}{lineage}"],
            ["method", f"{data['method']}, engine {data['engine']}, seed {data['seed']}, {data['device']}"],
            [
                "captions",
                f"{cal['dataset']} {cal['size']} (`{cal['digest'][:12]}`): {cal['calib_samples']} to calibrate, "
                f"{cal['score_samples']} to score",
            ],
            [
                "rows",
                f"{cal['packing']}, {cal['seq_len']} tokens each, {cal['batch_size']} a batch: {cal['calib_rows']} to "
                f"calibrate, {cal['score_rows']} to score",
            ],
            ["loss tokens", f"{cal['loss_tokens']:,} in {len(cal['batch_loss_tokens'])} score batches; {padding}"],
            *([name, value] for name, value in data["tags"].items()),
            ["made", data["created"]],
        ],
    )
    for c in data["candidates"]:
        yield f"### Candidate {c['name']}"
        yield _facts(
            [
                ["pair → format", f"{c['quant_pair']} → `{c['format_name']}`"],
                ["granularity", c["granularity"]],
                ["weights", c["words"]["weight"]],
                ["inputs", c["words"]["activation"]],
                ["calibration algorithm", c["words"]["algorithm"]],
                ["config hash", f"`{c['config_hash']}`"],
                ["adjusted", "; ".join(c["adjustments"]) or "nothing: the format as it is named"],
            ],
        )


def _reading(method: str, intervals: bool) -> Iterator[str]:
    yield "## How to read the numbers"
    if method == "kl_div":
        yield (
            "**Raw score** is ModelOpt's `kl_div` score: the KL divergence between the model and the model with this "
            "group alone quantized, summed over the scored positions. It grows with the number of rows: compare it "
            "only between runs with the same calibration."
        )
        yield (
            "**Measured KL** is the same per token, in nats, measured on the calibration rows: no estimate, but of "
            "those rows. It compares across runs, pairs and batch sizes. The total over groups assumes that damages "
            "add."
        )
    else:
        yield (
            "**Raw score** is ModelOpt's gradient score: the sum over score batches of Σ(∂L/∂y · Δy)², with L the mean "
            "token loss of the batch and Δy what quantizing the group changes in its output. It depends on the size "
            "and number of the batches: compare it only between runs with the same calibration."
        )
        yield (
            "**Predicted KL** is half of that sum on the scale of one token's loss, ½ · Σ N²·raw / Σ N over the "
            "batches with N loss tokens each, in nats per token. It compares across runs, pairs and batch sizes. Under "
            "a diagonal empirical Fisher it estimates the KL divergence that quantizing this group alone would cause: "
            "an estimate, not a measurement. The total over groups assumes that damages add."
        )
    if intervals:
        yield f"**low** and **high** are the ends of each group's {_kl_name(method)} interval, from resampled captions."


def _cost(data: Mapping[str, Any]) -> Iterator[str]:
    yield "## Time, memory, versions"
    rows = [[f"{phase} (s)", f"{seconds:.2f}"] for phase, seconds in data["seconds"].items()]
    rows.append(["all phases (s)", f"{sum(data['seconds'].values()):.2f}"])
    rows += [[name, f"{value:.2f}"] for name, value in data["memory"].items()]
    rows += [[name.removeprefix("version."), str(value)] for name, value in data["provenance"].items()]
    yield _facts(rows)


def _kl_name(method: str) -> str:
    return "measured KL" if method == "kl_div" else "predicted KL"


def _shares(c: Mapping[str, Any]) -> str:
    return ", ".join(f"{k['kind']} {_p(k['share'])}" for k in c["kinds"])


def _status(chosen: str | None, several: bool) -> str:
    if chosen is None:
        return "kept"
    return chosen if several else "quantized"


def _value(layer: Mapping[str, Any]) -> float | None:
    value: float | None = layer["score"] if layer["predicted_kl"] is None else layer["predicted_kl"]
    return value


def _n(value: float | None) -> str:
    """Three significant digits; a dash for what is not known or not finite."""
    return "–" if value is None else f"{value:.3g}"


def _p(share: float | None) -> str:
    if share is None:
        return "–"
    return "<0.1%" if 0 < share < 0.0005 else f"{share:.1%}"


def _facts(rows: Iterable[Sequence[str]]) -> str:
    return _table(["what", "value"], rows, numbers=False)


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = True) -> str:
    """A GitHub table; columns of ``numbers`` stand to the right."""
    body = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    numeric = [numbers and bool(body) and all(_is_number(row[i]) for row in body) for i in range(len(titles))]
    lines = ["| " + " | ".join(titles) + " |", "|" + "|".join("---:" if n else "---" for n in numeric) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in body)])


def _is_number(cell: str) -> bool:
    return cell == "–" or re.fullmatch(r"<?-?[\d,.]+(e[+-]\d+)?%?", cell) is not None
