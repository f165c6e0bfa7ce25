"""Runs, their scores and their results, from the tracking store and what is kept of it on this machine."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from layerbits.errors import UserError
from layerbits.history.cache import Cache
from layerbits.history.rows import RUN_SCHEMA, SCHEMA, row_of, with_table
from layerbits.history.source import connect, count_is, experiment_id, fetch, get_run, search, store_errors
from layerbits.results.frames import listed
from layerbits.results.manifest import load_manifest
from layerbits.results.result import SensitivityResult
from layerbits.tracking.contract import INTERVAL_COLUMNS, RESULT_ID, SCHEMA_VERSION
from layerbits.tracking.store import one_line

_WINDOW = 1000  # run ids in one filter: 50 ms to parse
_FEW = 32  # runs that are sooner read again than searched for the one that is gone
_PARALLEL = 8
_SCORE_COLUMNS = (
    *("run_id", "model", "quant_pair", "granularity", "dataset_size", "block", "kind", "layer", "candidate", "score"),
    *("predicted_kl", "bits", "chosen", "rank", *INTERVAL_COLUMNS, "believable"),
)


def runs(
    experiment: str = "layerbits",
    model: str | None = None,
    pair: str | None = None,
    granularity: str | None = None,
    since: str | date | None = None,
    where: str | None = None,
    tracking_uri: str | None = None,
    refresh: bool = False,
    *,
    outcome: str | None = "ok",
) -> pd.DataFrame:
    """The sensitivity runs of an experiment, latest first.

    The filters are the server's work. Finished runs are kept on this machine; the server is asked for those that are
    not, and whether it still has the others: runs deleted there are not in the answer.

    Args:
        experiment: Name of the experiment.
        model: Model name (``eff.model``).
        pair: Quant pair, ``wfp4_afp8``.
        granularity: Granularity overlay, ``default`` for none.
        since: Started then or later; a day or a time in ISO format, UTC where it names no zone.
        where: Any further condition, written as for ``mlflow.search_runs``; such a question is not answered from
            this machine.
        tracking_uri: The store; else ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` in the current folder.
        refresh: Read everything again; for runs that somebody changed after their end.
        outcome: What the runs ended with; ``None`` gives every run, parents and cells without a result too.

    Returns:
        One row per run: ``run_id``, ``run_name``, the parameters in force (``model``, ``model_revision``,
        ``quant_pair``, ``granularity``, ``dataset``, ``dataset_size``, ``dataset_digest``, ``method``, ``engine``,
        ``config_hash``, …), ``effective_bits`` and other sums of the recipe, ``loss_per_token`` of the unquantized
        model (guessing loses ln(``vocabulary``)), how many groups are ``not_believable``, what a KV cache costs
        over all blocks (``kv_cache_fp8_predicted_kl``, …), tags, ``start_time`` in UTC.
        What a run does not have is missing. ``attrs["tracking_uri"]`` names the store.

    Raises:
        UserError: The store cannot be read, there is no such experiment, or a filter cannot be asked.
    """
    uri = connect(tracking_uri)
    wanted = _Wanted(
        experiment_id(uri, experiment),
        {k: v for k, v in {"model": model, "quant_pair": pair, "granularity": granularity}.items() if v is not None},
        None if since is None else _milliseconds(since),
        None,
        outcome,
        where,
    )
    cache = Cache(uri)
    known = RUN_SCHEMA.empty_table()
    if not refresh and where is None and outcome == "ok":
        known = wanted.among(cache.runs(wanted.experiment))
    with store_errors(uri, where):
        new, gone = _sync(uri, wanted, known)
    cache.add(new)
    cache.forget(gone)
    kept = known.filter(~pc.field("run_id").isin(pa.array(gone, pa.string())))
    table = pa.concat_tables([kept, pa.Table.from_pylist(new, schema=RUN_SCHEMA)])
    frame = _frame(table.sort_by([("start_time", "descending"), ("run_id", "ascending")]))
    frame.attrs["tracking_uri"] = uri
    later = int((frame["schema_version"] > SCHEMA_VERSION).sum())
    if later:
        warnings.warn(
            f"{later} runs were written by a later LayerBits, whose columns may mean something else; upgrade layerbits",
            stacklevel=2,
        )
    return frame


def scores(runs: pd.DataFrame | Sequence[str], *, tracking_uri: str | None = None) -> pd.DataFrame:
    """The groups of runs, a row per run and group.

    They are in the tags of a run, so :func:`runs` has brought them along; the artifacts of a run are asked where its
    tags do not have them.

    Args:
        runs: Frame of :func:`runs`, or run ids.
        tracking_uri: The store; by default the one that the frame came from.

    Returns:
        Columns ``run_id``, ``model``, ``quant_pair``, ``granularity``, ``dataset_size``, ``block`` (missing outside
        the decoder blocks), ``kind`` (:data:`layerbits.results.result.KINDS`), ``layer``, ``candidate``, ``score``,
        ``predicted_kl`` (nats per token; both NaN where not finite), ``bits``, ``chosen``, ``rank`` (1 = most
        sensitive), the intervals ``low`` to ``high`` of the predicted KL and ``rank_low`` to ``rank_high`` of the
        rank, and ``believable``: false where a predicted KL is above ln(vocabulary). What a run does not have is
        missing. In the order of the runs, most sensitive first. Runs without scores
        are named in a warning and left out.

    Raises:
        UserError: The store cannot be read.
    """
    ids, uri = _ids(runs, tracking_uri)
    frame = long_frame(with_groups(uri, ids))
    frame.attrs["tracking_uri"] = uri
    return frame


def rows_and_scores(run_ids: Sequence[str], tracking_uri: str | None) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows of runs, with their id as index, and their scores as :func:`scores` gives them.

    Raises:
        UserError: One of them has none.
    """
    table = with_groups(connect(tracking_uri), run_ids, strict=True)
    return _frame(table.select(RUN_SCHEMA.names)).set_index("run_id", drop=False), long_frame(table)


def result(run_id: str, *, tracking_uri: str | None = None) -> SensitivityResult:
    """The result of a run as it was before it was logged, with its per-sample scores where it has them.

    Raises:
        UserError: There is no such run, it is one of another kind, or its manifest is missing, damaged or of a later
            LayerBits. Samples that cannot be read are a warning.
    """
    uri = connect(tracking_uri)
    run = get_run(uri, run_id)
    if (kind := run.tags.get("layerbits.kind")) is not None:
        raise UserError(no_scores(run_id, kind))
    where = str(run.info["artifact_uri"])
    with tempfile.TemporaryDirectory() as folder:
        manifest, samples = Path(folder) / "manifest.json", Path(folder) / "sensitivity" / "scores.parquet"
        samples.parent.mkdir()
        fetch(uri, where, "manifest.json", manifest)
        stored = load_manifest(manifest)
        try:
            fetch(uri, where, "sensitivity/scores.parquet", samples)
            return load_manifest(manifest)
        except Exception as error:  # whatever a damaged file makes of the reader
            warnings.warn(f"run {run_id} is without per-sample scores: {one_line(error)}", stacklevel=2)
    return stored


def no_scores(run_id: str, kind: str) -> str:
    """What is said of a run of another kind where scores are wanted."""
    return f"run {run_id} is a run of kind {kind} and holds no scores; give the sensitivity run that it came from"


def with_groups(uri: str, run_ids: Sequence[str], strict: bool = False) -> pa.Table:
    """Runs with their groups, as ``SCHEMA``, in the order of the ids; warns of those that have none.

    Raises:
        UserError: One has none, where ``strict``.
    """
    cache = Cache(uri)
    known = cache.with_groups(run_ids)
    missing = sorted(set(run_ids) - set(known["run_id"].to_pylist()))
    if missing:
        uri = connect(uri)
    rows: list[dict[str, object]] = []
    problems: dict[str, list[str]] = {}

    def read(run_id: str) -> dict[str, object] | str:
        try:
            run = get_run(uri, run_id)
            kind = run.tags.get("layerbits.kind")
            return with_table(uri, row_of(run)) if kind is None else no_scores(run_id, kind)
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(_PARALLEL) as pool:
        for run_id, row in zip(missing, pool.map(read, missing), strict=True):
            if isinstance(row, str):
                problems.setdefault(row.replace(run_id, "…"), []).append(run_id)
            else:
                rows.append(row)
    cache.add(rows)
    for problem, those in problems.items():
        if strict:
            raise UserError(f"run {those[0]}: {problem.replace('…', those[0])}")
        warnings.warn(f"{len(those)} runs left out ({listed(those, 2)}): {problem}", stacklevel=3)
    table = pa.concat_tables([known, pa.Table.from_pylist(rows, schema=SCHEMA)])
    at = {run_id: i for i, run_id in enumerate(table["run_id"].to_pylist())}
    return table.take(pa.array([at[run_id] for run_id in run_ids if run_id in at], pa.int64()))


@dataclass(frozen=True)
class _Wanted:
    """Which runs are asked for.

    Attributes:
        parameters: Columns and what they shall be.
        low: Earliest start, Unix milliseconds.
        high: The start before which they began.
    """

    experiment: str
    parameters: Mapping[str, str]
    low: int | None
    high: int | None
    outcome: str | None
    where: str | None

    def condition(self, *, without: Sequence[str] = ()) -> str:
        """The filter for the server."""
        parts = [f"params.`eff.{name}` = {_quoted(value)}" for name, value in self.parameters.items()]
        if self.outcome is not None:
            parts.append(f"tags.outcome = {_quoted(self.outcome)}")
        if self.outcome == "ok":  # a result, complete, of one candidate
            parts += ["attributes.status = 'FINISHED'", f"tags.`{RESULT_ID}` LIKE '%'"]
        if self.low is not None:
            parts.append(f"attributes.start_time >= {self.low}")
        if self.high is not None:
            parts.append(f"attributes.start_time < {self.high}")
        if without:
            parts.append(f"attributes.run_id NOT IN ({','.join(map(_quoted, without))})")
        if self.where:
            parts.append(self.where)
        return " AND ".join(parts)

    def among(self, known: pa.Table) -> pa.Table:
        """Those of the cached runs that meet it, oldest first."""
        mask = pc.field("outcome") == "ok"
        for name, value in self.parameters.items():
            mask &= pc.field(name) == value
        if self.low is not None:
            mask &= pc.field("start_time") >= _time(self.low)
        if self.high is not None:
            mask &= pc.field("start_time") < _time(self.high)
        return known.filter(mask).sort_by("start_time")


def _sync(uri: str, wanted: _Wanted, known: pa.Table) -> tuple[list[dict[str, object]], list[str]]:
    """Asks for the runs that are not known yet, and which of the known ones are gone.

    Exact whatever happened in between: if all others are as many as are known, the known ones are all there. If not,
    half of them is looked at, and so on down to a few, which are read again.

    Returns:
        Rows of new runs, ids of known runs that are not there any more.
    """
    count = known.num_rows
    whole = wanted.outcome != "ok"  # other runs may have metrics and not the tag that says the same
    middle = known["start_time"][count // 2].value if count else None
    halves = [] if middle is None else [replace(wanted, high=middle), replace(wanted, low=middle)]
    parts = [half.among(known) for half in halves]
    divisible = count > _FEW and all(part.num_rows < count for part in parts)
    new: list[dict[str, object]] = []
    gone: list[str] = []
    if count <= _WINDOW or not divisible:
        ids = known["run_id"].to_pylist()
        new = search(uri, wanted.experiment, wanted.condition(without=ids), row_of, few=count > 0, whole=whole)
        if not count or count_is(uri, wanted.experiment, wanted.condition(), count + len(new), whole):
            return new, []
        if not divisible:
            changed = search(uri, wanted.experiment, wanted.condition(), row_of, whole=whole)
            there = {row["run_id"]: row for row in changed}
            return [row for i, row in there.items() if i not in set(ids)], [i for i in ids if i not in there]
        new = []
    for half, part in zip(halves, parts, strict=True):
        more, lost = _sync(uri, half, part)
        new += more
        gone += lost
    return new, gone


def long_frame(table: pa.Table) -> pd.DataFrame:
    """A row per run and group, as :func:`scores` has them, of a table that has a row per run."""
    lengths = pc.list_value_length(table["layer"]).to_numpy()
    run = np.repeat(np.arange(table.num_rows), lengths)
    columns = {
        name: pc.list_flatten(table[name]) if pa.types.is_list(table[name].type) else table[name].take(run)
        for name in _SCORE_COLUMNS
        if name not in ("rank", "believable")
    }
    frame = _frame(pa.table(columns))
    frame["believable"] = _believable(table.take(pa.array(run)), frame["predicted_kl"])
    frame["rank"] = np.arange(len(run)) - np.repeat(np.cumsum(lengths) - lengths, lengths) + 1
    return frame[list(_SCORE_COLUMNS)]


def _believable(runs: pa.Table, predicted_kl: pd.Series) -> pd.Series:
    """Whether each predicted KL can be, missing where the run does not tell; a measured one may be anything."""
    guessing = np.log(runs["vocabulary"].to_numpy().astype(float))
    measured = pc.fill_null(pc.equal(runs["method"], "kl_div"), False).to_numpy()
    believable = pd.Series(measured | ~(predicted_kl.to_numpy() > guessing), dtype="boolean")
    return believable.mask(np.isnan(guessing))


def _ids(runs: pd.DataFrame | Sequence[str], tracking_uri: str | None) -> tuple[list[str], str]:
    """Run ids, and the store that they are in."""
    if isinstance(runs, str):
        runs = [runs]
    if not isinstance(runs, pd.DataFrame):
        return list(dict.fromkeys(runs)), connect(tracking_uri)
    if "run_id" not in runs:
        raise UserError("the frame has no column run_id; give a frame of history.runs, or run ids")
    known = runs.attrs.get("tracking_uri") if tracking_uri is None else None
    return list(dict.fromkeys(runs["run_id"])), known or connect(tracking_uri)


def _quoted(value: str) -> str:
    """A text as it stands in a filter; MLflow knows no escapes, but two kinds of quotes.

    Raises:
        UserError: It has both kinds, or a backslash.
    """
    for quote in "'\"":
        if quote not in value and "\\" not in value:
            return f"{quote}{value}{quote}"
    raise UserError(
        f"MLflow cannot search for {value!r}: backslashes and both kinds of quotes; filter the frame instead"
    )


def _milliseconds(since: str | date) -> int:
    try:
        at = pd.Timestamp(since)
    except ValueError:
        raise UserError(f"since={since!r} is no date; write 2026-05-01 or 2026-05-01T12:00+02:00") from None
    if at is pd.NaT:
        raise UserError("since is no date; write 2026-05-01 or 2026-05-01T12:00+02:00")
    return int((at.tz_localize("UTC") if at.tzinfo is None else at).timestamp() * 1000)


def _time(milliseconds: int) -> pa.Scalar:
    return pa.scalar(milliseconds, RUN_SCHEMA.field("start_time").type)


def _frame(table: pa.Table) -> pd.DataFrame:
    integers = {pa.int32(): pd.Int32Dtype(), pa.int64(): pd.Int64Dtype()}
    return table.to_pandas(types_mapper=integers.get)
