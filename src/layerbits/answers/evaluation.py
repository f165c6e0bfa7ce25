"""Answers of models to tasks, and what they say of schemes, as plain data (no torch)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from scipy import stats

from layerbits.answers.paired import Interval, Paired, Verdict, judge
from layerbits.errors import UserError
from layerbits.plain import JsonMapping, JsonObject, finite, finite_object
from layerbits.results.result import FloatArray, ModelInfo

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Answer:
    """What one model made of one document.

    Attributes:
        document: Its number in the task.
        question: End of the prompt.
        target: The right answer.
        said: The model's: the most likely choice, or what it generated.
        right: Whether the harness counts it as right.
        log_odds: Of the right answer, in nats: of it against all other choices, or of a single continuation against
            all others; ``None`` for generated answers.
        prompt_hash: The harness's, of the whole prompt.
    """

    document: int
    question: str
    target: str
    said: str
    right: bool
    log_odds: float | None
    prompt_hash: str


@dataclass(frozen=True)
class TaskAnswers:
    """One model's answers to one task.

    Attributes:
        task: Its name.
        metric: The harness's metric that says right or wrong, and its filter.
        answers: In the order of the documents.
        cut: Generated answers that ended only at the limit of tokens.
    """

    task: str
    metric: str
    answers: tuple[Answer, ...]
    cut: int = 0

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return sum(a.right for a in self.answers) / len(self.answers)

    @classmethod
    def from_json(cls, data: JsonMapping) -> TaskAnswers:
        """Reads ``asdict``'s data back."""
        return cls(data["task"], data["metric"], tuple(Answer(**a) for a in data["answers"]), data["cut"])


@dataclass(frozen=True)
class Evaluated:
    """A scheme's answers beside what else is known of it.

    Attributes:
        scheme: Its name, or ``served``.
        digest: Its digest; empty where it is not known.
        control_of: Scheme that it is a control of.
        effective_bits: Weight storage bits per weight.
        predicted_kl: Nats per token.
        kl: Measured on held-out rows, with its standard error; NaN where it was not measured.
        tasks: Task → answers.
        seconds: What the answers took.
        predicted: Task → ``[documents]`` first-order change of the right answers' log-odds, nats; where asked for.
        candidates: Names of the candidates that it uses.
    """

    scheme: str
    digest: str
    control_of: str | None
    effective_bits: float
    predicted_kl: float
    kl: float
    kl_se: float
    tasks: Mapping[str, TaskAnswers]
    seconds: float = 0.0
    predicted: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    candidates: tuple[str, ...] = ()


@dataclass(frozen=True)
class LayerChange:
    """Which way quantizing one group alone moves the answers of a task, to first order.

    Attributes:
        task: The task.
        layer: The group.
        candidate: What it is quantized with.
        change: Mean change of the right answers' log-odds over the documents with its interval, nats.
    """

    task: str
    layer: str
    candidate: str
    change: Interval


@dataclass(frozen=True)
class Evaluation:
    """The unquantized model and schemes on the same documents.

    Attributes:
        unquantized: Task → the unquantized model's answers.
        floor_kl: KL of the unquantized model to itself by arithmetic alone; NaN where it was not measured.
        margin: Loss of accuracy that is allowed, a share; ``None`` = not asked.
        layers: What each group does to the answers, where it was asked for.
        settings: What was in force: tasks, limit, batch size, the harness's version and so on.
    """

    model: ModelInfo
    source_run_ids: tuple[str, ...]
    dataset: str
    unquantized: Mapping[str, TaskAnswers]
    schemes: tuple[Evaluated, ...]
    floor_kl: float
    margin: float | None
    layers: tuple[LayerChange, ...] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)
    created: str = ""

    def pair(self, task: str, scheme: Evaluated) -> Paired:
        """One comparison in counts."""
        before, after = self.unquantized[task], scheme.tasks[task]
        return Paired.of([a.right for a in before.answers], [a.right for a in after.answers])

    def log_odds_changes(self, task: str, scheme: Evaluated) -> FloatArray | None:
        """``[documents]`` change of the right answers' log-odds in nats, ``None`` for generated answers."""
        return log_odds_changes(self.unquantized[task].answers, scheme.tasks[task].answers)

    def predicted_spearman(self, task: str, scheme: Evaluated) -> float:
        """Rank correlation of predicted with measured changes of log-odds over the documents; NaN without either."""
        measured = self.log_odds_changes(task, scheme)
        predicted = scheme.predicted.get(task)
        if measured is None or predicted is None or np.ptp(predicted) == 0 or np.ptp(measured) == 0:
            return math.nan
        return float(stats.spearmanr(predicted, measured).statistic)

    def predicted_flips(self, task: str, scheme: Evaluated) -> tuple[int, int, int]:
        """Documents whose right answer's log-odds change their sign: predicted, measured, and both."""
        before = np.array([a.log_odds or 0.0 for a in self.unquantized[task].answers])
        measured = self.log_odds_changes(task, scheme)
        predicted = scheme.predicted.get(task)
        if measured is None or predicted is None:
            return 0, 0, 0
        told, came = (np.sign(before + change) != np.sign(before) for change in (np.asarray(predicted), measured))
        return int(told.sum()), int(came.sum()), int((told & came).sum())

    def verdicts(self) -> dict[tuple[str, str], Verdict]:
        """(task, scheme) → verdict, Holm over all of them."""
        keys = [(task, scheme) for scheme in self.schemes for task in self.unquantized]
        changes = {(task, s.scheme): self.log_odds_changes(task, s) for task, s in keys}
        known = {key: [float(v) for v in values] for key, values in changes.items() if values is not None}
        return judge({(task, s.scheme): self.pair(task, s) for task, s in keys}, known, self.margin)

    def metrics(self) -> dict[str, float]:
        """Numbers by the names in ``docs/tracking.md``: ``eval/<task>/<scheme>/<number>`` and so on."""
        values: dict[str, float] = {}
        for task, answers in self.unquantized.items():
            values[f"eval/{task}/unquantized/accuracy"] = answers.accuracy
            values[f"eval/{task}/documents"] = float(len(answers.answers))
        verdicts = self.verdicts()
        for scheme in self.schemes:
            for task in self.unquantized:
                verdict = verdicts[task, scheme.scheme]
                numbers = _numbers(scheme, verdict)
                if task in scheme.predicted:
                    numbers["predicted_log_odds"] = float(np.mean(scheme.predicted[task]))
                    numbers["predicted_spearman"] = self.predicted_spearman(task, scheme)
                values |= {f"eval/{task}/{scheme.scheme}/{name}": value for name, value in numbers.items()}
        values["eval/floor_kl"] = self.floor_kl
        values |= {f"seconds/{phase}": spent for phase, spent in self.seconds.items()}
        return {key: value for key, value in values.items() if math.isfinite(value)}

    def to_json(self) -> dict[str, object]:
        """Plain JSON data with the verdicts and its schema version; what is not a number becomes null."""
        verdicts = [
            {"task": task, "scheme": scheme, **verdict.to_json()} for (task, scheme), verdict in self.verdicts().items()
        ]
        return {"schema_version": SCHEMA_VERSION, **finite_object(asdict(self)), "verdicts": finite(verdicts)}


