"""What every entry script shares: command lines as MLflow passes them, errors in one line."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path

from layerbits.errors import UserError

USER_ERROR_STATUS = 2


def hydra_arguments(arguments: Sequence[str]) -> list[str]:
    """Turns an MLproject command line into Hydra overrides.

    ``+overrides=none`` is dropped and ``+overrides="a=1 b=2"`` is split; ``--key value``, which ``mlflow run`` makes
    of a ``-P key=value`` that the entry point does not declare, becomes ``key=value``. ``-m`` goes first, as
    Hydra's parser wants it. Everything else stays.

    Args:
        arguments: ``sys.argv[1:]``.
    """
    result: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument.startswith("+overrides="):
            text = argument.removeprefix("+overrides=")
            result += [] if text in ("", "none") else shlex.split(text)
        elif (
            argument.startswith("--")
            and argument[2:].replace("_", "").replace(".", "").isalnum()
            and "=" not in argument
        ):
            if argument in _HYDRA_FLAGS:
                result.append(argument)
            else:
                result.append(f"{argument[2:]}={next(rest, '')}")
        else:
            result.append(argument)
    return sorted(result, key=lambda a: a not in ("-m", "--multirun"))


_HYDRA_FLAGS = {
    *("--help", "--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run", "--multirun", "--info"),
    *("--config-path", "--config-name", "--config-dir", "--experimental-rerun", "--shell-completion"),
}


def check_choices(arguments: Sequence[str], configs: Path) -> None:
    """Checks choices of config groups before Hydra does, for an error in one line.

    Args:
        arguments: Hydra's command line.
        configs: Folder of the config groups; a choice may also be in a folder given by ``--config-dir``.

    Raises:
        UserError: A group has no such choice.
    """
    if any(a.startswith(("--config-dir", "-cd", "hydra.searchpath")) for a in arguments):
        return
    for argument in arguments:
        group, _, values = argument.lstrip("+").partition("=")
        if not values or not (configs / group).is_dir() or values in ("null", "~"):
            continue
        known = sorted(p.stem for p in (configs / group).glob("*.yaml"))
        for value in values.split(","):
            if value not in known:
                close = get_close_matches(value, known)
                hint = f"did you mean {' or '.join(close)}?" if close else f"choose one of {', '.join(known)},"
                raise UserError(f"{group}={value} is not known; {hint} or add configs/{group}/{value}.yaml")


def run(main: Callable[[], object], configs: Path, lists: Sequence[str] = ()) -> None:
    """Runs a script's main function; a :class:`UserError` ends it with one line and status 2.

    Args:
        main: Decorated by ``hydra.main``.
        configs: Folder of the config groups.
        lists: Keys whose comma-separated value is one text, where Hydra alone would read a sweep.
    """
    arguments = hydra_arguments(sys.argv[1:])
    sys.argv[1:] = [_quoted(a) if a.partition("=")[0] in lists else a for a in arguments]
    try:
        check_choices(sys.argv[1:], configs)
        main()
    except UserError as error:
        fail(error)


def _quoted(argument: str) -> str:
    key, _, value = argument.partition("=")
    return argument if value[:1] in ("'", '"', "[") else f"{key}='{value}'"


def fail(error: UserError) -> None:
    """Prints the error's one line and exits with status 2."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(USER_ERROR_STATUS)
