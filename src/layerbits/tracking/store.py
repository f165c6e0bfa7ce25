"""Where runs go: the tracking URI, a fresh SQLite store, and whether the store answers."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote, urlsplit, urlunsplit

from layerbits.errors import UserError
from layerbits.tracking.artifacts import check_not_moved
from layerbits.tracking.uris import is_server, quoted_path, redact, sqlite_database

T = TypeVar("T")

_ANSWER_SECONDS = 4
_LOCK_SECONDS = float(os.environ.get("LAYERBITS_LOCK_SECONDS") or 120)
_LOCKED = "database is locked"
_NO_ANSWER = "Max retries exceeded"  # urllib3's words in MLflow's exception
_INVALID_HOST = "Invalid Host"
_DATABASES = ("postgresql", "mysql")
_MENDS = "start it, or unset tracking.uri and MLFLOW_TRACKING_URI to use a local store, or set tracking=none"

_LONGEST_REASON = 2_000
"""Characters of an error in a tag: a serve check names a cause and a remedy behind its figures; MLflow takes 8,000."""


def open_store(tracking_uri: str | None, root: Path, read: bool = False) -> str:
    """Decides where to log, makes sure that it answers, and makes it MLflow's tracking URI.

    In this order: ``tracking_uri``, ``MLFLOW_TRACKING_URI``, a SQLite file ``mlflow.db`` in ``root`` with artifacts
    in ``mlruns`` beside it. A SQLite file that is not there yet is created, whole or not at all.

    Args:
        tracking_uri: What the configuration says; ``None`` or empty leaves it to the environment.
        root: Folder of the embedded store.
        read: Nothing will be logged: a store that was moved, or that cannot be written, will do.

    Returns:
        The URI: a SQLite path made absolute, a server's user and password moved to where MLflow does not print them
        (``MLFLOW_TRACKING_USERNAME`` and ``_PASSWORD``).

    Raises:
        UserError: No such kind of store, or it does not answer, or refuses us; within seconds.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # MLflow's default of 7 blocks for 246 s when a server goes away in mid-run; 3 are 13 s.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    # The session prints the link of a run, for a local store as well.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    uri = (
        tracking_uri
        or os.environ.get("MLFLOW_TRACKING_URI")
        or f"sqlite:///{quoted_path(root.absolute() / 'mlflow.db')}"
    )
    if uri.startswith("sqlite"):
        uri = _open_sqlite(uri, read)
    else:
        uri = _without_password(uri)
        _check(uri)
    import mlflow

    mlflow.set_tracking_uri(uri)
    return uri


def experiment_id(name: str) -> str:
    """Id of the experiment, created where it is missing; safe with several processes at once.

    Raises:
        UserError: The experiment was deleted.
    """
    import mlflow
    from mlflow.exceptions import MlflowException

    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            return str(client.create_experiment(name, artifact_location=_artifact_location(name)))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)  # another process was faster
    if experiment.lifecycle_stage == "deleted":
        raise UserError(
            f"experiment {name} is deleted; run `mlflow experiments restore -x {experiment.experiment_id}` "
            "or choose another tracking.experiment"
        )
    return str(experiment.experiment_id)


@contextmanager
def impatient() -> Iterator[None]:
    """One short attempt per request to a server, where waiting would only delay bad news."""
    hurry = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": str(_ANSWER_SECONDS)}
    before = {name: os.environ.get(name) for name in hurry}
    os.environ.update(hurry)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def answers(uri: str) -> bool:
    """Whether a server answers at once; a database is taken to."""
    if not is_server(uri):
        return True
    try:
        _query(uri)
    except Exception as error:
        return _NO_ANSWER not in str(error)
    return True


def wait_for(uri: str, seconds: float = 10.0) -> None:
    """Waits for a server that may be restarting, in short attempts: MLflow's own take minutes where it hangs.

    Raises:
        ConnectionError: It does not come back.
    """
    deadline = time.monotonic() + seconds
    while not answers(uri):
        if time.monotonic() > deadline:
            raise ConnectionError("the server does not answer")
        time.sleep(1)


def patiently(write: Callable[[], T]) -> T:
    """Writes to a store, again and again while another process holds a SQLite database locked (for two minutes).

    Args:
        write: May be called again after it failed half-way.
    """
    deadline = time.monotonic() + _LOCK_SECONDS
    printed = False
    while True:
        try:
            return write()
        except Exception as error:
            if _LOCKED not in str(error) or time.monotonic() > deadline:
                raise
            if not printed:
                print(f"the store is locked by another process; waiting up to {_LOCK_SECONDS:.0f} s", file=sys.stderr)
            printed = True
            time.sleep(1)


def one_line(error: BaseException) -> str:
    """What an exception says, on one short line without passwords."""
    if _NO_ANSWER in str(error) and "/mlflow" in str(error):
        return "the server does not answer"
    if _refused(error):
        return "the server refuses us; ask its owner for EDIT permission, or log in as who has it"
    lines = str(error).strip().splitlines()
    return redact(lines[0])[:_LONGEST_REASON] if lines else type(error).__name__


