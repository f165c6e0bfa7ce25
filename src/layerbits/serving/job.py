"""Serve checks from their settings to their files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from layerbits.atomic import dated, why_unwritable, write_json
from layerbits.checkpoint.labels import read_quantization
from layerbits.checkpoint.processors import MISSING, Processor
from layerbits.errors import Skipped, UserError
from layerbits.export.plan import source_folder
from layerbits.history.derived import served_values
from layerbits.serving.check import MANIFEST, ServeCheck, check_files, compare, judge, read_scheme
from layerbits.serving.environment import Environment, find_environment, what_is_unknown
from layerbits.serving.gpu import check_card, missing_on_gpu, otherwise_on_gpu, rounding_on_gpu, unsaid_kernels
from layerbits.serving.processor import ask, in_words, otherwise, why_refused
from layerbits.serving.runtime import Question, Remembered, Running, Runtime, Started, with_kernels
from layerbits.serving.server import Launch, Refused
from layerbits.serving.settings import ServeSettings
from layerbits.serving.speed import check_positions
from layerbits.serving.targets import Target
from layerbits.serving.timing import Timer, local_source
from layerbits.serving.unasked import left_open
from layerbits.serving.verdict import DIVERGES, LOADS, REFUSED, SKIPPED, TIMED
from layerbits.tracking.contract import held_out_data
from layerbits.tracking.made import Data
from layerbits.tracking.made import Measured as MeasuredModel

if TYPE_CHECKING:
    from layerbits.checkpoint.reader import Checkpoint
    from layerbits.checkpoint.structure import Check
    from layerbits.inputs.models import ResolvedModel
    from layerbits.probing.loading import Prepared
    from layerbits.schemes import Scheme
    from layerbits.serving.check import RuntimeOutput
    from layerbits.serving.reference import Plain
    from layerbits.serving.verdict import Measured


NOT_COMPARED = "it was timed, and not asked: whether it answers as scored is not known"
"""What is said of a checkpoint that nothing was compared of."""


@dataclass(frozen=True)
class Checked:
    """A check, its files, and what names it in the tracking server."""

    done: ServeCheck
    folder: Path
    parameters: Mapping[str, str]
    tags: Mapping[str, str]
    data: tuple[Data, ...] = ()
    measured: tuple[MeasuredModel, ...] = ()


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

    def check(self, target: Target, keep: Callable[[Checked], None] = lambda _: None) -> Checked:
        """Checks a checkpoint and writes ``serve_check.md`` and ``.json``, and the runtime's log.

        Args:
            target: The checkpoint.
            keep: Gets what is known before each timing, which takes minutes: whoever stops one keeps that.

        Raises:
            UserError: It cannot be read, or its folder not be written, or something is to be corrected first.
        """
        checkpoint, digest, structure = check_files(target.folder)
        if target.digest is not None and digest != target.digest:
            run = target.tags.get("export_run_id")
            raise UserError(f"{target.folder} is not what run {run} exported (its digest differs); export it again")
        out = dated(self.settings.output_root, f"serve_check_{target.folder.name}")

        def described(done: ServeCheck) -> Checked:
            _write(done, out)
            return self._described(target, digest, done, out)

        try:
            out.mkdir(parents=True)
            return described(self._checked(checkpoint, structure, digest, out, lambda done: keep(described(done))))
        except OSError as error:
            if (reason := why_unwritable(error)) is None:
                raise
            raise UserError(f"cannot write {out} ({reason}); free space, or set output_root") from None

    def _described(self, target: Target, digest: str, done: ServeCheck, out: Path) -> Checked:
        """A check as its run has it."""
        tags = {
            **target.tags,
            "checkpoint.path": str(target.folder),
            "checkpoint.digest": digest,
            "serve": done.outcome,
        }
        tags |= {f"serve.{key}": value for key, value in done.runtime.items()}
        tags |= {"serve.unasked": done.unasked} if done.unasked else {}
        parameters = {"eff.runtime_dtype": self.settings.vllm.dtype}
        if self.settings.compare:
            parameters |= {"eff.tokens": str(self.settings.tokens), "eff.top_k": str(self.settings.top_k)}
        data: tuple[Data, ...] = ()
        models: tuple[MeasuredModel, ...] = ()
        if (target.folder / MANIFEST).is_file():
            scheme = read_scheme(target.folder)
            data = _held_out(scheme, self.settings) if self.settings.compare else ()
            models = logged_model(scheme, done, data)
            parameters |= {"eff.model": scheme.model.name, "eff.model_revision": scheme.model.revision}
            parameters |= {"eff.scheme": scheme.name, "eff.scheme_digest": scheme.digest}
        return Checked(done, out, parameters, tags, data, models)

    def _checked(
        self,
        checkpoint: Checkpoint,
        structure: tuple[Check, ...],
        digest: str,
        out: Path,
        keep: Callable[[ServeCheck], None],
    ) -> ServeCheck:
        folder = checkpoint.folder
        if not all(check.passed for check in structure):
            return ServeCheck(folder, digest, structure, SKIPPED, "not served, as its files are not sound")
        try:
            installed = self._installed
        except Skipped as why:
            return ServeCheck(folder, digest, structure, SKIPPED, str(why))
        scheme = read_scheme(folder)
        subject = Subject.of(scheme, self.settings) if self.settings.compare else None
        unasked = left_open(scheme, subject.prepared.resolved.config) if subject is not None else ""
        if unasked:
            print(f"warning: {folder.name} is {unasked}", file=sys.stderr, flush=True)
        if installed is not None and (unknown := what_is_unknown(installed[0])):
            print(f"warning: {unknown}", file=sys.stderr, flush=True)
        launch = None if installed is None else self._launch(installed[0], scheme)
        processor = None if installed is None else installed[1]
        about = {} if launch is None else Started(launch, processor).about
        labels = tuple(read_quantization(checkpoint).layers.values())
        unlike = otherwise(labels, processor)
        known = in_words(unlike, processor) if processor is not None and unlike else ""
        missing, unsaid = "", list[str]()
        if installed is not None:
            known = "; ".join(filter(None, (known, otherwise_on_gpu(labels, installed[0]))))
            missing, unsaid = missing_on_gpu(labels, installed[0]), unsaid_kernels(labels, installed[0])
        if self.settings.strict and known:
            detail = f"not served, as strict=true: {known}"
            return ServeCheck(folder, digest, structure, DIVERGES, detail, runtime=about)
        if self.settings.vllm.plugin is None and any(answer.state == MISSING for answer in unlike.values()):
            return ServeCheck(folder, digest, structure, REFUSED, known, runtime=about)
        if installed is not None:
            known = "; ".join(filter(None, (known, rounding_on_gpu(labels, installed[0]))))
            check_card(checkpoint, installed[0], self.settings.vllm.arguments)
        if self.settings.speed is not None:
            check_positions(folder, self.settings.speed)
        try:
            if subject is None:
                assert launch is not None  # settings without a comparison are of a vLLM that is started and timed
                assert self._timer is not None
                detail = NOT_COMPARED + (f"; known: {known}" if known else "")
                done = ServeCheck(folder, digest, structure, TIMED, detail, runtime=with_kernels(about, unsaid))
                return _timed(done, self._timer, launch, lambda: local_source(scheme), out, keep)
            runtime, plain = self._runtimes(subject, launch, processor)
            served = runtime.output(folder, folder.name, subject.question, out / "vllm.log")
            served = replace(served, runtime=with_kernels(served.runtime, unsaid))
        except Refused as words:
            detail = "; known: ".join(filter(None, (why_refused(str(words), labels, processor), missing)))
            return ServeCheck(folder, digest, structure, REFUSED, detail, runtime=about)
        unquantized = None if plain is None else self._plain(plain, subject, out)
        done = judge(
            folder, digest, structure, served, lambda: self._measured(subject, checkpoint, unquantized, served), known
        )
        done = replace(done, unasked=unasked)
        if self._timer is None or launch is None:
            return done
        keep(done)
        try:
            return _timed(done, self._timer, launch, lambda: subject.prepared.resolved, out, keep)
        except Refused as words:
            return replace(done, untimed=f"vLLM cannot be timed: {words}; its log is in {out}")
        except UserError as error:
            return replace(done, untimed=str(error))

    @cached_property
    def _timer(self) -> Timer | None:
        """What times checkpoints; ``None`` where that is not asked."""
        return None if self.settings.speed is None else Timer(self.settings.speed)

    @cached_property
    def _installed(self) -> tuple[Environment, Processor | None] | None:
        """Where vLLM is and what it computes with on this CPU; ``None`` where a server runs already."""
        if self.settings.vllm.url is not None:
            return None
        environment = find_environment(self.settings.vllm.python, self.root)
        return environment, ask(environment)

    def _launch(self, environment: Environment, scheme: Scheme) -> Launch:
        """How vLLM is started on a scheme's checkpoint and on its unquantized model."""
        vllm = self.settings.vllm
        trust = ("--trust-remote-code",) if scheme.settings.get("model", {}).get("trust_remote_code") else ()
        arguments = (*vllm.arguments, *trust)
        dtype = _runtime_dtype(scheme, self.settings)
        return Launch(
            environment, dtype=dtype, port=vllm.port, plugin=vllm.plugin, arguments=arguments, seconds=vllm.seconds
        )

    def _runtimes(
        self, subject: Subject, launch: Launch | None, processor: Processor | None
    ) -> tuple[Runtime, Runtime | None]:
        """The runtime of a checkpoint, and that of its unquantized model where there is one."""
        vllm = self.settings.vllm
        if launch is None:
            assert vllm.url is not None
            source = PurePath(subject.prepared.scheme.model.source).name
            plain = Running(vllm.unquantized_url, called=(source,)) if vllm.unquantized_url else None
            return Running(vllm.url, vllm.model), plain
        started = Started(replace(launch, max_length=subject.question.length, top_k=subject.question.top_k), processor)
        return started, started

    def _plain(self, runtime: Runtime, subject: Subject, out: Path) -> RuntimeOutput:
        source = source_folder(subject.prepared.resolved)
        key = (str(source), subject.texts_key)
        remembered = self._unquantized.setdefault(key, Remembered(runtime))
        try:
            return remembered.output(source, "the unquantized model", subject.question, out / "vllm-unquantized.log")
        except Refused as words:
            raise UserError(f"vLLM does not serve the unquantized model {source} either: {words}") from None

    def _measured(
        self, subject: Subject, checkpoint: Checkpoint, unquantized: RuntimeOutput | None, served: RuntimeOutput
    ) -> Measured:
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
        return compare(pytorch, unquantized, served, texts, subject.question.top_k)


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
        every = settings.top_k >= prepared.resolved.config.get_text_config().vocab_size
        question = Question(texts, -1 if every else settings.top_k, settings.new_tokens)
        return cls(prepared, question, _runtime_dtype(scheme, settings))


