"""The command ``layerbits``: what earlier runs found, and care for the store."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from layerbits import __version__, entry, process
from layerbits.errors import UserError
from layerbits.plain import JsonObject

if TYPE_CHECKING:
    import pandas as pd

_FORMATS = ("table", "csv", "json")
_RUN_COLUMNS = (
    *("run_id", "model", "quant_pair", "granularity", "dataset_size", "effective_bits", "predicted_kl_sum"),
    *("score_sum", "start_time"),
)
_SCORE_COLUMNS = ("run_id", "quant_pair", "granularity", "layer", "score", "predicted_kl", "bits", "chosen", "rank")
_MOVERS = 10
_PROJECT = Path(__file__).resolve().parents[2]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command; errors are one line and status 2."""
    process.prepare()
    try:
        options = _parser().parse_args(arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", category=UserWarning, module=r"layerbits\b|__main__")
            warnings.showwarning = _show_warning
            status = options.command(options)
        sys.stdout.flush()
    except UserError as error:
        entry.fail(error)
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still flushes at its end
        status = 0
    sys.exit(status)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="layerbits", description="What sensitivity runs found, and care for the store.")
    parser.add_argument("--version", action="version", version=f"layerbits {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], words: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=words, description=words)
        added.set_defaults(command=run)
        added.add_argument(
            "--tracking-uri", metavar="URI", help="the store; else MLFLOW_TRACKING_URI, else mlflow.db in this folder"
        )
        return added

    history = command("history", _history, "list runs, or their scores")
    history.add_argument("--experiment", default="layerbits", help="name of the experiment (layerbits)")
    history.add_argument("--model", help="model name")
    history.add_argument("--pair", help="quant pair, for instance wfp4_afp8")
    history.add_argument("--granularity", help="granularity, default for none")
    history.add_argument("--since", metavar="DATE", help="started then or later, ISO format, UTC")
    history.add_argument("--where", metavar="FILTER", help="further filter, as for mlflow.search_runs")
    history.add_argument("--outcome", default="ok", help="ok, failed, killed, … or any (ok)")
    history.add_argument("--scores", action="store_true", help="a row per run and group instead of a row per run")
    history.add_argument("--refresh", action="store_true", help="read everything again, not what is kept here")
    history.add_argument("--format", choices=_FORMATS, default="table", help="csv and json have all columns")

    compare = command("compare", _compare, "compare two runs group by group; status 1 where they are not comparable")
    compare.add_argument("a", metavar="RUN", help="run id")
    compare.add_argument("b", metavar="RUN", help="run id")
    compare.add_argument("--by", default="predicted_kl", choices=("predicted_kl", "score", "rank"))
    compare.add_argument("--format", choices=_FORMATS, default="table", help="csv is the groups, json everything")

    stability = command(
        "stability", _stability, "how far the rankings of runs agree, with intervals; each pair of them"
    )
    stability.add_argument("runs", metavar="RUN", nargs="*", help="run ids; without any, those that the filters find")
    stability.add_argument("--experiment", default="layerbits", help="name of the experiment (layerbits)")
    stability.add_argument("--model", help="model name")
    stability.add_argument("--pair", help="quant pair, for instance wfp4_afp8")
    stability.add_argument("--granularity", help="granularity, default for none")
    stability.add_argument(
        "--bits",
        metavar="BITS",
        help="how sure the schemes of these budgets are instead, the runs' candidates together: captions drawn again, "
        "the solver each time (several: 6,9)",
    )
    stability.add_argument(
        "--gib", metavar="GIB", help="the same of budgets of a server's memory, alone or with --bits"
    )
    stability.add_argument("--context", default="0", help="tokens of a request whose keys and values --gib counts (0)")
    stability.add_argument("--concurrency", default="1", help="requests at once (1)")
    stability.add_argument("--ms", metavar="MS", help="the same of budgets of a step, by the table of --costs")
    stability.add_argument("--step", default="decode:1", help="decode:BATCH or prefill:LENGTH (decode:1)")
    stability.add_argument("--costs", default="none", help="table of times: file, or id of a run of -e costs")
    stability.add_argument("--target", default="none", help="GPU that will serve, where that is not this machine's")
    stability.add_argument("--top", type=int, default=10, help="how many most sensitive groups are compared (10)")
    stability.add_argument("--format", choices=_FORMATS, default="table", help="csv and json have all columns")

    push = command("push", _push, "log a finished result on disk; what is logged already stays as it is")
    push.add_argument("directory", metavar="DIR", type=Path, help="result folder, with a manifest.json or a run.json")
    push.add_argument("--run-id", help="the run that the job had opened")
    push.add_argument("--experiment", default="layerbits", help="experiment of a new run (layerbits)")

    serve = command("serve", _serve, "serve an exported checkpoint with vLLM, until it is stopped, or time it")
    serve.add_argument("checkpoint", metavar="RUN", help="run id of an export, or a checkpoint's folder")
    serve.add_argument("--port", type=int, default=8000, help="on this machine (8000)")
    serve.add_argument("--python", help="a Python that has vLLM; else that of .venv-vllm, which `make vllm` makes")
    serve.add_argument("--plugin", help="folder with a plugin of vLLM for its path")
    serve.add_argument("--arguments", default="", help="further arguments of the server, in one text")
    serve.add_argument(
        "--measure",
        action="store_true",
        help="instead of serving: time it, then its unquantized model (which doubles the time); print speed and "
        "memory, and log them as a serve check that compares nothing (only printed where there is no store, or "
        "LayerBits did not export it)",
    )

    costs = command("costs", _costs, "measure the times of vLLM's linears on this card, for schemes by budget_ms")
    costs.add_argument("runs", metavar="RUN", nargs="+", help="sensitivity runs: id, result folder or manifest.json")
    costs.add_argument(
        "--candidates",
        help="pairs, or PAIR/GRANULARITY, of a model that was not scored; RUN is then its folder or hub id",
    )
    costs.add_argument("--batches", default="1,8,32", help="requests at once of decode steps (1,8,32)")
    costs.add_argument("--prefill", default="512,2048", help="lengths of prompts, or none (512,2048)")
    costs.add_argument("--repeats", type=int, default=25, help="of each linear (25)")
    costs.add_argument("--python", help="a Python that has vLLM; else that of .venv-vllm, which `make vllm` makes")
    costs.add_argument("--arguments", default="", help="further arguments of vLLM's engine, in one text")
    costs.add_argument("-o", "--output", type=Path, default=Path("costs.json"), help="file to write (costs.json)")

    view = command("view", _view, "print the link of each experiment's comparison view in the UI")
    view.add_argument("--port", type=int, default=5000, help="of the UI on a database; a server has its own (5000)")

    planned = command("plan", _plan, "what a run would take: memory by mode, seconds, what fits; loads no weights")
    planned.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="configuration, as for experiments/grid.py")
    planned.add_argument("--configs", type=Path, help="folder of the config groups (configs of this project)")
    planned.add_argument("--format", choices=("table", "json"), default="table")

    reap = command("reap", _reap, "end the runs of this machine whose process is gone")
    reap.add_argument("runs", metavar="RUN", nargs="*", help="run ids to end, on your word that their process is gone")
    command("relocate", _relocate, "point a SQLite store that was moved, with its mlruns, to where it is now")
    command("doctor", _doctor, "check store, artifacts, clock, disk, GPU and kernels; status 1 where one fails")
    return parser


