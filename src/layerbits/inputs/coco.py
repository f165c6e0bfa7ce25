"""Builds the COCO 2017 caption list from the annotation archive: ``python -m layerbits.inputs.coco``.

The archive (https://cocodataset.org/#download) is served over plain HTTP, and COCO publishes no checksum.
:data:`ARCHIVE_SHA256` is the one that TensorFlow Datasets pins for the same URL
(``tensorflow_datasets/url_checksums/coco.txt``). The captions are the COCO Consortium's, under CC BY 4.0
(https://cocodataset.org/#termsofuse).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from layerbits.cache import cache_dir, writable_cache
from layerbits.errors import UserError
from layerbits.inputs.captions import COCO_FILE, normalised
from layerbits.paths import user_path

ARCHIVE_URL = "http://images.cocodataset.org/annotations/annotations_trainval2017.zip"
ARCHIVE_SHA256 = "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268"
MEMBER = "annotations/captions_train2017.json"

_CHUNK = 1 << 20
_TIMEOUT = 60.0
_INSTEAD = "use dataset=text_file dataset.path=FILE with a caption list of your own"


@dataclass(frozen=True)
class Built:
    """A built caption list and the SHA-256 of the archive that it came from."""

    path: Path
    captions: int
    archive_sha256: str


def build_coco_captions(
    out_path: str | Path,
    url: str = ARCHIVE_URL,
    sha256: str | None = ARCHIVE_SHA256,
    seed: int = 0,
    count: int = 4096,
) -> Built:
    """Writes ``count`` captions of different images, one a line, in an order that depends on ``seed`` alone.

    Of each image the caption with the lowest annotation id is taken; one that repeats an earlier image's caption is
    passed over. The archive stays in the cache, so that another seed or count needs no download.

    Args:
        out_path: File to write; it appears whole or not at all.
        url: The archive; also ``file:///…`` for one that is already here.
        sha256: Expected SHA-256 of the archive in hex; ``None`` accepts any.
        seed: Seed of the order.
        count: Number of captions.

    Raises:
        UserError: The archive cannot be fetched, is not the expected one, or has too few captions.
    """
    if count < 1:
        raise UserError(f"--count {count} is not a number of captions; use 1 or more")
    out_path = user_path(out_path)
    if out_path.is_dir():
        raise UserError(f"--out {out_path} is a folder; give the name of the file to write")
    try:
        archive = _archive(url)
        digest = _sha256(archive)
        if sha256 is not None and digest != sha256.lower():
            raise UserError(
                f"{archive} has sha256 {digest}, expected {sha256}; delete it and run again to fetch it anew, "
                f"or pass --sha256 {digest} if you trust it"
            )
        captions = _ordered(_first_captions(archive), seed, count)
        _write_whole(out_path, "\n".join(captions) + "\n")
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or out_path} ({error.strerror or error}); "
            "free space there, or choose another --out or LAYERBITS_CACHE"
        ) from None
    return Built(out_path, len(captions), digest)


def _archive(url: str) -> Path:
    if url.startswith("file://"):
        archive = Path(url2pathname(urlsplit(url).path))
        if not archive.is_file():
            raise UserError(f"there is no file {archive}; give the archive's --url")
        return archive
    archive = writable_cache() / "downloads" / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{Path(url).name}"
    if not archive.exists():
        archive.parent.mkdir(parents=True, exist_ok=True)
        _download(url, archive)
    return archive


def _download(url: str, target: Path) -> None:
    """Fetches a file by way of ``<target>.part``, from which the next call goes on after an interruption."""
    part = target.with_name(target.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise UserError(f"{url} answered {error.code} {error.reason}; give another --url, or {_INSTEAD}") from None
        # Nothing lies behind the part: it is either the whole file or of some other one.
        if error.headers.get("Content-Range") != f"bytes */{have}":
            part.unlink()
            return _download(url, target)
        os.replace(part, target)
        return None
    except (OSError, ValueError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise UserError(f"cannot reach {url} ({reason}); run again when online, or {_INSTEAD}") from None
    with response:
        resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        start = have if resumed else 0
        length = response.headers.get("Content-Length")
        end = _receive(response, part, start, None if length is None else start + int(length))
    if length is not None and end != start + int(length):
        raise UserError(
            f"the download of {url} broke off at {end:,} of {start + int(length):,} bytes; "
            "run the same command again, it goes on from there"
        )
    os.replace(part, target)
    return None


def _receive(response: HTTPResponse, part: Path, start: int, total: int | None) -> int:
    """Appends a response to the part file; returns the size that it has then, also when the connection breaks."""
    from tqdm import tqdm

    with (
        part.open("ab" if start else "wb") as file,
        tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=part.stem, disable=None) as bar,
    ):
        while True:
            try:
                chunk: bytes = response.read(_CHUNK)
            except (OSError, HTTPException):
                chunk = b""
            if not chunk:
                return file.tell()
            file.write(chunk)
            bar.update(len(chunk))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_captions(archive: Path) -> dict[int, str]:
    """Caption with the lowest annotation id per image id."""
    try:
        with zipfile.ZipFile(archive) as opened, opened.open(MEMBER) as file:
            annotations = sorted(json.load(file)["annotations"], key=lambda a: int(a["id"]))
        captions: dict[int, str] = {}
        for annotation in annotations:
            captions.setdefault(int(annotation["image_id"]), " ".join(annotation["caption"].split()))
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{archive} is not the COCO 2017 annotation archive ({error}); delete it and run again, "
            "or give another --url"
        ) from None
    return captions


def _ordered(captions: dict[int, str], seed: int, count: int) -> list[str]:
    # By hash rather than by random.shuffle, whose order Python does not promise to keep between versions.
    images = sorted(captions, key=lambda image: hashlib.sha256(f"{seed}:{image}".encode()).digest())
    distinct: dict[str, str] = {}
    for image in images:
        distinct.setdefault(normalised(captions[image]), captions[image])
    distinct.pop("", None)
    if len(distinct) < count:
        raise UserError(f"the archive has {len(distinct)} distinct captions; use --count {len(distinct)} or fewer")
    return list(distinct.values())[:count]


def _write_whole(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of ``python -m layerbits.inputs.coco``; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m layerbits.inputs.coco", description="Build the COCO 2017 caption list."
    )
    parser.add_argument(
        "--out", help=f"file to write (default: {COCO_FILE} in the cache, where dataset=coco2017 looks)"
    )
    parser.add_argument("--url", default=ARCHIVE_URL, help="annotation archive, http(s):// or file:// (%(default)s)")
    parser.add_argument("--sha256", default=ARCHIVE_SHA256, help="expected checksum of it, or none (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order (%(default)s)")
    parser.add_argument("--count", type=int, default=4096, help="number of captions (%(default)s)")
    options = parser.parse_args(argv)
    out = options.out or cache_dir() / COCO_FILE
    sha256 = None if options.sha256 == "none" else options.sha256
    try:
        built = build_coco_captions(out, options.url, sha256, options.seed, options.count)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{built.captions} captions in {built.path} (archive sha256 {built.archive_sha256})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
