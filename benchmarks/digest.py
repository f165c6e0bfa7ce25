"""What the digest of a folder takes beside reading its files once: `python benchmarks/digest.py [GB] [FOLDER]`.

Writes three files of random bytes, asks the kernel to forget them before each cold reading, and removes them.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from layerbits.inputs.digest import folder_digest

BLOCK = 1 << 26


def timed(what: str, function: Callable[[], object]) -> None:
    start, cpu = time.perf_counter(), time.process_time()
    function()
    print(f"{what}: {time.perf_counter() - start:.4g} s, {time.process_time() - cpu:.4g} s of processor", flush=True)


def forget(files: list[Path]) -> None:
    for file in files:
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(files: list[Path]) -> None:
    buffer = bytearray(1 << 20)
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def main(size: float, parent: str | None) -> None:
    with tempfile.TemporaryDirectory(dir=parent) as name:
        folder = Path(name)
        os.environ["LAYERBITS_CACHE"] = str(folder / "cache")
        files = [folder / f"model-{i}.safetensors" for i in range(3)]
        block = os.urandom(BLOCK)
        for file in files:
            with file.open("wb") as stream:
                for _ in range(max(1, round(size * 1e9 / len(files) / BLOCK))):
                    stream.write(block)
                os.fsync(stream.fileno())
        time.sleep(3)  # a digest of files that changed just now is not kept
        print(f"{sum(file.stat().st_size for file in files) / 1e9:.1f} GB, {os.cpu_count()} cores")
        forget(files)
        timed("read once, cold", lambda: read(files))
        forget(files)
        timed("digest, cold", lambda: folder_digest(folder, files))
        timed("digest again", lambda: folder_digest(folder, files))


if __name__ == "__main__":
    main(float(sys.argv[1]) if sys.argv[1:] else 4.0, sys.argv[2] if sys.argv[2:] else None)