def _history(options: argparse.Namespace) -> int:
    from layerbits import history

    names = ("experiment", "model", "pair", "granularity", "since", "where", "tracking_uri", "refresh")
    outcome = None if options.outcome == "any" else options.outcome
    frame = history.runs(**{name: getattr(options, name) for name in names}, outcome=outcome)
    if options.scores:
        frame = history.scores(frame)
    _print(frame, options.format, _SCORE_COLUMNS if options.scores else _RUN_COLUMNS)
    return 0


def _compare(options: argparse.Namespace) -> int:
    from layerbits import history

    comparison = history.compare(options.a, options.b, options.by, tracking_uri=options.tracking_uri)
    if options.format == "csv":
        _print(comparison.movers, "csv", ())
    elif options.format == "json":
        plain: dict[str, object] = {**vars(comparison), "movers": json.loads(_json(comparison.movers))}
        plain |= {
            name: None if plain[name] != plain[name] else plain[name] for name in ("spearman", "kendall", "ratio")
        }
        print(json.dumps(plain, indent=2, allow_nan=False))
    elif comparison.comparable:
        print(
            f"{comparison.groups} groups by {comparison.by}: Spearman {comparison.spearman:.3f}, "
            f"Kendall {comparison.kendall:.3f}"
        )
        print(", ".join(f"{both} of the top {k} in both" for k, both in comparison.overlap.items()))
        if not math.isnan(comparison.ratio):
            print(f"sum of b / sum of a: {comparison.ratio:.4g}")
        print()
        _print(comparison.movers.head(_MOVERS), "table", tuple(comparison.movers.columns))
    if options.format != "json":
        for note in comparison.notes:
            print(f"note: {note}", file=sys.stderr)
        for reason in comparison.reasons:
            print(f"not comparable by {comparison.by}: {reason}", file=sys.stderr)
    return 0 if comparison.comparable else 1


