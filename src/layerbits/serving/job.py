"""Serve checks from their settings to their files."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from layerbits.atomic import dated, write_json
from layerbits.cache import writable_cache
from layerbits.checkpoint.labels import read_quantization
from layerbits.checkpoint.processors import MISSING, Processor
from layerbits.errors import Skipped, UserError
from layerbits.paths import user_path
from layerbits.plain import Composed
from layerbits.results.experiment import made_by
from layerbits.schemes.settings import listed_paths
from layerbits.serving.check import ServeCheck, check_files, compare, judge, read_scheme
from layerbits.serving.environment import Environment, find_environment
from layerbits.serving.processor import ask, in_words, otherwise, why_refused
from layerbits.serving.runtime import Question, Remembered, Running, Runtime, Started
from layerbits.serving.server import Launch, Refused
from layerbits.serving.verdict import REFUSED, SKIPPED

if TYPE_CHECKING:
    from layerbits.checkpoint.reader import Checkpoint
    from layerbits.checkpoint.structure import Check
    from layerbits.probing.loading import Prepared
    from layerbits.schemes import Scheme
    from layerbits.serving.check import Told
    from layerbits.serving.reference import Plain
    from layerbits.serving.verdict import Measured

_NONE = (None, "", "none", "null")
DTYPES = ("auto", "float32", "bfloat16", "float16")


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

    python: str | None
    url: str | None
    unquantized_url: str | None
    model: str | None
    dtype: str
    port: int | None
    plugin: Path | None
    arguments: tuple[str, ...]
    seconds: float

    @classmethod
    def from_config(cls, config: Composed) -> VllmSettings:
        """Reads it.

        Raises:
            UserError: A value is not one of its choices.
        """
        texts = {key: None if value in _NONE else str(value) for key, value in config.items()}
        if texts["url"] and texts["python"]:
            raise UserError("vllm.url talks to a running server, vllm.python starts one: set one of them")
        if texts["unquantized_url"] and not texts["url"]:
            raise UserError("vllm.unquantized_url goes with vllm.url; set both, or neither")
        if config["dtype"] not in DTYPES:
            raise UserError(f"vllm.dtype={config['dtype']} is not known; use one of {', '.join(DTYPES)}")
        plugin = None if texts["plugin"] is None else user_path(texts["plugin"])
        if plugin is not None and not plugin.is_dir():
            raise UserError(f"vllm.plugin={plugin} is no folder; name the one that holds the plugin and its dist-info")
        return cls(
            python=texts["python"],
            url=texts["url"],
            unquantized_url=texts["unquantized_url"],
            model=texts["model"],
            dtype=config["dtype"],
            port=None if texts["port"] is None else _positive("vllm.port", config["port"]),
            plugin=plugin,
            arguments=tuple(shlex.split(texts["arguments"] or "")),
            seconds=_positive("vllm.seconds", config["seconds"]),
        )


@dataclass(frozen=True)
class ServeSettings:
    """What ``configs/serve_check.yaml`` composes to; of ``run_ids`` and ``checkpoint`` one is given.

    Attributes:
        run_ids: Runs of exports.
        checkpoint: A checkpoint's folder.
        tokens: Held-out tokens to compare on, at least.
        top_k: Tokens that the runtime is to tell per position; -1 = all.
        new_tokens: Tokens to generate.
        device: Where PyTorch computes.
    """

    run_ids: tuple[str, ...]
    checkpoint: Path | None
    tokens: int
    top_k: int
    new_tokens: int
    device: str
    output_root: Path
    vllm: VllmSettings

    @property
    def source(self) -> str:
        """The checkpoints in a few words."""
        return ", ".join(self.run_ids) or str(self.checkpoint and self.checkpoint.name)

    @classmethod
    def from_config(cls, config: Composed) -> ServeSettings:
        """Reads a resolved configuration.

        Raises:
            UserError: No checkpoint or two, or a value that is not one of its choices.
        """
        run_ids = tuple(listed_paths(config["run_id"]))
        folder = None if config["checkpoint"] in _NONE else user_path(config["checkpoint"])
        if bool(run_ids) == (folder is not None):
            raise UserError("set run_id to the run of an export, or checkpoint to a folder: one of them")
        if config["device"] not in ("auto", "cpu", "cuda"):
            raise UserError(f"device={config['device']} is not known; use auto, cpu or cuda")
        return cls(
            run_ids=run_ids,
            checkpoint=folder,
            tokens=_positive("tokens", config["tokens"]),
            top_k=-1 if config["top_k"] == "all" else _positive("top_k", config["top_k"]),
            new_tokens=_positive("new_tokens", config["new_tokens"]),
            device=config["device"],
            output_root=user_path(config["output_root"]),
            vllm=VllmSettings.from_config(config["vllm"]),
        )


@dataclass(frozen=True)
class Target:
    """A checkpoint to check, with what is known of it.

    Attributes:
        digest: Of its tensors as they were exported; ``None`` where that is not known.
        tags: For the run.
    """

    folder: Path
    digest: str | None
    tags: Mapping[str, str]


@dataclass(frozen=True)
class Checked:
    """A check, its files, and what names it in the tracking server."""

    done: ServeCheck
    folder: Path
    parameters: Mapping[str, str]
    tags: Mapping[str, str]


def find_targets(settings: ServeSettings, uri: str | None) -> list[Target]:
    """The checkpoints, those of a parent run of exports one by one.

    Raises:
        UserError: There is no such checkpoint.
    """
    if settings.checkpoint is not None:
        made = made_by(settings.checkpoint)
        tags = {"export_run_id": made.run_id} if made else {}
        return [Target(settings.checkpoint, None, tags)]
    from layerbits.history.checkpoints import export_runs, fetch_checkpoint
    from layerbits.history.source import connect

    store = connect(uri)
    targets = []
    for run_id in (one for given in settings.run_ids for one in export_runs(store, given)):
        run, folder = fetch_checkpoint(store, run_id, writable_cache() / "checkpoints" / run_id)
        tags = {key: run.tags[key] for key in ("source_run_id", "scheme") if key in run.tags}
        targets.append(Target(folder, run.tags.get("checkpoint.digest"), {**tags, "export_run_id": run.run_id}))
    return targets


@dataclass
class Checker:
    """Checks checkpoints one after the other; the unquantized model of several is served once.

    Args:
        settings: How.
        root: The project's folder.
    """

    settings: ServeSettings
    root: Path
    _unquantized: dict[tuple[str, str], Remembered] = field(default_factory=dict)
    _plain_in_pytorch: dict[tuple[str, str], Plain] = field(default_factory=dict)

    def check(self, target: Target) -> Checked:
        """Checks a checkpoint and writes ``serve_check.md`` and ``.json``, and the runtime's log.

        Raises:
            UserError: It cannot be read, or something is to be corrected first.
        """
        checkpoint, digest, structure = check_files(target.folder)
        if target.digest is not None and digest != target.digest:
            run = target.tags.get("export_run_id")
            raise UserError(f"{target.folder} is not what run {run} exported (its digest differs); export it again")
        out = dated(self.settings.output_root, f"serve_check_{target.folder.name}")
        out.mkdir(parents=True)
        done = self._checked(checkpoint, structure, digest, out)
        write_json(out / "serve_check.json", done.to_json())
        (out / "serve_check.md").write_text(done.markdown(), "utf-8")
        print(f"\n{done.markdown()}\nserve check: {out}", flush=True)
        tags = {
            **target.tags,
            "checkpoint.path": str(target.folder),
            "checkpoint.digest": digest,
            "serve": done.outcome,
        }
        tags |= {f"serve.{key}": value for key, value in done.runtime.items()}
        parameters = {
            "eff.tokens": str(self.settings.tokens),
            "eff.top_k": str(self.settings.top_k),
            "eff.runtime_dtype": self.settings.vllm.dtype,
        }
        if (target.folder / "layerbits.json").is_file():
            scheme = read_scheme(target.folder)
            parameters |= {"eff.model": scheme.model.name, "eff.model_revision": scheme.model.revision}
            parameters |= {"eff.scheme": scheme.name, "eff.scheme_digest": scheme.digest}
        return Checked(done, out, parameters, tags)

    def _checked(self, checkpoint: Checkpoint, structure: tuple[Check, ...], digest: str, out: Path) -> ServeCheck:
        folder = checkpoint.folder
        if not all(check.passed for check in structure):
            return ServeCheck(folder, digest, structure, SKIPPED, "not served, as its files are not sound")
        try:
            installed = self._installed
        except Skipped as why:
            return ServeCheck(folder, digest, structure, SKIPPED, str(why))
        subject = Subject.of(read_scheme(folder), self.settings)
        runtime, plain = self._runtimes(subject)
        processor = None if installed is None else installed[1]
        labels = tuple(read_quantization(checkpoint).layers.values())
        unlike = otherwise(labels, processor)
        known = in_words(unlike, processor) if processor is not None and unlike else ""
        if self.settings.vllm.plugin is None and any(answer.state == MISSING for answer in unlike.values()):
            return ServeCheck(folder, digest, structure, REFUSED, known, runtime=_about(runtime))
        try:
            served = runtime.tell(folder, folder.name, subject.question, out / "vllm.log")
        except Refused as words:
            detail = why_refused(str(words), labels, processor)
            return ServeCheck(folder, digest, structure, REFUSED, detail, runtime=_about(runtime))
        unquantized = None if plain is None else self._plain(plain, subject, out)
        return judge(
            folder, digest, structure, served, lambda: self._measured(subject, checkpoint, unquantized, served), known
        )

    @cached_property
    def _installed(self) -> tuple[Environment, Processor | None] | None:
        """Where vLLM is and what it computes with on this CPU; ``None`` where a server runs already."""
        if self.settings.vllm.url is not None:
            return None
        environment = find_environment(self.settings.vllm.python, self.root)
        return environment, ask(environment)

    def _runtimes(self, subject: Subject) -> tuple[Runtime, Runtime | None]:
        """The runtime of a checkpoint, and that of its unquantized model where there is one."""
        vllm = self.settings.vllm
        if vllm.url is not None:
            source = PurePath(subject.prepared.scheme.model.source).name
            plain = Running(vllm.unquantized_url, called=(source,)) if vllm.unquantized_url else None
            return Running(vllm.url, vllm.model), plain
        assert self._installed is not None
        environment, processor = self._installed
        trust = ("--trust-remote-code",) if subject.prepared.resolved.spec.trust_remote_code else ()
        launch = Launch(
            environment,
            subject.question.length,
            self.settings.top_k,
            subject.dtype,
            vllm.port,
            vllm.plugin,
            (*vllm.arguments, *trust),
            vllm.seconds,
        )
        return Started(launch, processor), Started(launch, processor)

    def _plain(self, runtime: Runtime, subject: Subject, out: Path) -> Told:
        from layerbits.export.plan import source_folder

        source = source_folder(subject.prepared.resolved)
        key = (str(source), subject.texts_key)
        remembered = self._unquantized.setdefault(key, Remembered(runtime))
        try:
            return remembered.tell(source, "the unquantized model", subject.question, out / "vllm-unquantized.log")
        except Refused as words:
            raise UserError(f"vLLM does not serve the unquantized model {source} either: {words}") from None

    def _measured(self, subject: Subject, checkpoint: Checkpoint, unquantized: Told | None, served: Told) -> Measured:
        import torch

        from layerbits.serving.reference import reference

        device = self.settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        texts = subject.question.texts
        key = (subject.prepared.scheme.model.revision, subject.texts_key)
        plain = self._plain_in_pytorch.get(key)
        pytorch = reference(subject.prepared, checkpoint, texts.batches, subject.dtype, device, plain)
        self._plain_in_pytorch[key] = pytorch.plain
        return compare(pytorch, unquantized, served, texts, self.settings.top_k)


@dataclass(frozen=True)
class Subject:
    """What a scheme is compared on.

    Attributes:
        dtype: What the runtime computes in.
    """

    prepared: Prepared
    question: Question
    dtype: str

    @property
    def texts_key(self) -> str:
        """What the texts are."""
        data = self.prepared.scheme.calibration
        return f"{data.digest} {data.row_shape} {self.question.texts.tokens} {self.dtype}"

    @classmethod
    def of(cls, scheme: Scheme, settings: ServeSettings) -> Subject:
        """Finds a scheme's source and its held-out rows.

        Raises:
            UserError: They have changed since it was scored, or are too few.
        """
        from layerbits.inputs.datasets import held_out_captions
        from layerbits.probing.loading import prepare
        from layerbits.serving.texts import held_out_texts

        prepared = prepare(scheme)
        packing, seq_len, _ = scheme.calibration.row_shape
        captions = held_out_captions(prepared.captions.held_out)
        texts = held_out_texts(captions, prepared.tokenizer, packing, seq_len, settings.tokens)
        dtype = settings.vllm.dtype
        if dtype == "auto":
            dtype = "bfloat16" if scheme.model.dtype == "float32" else scheme.model.dtype
        return cls(prepared, Question(texts, settings.top_k, settings.new_tokens), dtype)


def _about(runtime: Runtime) -> Mapping[str, str]:
    return runtime.about if isinstance(runtime, Started) else {}


def _positive(key: str, value: object) -> int:
    try:
        number = int(str(value))
    except ValueError:
        number = 0
    if number < 1:
        raise UserError(f"{key}={value} is not a positive whole number")
    return number
