"""A checkpoint served until somebody stops it: this process becomes the server."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from layerbits.cache import writable_cache
from layerbits.errors import UserError
from layerbits.paths import user_path
from layerbits.serving.environment import find_environment
from layerbits.serving.server import Launch, free_port


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
        UserError: There is no such checkpoint, or no vLLM, or the port is in use.
    """
    folder = _checkpoint(reference, uri)
    free_port(port, "--port")
    launch = Launch(find_environment(python, Path.cwd()), plugin=plugin, arguments=tuple(arguments))
    name = folder.name
    command = launch.command(folder, port, name)
    request = f'{{"model": "{name}", "prompt": "A man rides", "max_tokens": 16, "temperature": 0}}'
    print(shlex.join(command))
    print(f"when it says that it is up:\n  curl http://127.0.0.1:{port}/v1/completions \\")
    print(f"    -H 'Content-Type: application/json' -d '{request}'", flush=True)
    os.execve(command[0], command, dict(launch.variables()))


def _checkpoint(reference: str, uri: str | None) -> Path:
    path = user_path(reference)
    if (path / "config.json").is_file():
        return path
    if "/" in reference:
        raise UserError(f"{path} is no checkpoint: it has no config.json; give an export's folder or its run id")
    from layerbits.history.checkpoints import export_runs, fetch_checkpoint
    from layerbits.history.source import connect

    store = connect(uri)
    runs = export_runs(store, reference)
    if len(runs) > 1:
        raise UserError(f"run {reference} holds {len(runs)} exports; give one of them: {', '.join(runs)}")
    return fetch_checkpoint(store, runs[0], writable_cache() / "checkpoints" / runs[0])[1]
