"""What a vLLM tells of a model: one that is started here, or one that is running."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from layerbits.checkpoint.processors import Processor
from layerbits.errors import UserError
from layerbits.serving.check import RuntimeOutput
from layerbits.serving.client import Client, ServerError, check_length, choose
from layerbits.serving.distributions import select
from layerbits.serving.gpu import card_name
from layerbits.serving.server import NAME, Launch, Refused, last_error, serving
from layerbits.serving.texts import Texts

_PROMPTS = 2  # texts to continue, for a reader
_PROMPT_TOKENS = 24


@dataclass(frozen=True)
class Question:
    """What is asked of every model.

    Attributes:
        top_k: Tokens per position; -1 = all.
        new_tokens: Tokens to generate after the first rows.
    """

    texts: Texts
    top_k: int
    new_tokens: int

    @property
    def length(self) -> int:
        """Tokens that a server has to take in one request."""
        return self.texts.longest + max(self.new_tokens, 1)


class Runtime(Protocol):
    """Something that serves a checkpoint."""

    def output(self, folder: Path, what: str, question: Question, log: Path) -> RuntimeOutput:
        """Serves a checkpoint and asks it.

        Args:
            folder: The checkpoint.
            what: It in a word.
            question: What to ask.
            log: File for what the runtime says.

        Raises:
            Refused: It does not serve it.
            UserError: There is something to correct first.
        """


@dataclass(frozen=True)
class Started:
    """A vLLM that is started for each checkpoint, and ended."""

    launch: Launch
    processor: Processor | None = None

    @property
    def about(self) -> dict[str, str]:
        """What it is: package and version, the class of the CPU or the GPU, and the name of the plugin's folder."""
        environment, plugin, cpu = self.launch.environment, self.launch.plugin, self.processor
        about = {environment.package: environment.version} | ({} if cpu is None else {"cpu": cpu.name})
        about |= {} if (card := card_name(environment)) is None else {"card": card}
        return about | ({} if plugin is None else {"plugin": plugin.name})

    def output(self, folder: Path, what: str, question: Question, log: Path) -> RuntimeOutput:
        """As :class:`Runtime`."""
        with serving(self.launch, folder, what, log) as client:
            try:
                return _ask(client, NAME, question, with_kernels(self.about, kernels(log)))
            except ServerError as error:
                raise Refused(last_error(log, str(error))) from None


@dataclass(frozen=True)
class Running:
    """A server that somebody else has started.

    Attributes:
        url: Its address.
        model: Name of the model there; ``None`` = the one from a folder called like the checkpoint's.
        called: What the folder may be called there, beside its name here: a hub's name.
    """

    url: str
    model: str | None = None
    called: tuple[str, ...] = ()

    def output(self, folder: Path, what: str, question: Question, log: Path) -> RuntimeOutput:
        """As :class:`Runtime`."""
        client = Client(self.url)
        served = choose(client.models(), self.url, self.model, (folder.name, *self.called))
        check_length(served, self.url, question.length)
        try:
            return _ask(client, served.name, question, {"vllm": client.version(), "at": self.url})
        except ServerError as error:
            advice = f"serve it with --max-logprobs {question.top_k}, or set top_k to what it allows"
            raise UserError(f"{self.url}: {error}{f'; {advice}' if 'logprobs' in str(error) else ''}") from None


@dataclass
class Remembered:
    """A runtime that is asked once for each folder, as several schemes have one unquantized model."""

    runtime: Runtime
    _outputs: dict[Path, RuntimeOutput] = field(default_factory=dict)

    def output(self, folder: Path, what: str, question: Question, log: Path) -> RuntimeOutput:
        """As :class:`Runtime`; the question has to be the same."""
        if folder not in self._outputs:
            self._outputs[folder] = self.runtime.output(folder, what, question, log)
        return self._outputs[folder]


def kernels(log: Path) -> list[str]:
    """The kernels of quantized linears that vLLM says in its log that it chose."""
    return re.findall(r"(?:Using|Selected) (\w+Kernel) for", log.read_text("utf-8", errors="replace"))


def with_kernels(about: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """What a runtime is, with more kernels beside those that it has already."""
    known = {*filter(None, about.get("kernel", "").split(", ")), *names}
    return {**about, **({"kernel": ", ".join(sorted(known))} if known else {})}


def _ask(client: Client, model: str, question: Question, about: Mapping[str, str]) -> RuntimeOutput:
    texts = question.texts
    rows = client.distributions(model, texts.rows, question.top_k)
    prompts = [row[:_PROMPT_TOKENS] for row in texts.rows[:_PROMPTS]]
    return RuntimeOutput(
        select(rows, texts.wanted), tuple(client.generate(model, prompts, question.new_tokens)), dict(about)
    )