def _stability(options: argparse.Namespace) -> int:
    from layerbits import history
    from layerbits.trust.stability import in_words, stability

    runs, uri = list(dict.fromkeys(options.runs)), options.tracking_uri
    if not runs:
        names = ("experiment", "model", "pair", "granularity")
        runs = list(history.runs(**{name: getattr(options, name) for name in names}, tracking_uri=uri)["run_id"])
    if (options.bits, options.gib, options.ms) != (None, None, None):
        return _scheme_stability(runs, options)
    frame = stability({run: history.result(run, tracking_uri=uri) for run in runs}, options.top)
    if options.format == "table":
        frame = in_words(frame)
    _print(frame, options.format, tuple(frame.columns))
    return 0


def _scheme_stability(runs: Sequence[str], options: argparse.Namespace) -> int:
    from layerbits.export.target import find_target
    from layerbits.history.scheme_inputs import load_scores
    from layerbits.schemes.settings import SchemeSettings
    from layerbits.schemes.sureness import by_group, in_words, sureness
    from layerbits.serving.find_costs import measuring

    find_target(options.target)
    settings = SchemeSettings.of_budgets(
        runs,
        effective_bits=options.bits,
        budget_gib=options.gib,
        context=options.context,
        concurrency=options.concurrency,
        budget_ms=options.ms,
        step=options.step,
        costs=options.costs,
    )
    measure = measuring(options.tracking_uri, Path.cwd(), options.target)
    sure = sureness(settings.specs, settings.applied(load_scores(runs, options.tracking_uri), measure))
    if not sure:
        raise UserError("these runs keep no shares of captions, or of too few; score them on 8 captions or more")
    frame = in_words(sure) if options.format == "table" else by_group(sure)
    _print(frame, options.format, tuple(frame.columns))
    return 0


def _push(options: argparse.Namespace) -> int:
    from layerbits import tracking
    from layerbits.tracking.uris import run_link, ui_command
    from layerbits.tracking.view import print_view

    run_id = tracking.push(options.directory, options.tracking_uri, options.experiment, options.run_id)
    import mlflow

    client, uri = mlflow.MlflowClient(), mlflow.get_tracking_uri()
    where = client.get_run(run_id).info.experiment_id
    print(f"logged: {run_link(uri, where, run_id)}")
    if command := ui_command(uri):
        print(f"open the UI with: {command}")
    print_view(client, uri, where)
    return 0


def _serve(options: argparse.Namespace) -> int:
    from layerbits.serving.settings import check_port, plugin_folder, split_arguments

    check_port("--port ", options.port)
    arguments = split_arguments("--arguments ", options.arguments)
    plugin = plugin_folder("--plugin ", options.plugin)
    if options.measure:
        from layerbits.serving.measure import measure

        measure(options.checkpoint, options.python, plugin, arguments, options.tracking_uri)
        return 0
    from layerbits.serving.foreground import serve

    serve(options.checkpoint, options.port, options.python, plugin, arguments, options.tracking_uri)
    return 0


