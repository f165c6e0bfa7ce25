"""An evaluation as Markdown, tables, figure and folder."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from layerbits.answers.evaluation import Evaluated, Evaluation, documents
from layerbits.answers.paired import LEVEL, Interval, Verdict
from layerbits.atomic import dated, whole_folder, write_json
from layerbits.results.naming import scheme_title
from layerbits.tracking.contract import VERDICT_TAG
from layerbits.tracking.made import Data, Measured

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TAG = 5000  # characters that every server takes
_ELSEWHERE = ("bits", "predicted_kl", "kl", "kl_se")
"""Numbers of a scheme that are not of its answers."""


def markdown(evaluation: Evaluation) -> str:
    """A table per task with a row per scheme, and what to read it with."""
    verdicts, settings = evaluation.verdicts(), evaluation.settings
    dtype = settings.get("dtype", evaluation.model.dtype)
    lines = [
        f"{evaluation.model.name} ({dtype}) and {len(evaluation.schemes)} schemes on the same questions, "
        f"lm-evaluation-harness {settings.get('harness', '')}, greedy.",
    ]
    for task, answers in evaluation.unquantized.items():
        count = len(answers.answers)
        odds = any(verdicts[task, s.scheme].log_odds is not None for s in evaluation.schemes)
        lines += [
            "",
            f"**{task}**: {count} documents, {answers.metric}, unquantized {100 * answers.accuracy:.1f}% right",
            "",
            f"| scheme | bits | KL (nats/token) | right | lost / won | difference (points) |"
            f"{' log-odds (nats) |' * odds} p (Holm) | verdict |",
            f"|---|---|---|---|---|---|{'---|' * odds}---|---|",
            *(_row(s, verdicts[task, s.scheme], odds) for s in evaluation.schemes),
        ]
        rhos = [(s, evaluation.predicted_spearman(task, s)) for s in evaluation.schemes if task in s.predicted]
        if rhos:
            each = ", ".join(
                f"{s.scheme} {rho:.2f} (mean {sum(s.predicted[task]) / count:+.2f} nats)" for s, rho in rhos
            )
            lines += ["", f"Predicted against measured change of log-odds, Spearman over the documents: {each}."]
            flips = [(s, *evaluation.predicted_flips(task, s)) for s, _ in rhos]
            told = ", ".join(f"{s.scheme} {both} of {said} ({came} measured)" for s, said, came, both in flips)
            lines += [f"Predicted changes of their sign that came true: {told}."]
        cut = {"unquantized": answers.cut, **{s.scheme: s.tasks[task].cut for s in evaluation.schemes}}
        if any(cut.values()):
            those = ", ".join(f"{name} {number}" for name, number in cut.items() if number)
            lines += ["", f"Answers that ended only at the limit of tokens: {those}."]
    lines += [
        "",
        f"Intervals and tests are paired, at {LEVEL:.0%}: Bonett and Price 2012, exact McNemar, Holm over all "
        f"{len(verdicts)} comparisons. lost = right unquantized, wrong quantized.",
    ]
    if math.isfinite(evaluation.floor_kl):
        lines.append(f"KL of the unquantized model to itself by arithmetic alone: {evaluation.floor_kl:.2g}.")
    return "\n".join(lines) + "\n"


def _row(scheme: Evaluated, verdict: Verdict, odds: bool) -> str:
    paired = verdict.paired
    kl = f"{scheme.kl:.4g} ± {scheme.kl_se:.1g}" if math.isfinite(scheme.kl) else "–"
    bits = f"{scheme.effective_bits:.3f}" if math.isfinite(scheme.effective_bits) else "–"
    change = f" {_interval(verdict.log_odds, 1.0)} |" if odds else ""
    return (
        f"| {scheme.scheme} | {bits} | {kl} | {100 * paired.accuracies[1]:.1f}% | "
        f"{paired.lost} / {paired.won} | {_interval(verdict.difference, 100.0)} |{change} {verdict.adjusted:.2g} | "
        f"{verdict.words} |"
    )


def _interval(interval: Interval | None, scale: float) -> str:
    if interval is None:
        return "–"
    return f"{scale * interval.value:+.2f} ({scale * interval.low:+.2f} to {scale * interval.high:+.2f})"


def parameters(evaluation: Evaluation) -> dict[str, str]:
    """What was in force, for the tracking server."""
    model = evaluation.model
    return {
        "eff.model": model.name,
        "eff.model_revision": model.revision,
        "eff.schemes": ",".join(s.scheme for s in evaluation.schemes),
        **{f"eff.{name}": value for name, value in evaluation.settings.items()},
    }


def tags(evaluation: Evaluation) -> dict[str, str]:
    """Tags that have MLflow show the tables of documents, and the verdict on each scheme for others to find."""
    tables = [{"path": table_path(s), "type": "table"} for s in evaluation.schemes]
    said = {s.scheme: summary(evaluation, s)[:_TAG] for s in evaluation.schemes if s.digest}
    return {
        "mlflow.loggedArtifacts": json.dumps(tables),
        **{f"{VERDICT_TAG}{name}": words for name, words in said.items()},
    }


def data(evaluation: Evaluation) -> tuple[Data, ...]:
    """The documents of each task as MLflow's datasets: named, counted and told apart by prompts and right answers."""
    datasets = []
    versions = dict(one.rsplit(":", 1) for one in evaluation.settings.get("task_versions", "").split(",") if ":" in one)
    for task, asked in evaluation.unquantized.items():
        documents = [[a.document, a.prompt_hash, a.target] for a in asked.answers]
        digest = hashlib.sha256(json.dumps(documents).encode()).hexdigest()[:36]  # as long as MLflow takes it
        columns = [{"type": "string", "name": name, "required": True} for name in ("question", "right_answer")]
        source = {"task": task, "version": versions.get(task, ""), "harness": evaluation.settings.get("harness", "")}
        fields = {
            "name": task,
            "digest": digest,
            "source_type": "code",
            "source": json.dumps({"tags": source}),
            "schema": json.dumps({"mlflow_colspec": columns}),
            "profile": json.dumps({"documents": len(documents), "metric": asked.metric}),
        }
        datasets.append(Data(fields, "evaluation"))
    return tuple(datasets)