def _runtime_dtype(scheme: Scheme, settings: ServeSettings) -> str:
    """What the runtime computes in."""
    if settings.vllm.dtype != "auto":
        return settings.vllm.dtype
    return "bfloat16" if scheme.model.dtype == "float32" else scheme.model.dtype


def _timed(
    done: ServeCheck,
    timer: Timer,
    launch: Launch,
    find: Callable[[], ResolvedModel],
    out: Path,
    keep: Callable[[ServeCheck], None],
) -> ServeCheck:
    """A check with the times of its checkpoint and of the unquantized model; those of the first are kept at once.

    Raises:
        Refused: vLLM does not load the checkpoint.
        UserError: It was not timed.
    """
    done = timer.timed(done, launch, out)
    keep(done)
    return timer.beside(done, launch, find, out)


def _write(done: ServeCheck, out: Path) -> None:
    write_json(out / "serve_check.json", done.to_json())
    (out / "serve_check.md").write_text(done.markdown(), "utf-8")


def _held_out(scheme: Scheme, settings: ServeSettings) -> tuple[Data, ...]:
    """The texts as an MLflow dataset."""
    known = scheme.calibration
    facts = {"digest": known.digest, "packing": known.packing, "seq_len": known.seq_len, "tokens": settings.tokens}
    return (Data(held_out_data(known.dataset, facts), "evaluation"),)


def logged_model(scheme: Scheme, done: ServeCheck, data: Sequence[Data]) -> tuple[MeasuredModel, ...]:
    """The scheme's logged model: which metrics are of it, and what it is searched by.

    Args:
        scheme: What was served.
        done: Its check; only one that ended well is searched by.
        data: The texts; empty where nothing was compared.
    """
    name = scheme.title
    speed = tuple(key for key in done.metrics if key.startswith("speed/"))
    served = tuple(key for key in done.metrics if key.startswith("serve/"))
    values = served_values(done.metrics) if done.outcome in (LOADS, TIMED) else {}
    kl = {key: value for key, value in values.items() if key == "served_kl"}
    others = {key: value for key, value in values.items() if key not in kl}
    tags = done.speeds.quantized.tags(done.runtime) if done.speeds is not None and others else {}
    timed = MeasuredModel(name, scheme.digest, speed, values={"bits": scheme.effective_bits, **others}, tags=tags)
    if not data:
        return (timed,)
    return timed, MeasuredModel(name, scheme.digest, served, data[0].fields["name"], kl)
