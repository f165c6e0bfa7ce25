"""The report as GitHub-style Markdown, and the ten-line note of a run page."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence

from layerbits.plain import JsonMapping
from layerbits.report.content import MOST, json_report
from layerbits.report.wording import modules_words, rows_words
from layerbits.results.frames import listed
from layerbits.results.kv_cache import kv_sums
from layerbits.results.result import SensitivityResult

ROUTING = "routing"
"""The figure of runs with experts."""
MODALITY = "modality"
"""The figure of runs with pictures."""
FIGURES = {
    "heatmap": "by block and kind",
    "by_layer": "along the blocks",
    "ranked": "most sensitive groups",
    "cumulative": "how many groups make most of the damage",
}
"""Files that :func:`layerbits.figures.save_figures` writes, with their captions."""
_LISTED = 10
_TIED = 3  # named a group
_NOTHING = "nothing: the format as it is named"
_ENDS = ("low", "high")
_NAMES = {
    "cell": "digest of the parameters",
    "deployable": "a runtime serves the format",
    "estimate_gb": "estimated peak memory (GB)",
    "fast_estimate_gb": "estimate for memory=fast (GB)",
    "fingerprint": "digest of the search checkpoint",
    "fp4_numerics": "FP4 computed by",
    "free_gb": "free memory before the pass (GB)",
    "lean_estimate_gb": "estimate for memory=lean (GB)",
    "memory_mode": "memory mode",
    "offload_estimate_gb": "estimate for memory=offload (GB)",
    "pass_candidates": "candidates in the pass",
    "peak_gpu_gb": "peak GPU memory (GB)",
    "peak_rss_gb": "peak memory of the process (GB)",
    "resumed": "resumed from a search checkpoint",
}
"""Words of the report for tags and figures of memory, by their names in MLflow."""


def markdown_report(result: SensitivityResult) -> str:
    """The whole report; figures are named as files of the run, ``figures/<name>.png``."""
    data = json_report(result)
    parts = [
        [f"# Layer sensitivity: {data['run_name']}"],
        _attention(data["attention"]),
        _headline(data),
        _figures(data["experts"], data.get("modality")),
        _ranking(data),
        _recipe(data["recipe"]),
        _experts(data["experts"]),
        _pictures(data),
        _run(data),
        _reading(data["method"], data["intervals"], data["engine"]),
        _cost(data),
    ]
    return "\n\n".join(block for part in parts for block in part) + "\n"


def note(result: SensitivityResult) -> str:
    """Ten lines of Markdown for the run page: what was run, total, bits, the top five."""
    data = json_report(result)
    recipe, calibration = data["recipe"], data["calibration"]
    (c,) = data["candidates"]
    count = len(data["attention"])
    warned = f" **{count} warning{'s' * (count > 1)}: read the report first.**" if count else ""
    lines = [
        f"**{data['run_name']}** ({c['format_name']}): {data['method']}, {_k(data['engine'])}, {_k(data['device'])}, "
        f"seed {_k(data['seed'])}.{warned}",
        f"{_k(calibration['dataset'])} {calibration['size']}: {_k(calibration['score_samples'])} captions, "
        f"{_k(calibration['score_rows'])} rows, {_k(calibration['loss_tokens'], ',')} loss tokens{_loss(data)}",
        f"Effective bits {_k(recipe['effective_bits'], '.3f')} (ModelOpt counts "
        f"{_k(recipe['effective_bits_modelopt'], '.3f')}{_active(recipe)}), target "
        f"{_k(recipe['target_bits'], 'g')}{_unit(recipe)}{_tower(recipe)}: "
        f"{_quantized(recipe)} groups quantized",
    ]
    lines += _picture_lines(data.get("modality"))
    lines += [f"experts in {p['words']}" for p in data["experts"]["phases"][-1:]]
    prices = kv_sums(result.kv_cache).items()
    lines += [f"KV cache {form}: predicted KL {_n(kl)} nats/token over all blocks" for form, kl in prices]
    kl, name = c["predicted_kl_sum"], _kl_name(data["method"])
    total = f"{name} not known" if kl is None else f"{name} {_n(kl)} nats/token over all groups"
    lines.append(f"{c['name']}: {total}, raw score {_n(c['score_sum'])}")
    ends = data["intervals"]
    stable = ends and ends["top_overlap"][c["name"]]
    sure = f"; other captions would share {stable:.1f} of the top {ends['top']}" if stable else ""
    lines.append(f"{_shares(c)}; {c['groups_for_most'] or '–'} of {recipe['groups']} groups make {MOST:.0%}{sure}")
    lines += [
        f"**{x['rank']}** `{x['layer']}` {_n(_value(x))} ({_p(x['share'])})"
        f"{'' if x.get('believable', True) else ', not believable'}"
        for x in c["layers"][:5]
    ]
    return "\n".join(f"- {line}" for line in lines)


def _active(recipe: JsonMapping) -> str:
    """Bits of the weights that a token uses, where they are others."""
    active, bits = recipe["effective_bits_active"], recipe["effective_bits"]
    return "" if active is None or bits is None or abs(active - bits) < 1e-9 else f", {active:.3f} of active weights"


def _unit(recipe: JsonMapping) -> str:
    return " of active weights" if recipe["cost_model"] == "active_moe" else ""


def _tower(recipe: JsonMapping) -> str:
    """The budget of the vision tower alone, where it has one, and what each of the two takes."""
    if recipe.get("vision_bits") is None:
        return ""
    own = f" over all but the vision tower and {recipe['vision_bits']:g} over the tower"
    taken, rest = recipe.get("vision_effective_bits"), recipe.get("other_effective_bits")
    return own if taken is None else f"{own} (they take {rest:.3f} and {taken:.3f})"


def _attention(sentences: Sequence[str]) -> list[str]:
    if not sentences:
        return []
    return ["\n".join(["> **Read this first**", ">", *(f"> - {s}" for s in sentences)])]


def _headline(data: JsonMapping) -> Iterator[str]:
    recipe, kl = data["recipe"], _kl_name(data["method"])
    (c,) = data["candidates"]
    yield "## In short"
    few = f"{c['groups_for_most'] or '–'} of {recipe['groups']}"
    rows = [[c["name"], _n(c["predicted_kl_sum"]), _n(c["score_sum"]), _shares(c), few]]
    titles = [
        "candidate",
        f"total {kl} (nats/token)",
        "total raw score",
        "share by kind",
        f"groups that make {MOST:.0%}",
    ]
    yield _table(titles, rows)
    yield "Totals and shares are over all groups, as if every group were quantized; shares are of the raw score."
    counts = f"{c['name']} {_k(c['bits'], 'g')} (ModelOpt {_k(c['bits_modelopt'], 'g')})"
    yield (
        f"**Effective bits {_k(recipe['effective_bits'], '.3f')}**{_active(recipe)} for a target of "
        f"{_k(recipe['target_bits'], 'g')}{_unit(recipe)}{_tower(recipe)}: "
        f"the solver quantized {_quantized(recipe)} groups. ModelOpt counts "
        f"{_k(recipe['effective_bits_modelopt'], '.3f')} for the same choice. Ours is weight storage per weight, block "
        "scales included, over the groups of this search. ModelOpt's takes the smaller of weight and activation bits, "
        "leaves block scales out unless the format declares them, and divides by the layers outside the search as "
        f"well. Per quantized weight: {counts}."
    )


def _figures(experts: JsonMapping, pictures: JsonMapping | None) -> Iterator[str]:
    # Names, neither links nor images: MLflow's viewer disables relative links and shows relative images as source.
    drawn = {**FIGURES, **({ROUTING: "tokens per expert"} if experts["phases"] else {})}
    if pictures and pictures["share"] is not None:
        drawn[MODALITY] = "pictures and words along the blocks"
    yield "Figures of this run: " + ", ".join(f"`figures/{name}.png` ({caption})" for name, caption in drawn.items())


def _ranking(data: JsonMapping) -> Iterator[str]:
    kl = _kl_name(data["method"])
    (c,) = data["candidates"]
    usable = [x for x in c["layers"] if x["score"] is not None]
    most, least = usable[:_LISTED], usable[_LISTED:][-_LISTED:][::-1]
    sure = data["intervals"]
    ends = _ENDS if sure else ()
    known = data["recipe"]["unquantized_modules"] is not None
    titles = ["rank", "group", "modules", f"{kl} (nats/token)", *ends, "raw score", "share", *["recipe"] * known]
    titles[1:1] = ["ranks"] if sure else []
    titles += ["tied with"] if sure else []

    def row(x: JsonMapping) -> list[str]:
        doubt = " (not believable)" if not x.get("believable", True) else ""
        doubt += f" (measured, ± {x['measured_se']:.1g})" if "measured_se" in x else ""
        values = [_n(x["predicted_kl"]) + doubt, *(_n(x[e]) for e in ends), _n(x["score"]), _p(x["share"])]
        status = ["kept" if x["chosen"] is None else "quantized"] if known else []
        rank = [str(x["rank"]), *([_range(x["rank_low"], x["rank_high"])] if sure else [])]
        others = [_tied(x["tied"])] if sure else []
        return [*rank, f"`{x['layer']}`", modules_words(x["modules"]), *values, *status, *others]

    yield "## Most sensitive groups"
    yield _table(titles, map(row, most)) if most else "No group has a finite score."
    if least:
        yield "## Least sensitive groups"
        yield _table(titles, map(row, least))
    if sure:
        yield f"**{sure['words'][c['name']]}**"
    yield "## By kind of linear"
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
                "–" if k["quantized"] is None else f"{k['quantized']} of {k['groups']}",
            ]
            for k in c["kinds"]
        ],
    )


def _recipe(recipe: JsonMapping) -> Iterator[str]:
    names = recipe["unquantized_modules"]
    yield "## Recipe"
    if names is None:
        yield "Which groups the solver quantized is not known."
        return
    if not names:
        yield "Every group is quantized: the exclude list is empty."
        return
    yield (
        f"Left unquantized, {len(names)} modules, as an exclude list. Linears outside this search (such as an output "
        "head or a vision tower that was not asked for) are not listed and stay unquantized too."
    )
    yield f"```json\n{json.dumps(names, indent=0)}\n```"


def _experts(experts: JsonMapping) -> Iterator[str]:
    if not experts["phases"]:
        return
    yield "## Experts"
    yield _table(
        ["phase", "experts", "saw no token", f"fewer than {experts['floor']}", "least tokens", "median"],
        [
            [p["phase"], *(f"{p[name]:,}" for name in ("experts", "unseen", "starved", "least")), f"{p['median']:,.0f}"]
            for p in experts["phases"]
        ],
    )
    yield (
        "All experts of a block are one group. A token counts once for each expert that it is routed to, by the "
        f"unquantized model. Below {experts['floor']} tokens what an expert adds to a score is uncertain: a mean of "
        f"{experts['floor']} squares has a relative standard error of a quarter. Activation ranges are shared by all "
        "experts of a module, so that an expert without a token has the range of the others."
    )


def _picture_lines(modality: JsonMapping | None) -> Iterator[str]:
    """Pictures in a line of the note; none where no row had one."""
    if modality is None:
        return
    share = "" if modality["share"] is None else f"; image positions make {_p(modality['share'])} of the total"
    yield f"{modality['image_tokens']:,} of {modality['tokens']:,} scored tokens are image tokens{share}"


def _pictures(data: JsonMapping) -> Iterator[str]:
    modality = data.get("modality")
    if modality is None:
        return
    yield "## Pictures and words"
    yield f"{next(_picture_lines(modality))}."
    (c,) = data["candidates"]
    known = [x for x in c["layers"] if x["image_share"] is not None and x["predicted_kl"] is not None]
    if known:
        most = sorted(known, key=lambda x: -x["image_share"] * x["predicted_kl"])[:_LISTED]
        yield "### Groups that pictures stress most"
        yield _table(
            ["group", "from image positions (nats/token)", "share", "low", "high", "rank of the whole"],
            [
                [
                    f"`{x['layer']}`",
                    _n(x["image_share"] * x["predicted_kl"]),
                    *(_p(x[name]) for name in ("image_share", "image_low", "image_high")),
                    str(x["rank"]),
                ]
                for x in most
            ],
        )
    else:
        words = (
            "ModelOpt's search has no scores by token"
            if data["engine"] == "stock"
            else "This method scores the predicted words alone"
        )
        yield f"{words}, so that image positions have no share of their own."
    if modality["ranges"]:
        ranges = sorted(modality["ranges"], key=lambda r: (-r["clipped"], -r["images"] / max(r["words"], 1e-30)))
        worst = ranges[:_LISTED]
        yield "### Static activation ranges"
        yield _table(
            ["module", "largest at words", "at image positions", "image tokens that a range of words clips"],
            [[f"`{r['module']}`", _n(r["words"]), _n(r["images"]), _p(r["clipped"])] for r in worst],
        )
        yield (
            "Magnitudes of a module's input in the calibration rows. The last column is the share of the image tokens "
            "with a larger magnitude than any word of the same rows; the ranges of this run hold both."
        )


def _run(data: JsonMapping) -> Iterator[str]:
    model, cal = data["model"], data["calibration"]
    lineage = f", language model `{model['language_model']}`" if model["language_model"] else ""
    padding = f"{_k(cal['padding_share'], '.1%')} of the scored tokens are padding"
    batches = len(cal["batch_loss_tokens"])
    tokens = f"{_k(cal['loss_tokens'], ',')} in {_k(batches or None)} score batch{'' if batches == 1 else 'es'}"
    yield "## What was run"
    yield _facts(
        [
            ["model", f"{model['name']} (`{model['source']}`), revision `{_k(model['revision'])}`"],
            ["architecture", f"{_k(model['architecture'])}, {_k(model['dtype'])}{lineage}"],
            [
                "method",
                f"{data['method']}, engine {_k(data['engine'])}, seed {_k(data['seed'])}, {_k(data['device'])}",
            ],
            [
                "captions",
                f"{_k(cal['dataset'])} {cal['size']} (`{_k(cal['digest'][:12])}`): {_k(cal['calib_samples'])} to "
                f"calibrate, {_k(cal['score_samples'])} to score",
            ],
            [
                "rows",
                f"{rows_words(cal['dataset'], _k(cal['packing']), _k(cal['seq_len']))}, "
                f"{_k(cal['batch_size'])} a batch: {_k(cal['calib_rows'])} to calibrate, "
                f"{_k(cal['score_rows'])} to score",
            ],
            ["loss tokens", f"{tokens}; {padding}"],
            *([["loss per token, unquantized", _loss(data).removeprefix("; ")]] if data["baseline"] else []),
            *([_NAMES.get(name, name), value] for name, value in data["tags"].items()),
            ["made", _k(data["created"])],
        ],
    )
    (c,) = data["candidates"]
    yield f"### Candidate {c['name']}"
    yield _facts(
        [
            ["pair → format", f"{_k(c['quant_pair'])} → `{_k(c['format_name'])}`"],
            ["granularity", _k(c["granularity"])],
            ["weights", c["words"]["weight"]],
            ["inputs", c["words"]["activation"]],
            ["calibration algorithm", c["words"]["algorithm"]],
            ["config hash", f"`{_k(c['config_hash'])}`"],
            ["adjusted", "; ".join(c["adjustments"]) or (_NOTHING if c["config_hash"] else _k(None))],
        ],
    )


def _reading(method: str, intervals: JsonMapping | None, engine: str) -> Iterator[str]:
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
    elif method == "fisher":
        yield (
            "**Raw score** is the sum over score batches of E(Σ g · Δy)², with g the gradient of the batch's mean loss "
            "for tokens that the model itself predicts, Δy what quantizing the group changes in its output, and the "
            "inner sum over features and windows of neighbouring tokens. It depends on the size and number of the "
            "batches: compare it only between runs with the same calibration and method."
        )
        yield (
            "**Predicted KL** is half of that sum on the scale of one token's loss, in nats per token: to second order "
            "the KL divergence that quantizing this group alone would cause, estimated from drawn tokens. It compares "
            "across runs, pairs and batch sizes. The total over groups assumes that damages add."
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
    if intervals is None:
        yield (
            "There are no intervals: they come from the scores of single captions, two at least, and "
            f"{'the stock engine keeps none' if engine == 'stock' else 'this result has none'}."
        )
        return
    yield (
        f"**low** and **high** are the ends of the {intervals['level']:.0%} interval of each group's "
        f"{_kl_name(method)}, and **ranks** that of its rank: from the {intervals['captions']} scored captions, drawn "
        "again many times. **Tied** are groups of which neither beats the other in 95% of the draws: read no order "
        "into them. The activation ranges "
        "are held fixed, so what other captions would do to those is not in it."
    )


def _cost(data: JsonMapping) -> Iterator[str]:
    yield "## Time, memory, versions"
    rows = [[f"{phase} (s)", f"{seconds:.2f}"] for phase, seconds in data["seconds"].items()]
    rows += [["all phases (s)", f"{sum(data['seconds'].values()):.2f}"]] if rows else []
    rows += [[_NAMES.get(name, name), f"{value:.2f}"] for name, value in data["memory"].items()]
    rows += [[name.removeprefix("version."), str(value)] for name, value in data["provenance"].items()]
    yield _facts(rows)


def _loss(data: JsonMapping) -> str:
    """How well the unquantized model predicts, beside guessing; empty where it is not known."""
    baseline = data["baseline"]
    if not baseline:
        return ""
    return (
        f"; the unquantized model loses {_k(baseline['loss_per_token'], '.2f')} nats per token, guessing "
        f"ln({baseline['vocabulary']:,}) = {baseline['guessing']:.2f}"
    )


def _kl_name(method: str) -> str:
    return "measured KL" if method == "kl_div" else "predicted KL"


def _shares(c: JsonMapping) -> str:
    return ", ".join(f"{k['kind']} {_p(k['share'])}" for k in c["kinds"])


def _value(layer: JsonMapping) -> float | None:
    value: float | None = layer["score"] if layer["predicted_kl"] is None else layer["predicted_kl"]
    return value


def _quantized(recipe: JsonMapping) -> str:
    count = recipe["quantized_groups"]
    return f"{'an unknown number' if count is None else count} of {recipe['groups']}"


def _range(low: int | None, high: int | None) -> str:
    if low is None:
        return "–"
    return str(low) if low == high else f"{low}–{high}"


def _tied(keys: Sequence[str]) -> str:
    return listed([f"`{key}`" for key in keys], _TIED) or "–"


def _k(value: object, form: str = "") -> str:
    """What is known of a run as the form says, and in words what is not."""
    return "not known" if value in (None, "") else format(value, form)


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
