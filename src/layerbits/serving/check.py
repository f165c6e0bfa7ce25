"""Whether a runtime serves an exported checkpoint as PyTorch computes it.

A checkpoint that loads cleanly and answers with corrupted logits is a known failure, so the runtime's log-probabilities
of given tokens are compared with those of the model that :mod:`layerbits.checkpoint.restore` makes of the same files.
The runtime is behind :class:`Engine`; :mod:`layerbits.serving.vllm` is the one for vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from layerbits.checkpoint.labels import COMPRESSED
from layerbits.checkpoint.quantization import Quantization, read_quantization
from layerbits.checkpoint.reader import Checkpoint, open_checkpoint
from layerbits.checkpoint.structure import Check, check_structure
from layerbits.errors import Skipped, UserError

LOADS, REFUSED, DIVERGES = "loads", "refused", "diverges"

LogProbs = list[list[float]]
"""Per prompt the log-probability of each token but the first, given those before it."""


class Engine(Protocol):
    """A runtime that has loaded a checkpoint."""

    def logprobs(self, prompts: Sequence[Sequence[int]]) -> LogProbs:
        """Log-probabilities of the prompts' own tokens."""

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[str]:
        """Greedy continuations."""


@dataclass(frozen=True)
class Served:
    """What a runtime made of a checkpoint.

    Attributes:
        outcome: :data:`LOADS`, :data:`REFUSED` or :data:`DIVERGES`.
        detail: The runtime's error, or in words how far it is from PyTorch.
        tokens: Log-probabilities compared.
        mean_error: Mean absolute difference from PyTorch's, nats; NaN where one is not a number.
        max_error: The largest.
        texts: Continuations, one per prompt.
    """

    outcome: str
    detail: str
    tokens: int = 0
    mean_error: float = math.nan
    max_error: float = math.nan
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class ServeCheck:
    """Everything that was checked of one checkpoint; ``served`` is ``None`` where the runtime is not installed."""

    folder: Path
    digest: str
    structure: tuple[Check, ...]
    served: Served | None
    skipped: str = ""

    def require(self) -> None:
        """Raises unless everything was checked and is well.

        Raises:
            Skipped: The runtime is missing; what needs none has passed.
            UserError: The checkpoint is not sound, or not served as PyTorch computes it.
        """
        if failed := next((c for c in self.structure if not c.passed), None):
            raise UserError(f"{self.folder} is not sound: {failed.name} - not so: {failed.detail}; export it again")
        if self.served is None:
            raise Skipped(f"{self.skipped}; checked were the files alone, and they are sound")
        if self.served.outcome != LOADS:
            raise UserError(f"vLLM {self.served.outcome} {self.folder}: {self.served.detail}")

    @property
    def metrics(self) -> dict[str, float]:
        """Numbers for the tracking server."""
        values = {"serve/structure_failed": float(sum(not c.passed for c in self.structure))}
        if self.served is not None:
            values |= {
                "serve/tokens": float(self.served.tokens),
                "serve/logprob_mean_error": self.served.mean_error,
                "serve/logprob_max_error": self.served.max_error,
            }
        return values

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data; what is not a number becomes null."""
        data = {**asdict(self), "folder": str(self.folder)}
        if data["served"] is not None:
            data["served"] = {
                k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in data["served"].items()
            }
        return data

    def markdown(self) -> str:
        """The report to read."""
        lines = [f"# Serve check of {self.folder.name}", "", "## Files", ""]
        lines += [
            f"- {'ok' if c.passed else 'NOT'}: {c.name}{'' if c.passed else f' - {c.detail}'}" for c in self.structure
        ]
        lines += ["", "## vLLM", ""]
        if self.served is None:
            lines.append(f"Skipped: {self.skipped}")
        else:
            lines.append(f"**{self.served.outcome}**: {self.served.detail}")
            lines += ["", *(f"- `{text!r}`" for text in self.served.texts)]
        return "\n".join(lines) + "\n"


def check_serving(
    folder: Path,
    make_engine: Callable[[Path, str], Engine] | None,
    device: str,
    prompts: int = 4,
    length: int = 64,
    new_tokens: int = 16,
    tolerance: float = 0.2,
    skipped: str = "",
) -> ServeCheck:
    """Checks a checkpoint's files, and then whether a runtime serves it.

    Args:
        folder: The export.
        make_engine: Loads it, given vLLM's name of its quantization; ``None`` where there is no runtime.
        device: Where PyTorch computes what is compared: ``cpu`` or ``cuda``.
        prompts: How many texts.
        length: Tokens of each.
        new_tokens: Tokens to generate.
        tolerance: Mean absolute difference of the log-probabilities, nats, from which on it diverges. Corrupted logits
            are off by nats; two sound runtimes round activations differently, which is a fraction of one.
        skipped: Why there is no runtime.

    Raises:
        UserError: The folder is no checkpoint that can be read.
    """
    checkpoint = open_checkpoint(folder)
    structure = check_structure(checkpoint)
    digest = checkpoint.digest()
    if not all(check.passed for check in structure):
        return ServeCheck(folder, digest, structure, None, "the files are not sound")
    if make_engine is None:
        return ServeCheck(folder, digest, structure, None, skipped)
    name, load = quantization_name(read_quantization(checkpoint)), make_engine
    texts = token_rows(folder, prompts, length)
    expected = reference_logprobs(checkpoint, texts, device)  # first: a runtime takes most of the GPU's memory
    return ServeCheck(
        folder, digest, structure, serve(lambda: load(folder, name), texts, expected, new_tokens, tolerance)
    )


def serve(
    load: Callable[[], Engine], texts: Sequence[Sequence[int]], expected: LogProbs, new_tokens: int, tolerance: float
) -> Served:
    """Loads a runtime, lets it compute and compares."""
    try:
        engine = load()
        found = engine.logprobs(texts)
        generated = tuple(engine.generate(texts, new_tokens))
    except Exception as error:
        # The runtime's own words are the result here, whatever class they come in.
        words = (str(error).strip().splitlines() or [""])[-1]
        return Served(REFUSED, f"{type(error).__name__}: {words}".rstrip(": "))
    return classify(found, expected, generated, tolerance)


def classify(found: LogProbs, expected: LogProbs, texts: tuple[str, ...], tolerance: float) -> Served:
    """Compares a runtime's log-probabilities with PyTorch's.

    Args:
        found: The runtime's.
        expected: PyTorch's.
        texts: What the runtime generated.
        tolerance: Mean absolute difference, nats, that is allowed.
    """
    if [len(row) for row in found] != [len(row) for row in expected]:
        return Served(DIVERGES, "it returned log-probabilities of another number of tokens", texts=texts)
    errors = [abs(a - b) for mine, other in zip(found, expected, strict=True) for a, b in zip(mine, other, strict=True)]
    if not all(map(math.isfinite, errors)):
        bad = sum(not math.isfinite(error) for error in errors)
        return Served(DIVERGES, f"{bad} of {len(errors)} log-probabilities are not finite", len(errors), texts=texts)
    mean, largest = sum(errors) / len(errors), max(errors)
    outcome = LOADS if mean <= tolerance else DIVERGES
    detail = (
        f"log-probabilities of {len(errors)} tokens differ from PyTorch's by {mean:.3g} nats in the mean, "
        f"{largest:.3g} at most; {tolerance:g} in the mean is allowed"
    )
    return Served(outcome, detail, len(errors), mean, largest, texts)


def quantization_name(quantization: Quantization) -> str:
    """What vLLM calls the quantization of a checkpoint (its ``quantization`` argument).

    https://docs.vllm.ai/en/latest/features/quantization/modelopt/ (read 2026-11-21).
    """
    if quantization.format == COMPRESSED:
        return COMPRESSED
    if quantization.mixed:
        return "modelopt_mixed"
    algos = {label.algo for label in quantization.layers.values()}
    return "modelopt_fp4" if algos <= {"NVFP4", "W4A16_NVFP4"} else "modelopt"


def token_rows(folder: Path, rows: int, length: int) -> list[list[int]]:
    """Texts to compare on: captions that come with LayerBits, in the checkpoint's own tokens.

    Raises:
        UserError: The checkpoint has no tokenizer.
    """
    from transformers import AutoTokenizer

    from layerbits.inputs.captions import load_captions

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError):
        raise UserError(f"{folder} holds no tokenizer; export it again from a model that has one") from None
    captions = load_captions("everyday", "large")
    ids = tokenizer(" ".join(captions.held_out or captions.captions), add_special_tokens=False)["input_ids"]
    found = [ids[start : start + length] for start in range(0, min(len(ids), rows * length), length)]
    return [row for row in found if len(row) > 1]


def reference_logprobs(checkpoint: Checkpoint, texts: Sequence[Sequence[int]], device: str) -> LogProbs:
    """What the model made of the checkpoint alone gives to the texts' own tokens, in PyTorch."""
    import torch

    from layerbits.checkpoint.restore import restore

    model = restore(checkpoint, read_quantization(checkpoint), device)
    rows = []
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([list(text)], device=device)
            logprobs = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
            rows.append(logprobs.gather(1, ids[0, 1:, None])[:, 0].tolist())
    return rows