def measured(evaluation: Evaluation) -> tuple[Measured, ...]:
    """Which of the metrics are of which scheme and task; those of a served model are of no scheme that is known."""
    model = evaluation.model
    known = {s.scheme: (s.digest, s.candidates) for s in evaluation.schemes if s.digest}
    known["unquantized"] = hashlib.sha256(f"{model.name}@{model.revision}".encode()).hexdigest()[:16], ()
    metrics = evaluation.metrics()
    measurements = []
    for task in evaluation.unquantized:
        for scheme, (digest, candidates) in known.items():
            prefix = f"eval/{task}/{scheme}/"
            numbers = [key for key in metrics if key.startswith(prefix)]
            elsewhere = tuple(key for key in numbers if key.removeprefix(prefix) in _ELSEWHERE)
            of_task = tuple(key for key in numbers if key not in elsewhere)
            name = scheme_title(scheme, candidates, model.name)
            measurements.append(Measured(name, digest, of_task, task))
            measurements += [Measured(name, digest, elsewhere)] if elsewhere else []
    return tuple(measurements)


def remarks(evaluation: Evaluation) -> dict[str, str]:
    """Digest of each scheme → the verdict on it, for the reports of the runs that made it."""
    return {s.digest: summary(evaluation, s)[:_TAG] for s in evaluation.schemes if s.digest}


def table_path(scheme: Evaluated) -> str:
    """Where a scheme's table of documents is, in the evaluation's folder."""
    return f"documents/{scheme.scheme}.json"


def table(evaluation: Evaluation, scheme: Evaluated) -> str:
    """The documents of a scheme in the JSON that ``mlflow.load_table`` and the UI read, changed answers first."""
    rows = documents(evaluation, scheme)
    columns = list(rows[0])
    return json.dumps({"columns": columns, "data": [[row[c] for c in columns] for row in rows]}, allow_nan=False)


def layers_csv(evaluation: Evaluation) -> str:
    """What each group alone does to the answers of each task, the most harmful first."""
    ordered = sorted(evaluation.layers, key=lambda one: (one.task, one.candidate, one.change.value))
    rows = (
        f"{one.task},{one.layer},{one.candidate},{one.change.value:.6g},{one.change.low:.6g},{one.change.high:.6g}"
        for one in ordered
    )
    return "\n".join(["task,layer,candidate,log_odds,log_odds_low,log_odds_high", *rows]) + "\n"


def figure(evaluation: Evaluation) -> Figure:
    """Accuracy difference against measured KL, a panel per task, both with their intervals."""
    import pandas as pd

    from layerbits.figures import answers

    verdicts = evaluation.verdicts()
    rows = [
        {
            "task": task,
            "label": "schemes" if s.control_of is None else "controls",
            "kl": s.kl,
            "kl_se": s.kl_se,
            "difference": (v := verdicts[task, s.scheme].difference).value,
            "difference_low": v.low,
            "difference_high": v.high,
        }
        for task in evaluation.unquantized
        for s in evaluation.schemes
    ]
    return answers(pd.DataFrame(rows), title=f"{evaluation.model.name}: answers against KL, {LEVEL:.0%} intervals")


def write_evaluation(evaluation: Evaluation, root: Path) -> Path:
    """Writes ``evaluation.json``, ``evaluation.md``, the tables of documents and the figure, whole or not at all.

    Args:
        evaluation: What was found.
        root: Output root; the folder is made below its ``tmp``.

    Raises:
        UserError: The disk is full or cannot be written.
    """
    from layerbits.figures.style import save_png

    final = dated(root, f"evaluation_{evaluation.model.name}")
    with whole_folder(final) as partial:
        write_json(partial / "evaluation.json", evaluation.to_json())
        (partial / "evaluation.md").write_text(markdown(evaluation))
        if evaluation.layers:
            (partial / "layers.csv").write_text(layers_csv(evaluation))
        (partial / "documents").mkdir()
        for scheme in evaluation.schemes:
            (partial / table_path(scheme)).write_text(table(evaluation, scheme))
        if any(math.isfinite(s.kl) for s in evaluation.schemes):
            save_png(figure(evaluation), partial / "figures" / "answers.png")
    return final


def summary(evaluation: Evaluation, scheme: Evaluated) -> str:
    """The verdicts on one scheme in a line."""
    verdicts = evaluation.verdicts()
    return "; ".join(f"{task}: {verdicts[task, scheme.scheme].words}" for task in evaluation.unquantized)
