"""What ``configs/evaluate.yaml`` composes to, as typed settings, checked before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from layerbits.errors import UserError
from layerbits.paths import user_path
from layerbits.plain import Composed, check_address, unset
from layerbits.schemes.settings import listed, whole
from layerbits.scoring.settings import check_dtype


@dataclass(frozen=True)
class TaskSettings:
    """Which tasks, and how they are put.

    Attributes:
        names: Tasks, groups or tags of the harness, ours, or of ``path``.
        path: Folder of further task YAML files.
        limit: Documents of each task, from the first on; ``None`` = all.
        num_fewshot: Examples in the prompt; ``None`` = as the task says.
        chat_template: Whether prompts go through the tokenizer's chat template.
        batch_size: Requests a forward; ``None`` = as many as there is memory for, at most 16.
    """

    names: tuple[str, ...]
    path: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    chat_template: bool = False
    batch_size: int | None = None


@dataclass(frozen=True)
class EvaluateSettings:
    """What is asked of the schemes.

    Attributes:
        tasks: The tasks.
        rows: Held-out rows that the KL divergence is measured on; 0 = it is not.
        margin: Loss of accuracy that is allowed, a share.
        predict: Whether the change of each document's log-odds is predicted per group too.
        dtype: What the model computes in, one of :data:`layerbits.scoring.settings.DTYPES`.
        endpoint: Server that is asked too; ``None`` = none.
        endpoint_model: Name of the model there; ``None`` = the only one.
    """

    tasks: TaskSettings
    rows: int = 8
    margin: float | None = None
    predict: bool = False
    dtype: str = "auto"
    endpoint: str | None = None
    endpoint_model: str | None = None


def evaluate_settings(config: Composed) -> EvaluateSettings:
    """Reads a resolved configuration.

    Raises:
        UserError: A value is out of range, a folder is missing, or the harness is not installed.
    """
    names = tuple(dict.fromkeys(listed(config["tasks"])))
    if not names:
        raise UserError("tasks names no task; use tasks=cloze, or others of docs/answers.md")
    path = None if unset(config["task_path"]) else user_path(str(config["task_path"]))
    if path is not None and not path.is_dir():
        raise UserError(f"task_path={path} is no folder; give one with task YAML files")
    tasks = TaskSettings(
        names=names,
        path=path,
        limit=_at_least(1, "limit", config["limit"]),
        num_fewshot=_at_least(0, "num_fewshot", config["num_fewshot"]),
        chat_template=_flag("chat_template", config["chat_template"]),
        batch_size=_batch(config["eval_batch_size"]),
    )
    settings = EvaluateSettings(
        tasks=tasks,
        rows=_at_least(0, "rows", config["rows"]) or 0,
        margin=_margin(config["margin"]),
        predict=_flag("predict", config["predict"]),
        dtype=check_dtype(str(config["dtype"])),
        endpoint=_text(config["endpoint"]),
        endpoint_model=_text(config["endpoint_model"]),
    )
    check_address("endpoint", settings.endpoint)
    check_installed()
    return settings


def check_installed() -> None:
    """Checks that the harness is there.

    Raises:
        UserError: It is not.
    """
    if find_spec("lm_eval") is None:
        raise UserError(
            "lm-evaluation-harness is not installed; run `pip install --no-deps -r requirements-eval.lock` here"
        )


def _at_least(least: int, key: str, value: object) -> int | None:
    if unset(value):
        return None
    number = whole(key, value)
    if number < least:
        raise UserError(f"{key}={value} is too small; use {least} or more")
    return number


def _batch(value: object) -> int | None:
    return None if value == "auto" else _at_least(1, "eval_batch_size", value)


def _text(value: object) -> str | None:
    return None if unset(value) else str(value)


def _flag(key: str, value: object) -> bool:
    if str(value).lower() not in ("true", "false"):
        raise UserError(f"{key}={value} is neither true nor false")
    return str(value).lower() == "true"


def _margin(value: object) -> float | None:
    if unset(value):
        return None
    try:
        share = float(str(value))
    except ValueError:
        raise UserError(f"margin={value} is not a number; 0.01 allows one point") from None
    if not 0 < share < 1:
        raise UserError(f"margin={value} must be a share between 0 and 1; 0.01 allows one point")
    return share
