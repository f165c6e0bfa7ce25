"""Where a store says that artifacts lie, and whether they do: a database that was moved, a server's own disk."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from layerbits.errors import UserError
from layerbits.tracking.uris import is_server, redact, sqlite_database

if TYPE_CHECKING:
    from mlflow.entities import RunInfo

_ROOT = "mlruns"
# Tables and columns of MLflow 3.17 that hold the place of an artifact.
_PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
    ("logged_models", "artifact_location"),
)
_PROBE = "layerbits-probe"


@dataclass(frozen=True)
class Moved:
    """An experiment whose artifacts lie, by the database, in a folder where the database is no more.

    Attributes:
        name: Of the experiment.
        before: Folder that held ``mlruns``.
        now: Folder of the database.
    """

    name: str
    before: str
    now: str


def moved_experiments(database: Path) -> list[Moved]:
    """The active experiments of a SQLite store that was moved or copied together with its artifacts.

    Args:
        database: Its file.
    """
    folder = database.parent
    with closing(sqlite3.connect(database)) as store:
        rows = store.execute("SELECT name, artifact_location FROM experiments WHERE lifecycle_stage = 'active'")
        places = [(str(name), str(location)) for name, location in rows]
    moved = []
    for name, location in places:
        path = local_path(location)
        if path is None or _ROOT not in path.parts:
            continue
        before, tail = _split(path)
        if before == folder:
            continue
        if (folder / _ROOT / tail).exists() or not before.exists():
            moved.append(Moved(name, str(before), str(folder)))
    return moved


def check_not_moved(uri: str) -> None:
    """Checks that a SQLite store is where its artifacts are.

    Raises:
        UserError: It was moved; the message has the command that repairs it.
    """
    database = sqlite_database(uri)
    if database is not None and (moved := moved_experiments(database)):
        raise UserError(
            f"the store {database} was moved: artifacts of experiment {moved[0].name} would go to {moved[0].before}; "
            f"run `layerbits relocate --tracking-uri {redact(uri)}`, which points it to {moved[0].now}"
        )


def relocate(uri: str) -> int:
    """Points the experiments, runs and models of a SQLite store that was moved to the folder where it is now.

    Returns:
        How many places were changed.

    Raises:
        UserError: Not a SQLite store, or it cannot be written.
    """
    database = sqlite_database(uri)
    if database is None:
        raise UserError(f"{redact(uri)} is no SQLite store; a server and its database keep their own places")
    changed = 0
    try:
        moves = {(one.before, one.now) for one in moved_experiments(database)}
        with closing(sqlite3.connect(database)) as store, store:
            for table, column in _existing(store):
                for before, now in moves:
                    for start in (before, f"file://{before}"):
                        old, new = f"{start}/{_ROOT}/", f"{start.removesuffix(before)}{now}/{_ROOT}/"
                        changed += store.execute(
                            f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                            (new, len(old) + 1, len(old), old),
                        ).rowcount
    except sqlite3.Error as error:
        raise UserError(f"cannot change {database} ({error}); stop what uses it, and make it writable") from None
    return changed


def found_beside(uri: str, artifact_uri: str) -> str:
    """The place of an artifact, or the one beside a moved SQLite store where it lies now."""
    database, path = sqlite_database(uri), local_path(artifact_uri)
    if database is None or path is None or _ROOT not in path.parts or path.exists():
        return artifact_uri
    here = database.parent / _ROOT / _split(path)[1]
    return str(here) if here.exists() else artifact_uri


def check_reachable(uri: str, run: RunInfo) -> None:
    """Checks that what a run logs arrives where its server, or other machines, read it.

    A server whose artifact root is a folder tells its clients to write there themselves: to a disk of theirs, unless
    it is the same. So a small file is written, and the server is asked whether it sees it.

    Args:
        uri: The store.
        run: A run of it.

    Raises:
        UserError: It does not.
    """
    place = local_path(str(run.artifact_uri))
    if place is None or sqlite_database(uri) is not None:
        return
    if is_server(uri):
        if not _server_sees(uri, str(run.run_id), place):
            raise UserError(
                f"tracking store {redact(uri)} keeps artifacts in {place} on a disk of its own, which this machine "
                "does not share; start it with --artifacts-destination instead of --default-artifact-root (and "
                "without --no-serve-artifacts), and choose a new tracking.experiment"
            )
    elif _ROOT in place.parts and not _split(place)[0].exists():
        raise UserError(
            f"experiment {run.experiment_id} of {redact(uri)} keeps artifacts in {place}, a folder of another machine; "
            "choose a new tracking.experiment, or make that folder reachable here"
        )


def local_path(location: str) -> Path | None:
    """The folder that an artifact URI names; ``None`` for one of a server or an object store."""
    parts = urlsplit(location)
    if parts.scheme == "file":
        return Path(unquote(parts.path))
    return Path(location) if location.startswith("/") else None


def _split(path: Path) -> tuple[Path, Path]:
    """The folder that holds the last ``mlruns`` of a path, and what is below that."""
    at = len(path.parts) - 1 - path.parts[::-1].index(_ROOT)
    return Path(*path.parts[:at]), Path(*path.parts[at + 1 :])


def _existing(store: sqlite3.Connection) -> Iterator[tuple[str, str]]:
    for table, column in _PLACES:
        if column in {row[1] for row in store.execute(f"PRAGMA table_info({table})")}:
            yield table, column


def _server_sees(uri: str, run_id: str, place: Path) -> bool:
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    made = [folder for folder in (place, *place.parents) if not folder.exists()]
    file = place / _PROBE
    try:
        place.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
        answer = http_request(
            get_default_host_creds(uri), "/api/2.0/mlflow/artifacts/list", "GET", params={"run_id": run_id}
        )
        return answer.status_code == 200 and _PROBE in {one["path"] for one in answer.json().get("files", [])}
    except OSError:
        return False
    finally:
        file.unlink(missing_ok=True)
        with suppress(OSError):  # not empty: others write there too
            for folder in made:
                folder.rmdir()
