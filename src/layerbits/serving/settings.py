"""What is asked of serve checks and of tables of costs, read and checked."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from layerbits.errors import UserError
from layerbits.paths import named_folder, output_folder, user_path
from layerbits.plain import Composed, check_address, flag, unset
from layerbits.schemes.settings import listed, listed_paths, source_name
from layerbits.scoring.settings import check_device
from layerbits.serving.environment import named_python

DTYPES = ("auto", "float32", "bfloat16", "float16")
_LAST_PORT = 65535


@dataclass(frozen=True)
class VllmSettings:
    """The ``vllm`` part of ``configs/serve_check.yaml``.

    Attributes:
        python: A Python with vLLM; ``None`` = that of ``.venv-vllm``.
        url: A running server of the checkpoint, instead of one that is started.
        unquantized_url: A running server of its unquantized model, where ``url`` is given.
        model: Name of the checkpoint at ``url``.
        dtype: What the runtime computes in; ``auto`` = the model's, bfloat16 for float32.
        port, plugin, arguments, seconds: As :class:`layerbits.serving.server.Launch` takes them.
    """

    python: str | None = None
    url: str | None = None
    unquantized_url: str | None = None
    model: str | None = None
    dtype: str = "auto"
    port: int | None = None
    plugin: Path | None = None
    arguments: tuple[str, ...] = ()
    seconds: float = 1800.0

    @classmethod
    def from_config(cls, config: Composed) -> VllmSettings:
        """Reads it.

        Raises:
            UserError: A value is not one of its choices.
        """
        texts = {key: None if unset(value) else str(value) for key, value in config.items()}
        if texts["url"] and texts["python"]:
            raise UserError("vllm.url talks to a running server, vllm.python starts one: set one of them")
        for key in ("url", "unquantized_url"):
            check_address(f"vllm.{key}", texts[key])
        if texts["python"]:
            named_python(texts["python"])
        if texts["unquantized_url"] and not texts["url"]:
            raise UserError("vllm.unquantized_url goes with vllm.url; set both, or neither")
        if config["dtype"] not in DTYPES:
            raise UserError(f"vllm.dtype={config['dtype']} is not known; use one of {', '.join(DTYPES)}")
        return cls(
            python=texts["python"],
            url=texts["url"],
            unquantized_url=texts["unquantized_url"],
            model=texts["model"],
            dtype=config["dtype"],
            port=None if texts["port"] is None else check_port("vllm.port=", positive("vllm.port", config["port"])),
            plugin=plugin_folder("vllm.plugin=", texts["plugin"]),
            arguments=split_arguments("vllm.arguments=", texts["arguments"]),
            seconds=positive("vllm.seconds", config["seconds"]),
        )


@dataclass(frozen=True)
class SpeedRequest:
    """What to time.

    Attributes:
        batches: Requests at once.
        prompt_tokens: Of each request.
        new_tokens: Decode steps that are timed together.
        repeats: Rounds that are counted.
    """

    batches: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    repeats: int

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return self.prompt_tokens + self.new_tokens + 1

    @classmethod
    def from_config(cls, config: Composed) -> SpeedRequest | None:
        """Reads the ``speed`` part of ``configs/serve_check.yaml``; ``None`` where nothing is to be timed.

        Raises:
            UserError: A value is no positive whole number, or there is nothing to time.
        """
        measure = flag("speed.measure", config["measure"])
        batches = tuple(dict.fromkeys(positive("speed.batches", batch) for batch in listed(config["batches"])))
        numbers = [positive(f"speed.{key}", config[key]) for key in ("prompt_tokens", "new_tokens", "repeats")]
        if not measure:
            return None
        if not batches:
            raise UserError("there is nothing to time; give speed.batches, or speed.measure=false")
        return cls(batches, *numbers)


@dataclass(frozen=True)
class ServeSettings:
    """What ``configs/serve_check.yaml`` composes to; of ``run_ids`` and ``checkpoint`` one is given.

    Attributes:
        run_ids: Runs of exports.
        checkpoint: A checkpoint's folder.
        speed: What to time; ``None`` = nothing.
        tokens: Held-out tokens to compare on, at least.
        top_k: Tokens that the runtime is to tell per position; -1 = all.
        new_tokens: Tokens to generate.
        device: Where PyTorch computes.
        strict: Whether a runtime that is known to compute something else than was scored is not even started.
        compare: Whether what it computes is compared; without that it is timed only.
    """

    run_ids: tuple[str, ...]
    checkpoint: Path | None
    output_root: Path
    vllm: VllmSettings
    speed: SpeedRequest | None
    tokens: int = 1000
    top_k: int = 1000
    new_tokens: int = 16
    device: str = "auto"
    strict: bool = False
    compare: bool = True

    @property
    def source(self) -> str:
        """The runs in a few words."""
        return source_name(self.run_ids)

    @classmethod
    def from_config(cls, config: Composed) -> ServeSettings:
        """Reads a resolved configuration.

        Raises:
            UserError: No checkpoint or two, or a value that is not one of its choices.
        """
        run_ids = tuple(listed_paths(config["run_id"]))
        folder = None if unset(config["checkpoint"]) else named_folder("checkpoint", config["checkpoint"])
        if bool(run_ids) == (folder is not None):
            raise UserError("set run_id to the run of an export, or checkpoint to a folder: one of them")
        device = check_device(config["device"])
        strict, compared = (flag(key, config[key]) for key in ("strict", "compare"))
        vllm, speed = VllmSettings.from_config(config["vllm"]), SpeedRequest.from_config(config["speed"])
        if speed is not None and vllm.url is not None:
            raise UserError("speed.measure starts vLLM itself; set vllm.python instead of vllm.url")
        if speed is None and not compared:
            raise UserError("compare=false leaves nothing to do; set speed.measure=true with it")
        settings = cls(
            run_ids=run_ids,
            checkpoint=folder,
            tokens=positive("tokens", config["tokens"]),
            top_k=-1 if config["top_k"] == "all" else positive("top_k", config["top_k"]),
            new_tokens=positive("new_tokens", config["new_tokens"]),
            device=device,
            output_root=output_folder("output_root", config["output_root"]),
            vllm=vllm,
            speed=speed,
            strict=strict,
            compare=compared,
        )
        if folder is not None:
            check_is_checkpoint(folder)
        return settings


@dataclass(frozen=True)
class CostRequest:
    """What to time.

    Attributes:
        batches: Requests at once of decode steps.
        prefill: Lengths of prompts.
        repeats: Of each linear; the whole steps are repeated a fifth as often, at least three times.
    """

    batches: tuple[int, ...]
    prefill: tuple[int, ...]
    repeats: int = 25

    @classmethod
    def of(cls, batches: object, prefill: object, repeats: object) -> CostRequest:
        """Reads numbers as users write them: lists with commas.

        Raises:
            UserError: One is no positive whole number, or there is nothing to time.
        """
        timed, prompts = (
            tuple(dict.fromkeys(positive(key, one) for one in listed(given)))
            for key, given in (("batches", batches), ("prefill", prefill))
        )
        if not timed and not prompts:
            raise UserError("there is nothing to time; give batches, prefill or both")
        return cls(timed, prompts, positive("repeats", repeats))

    @property
    def tokens(self) -> tuple[int, ...]:
        """Numbers of tokens that enter a linear."""
        return tuple(sorted({*self.batches, *self.prefill}))


def check_is_checkpoint(folder: Path) -> None:
    """Checks that a folder may be a checkpoint, before anything heavy is imported.

    Raises:
        UserError: It has no ``config.json``.
    """
    if not (folder / "config.json").is_file():
        what = "it has no config.json" if folder.is_dir() else "there is no such folder"
        raise UserError(f"{folder} is no checkpoint: {what}; give an export's folder or its run id")


def plugin_folder(key: str, value: str | None) -> Path | None:
    """Folder of a plugin of vLLM.

    Args:
        key: How it is given, for the error.
        value: As it is given; ``None`` = no plugin.

    Raises:
        UserError: There is none.
    """
    folder = None if value is None else user_path(value)
    if folder is not None and not folder.is_dir():
        raise UserError(f"{key}{folder} is no folder; name the one that holds the plugin and its dist-info")
    return folder


def split_arguments(key: str, text: str | None) -> tuple[str, ...]:
    """Arguments of vLLM, as a shell would split them.

    Args:
        key: How they are given, for the error.
        text: In one text; ``None`` = none.

    Raises:
        UserError: A quotation is not closed.
    """
    try:
        return tuple(shlex.split(text or ""))
    except ValueError as error:
        raise UserError(f"{key}{text} cannot be split ({error}); close its quotes") from None


def check_port(key: str, port: int) -> int:
    """A port of this machine.

    Args:
        key: How it is given, for the error.
        port: Its number.

    Raises:
        UserError: There is none of that number.
    """
    if not 1 <= port <= _LAST_PORT:
        raise UserError(f"{key}{port} is no port; give one from 1 to {_LAST_PORT}")
    return port


def positive(key: str, value: object) -> int:
    """A number of a configuration.

    Raises:
        UserError: It is not a positive whole number; ``key`` names it.
    """
    try:
        number = int(str(value))
    except ValueError:
        number = 0
    if number < 1:
        raise UserError(f"{key}={value} is not a positive whole number; give one from 1 on")
    return number