def read_evaluation(path: Path) -> Evaluation:
    """An evaluation from the ``evaluation.json`` that it wrote.

    Raises:
        UserError: It is no such file, or one of a later version.
    """
    try:
        data = json.loads(path.read_text("utf-8"))
        if data["schema_version"] > SCHEMA_VERSION:
            raise UserError(f"{path} has schema_version {data['schema_version']}; upgrade layerbits")
        return Evaluation(
            model=ModelInfo(**data["model"]),
            source_run_ids=tuple(data["source_run_ids"]),
            dataset=data["dataset"],
            unquantized=_tasks(data["unquantized"]),
            schemes=tuple(_scheme(one) for one in data["schemes"]),
            floor_kl=math.nan if data["floor_kl"] is None else data["floor_kl"],
            margin=data["margin"],
            layers=tuple(
                LayerChange(one["task"], one["layer"], one["candidate"], Interval(**one["change"]))
                for one in data["layers"]
            ),
            settings=data["settings"],
            seconds=data["seconds"],
            provenance=data["provenance"],
            created=data["created"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no evaluation.json ({error!r}); give one of experiments/evaluate.py") from None


_NUMBERS = ("effective_bits", "predicted_kl", "kl", "kl_se")


def _scheme(data: JsonMapping) -> Evaluated:
    values: JsonObject = {k: math.nan if v is None and k in _NUMBERS else v for k, v in data.items()}
    values["tasks"] = _tasks(data["tasks"])
    values["predicted"] = {task: tuple(changes) for task, changes in data["predicted"].items()}
    values["candidates"] = tuple(data.get("candidates", ()))
    return Evaluated(**values)


def _tasks(data: JsonMapping) -> dict[str, TaskAnswers]:
    return {task: TaskAnswers.from_json(answers) for task, answers in data.items()}


def log_odds_changes(before: Sequence[Answer], after: Sequence[Answer]) -> FloatArray | None:
    """``[documents]`` change of the right answers' log-odds in nats; ``None`` where one of them has none."""
    pairs = [(a.log_odds, b.log_odds) for a, b in zip(before, after, strict=True)]
    known = [b - a for a, b in pairs if a is not None and b is not None]
    return np.asarray(known, dtype=np.float64) if len(known) == len(pairs) else None


def documents(evaluation: Evaluation, scheme: Evaluated) -> list[JsonObject]:
    """A row per task and document of one scheme, changed answers first."""
    rows = [
        {
            "task": task,
            "document": a.document,
            "change": "lost" if a.right and not b.right else "won" if b.right and not a.right else "",
            "question": a.question,
            "right_answer": a.target,
            "unquantized": a.said,
            "quantized": b.said,
            "unquantized_right": a.right,
            "quantized_right": b.right,
            "log_odds": a.log_odds,
            "log_odds_change": None if a.log_odds is None or b.log_odds is None else b.log_odds - a.log_odds,
            **({"predicted_log_odds_change": None if changes is None else changes[i]} if scheme.predicted else {}),
        }
        for task, before in evaluation.unquantized.items()
        for changes in (scheme.predicted.get(task),)
        for i, (a, b) in enumerate(zip(before.answers, scheme.tasks[task].answers, strict=True))
    ]
    return sorted(rows, key=lambda row: row["change"] == "")


def _numbers(scheme: Evaluated, verdict: Verdict) -> dict[str, float]:
    difference, paired = verdict.difference, verdict.paired
    numbers = {
        "accuracy": paired.accuracies[1],
        "difference": difference.value,
        "difference_low": difference.low,
        "difference_high": difference.high,
        "lost": float(paired.lost),
        "won": float(paired.won),
        "p_value": verdict.p_value,
        "p_holm": verdict.adjusted,
        "detectable": verdict.detectable,
        "bits": scheme.effective_bits,
        "predicted_kl": scheme.predicted_kl,
        "kl": scheme.kl,
        "kl_se": scheme.kl_se,
    }
    if verdict.within_margin is not None:
        numbers["within_margin"] = float(verdict.within_margin)
    if verdict.log_odds is not None:
        ends = verdict.log_odds
        numbers |= {"log_odds": ends.value, "log_odds_low": ends.low, "log_odds_high": ends.high}
    return numbers
