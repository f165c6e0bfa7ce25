"""A checkpoint in vLLM at the command line, served until somebody stops it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from layerbits.cache import writable_cache
from layerbits.checkpoint.labels import read_quantization
from layerbits.checkpoint.processors import MISSING
from layerbits.checkpoint.reader import open_checkpoint
from layerbits.errors import UserError
from layerbits.paths import user_path
from layerbits.serving.environment import Environment, find_environment, what_is_unknown
from layerbits.serving.gpu import check_card
from layerbits.serving.processor import ask, in_words, otherwise
from layerbits.serving.server import Launch, free_port
from layerbits.serving.settings import check_is_checkpoint


def serve(
    reference: str, port: int, python: str | None, plugin: Path | None, arguments: Sequence[str], uri: str | None
) -> None:
    """Replaces this process by vLLM's server of a checkpoint; prints a request that it answers first.

    Args:
        reference: Run id of an export, or a checkpoint's folder.
        port: Port on this machine.
        python: A Python with vLLM; ``None`` = that of ``.venv-vllm`` in the current folder.
        plugin: Folder with a plugin of vLLM.
        arguments: Further arguments of the server.
        uri: The store of the run.

    Raises:
        UserError: There is no such checkpoint, or no vLLM, or the port is in use, or this CPU cannot serve it.
    """
    free_port(port, "--port")
    folder, launch = prepare(reference, python, plugin, arguments, uri)
    name = folder.name
    command = launch.command(folder, port, name)
    request = f'{{"model": "{name}", "prompt": "A man rides", "max_tokens": 16, "temperature": 0}}'
    print(shlex.join(command))
    print(f"when it says that it is up:\n  curl http://127.0.0.1:{port}/v1/completions \\")
    print(f"    -H 'Content-Type: application/json' -d '{request}'", flush=True)
    os.execve(command[0], command, dict(launch.variables()))


def prepare(
    reference: str, python: str | None, plugin: Path | None, arguments: Sequence[str], uri: str | None
) -> tuple[Path, Launch]:
    """The checkpoint's folder, and how vLLM is started on it.

    Raises:
        UserError: There is no such checkpoint, or no vLLM, or this CPU cannot serve it, or the GPU is too small.
    """
    folder = _checkpoint(reference, uri)
    environment = find_environment(python, Path.cwd())
    if unknown := what_is_unknown(environment):
        print(f"warning: {unknown}", file=sys.stderr, flush=True)
    _check_processor(folder, environment, plugin)
    _check_gpu(folder, environment, arguments)
    return folder, Launch(environment, plugin=plugin, arguments=tuple(arguments))


def _check_processor(folder: Path, environment: Environment, plugin: Path | None) -> None:
    """Says what this CPU does not compute as the files say.

    Raises:
        UserError: It cannot serve them at all.
    """
    processor = ask(environment)
    try:
        unlike = otherwise(read_quantization(open_checkpoint(folder)).layers.values(), processor)
    except UserError:  # not quantized, or not by us: vLLM says what it makes of it
        return
    if processor is None or not unlike:
        return
    if plugin is None and any(answer.state == MISSING for answer in unlike.values()):
        raise UserError(f"vLLM cannot serve {folder}: {in_words(unlike, processor)}")
    print(f"warning: {in_words(unlike, processor)}", file=sys.stderr, flush=True)


def _check_gpu(folder: Path, environment: Environment, arguments: Sequence[str]) -> None:
    """Checks that the weights fit on the GPU.

    Raises:
        UserError: They do not.
    """
    try:
        checkpoint = open_checkpoint(folder)
    except UserError:  # in other files than ours: vLLM says what it makes of them
        return
    check_card(checkpoint, environment, arguments)


def _checkpoint(reference: str, uri: str | None) -> Path:
    path = user_path(reference)
    if (path / "config.json").is_file():
        return path
    if "/" in reference:
        check_is_checkpoint(path)
    from layerbits.history.checkpoints import export_runs, fetch_checkpoint
    from layerbits.history.source import connect

    store = connect(uri)
    runs = export_runs(store, reference)
    if len(runs) > 1:
        raise UserError(f"run {reference} holds {len(runs)} exports; give one of them: {', '.join(runs)}")
    return fetch_checkpoint(store, runs[0], writable_cache() / "checkpoints" / runs[0])[1]
