"""Command lines as users, shells and MLflow write them, as overrides that Hydra reads.

Hydra has a grammar of its own for values: brackets, braces, quotes, ``#``, ``=`` and letters beyond ASCII mean
something or are refused, and a comma starts a sweep. The value of a key that holds a path or a name is quoted here, so
that it arrives as it was typed.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence

from layerbits.errors import UserError
from layerbits.paths import exists, home_path, split_at_commas

PATHS = frozenset(
    {
        *("model.path", "dataset.path", "autoquant.checkpoint", "output_root", "export_root", "report_only"),
        *("checkpoint", "path", "recipe", "vllm.python", "vllm.plugin", "run_id", "scheme_files", "measured"),
        *("task_path", "texts", "costs"),
    }
)
"""Keys whose value may be a path: ``~`` is the home directory."""

NAMES = frozenset(
    {
        *("model.name", "model.revision", "dataset.name", "tracking.uri", "tracking.experiment", "tracking.run_name"),
        *("registered_model", "model_name", "vllm.url", "vllm.unquantized_url", "vllm.model", "vllm.arguments"),
        *("endpoint", "endpoint_model"),
    }
)
"""Further keys whose value is a text, whatever it looks like."""

LISTS = frozenset(
    {
        *("run_id", "scheme_files", "measured", "schemes", "controls", "candidates", "rankers"),
        *("effective_bits", "budget_gib", "budget_ms"),
        *("quant_pairs", "quant_granularities", "dataset_sizes", "recipe_overrides", "tasks", "texts"),
        *("speed.batches", "batches", "prefill"),
    }
)
"""Keys whose value is a list in one text, where Hydra alone would read a sweep."""

_KEY = r"(?:\+\+?)?[A-Za-z_][\w.@/:-]*="
_START = re.compile(rf"\s+(?={_KEY}|~[A-Za-z_]|-{{1,2}}[a-z])")
_OVERRIDE = re.compile(rf"{_KEY}|~[A-Za-z_]|-")
_FUNCTION = re.compile(r"(choice|glob|range|interval|shuffle|sort|tag)\(.*\)", re.DOTALL)
_HYDRA_FLAGS = {
    *("--help", "--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run", "--multirun", "--info"),
    *("--config-path", "--config-name", "--config-dir", "--experimental-rerun", "--shell-completion"),
}


def hydra_arguments(arguments: Sequence[str]) -> list[str]:
    """Turns an MLproject command line into Hydra's.

    ``+overrides=none`` is dropped and ``+overrides="a=1 b=2"`` is split; ``--key value``, which ``mlflow run`` makes
    of a ``-P key=value`` that the entry point does not declare, becomes ``key=value``. ``-m`` goes first, as Hydra's
    parser wants it. Values of :data:`PATHS`, :data:`NAMES` and :data:`LISTS` are quoted. Everything else stays.

    Args:
        arguments: ``sys.argv[1:]``.
    """
    given: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument.startswith("+overrides="):
            given += split_overrides(argument.removeprefix("+overrides="))
        elif re.fullmatch(r"--[\w.]+", argument) and argument not in _HYDRA_FLAGS:
            given.append(f"{argument[2:]}={next(rest, '')}")
        else:
            given.append(argument)
    given.sort(key=lambda a: a not in ("-m", "--multirun"))
    sweeps = bool(given) and given[0] in ("-m", "--multirun")
    return [as_typed(argument, sweeps) for argument in given]


def split_overrides(text: str) -> list[str]:
    """The overrides in one text, apart by spaces; a value with spaces may be quoted as for a shell.

    A text that a shell could not split (``it's``), or whose parts are no overrides (``dataset.path=my file.txt``), is
    split where a key begins.
    """
    if text.strip() in ("", "none"):
        return []
    try:
        parts = shlex.split(text)
    except ValueError:
        parts = []
    if parts and all(_OVERRIDE.match(part) for part in parts):
        return parts
    return _START.split(text.strip())


def as_typed(argument: str, sweeps: bool = False) -> str:
    """An override whose value Hydra takes as it was typed, where its key holds a path, a name or a list.

    Args:
        argument: ``key=value``.
        sweeps: Whether commas separate the values of a sweep (``-m``), but inside a path that exists.

    Raises:
        UserError: ``~`` is the home directory and there is none.
    """
    key, _, value = argument.partition("=")
    name = key.lstrip("+")
    if name not in PATHS | NAMES | LISTS or value == "" or value.lower() == "null":
        return argument
    if not exists(value):
        if _is_quoted(value) or (sweeps and _FUNCTION.fullmatch(value)):
            return argument
        if name in LISTS and value.startswith("["):
            return argument
    parts = split_at_commas(value) if sweeps and name not in LISTS else [value]
    if name in PATHS:
        parts = [_at_home(part) for part in parts]
    return f"{key}={','.join(map(_quoted, parts))}"


def _at_home(text: str) -> str:
    """The paths of a text with ``~`` replaced."""
    if "~" not in text:
        return text
    if exists(text):
        return os.fspath(home_path(text))
    return ",".join(os.fspath(home_path(p)) if p.startswith("~") else p for p in split_at_commas(text))


def _is_quoted(value: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if value[:1] not in ("'", '"'):
        return False
    try:
        OverridesParser.create().parse_override(f"key={value}")
    except HydraException:
        return False
    return True


def _quoted(value: str) -> str:
    from hydra.core.override_parser.types import Quote, QuotedString

    if "${" in value and exists(value):
        value = value.replace("${", r"\${")  # a folder of that name, no reference to another key
    return str(QuotedString(value, Quote.single).with_quotes())


def check_grammar(arguments: Sequence[str]) -> None:
    """Checks that Hydra can read the overrides before it does, for an error in one line.

    Raises:
        UserError: It cannot.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    flag = ""
    for argument in arguments:
        before, flag = flag, argument if argument.startswith("-") else ""
        if flag or before in ("--cfg", "-c", "--package", "-p", "--config-name", "-cn", "--config-dir", "-cd"):
            continue
        key, equals, value = argument.partition("=")
        if not equals and not argument.startswith("~"):
            raise UserError(f"{argument} is no setting; give key=value, and quote a value with spaces")
        try:
            OverridesParser.create().parse_override(argument)
        except HydraException:
            raise UserError(
                f"{key}={value} is not a value that Hydra reads; put it in quotes inside quotes: {key}=\"'…'\""
            ) from None
