"""What every entry script shares: command lines as MLflow passes them, errors in one line."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence

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


def run(main: Callable[[], object]) -> None:
    """Runs a script's main function; a :class:`UserError` ends it with one line and status 2."""
    sys.argv[1:] = hydra_arguments(sys.argv[1:])
    try:
        main()
    except UserError as error:
        fail(error)


def fail(error: UserError) -> None:
    """Prints the error's one line and exits with status 2."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(USER_ERROR_STATUS)
