"""A serve check from its settings to its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from layerbits.atomic import write_json
from layerbits.cache import cache_dir
from layerbits.errors import UserError
from layerbits.serving.check import ServeCheck, check_serving

_NONE = (None, "", "none", "null")


@dataclass(frozen=True)
class ServeSettings:
    """What ``configs/serve_check.yaml`` composes to; of ``run_id`` and ``checkpoint`` one is given."""

    run_id: str | None
    checkpoint: Path | None
    prompts: int
    length: int
    new_tokens: int
    tolerance: float
    device: str
    output_root: Path

    @property
    def source(self) -> str:
        """The checkpoint in a word."""
        return self.run_id or str(self.checkpoint and self.checkpoint.name)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ServeSettings:
        """Reads a resolved configuration.

        Raises:
            UserError: No checkpoint or two, or a value that is no positive number.
        """
        run_id = None if config["run_id"] in _NONE else str(config["run_id"])
        folder = None if config["checkpoint"] in _NONE else Path(config["checkpoint"]).expanduser().absolute()
        if (run_id is None) == (folder is None):
            raise UserError("set run_id to the run of an export, or checkpoint to a folder: one of them")
        for key in ("prompts", "length", "new_tokens", "tolerance"):
            if not isinstance(config[key], int | float) or config[key] <= 0:
                raise UserError(f"{key}={config[key]} is not a positive number")
        if config["device"] not in ("auto", "cpu", "cuda"):
            raise UserError(f"device={config['device']} is not known; use auto, cpu or cuda")
        return cls(
            run_id=run_id,
            checkpoint=folder,
            prompts=int(config["prompts"]),
            length=int(config["length"]),
            new_tokens=int(config["new_tokens"]),
            tolerance=float(config["tolerance"]),
            device=config["device"],
            output_root=Path(config["output_root"]).expanduser().absolute(),
        )


@dataclass(frozen=True)
class Checked:
    """A check, its files, and what names it in the tracking server."""

    done: ServeCheck
    folder: Path
    parameters: Mapping[str, str]
    tags: Mapping[str, str]


def check(settings: ServeSettings, uri: str | None) -> Checked:
    """Finds the checkpoint, checks it and writes ``serve_check.md`` and ``.json``.

    Args:
        settings: Which one and how.
        uri: The store of the run.

    Raises:
        UserError: There is no such checkpoint.
    """
    import torch

    from layerbits.serving.vllm import load, missing

    tags = {}
    if settings.run_id is not None:
        from layerbits.history.checkpoints import fetch_checkpoint
        from layerbits.history.source import connect

        run, folder = fetch_checkpoint(connect(uri), settings.run_id, cache_dir() / "checkpoints" / settings.run_id)
        tags = {key: run.tags[key] for key in ("source_run_id", "scheme") if key in run.tags}
        tags["export_run_id"] = run.run_id
    else:
        assert settings.checkpoint is not None
        folder = settings.checkpoint
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    skipped = missing()
    done = check_serving(
        folder,
        None if skipped else load,
        device,
        settings.prompts,
        settings.length,
        settings.new_tokens,
        settings.tolerance,
        skipped,
    )
    if settings.run_id is not None and done.digest != run.tags.get("checkpoint.digest"):
        raise UserError(f"{folder} is not what run {run.run_id} exported (its digest differs); export the scheme again")
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")
    out = settings.output_root / "tmp" / f"serve_check_{folder.name}-{stamp}"
    write_json(out / "serve_check.json", done.to_json())
    (out / "serve_check.md").write_text(done.markdown())
    print(f"\n{done.markdown()}\nserve check: {out}")
    tags |= {"checkpoint.path": str(folder), "checkpoint.digest": done.digest}
    tags["serve"] = "skipped" if done.served is None else done.served.outcome
    parameters = {"eff.prompts": str(settings.prompts), "eff.length": str(settings.length), "eff.device": device}
    return Checked(done, out, {**parameters, "eff.tolerance": f"{settings.tolerance:g}"}, tags)
