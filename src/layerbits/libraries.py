"""What libraries print: lines that ask nothing of the user are left out, every other one is shown."""

from __future__ import annotations

import io
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TextIO, TypeVar

BAR_SECONDS = 2.0
"""A bar of transformers is shown from then on: one that is over sooner says nothing."""

_PRINTED = re.compile(
    "|".join(
        (
            r"Inserted \d+ quantizers",
            r"Registered <class '.*'> to \w+ for KV Cache quantization",
            r"Loaded extension modelopt_cuda_ext\w* in [\d.]+ seconds",
        )
    )
)
"""Lines that ModelOpt prints; that it loads an extension is shown, because the first time it compiles for minutes."""
_WARNED = (
    r"transformers \S+ is not tested with current version of modelopt",  # the range of versions is that of our package
    r"To copy construct from a tensor, it is recommended to use",  # in ModelOpt's exporter
)
"""Beginnings of warnings."""
_LOGGED = {
    "transformers.configuration_utils": r"`torch_dtype` is deprecated",  # ModelOpt's exporter uses it
    "modelopt.torch.export.quant_utils": r"Tied weight \(declared\): dropping|Found tied weight: ",
}
"""Logger → beginnings of its messages."""


class _OtherLines(io.TextIOBase):
    """A stream that passes on what is written to it: lines as soon as they are whole, others when it is flushed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._begun = ""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Of the stream."""
        return self._stream.encoding

    def fileno(self) -> int:
        """Of the stream."""
        return self._stream.fileno()

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self._stream.isatty()

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, text: str) -> int:
        """Takes some text; returns its length."""
        *lines, self._begun = f"{self._begun}{text}".split("\n")
        for line in lines:
            if not _PRINTED.fullmatch(line):
                self._stream.write(f"{line}\n")
        return len(text)

    def flush(self) -> None:
        """Passes on what there is."""
        begun, self._begun = self._begun, ""
        self._stream.write(begun)
        self._stream.flush()


@contextmanager
def known_lines_left_out() -> Iterator[None]:
    """Leaves out lines of libraries that ask nothing of the user, whether printed, warned of or logged.

    The filters of warnings and loggers stay when it ends: to put the former back would undo those of libraries that
    were imported meanwhile.
    """
    for message in _WARNED:
        warnings.filterwarnings("ignore", message=message)
    for name in _LOGGED:
        logger = logging.getLogger(name)
        if _shown not in logger.filters:
            logger.addFilter(_shown)
    with other_lines_to(sys.stdout):
        yield


@contextmanager
def other_lines_to(stream: TextIO) -> Iterator[None]:
    """Sends what is printed to a stream, without the known lines of ModelOpt."""
    with redirect_stdout(_OtherLines(stream)) as lines:
        try:
            yield
        finally:
            lines.flush()


def _shown(record: logging.LogRecord) -> bool:
    return re.match(_LOGGED[record.name], record.getMessage()) is None


Bar = TypeVar("Bar")


@contextmanager
def short_bars_left_out() -> Iterator[None]:
    """Shows bars of transformers only of what takes longer than :data:`BAR_SECONDS`.

    Versions of transformers that let nobody change their bars (5.0 is one) show all of them.
    """
    from transformers.utils import logging as transformers_logging

    def delayed(make: Callable[..., Bar], args: tuple[object, ...], kwargs: dict[str, object]) -> Bar:
        return make(*args, **{"delay": BAR_SECONDS, **kwargs})

    hook = getattr(transformers_logging, "set_tqdm_hook", None)
    if hook is None:
        yield
        return
    before = hook(delayed)
    try:
        yield
    finally:
        hook(before)