def _costs(options: argparse.Namespace) -> int:
    from layerbits.atomic import why_no_file
    from layerbits.history.scheme_inputs import load_scores
    from layerbits.paths import user_path
    from layerbits.schemes.settings import listed
    from layerbits.serving.costs import in_words, measure_costs
    from layerbits.serving.environment import find_environment, named_python
    from layerbits.serving.server import Launch
    from layerbits.serving.settings import CostRequest, split_arguments
    from layerbits.serving.unscored import unscored

    asked = CostRequest.of(options.batches, options.prefill, options.repeats)
    arguments = split_arguments("--arguments ", options.arguments)
    if options.python:
        named_python(options.python)
    output = user_path(options.output)
    if why := why_no_file(output):
        raise UserError(f"--output {output} cannot be written ({why}); name a file of a folder that you can write")
    if options.candidates is None:
        source = load_scores(options.runs, options.tracking_uri)
    elif len(options.runs) == 1:
        if not listed(options.candidates):
            raise UserError("--candidates names none; give PAIR or PAIR/GRANULARITY, for instance wfp8_afp8")
        source = unscored(options.runs[0], listed(options.candidates))
    else:
        raise UserError("--candidates goes with one model; leave it out for runs")
    launch = Launch(find_environment(options.python, Path.cwd()), arguments=arguments)
    table = measure_costs(source, asked, launch, output.with_name(f"{output.name}.work"))
    print(f"{in_words(table)}\ncosts: {table.save(output)}")
    return 0


def _view(options: argparse.Namespace) -> int:
    from layerbits.serving.settings import check_port
    from layerbits.tracking.view import print_links

    check_port("--port ", options.port)
    print_links(f"http://127.0.0.1:{options.port}", options.tracking_uri)
    return 0


def _plan(options: argparse.Namespace) -> int:
    from layerbits.planning.plan import forecast, in_words

    places = [options.configs] if options.configs else [Path.cwd() / "configs", _PROJECT / "configs"]
    configs = next((p.absolute() for p in places if (p / "grid.yaml").is_file()), None)
    if configs is None:
        raise UserError(f"there is no grid.yaml in {places[0]}; run it in the project's folder, or give --configs")
    prediction = forecast(options.overrides, configs)
    print(in_words(prediction) if options.format == "table" else _strict_json(asdict(prediction)))
    return 0 if prediction.best or any(row.fits == "?" for row in prediction.rows) else 1


def _strict_json(data: JsonObject) -> str:
    for row in data["rows"]:
        row |= {k: None for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
    return json.dumps(data, indent=2, allow_nan=False)


def _reap(options: argparse.Namespace) -> int:
    from layerbits.history.source import connect
    from layerbits.tracking.reap import reap

    closed = reap(connect(options.tracking_uri), named=options.runs)
    for run in closed:
        print(f"{run.outcome}: {run.run_id} {run.name} ({run.reason})")
    print(f"{len(closed)} runs closed")
    return 0


def _relocate(options: argparse.Namespace) -> int:
    from layerbits.history.source import connect
    from layerbits.tracking.artifacts import relocate

    print(f"{relocate(connect(options.tracking_uri))} places of artifacts changed")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from layerbits.doctor import examine

    failed = 0
    for check in examine(options.tracking_uri):
        failed += check.state == "fail"
        print(f"{check.state:4}  {check.name:9}  {check.detail}", flush=True)
    return 1 if failed else 0


def _print(frame: pd.DataFrame, form: str, columns: Sequence[str]) -> None:
    if form == "csv":
        frame.to_csv(sys.stdout, index=False)
    elif form == "json":
        print(_json(frame))
    elif frame.empty:
        print("nothing found")
    else:
        shown = frame[list(columns)].copy()
        if "start_time" in shown:
            shown["start_time"] = shown["start_time"].dt.strftime("%Y-%m-%d %H:%M")
        print(shown.to_string(index=False, na_rep="–", float_format=lambda value: f"{value:.4g}"))


def _json(frame: pd.DataFrame) -> str:
    # 15 digits are what pandas' own writer has at most, and a double needs 17
    columns = {name: frame[name].astype(object).where(frame[name].notna(), None).tolist() for name in frame}
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return json.dumps(rows, indent=2, allow_nan=False, default=lambda time: time.isoformat())


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"warning: {message}", file=sys.stderr)
