"""Tasks of EleutherAI's lm-evaluation-harness, put to a model; it does prompts, examples, filters and scores."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from layerbits.answers.evaluation import Answer, TaskAnswers
from layerbits.answers.settings import TaskSettings
from layerbits.errors import UserError, first_line
from layerbits.plain import JsonMapping

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager
    from torch import nn
    from transformers import PreTrainedTokenizerBase

OWN = Path(__file__).resolve().parent / "tasks"
"""YAML files of the tasks that need no network."""
_TOKENS = 256
"""Generated tokens where a task does not say."""
_SHOWN = 1000
"""Characters kept of a prompt (its end) and of an answer."""
_EMPTY = "task {} has no documents; give it data, or leave it out"
_SEED = 1234
_DRAWING = ("lm_eval.api.task", "lm_eval.api.model", "lm_eval.models.huggingface")
"""Modules with a bar of their own inside ours, which fills a log file with thousands of steps and escape sequences."""
TOGETHER = 4
"""Generated answers a forward, per request of a forward."""


def own_tasks() -> list[str]:
    """Names of the tasks that come with LayerBits."""
    return sorted(path.stem for path in OWN.glob("*.yaml"))


@dataclass(frozen=True)
class Lengths:
    """Tokens of the longest requests, each with its answer.

    Attributes:
        chosen: Of tasks whose answers are chosen by their likelihood; 0 without such a task.
        written: Of tasks whose answers are generated, as long as they may be; 0 without such a task.
    """

    chosen: int
    written: int


class Harness:
    """Tasks with their documents loaded.

    Args:
        settings: Which, and how.
        held_out: Captions that no scheme was calibrated on, for ``cloze``.

    Raises:
        UserError: A task is not known, its data cannot be had, or it has no documents.
    """

    def __init__(self, settings: TaskSettings, held_out: Sequence[str] = ()) -> None:
        self._settings = settings
        with _quiet():
            self.tasks: dict[str, Task] = _load(settings, {"held_out": list(held_out)})
        for name, task in self.tasks.items():
            _make_greedy(name, task)

    @property
    def documents(self) -> dict[str, int]:
        """Task → documents that will be put."""
        limit = self._settings.limit
        counts = {name: len(task.eval_docs) for name, task in self.tasks.items()}
        return {name: count if limit is None else min(limit, count) for name, count in counts.items()}

    @property
    def versions(self) -> dict[str, str]:
        """Task → version, as its file says."""
        return {name: str(getattr(task, "VERSION", "")) for name, task in self.tasks.items()}

    def wrap(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> LM:
        """A loaded model as the harness takes it, one request a forward where the settings leave that open.

        ``batch_size_per_gpu`` of what is returned may be set.

        Raises:
            UserError: It has no chat template, where one is asked for.
        """
        from lm_eval.models.huggingface import HFLM

        if self._settings.chat_template and not getattr(tokenizer, "chat_template", None):
            raise UserError("chat_template=true, but the model's tokenizer has no chat template; set it to false")

        with _quiet():
            lm = HFLM(
                pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=self._settings.batch_size or 1
            )
        generate = lm.generate_until

        def generate_together(requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
            size = lm.batch_size_per_gpu
            lm.batch_size_per_gpu = TOGETHER * size
            try:
                return list(generate(requests, disable_tqdm))
            finally:
                lm.batch_size_per_gpu = size

        lm.generate_until = generate_together  # answers hold the logits of one token each, not of the whole prompt
        return lm

    def check_lengths(self, lm: LM) -> Lengths:
        """Checks that every prompt with its answer fits the model, which would cut it silently.

        Returns:
            Tokens of the longest.

        Raises:
            UserError: One does not fit.
        """
        most, chosen, written = lm.max_length, 0, 0
        for name, task in self.tasks.items():
            self.build(task, lm)
            room = 0
            if task.OUTPUT_TYPE == "generate_until":
                room = int(task.config.generation_kwargs.get("max_gen_toks", _TOKENS))
            texts = ["".join(a for a in instance.args if isinstance(a, str)) for instance in task.instances]
            longest = max(len(tokens) for tokens in lm.tokenizer(texts)["input_ids"]) + room
            if longest > most:
                raise UserError(
                    f"task {name} has a prompt of {longest} tokens with its answer, and the model takes {most}; "
                    "use fewer examples (num_fewshot), or leave the task out"
                )
            if room:
                written = max(written, longest)
            else:
                chosen = max(chosen, longest)
        return Lengths(chosen, written)

    def answers(self, lm: LM) -> dict[str, TaskAnswers]:
        """Puts all tasks to a model, as :meth:`each` does."""
        return {answers.task: answers for answers in self.each(lm, list(self.tasks))}

    def each(self, lm: LM, names: Sequence[str]) -> Iterator[TaskAnswers]:
        """Puts tasks to a model, one after the other.

        Args:
            lm: The model.
            names: Some of :attr:`tasks`.

        Raises:
            UserError: A task does not say right or wrong.
        """
        from lm_eval.evaluator import evaluate

        for name in names:
            task = self.tasks[name]
            task.set_fewshot_seed(seed=_SEED)  # the same examples every time
            with _quiet():
                evaluated = evaluate(
                    lm=lm,
                    task_dict={"tasks": {name: task}, "groups": {}, "group_map": {}},
                    limit=self._settings.limit,
                    bootstrap_iters=0,
                    apply_chat_template=self._settings.chat_template,
                    fewshot_as_multiturn=self._settings.chat_template,
                )
            yield _read(name, task, evaluated["samples"][name], lm)

    def build(self, task: Task, lm: LM | None = None) -> None:
        """Builds a task's requests.

        Args:
            task: One of :attr:`tasks`.
            lm: The model, whose chat template is used where one is asked for.
        """
        task.set_fewshot_seed(seed=_SEED)
        chat = self._settings.chat_template and lm is not None
        with _quiet():
            task.build_all_requests(
                limit=self._settings.limit,
                rank=0,
                world_size=1,
                cache_requests=False,
                rewrite_requests_cache=False,
                system_instruction=None,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
                chat_template=lm.apply_chat_template if chat and lm is not None else None,
                tokenizer_name=lm.tokenizer_name if chat and lm is not None else "",
            )


def _load(settings: TaskSettings, metadata: Mapping[str, object]) -> dict[str, Task]:
    from lm_eval.tasks import TaskManager

    paths = [OWN, *([settings.path] if settings.path else [])]
    manager = TaskManager(include_path=paths, include_defaults=False, metadata=dict(metadata))
    if any(name not in manager.all_tasks for name in settings.names):  # the harness's own are a second of work
        manager = TaskManager(include_path=paths, metadata=dict(metadata))
    if unknown := [name for name in settings.names if name not in manager.all_tasks]:
        near = get_close_matches(unknown[0], manager.all_tasks, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"without a network there are {', '.join(own_tasks())}"
        raise UserError(f"task {unknown[0]} is not known; {hint}")
    tasks: dict[str, Task] = {}
    for name in settings.names:
        try:
            tasks |= manager.load([name])["tasks"]
        except Exception as error:
            raise UserError(_no_data(name, manager, error)) from error
    for name, task in tasks.items():
        if not len(task.eval_docs):
            raise UserError(_EMPTY.format(name))
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"task {name} runs programs of the model without limits; humaneval_offline has limits")
        if task.OUTPUT_TYPE == "loglikelihood_rolling":
            raise UserError(f"task {name} measures perplexity, not answers; `-e probe` does that")
        if settings.num_fewshot is not None and task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=settings.num_fewshot)
        elif task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return tasks


def _no_data(name: str, manager: TaskManager, error: Exception) -> str:
    why = first_line(error)
    if isinstance(error, ImportError):
        return f"task {name} needs a package that is not installed ({why}); install it, or leave the task out"
    if isinstance(error, StopIteration | IndexError):  # of an empty file, and of no first document
        return _EMPTY.format(name)
    config = getattr(manager.task_index.get(name), "cfg", None) or {}
    where = config.get("dataset_path", "its data")
    return (
        f"the data of task {name} ({where}) cannot be had here ({why}); give a folder of task files with "
        "task_path, with `dataset_path: json` and the files under dataset_kwargs.data_files, or a Hugging Face cache "
        "that has it with HF_HOME"
    )


def _make_greedy(name: str, task: Task) -> None:
    if int(task.get_config("repeats") or 1) > 1:
        raise UserError(f"task {name} draws several answers to a question; use a task with repeats: 1")
    if task.OUTPUT_TYPE == "generate_until":
        task.set_config(key="generation_kwargs", value={"do_sample": False, "temperature": 0.0}, update=True)


def _read(name: str, task: Task, samples: Sequence[JsonMapping], lm: LM) -> TaskAnswers:
    first = samples[0]["filter"]  # a task may read answers in several ways; its first is its main one
    samples = sorted((s for s in samples if s["filter"] == first), key=lambda s: s["doc_id"])
    metric = _right_or_wrong(name, samples)
    read = {"multiple_choice": _choice, "loglikelihood": _continuation}.get(task.OUTPUT_TYPE, _generated)
    answers = []
    for sample in samples:
        target, said, log_odds = read(task, sample)
        answers.append(
            Answer(
                document=int(sample["doc_id"]),
                question=str(sample["arguments"][0][0])[-_SHOWN:],
                target=target[:_SHOWN],
                said=said[:_SHOWN],
                right=bool(sample[metric]),
                log_odds=log_odds,
                prompt_hash=str(sample["prompt_hash"]),
            )
        )
    return TaskAnswers(name, f"{metric},{first}", tuple(answers), _cut(task, samples, lm))


def _right_or_wrong(name: str, samples: Sequence[JsonMapping]) -> str:
    for metric in samples[0]["metrics"]:
        if all(isinstance(s[metric], int | float) and s[metric] in (0, 1) for s in samples):
            return str(metric)
    raise UserError(
        f"task {name} scores answers by {', '.join(samples[0]['metrics'])}, none of which says right or wrong; choose "
        "a task with acc or exact_match"
    )


def _choice(task: Task, sample: JsonMapping) -> tuple[str, str, float | None]:
    choices = task.doc_to_choice(sample["doc"])
    lls = [float(resp[0][0]) for resp in sample["resps"]][: len(choices)]
    target = sample["target"]
    right = choices.index(target) if isinstance(target, str) and target in choices else target
    if not isinstance(right, int) or not 0 <= right < len(lls):  # several right answers, or none
        return str(target), str(choices[lls.index(max(lls))]), None
    return choices[right], choices[lls.index(max(lls))], choice_log_odds(lls, right)


def choice_log_odds(log_likelihoods: Sequence[float], right: int) -> float:
    """Log-odds of one choice against all others, each by its likelihood, in nats."""
    others = [ll for i, ll in enumerate(log_likelihoods) if i != right]
    most = max(others)
    return log_likelihoods[right] - most - math.log(sum(math.exp(ll - most) for ll in others))


def _continuation(_task: Task, sample: JsonMapping) -> tuple[str, str, float | None]:
    ll, greedy = sample["resps"][0][0]
    target = str(sample["target"])
    log_odds = ll - math.log(-math.expm1(ll)) if ll < 0 else None
    return target, target if greedy else "another continuation", log_odds


def _generated(_task: Task, sample: JsonMapping) -> tuple[str, str, float | None]:
    return str(sample["target"]), str(sample["resps"][0][0]), None


def _cut(task: Task, samples: Sequence[JsonMapping], lm: LM) -> int:
    """Answers as long as the limit: they were not finished."""
    if task.OUTPUT_TYPE != "generate_until":
        return 0
    most = int(task.config.generation_kwargs.get("max_gen_toks", _TOKENS))
    tokens = lm.tokenizer([str(s["resps"][0][0]) for s in samples], add_special_tokens=False)["input_ids"]
    return sum(len(t) >= most for t in tokens)


def _without_bar(bar: Callable[..., object], *items: object, **how: object) -> object:
    """What a bar makes, never drawn."""
    return bar(*items, **{**how, "disable": True})


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what the harness and the dataset library tell of their work off the terminal, and bars out of log files."""
    names = ("lm_eval", "datasets", "evaluate", "transformers")
    before = {name: logging.getLogger(name).level for name in names}
    drawing = [] if sys.stderr.isatty() else [sys.modules[name] for name in _DRAWING if name in sys.modules]
    bars = [vars(module)["tqdm"] for module in drawing]
    for module, bar in zip(drawing, bars, strict=True):
        vars(module)["tqdm"] = partial(_without_bar, bar)
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
        for module, bar in zip(drawing, bars, strict=True):
            vars(module)["tqdm"] = bar
