"""Finished runs on this machine, as Parquet files that any number of processes may read and write.

A file is written whole under a name of our own making and never changed. A run may be in several files (two
processes read it at once); what is missing is asked of the server again. So no lock is needed.
"""

from __future__ import annotations

import hashlib
import uuid
import warnings
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from layerbits.atomic import atomic
from layerbits.cache import cache_dir
from layerbits.history.rows import RUN_SCHEMA, SCHEMA, is_later

_FORMAT = "6"  # another schema of the files is another folder
_MANY = 40  # files, then they become one


class Cache:
    """The finished runs of one store that were read before.

    Args:
        uri: The store; its folder is named by a digest of it.
    """

    def __init__(self, uri: str) -> None:
        self._folder = cache_dir() / "history" / _FORMAT / hashlib.sha256(uri.encode()).hexdigest()[:16]

    def runs(self, experiment_id: str) -> pa.Table:
        """The runs of an experiment, as ``RUN_SCHEMA``."""
        return self._read(RUN_SCHEMA.names, pc.field("experiment_id") == experiment_id)

    def with_groups(self, run_ids: Collection[str]) -> pa.Table:
        """Those of the runs whose groups are known, as ``SCHEMA``."""
        ids = pa.array(list(run_ids), pa.string())
        return self._read(SCHEMA.names, pc.field("run_id").isin(ids) & pc.field("layer").is_valid())

    def add(self, rows: Sequence[dict[str, object]]) -> None:
        """Keeps those rows that will not change any more; warns where the disk does not take them."""
        final = [r for r in rows if r["status"] == "FINISHED" and r["outcome"] == "ok" and not is_later(r)]
        if not final:
            return
        self._write(pa.Table.from_pylist(final, schema=SCHEMA))
        if len(files := self._files()) > _MANY:
            self._rewrite(files, ())

    def forget(self, run_ids: Collection[str]) -> None:
        """Drops runs that the store has no more."""
        if run_ids:
            self._rewrite(self._files(), run_ids)

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("*.parquet"))

    def _read(self, columns: Sequence[str], condition: pc.Expression) -> pa.Table:
        schema = pa.schema([SCHEMA.field(name) for name in columns])
        return _once(pa.concat_tables([schema.empty_table(), *_tables(self._files(), columns, condition)]))

    def _rewrite(self, files: Sequence[Path], without: Collection[str]) -> None:
        kept = ~pc.field("run_id").isin(pa.array(list(without), pa.string()))
        if self._write(_once(pa.concat_tables([SCHEMA.empty_table(), *_tables(files, SCHEMA.names, kept)]))):
            for file in files:
                file.unlink(missing_ok=True)

    def _write(self, table: pa.Table) -> bool:
        try:
            with atomic(self._folder / f"{uuid.uuid4().hex}.parquet") as file:
                pq.write_table(table, file, compression="zstd", row_group_size=256)
        except OSError as error:
            warnings.warn(f"cannot keep runs in {self._folder} ({error.strerror}); set LAYERBITS_CACHE", stacklevel=4)
            return False
        return True


def _tables(files: Sequence[Path], columns: Sequence[str], condition: pc.Expression) -> list[pa.Table]:
    tables = []
    for file in files:
        try:
            tables.append(pq.read_table(file, columns=list(columns), filters=condition))
        except FileNotFoundError:
            continue  # another process made one of many
        except (OSError, pa.ArrowException):
            with suppress(OSError):
                file.unlink()  # damaged: its runs are read again
    return tables


def _once(table: pa.Table) -> pa.Table:
    """One row per run: one with its groups, where one has them."""
    if table.num_rows == 0:
        return table
    known = table["layer"].is_valid() if "layer" in table.column_names else None
    ids = table["run_id"].to_pylist()
    best: dict[str, int] = {}
    for i, run_id in enumerate(ids):
        if run_id not in best or (known is not None and known[i].as_py()):
            best[run_id] = i
    return table if len(best) == len(ids) else table.take(list(best.values()))
