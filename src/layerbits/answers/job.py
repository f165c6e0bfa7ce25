"""Schemes on tasks: the model is loaded once, each scheme is applied, asked and taken away again."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from layerbits.answers.endpoint import answering, check_same_model, served
from layerbits.answers.evaluation import Evaluated, Evaluation, LayerChange, TaskAnswers
from layerbits.answers.harness import Harness
from layerbits.answers.paired import LEVEL, detectable, fewest, mean_interval, points
from layerbits.answers.settings import EvaluateSettings, TaskSettings
from layerbits.atomic import write_json
from layerbits.cache import cache_dir
from layerbits.errors import UserError
from layerbits.inputs.datasets import held_out_captions

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from transformers import PreTrainedModel

    from layerbits.answers.predicted import PredictedChanges
    from layerbits.inputs.calibration import Batch
    from layerbits.probing.apply import Ranges
    from layerbits.probing.loading import Prepared
    from layerbits.probing.measured import ProbeResult
    from layerbits.results.result import ModelInfo
    from layerbits.schemes import Scheme


def evaluate_schemes(schemes: Sequence[Scheme], settings: EvaluateSettings, device: str, root: Path) -> Evaluation:
    """Asks the unquantized model and each scheme the same questions.

    Args:
        schemes: Of one model and calibration.
        settings: What to ask.
        device: ``auto``, ``cpu`` or ``cuda``.
        root: Project folder, for the git commit.

    Raises:
        UserError: The harness is not installed, a task cannot be put, or there are too few documents to see anything;
            all before the weights are loaded. Or there is too little memory; before anything is measured. Or as
            :func:`layerbits.probing.loading.prepare_together`.
    """
    from layerbits.answers.batch import plan_batch
    from layerbits.probing.apply import apply_scheme, find_ranges
    from layerbits.probing.loading import prepare_together
    from layerbits.probing.probe import weights_fit
    from layerbits.progress import progress
    from layerbits.provenance import provenance
    from layerbits.scoring.assigned import Made
    from layerbits.scoring.precision import computing

    clock = time.perf_counter
    start = clock()
    prepared = prepare_together(schemes, "evaluate")
    harness = Harness(settings.tasks, held_out_captions(prepared.captions.held_out))
    check_documents(harness.documents, len({s.digest for s in schemes}) + (settings.endpoint is not None))
    loaded = prepared.load(device, whole=True)
    lm = harness.wrap(loaded.model, loaded.tokenizer)
    lengths = harness.check_lengths(lm)
    size, precision = plan_batch(loaded.model, lengths, settings.tasks.batch_size, settings.dtype)
    lm.batch_size_per_gpu = size
    tasks = replace(settings.tasks, batch_size=size)
    rows = _rows(prepared, loaded.model, settings) if settings.rows else ()
    remote = None
    if settings.endpoint is not None:
        remote = served(settings.endpoint, settings.endpoint_model, prepared.resolved.source, lm.max_length)
        check_same_model(lm, remote, held_out_captions(prepared.captions.held_out)[0])
    seconds = {"load": clock() - start}

    start = clock()
    probe = _probe(prepared, loaded.model, loaded.info, schemes, rows, settings.dtype) if rows else None
    seconds["probe"] = clock() - start
    ranges = find_ranges(loaded.model, schemes, prepared.calibration)
    kept = _Kept(_key(loaded.info, precision.dtype, harness, tasks))
    with computing(loaded.model, precision):
        start = clock()
        unquantized, _ = kept.answers("unquantized", harness.tasks, lambda tasks: harness.each(lm, tasks))
        seconds["reference"] = clock() - start
        start = clock()
        predicted = predict(harness, lm, schemes, ranges) if settings.predict else {}
        seconds["predict"] = clock() - start
        start = clock()
        made: Made | None = {} if weights_fit(loaded.model, schemes) else None
        measured = {} if probe is None else {p.scheme: p.difference for p in probe.schemes}
        evaluated = []
        for scheme in progress(schemes, "evaluating"):

            def ask(tasks: Sequence[str], scheme: Scheme = scheme) -> Iterator[TaskAnswers]:
                with apply_scheme(loaded.model, scheme, ranges, made=made):
                    yield from harness.each(lm, tasks)

            answers, spent = kept.answers(scheme.digest, harness.tasks, ask)
            check_same_prompts(unquantized, answers, scheme.name)
            difference = measured.get(scheme.name)
            evaluated.append(
                Evaluated(
                    scheme=scheme.name,
                    digest=scheme.digest,
                    control_of=scheme.how.get("reference"),
                    effective_bits=scheme.effective_bits,
                    predicted_kl=scheme.predicted_kl + scheme.kv_predicted_kl,
                    kl=math.nan if difference is None else difference.kl,
                    kl_se=math.nan if difference is None else difference.kl_se,
                    tasks=answers,
                    seconds=spent,
                    predicted={task: tuple(map(float, p.of_scheme(scheme))) for task, p in predicted.items()},
                    candidates=tuple(candidate.name for candidate in scheme.candidates),
                )
            )
    if remote is not None:
        start_served = clock()
        with answering():
            answers = harness.answers(remote)
        check_same_prompts(unquantized, answers, "the endpoint")
        nan, spent = math.nan, clock() - start_served
        evaluated.append(Evaluated("served", "", None, nan, nan, nan, nan, answers, spent))
    seconds["evaluate"] = clock() - start
    evaluation = Evaluation(
        model=loaded.info,
        source_run_ids=tuple(dict.fromkeys(run for s in schemes for run in s.source_run_ids)),
        dataset=prepared.scheme.calibration.dataset,
        unquantized=unquantized,
        schemes=tuple(evaluated),
        floor_kl=math.nan if probe is None else probe.floor.kl,
        margin=settings.margin,
        layers=_layers(predicted, schemes),
        settings={**_settings_record(replace(settings, tasks=tasks), harness, prepared), "dtype": precision.dtype},
        seconds=seconds,
        provenance=provenance(root),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    kept.forget()
    return evaluation


def predict(harness: Harness, lm: LM, schemes: Sequence[Scheme], ranges: Ranges) -> dict[str, PredictedChanges]:
    """Task → first-order changes of log-odds, of the tasks whose answers are chosen among several.

    Raises:
        UserError: There is no such task.
    """
    from layerbits.answers.predicted import predict_changes

    tasks = {name: task for name, task in harness.tasks.items() if task.OUTPUT_TYPE == "multiple_choice"}
    if not tasks:
        raise UserError("predict=true needs a task whose answers are chosen among several, such as cloze; add one")
    return {name: predict_changes(lm, task, schemes, ranges) for name, task in tasks.items()}


def _layers(predicted: Mapping[str, PredictedChanges], schemes: Sequence[Scheme]) -> tuple[LayerChange, ...]:
    names = {c.config_hash: c.name for scheme in schemes for c in scheme.candidates}
    return tuple(
        LayerChange(task, layer, names[config], mean_interval(values))
        for task, changes in predicted.items()
        for (layer, config), values in changes.changes.items()
    )


def check_documents(documents: Mapping[str, int], schemes: int) -> None:
    """Checks that the documents could show something, before the run, and says what.

    Args:
        documents: Task → how many.
        schemes: How many are compared with the unquantized model.

    Raises:
        UserError: Of one task there are so few that no number of lost answers could be told from chance.
    """
    comparisons = len(documents) * max(schemes, 1)
    level = (1 - LEVEL) / comparisons
    least = fewest(level)
    for task, count in documents.items():
        if count < least:
            raise UserError(
                f"{count} documents of {task} cannot show any difference in {comparisons} comparisons, whatever the "
                f"answers; use limit={least} or more"
            )
        print(
            f"{task}: {count} documents, which show a loss of {points(detectable(count, level=level))} points or more"
        )


def check_same_prompts(before: Mapping[str, TaskAnswers], after: Mapping[str, TaskAnswers], name: str) -> None:
    """Checks that two models were asked the same, which the paired comparison rests on.

    Raises:
        UserError: They were not.
    """
    for task, answers in before.items():
        asked = [(a.document, a.prompt_hash) for a in answers.answers]
        if asked != [(a.document, a.prompt_hash) for a in after[task].answers]:
            raise UserError(f"task {task} put other prompts to {name}: its prompts are drawn anew; use another task")


def _rows(prepared: Prepared, model: PreTrainedModel, settings: EvaluateSettings) -> tuple[Batch, ...]:
    """Held-out rows for the KL divergence, of which it is known that they fit in memory."""
    from layerbits.probing.probe import held_out_rows
    from layerbits.scoring.precision import plan_precision

    packing, seq_len, _ = prepared.scheme.calibration.row_shape
    held_out, rows = held_out_captions(prepared.captions.held_out), settings.rows
    batches = held_out_rows(held_out, prepared.tokenizer, packing, seq_len, rows, rows)
    tokens = max(s.input_ids.numel() for b in batches for s in b.segments)
    plan_precision(model, tokens, settings.dtype, "use fewer rows (rows; 0 leaves the KL out), or dtype=model")
    return batches


def _probe(
    prepared: Prepared,
    model: PreTrainedModel,
    info: ModelInfo,
    schemes: Sequence[Scheme],
    batches: Sequence[Batch],
    dtype: str,
) -> ProbeResult:
    from layerbits.probing.measured import Rows
    from layerbits.probing.probe import probe

    data = prepared.scheme.calibration
    packing, seq_len, _ = data.row_shape
    what = Rows(data.dataset, packing, seq_len, sum(b.rows for b in batches), tokens=0)
    return probe(model, info, schemes, prepared.calibration, batches, what, dtype=dtype)


class _Kept:
    """Answers that are finished on disk, a file per model and task, so that a killed job goes on where it was."""

    def __init__(self, key: str) -> None:
        self._folder = cache_dir() / "answers" / key

    def answers(
        self, name: str, tasks: Iterable[str], ask: Callable[[Sequence[str]], Iterator[TaskAnswers]]
    ) -> tuple[dict[str, TaskAnswers], float]:
        """Those of a model to each task, and the seconds that they took.

        Args:
            name: What tells the model from the others of the evaluation.
            tasks: Names.
            ask: Puts the tasks that are not here, one after the other; not called where there is none.
        """
        files = {task: self._folder / f"{name}-{hashlib.sha256(task.encode()).hexdigest()[:16]}.json" for task in tasks}
        records = {task: json.loads(path.read_text()) for task, path in files.items() if path.exists()}
        missing = [task for task in files if task not in records]
        start = time.perf_counter()
        for answers in ask(missing) if missing else ():
            spent, start = time.perf_counter() - start, time.perf_counter()
            records[answers.task] = {"seconds": spent, "answers": asdict(answers)}
            self._folder.mkdir(parents=True, exist_ok=True)
            write_json(files[answers.task], records[answers.task])
        answers_of = {task: TaskAnswers.from_json(records[task]["answers"]) for task in files}
        return answers_of, sum(float(one["seconds"]) for one in records.values())

    def forget(self) -> None:
        """Removes them."""
        for path in self._folder.glob("*.json"):
            path.unlink()
        if self._folder.exists():
            self._folder.rmdir()


def _key(info: ModelInfo, dtype: str, harness: Harness, settings: TaskSettings) -> str:
    from layerbits import __version__

    configs = {name: task.dump_config() for name, task in harness.tasks.items()}
    plain = [asdict(info), dtype, configs, asdict(settings), __version__, metadata.version("lm-eval")]
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:24]


def _settings_record(settings: EvaluateSettings, harness: Harness, prepared: Prepared) -> dict[str, str]:
    tasks = settings.tasks
    return {
        "tasks": ",".join(harness.tasks),
        "task_versions": ",".join(f"{name}:{version}" for name, version in harness.versions.items()),
        "task_path": str(tasks.path or "none"),
        "limit": str(tasks.limit or "none"),
        "num_fewshot": "as the task says" if tasks.num_fewshot is None else str(tasks.num_fewshot),
        "chat_template": str(tasks.chat_template).lower(),
        "batch_size": str(tasks.batch_size),
        "rows": str(settings.rows),
        "endpoint": " ".join(filter(None, (settings.endpoint, settings.endpoint_model))) or "none",
        "predict": str(settings.predict).lower(),
        "margin": "none" if settings.margin is None else f"{settings.margin:g}",
        "harness": metadata.version("lm-eval"),
        "dataset": prepared.scheme.calibration.dataset,
    }