def _refused(error: BaseException) -> bool:
    text, code = str(error), getattr(error, "error_code", "")
    if _INVALID_HOST in text:
        return False
    return code in ("UNAUTHENTICATED", "PERMISSION_DENIED") or "error code 401" in text or "error code 403" in text


def _without_password(uri: str) -> str:
    """MLflow's warnings and errors show a server's URI as it is, so that must be without a password."""
    if not is_server(uri):
        return uri
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise UserError(f"tracking store {redact(uri)} is no address ({error}); write http://server:port") from None
    if parts.password is None:
        return uri
    os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username or "")
    os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _open_sqlite(uri: str, read: bool) -> str:
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        url = make_url(uri)
    except ArgumentError:
        raise UserError(f"{uri} is not a SQLite URI; write sqlite:////absolute/path/mlflow.db") from None
    if not url.database or url.database == ":memory:":
        raise UserError(f"{uri} keeps nothing after the run; give a file: sqlite:////absolute/path/mlflow.db")
    path = Path(url.database).absolute()
    # Not SQLAlchemy's own rendering: that leaves a % in the path unquoted, and it is unquoted when read.
    uri = f"{url.drivername}:///{quoted_path(path)}" + (f"?{uri.partition('?')[2]}" if "?" in uri else "")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path, read and path.exists()):
            if not path.exists():
                _create_sqlite(path)
            _query(uri)
    except Exception as error:
        raise UserError(f"cannot use the SQLite store {path}: {_mend_sqlite(error, path)}") from error
    if not read:
        check_not_moved(uri)
    return uri


@contextmanager
def _locked(path: Path, read: bool) -> Iterator[None]:
    """Holds the lock file beside the database: MLflow's own first contact writes, and two at once break it.

    Args:
        path: Of the database.
        read: It is there and only read: without a lock, where its folder cannot be written.
    """
    try:
        lock = (path.parent / f".{path.name}.lock").open("w")
    except OSError:
        if not read:
            raise
        yield
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _create_sqlite(path: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)
    try:
        store = SqlAlchemyStore(f"sqlite:///{quoted_path(partial)}", str(path.parent / "mlruns"))
        store.engine.dispose()
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def _mend_sqlite(error: Exception, path: Path) -> str:
    text = str(error)
    if "is full" in text or getattr(error, "errno", None) == errno.ENOSPC:
        return "the disk is full; free space or set tracking.uri to another place"
    if isinstance(error, OSError) or "readonly database" in text or "unable to open" in text:
        return "it cannot be written; make the folder writable or set tracking.uri to another place"
    if "not a database" in text or "malformed" in text:
        return "it is not a database or damaged; move it away, or set tracking.uri to another file"
    if "out-of-date database schema" in text:
        return f"another MLflow version made it; back it up and run `mlflow db upgrade sqlite:///{quoted_path(path)}`"
    if "Can't locate revision" in text:
        return "a later MLflow made it; install that version or set tracking.uri to another file"
    return one_line(error)


def _check(uri: str) -> None:
    try:
        if uri.startswith(_DATABASES):
            _connect(uri)
        _query(uri)
    except ModuleNotFoundError as error:
        raise UserError(f"tracking store {redact(uri)} needs the driver {error.name}; pip install it") from None
    except Exception as error:
        raise UserError(f"tracking store {redact(uri)} {_mend(error, uri)}") from error


def _mend(error: Exception, uri: str) -> str:
    text, code = str(error), getattr(error, "error_code", "")
    if _INVALID_HOST in text:
        return "refuses this host name; start the server with --allowed-hosts naming it"
    if _refused(error):
        return "refuses us; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
    if is_server(uri):
        if match := re.search(r"\b(5\d\d) (error responses|!= 200)", text):
            return f"answers with error {match[1]}; look at its log"
        if "!= 200" in text or "JSON" in text or code == "ENDPOINT_NOT_FOUND":
            return "answers, but not as an MLflow server; check the address"
        return f"does not answer within {_ANSWER_SECONDS} s; {_MENDS}"
    if uri.startswith(_DATABASES):
        return f"does not take a connection ({one_line(error)}); {_MENDS}"
    return "is of no supported kind; use http(s)://server:port, sqlite:////absolute/path/mlflow.db or postgresql://"


def _connect(uri: str) -> None:
    """Opens one connection: MLflow itself tries for 100 s before it says that a database is not there."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(uri, connect_args={"connect_timeout": _ANSWER_SECONDS})
    try:
        engine.connect().close()
    finally:
        engine.dispose()


def _query(uri: str) -> object:
    from mlflow import MlflowClient

    with impatient():
        return MlflowClient(tracking_uri=uri).search_experiments(max_results=1)


def _artifact_location(name: str) -> str | None:
    """``mlruns`` beside a SQLite file, wherever the process runs; others know their own place."""
    import mlflow

    database = sqlite_database(mlflow.get_tracking_uri())
    if database is None:
        return None
    return str(database.parent / "mlruns" / re.sub(r"[^\w.-]+", "_", name).strip("."))
