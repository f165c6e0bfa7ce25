"""A small disk of its own for a test, which fills up and is freed again."""

import contextlib
import errno
import os
import subprocess
from pathlib import Path

import pytest


class Disk:
    """A file system in memory, of a size that may be changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._filler = folder / "filler"

    def resize(self, size: str) -> None:
        """Gives it another size, as ``mount`` takes it."""
        mount("-o", f"remount,size={size}", self.folder)

    def fill(self, left: int = 0) -> None:
        """Writes a file until there is no more than ``left`` bytes of space."""
        stat = os.statvfs(self.folder)
        self._filler.write_bytes(bytes(max(0, stat.f_bavail * stat.f_frsize - left)))
        if not left:
            with contextlib.suppress(OSError), self._filler.open("ab") as file:
                file.write(bytes(1 << 20))

    def free(self) -> None:
        """Removes that file."""
        self._filler.unlink()

    def holds(self) -> list[str]:
        """Names of all files and folders on it."""
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path != self._filler)


def mount(*arguments: object) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path):
    """A disk of 16 MB; skips where nobody may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mount("-t", "tmpfs", "-o", "size=16m", "tmpfs", folder)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no disk can be mounted here ({getattr(error, 'stderr', b'') or os.strerror(errno.ENOENT)!r})")
    yield Disk(folder)
    subprocess.run(["umount", "--lazy", folder], check=True)  # what failed may still hold a file open
