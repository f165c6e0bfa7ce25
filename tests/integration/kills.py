"""Kills runs of the default model at random moments, starts them again, and says whether anything came out otherwise.

    python -m tests.integration.kills --moments 20 --seed 0 --at-once

The moments are spread over load, calibration, scoring, writing and logging, which are told by the files of the run. The
runs are those of ``experiments/sensitivity.py``, forked from a process that has imported everything: imports are most
of the time of a small run, and nothing is open in them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import runpy
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PHASES = ("load", "calibration", "scoring", "writing", "logging")
SMALL = ("quant_pair=wint8_aint8", "autoquant.seq_len=32", "autoquant.batch_size=2", "autoquant.num_score_samples=5")
_TICK = 0.004


@dataclass(frozen=True)
class Trial:
    """One run that was killed and started again; ``wrong`` lists what came out otherwise."""

    planned: str
    phase: str
    seconds: float
    closed: int
    wrong: tuple[str, ...]


class Job:
    """A run with a search checkpoint and results of its own, in a store that is shared."""

    def __init__(self, folder: Path, store: str, arguments: Sequence[str]) -> None:
        self.folder = folder
        self.results = folder / "out" / "tmp"
        self._search = folder / "search"
        self._arguments = [
            *arguments, f"autoquant.checkpoint={self._search}", f"output_root={folder}/out", f"tracking.uri={store}",
            "hydra.output_subdir=null", "device=cpu",
        ]  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, *more: str) -> int:
        """Forks the run; returns its process."""
        log = self.folder / "log"
        pid = os.fork()
        if pid == 0:
            _child([*self._arguments, *more], log)
        return pid

    def phase(self, since: frozenset[str] = frozenset()) -> str:
        """What the run is at, by its files; results of ``since`` are earlier runs'."""
        if set(map(str, self.finished())) - since:
            return "logging"
        if any(self.results.glob(".*.partial")):
            return "writing"
        if (self._search / "calibrated.npz").exists():
            return "scoring"
        return "calibration" if (self._search / "fingerprint.json").exists() else "load"

    def finished(self) -> list[Path]:
        """Folders that a reader takes for results."""
        return sorted(self.results.glob("[!.]*"))


def _child(arguments: Sequence[str], log: Path) -> None:
    """Runs the entry script in a forked process, which ends here."""
    status = 1
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(ROOT)
        sys.argv = ["experiments/sensitivity.py", *arguments]
        runpy.run_path("experiments/sensitivity.py", run_name="__main__")
        status = 0
    except SystemExit as error:
        status = int(error.code or 0) if isinstance(error.code, int | None) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait(pid: int) -> int:
    """Exit status of a process."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def times(job: Job) -> dict[str, float]:
    """Seconds of each phase of a whole run.

    Raises:
        RuntimeError: It failed.
    """
    pid, begin, found = job.start(), time.monotonic(), dict.fromkeys(PHASES, 0.0)
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
        now = time.monotonic()
        found[job.phase()] += now - begin
        begin = now
        time.sleep(_TICK)
    if ended[1]:
        raise RuntimeError((job.folder / "log").read_text())
    return found


def kill(job: Job, phase: str, after: float) -> str | None:
    """Starts a run and kills it some seconds into a phase; returns what it was at, ``None`` where it had ended."""
    pid = job.start()
    reached: float | None = None
    while True:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return None
        if reached is None and PHASES.index(job.phase()) >= PHASES.index(phase):
            reached = time.monotonic()
        if reached is not None and time.monotonic() - reached >= after:
            os.kill(pid, signal.SIGKILL)
            wait(pid)
            return job.phase()
        time.sleep(min(_TICK, after / 4 + 1e-4))


def trial(job: Job, phase: str, after: float, store: str, reference: Path) -> Trial | None:
    """Kills a run, looks at what it left, starts it again and compares; ``None`` where it ended before that."""
    from layerbits.tracking.reap import reap

    at = kill(job, phase, after)
    if at is None:
        return None
    wrong = [f"half a result: {folder.name}" for folder in job.finished() if missing(folder, reference)]
    closed = reap(store)
    wrong += still_running(store)
    before = set(job.finished())
    if status := wait(job.start()):
        wrong.append(f"started again, it ended with status {status}: {(job.folder / 'log').read_text()[-2000:]}")
    new = set(job.finished()) - before
    if len(new) != 1:
        wrong.append(f"started again, it left {len(new)} results")
    for folder in job.finished():
        wrong += [f"another {what}" for what in differences(folder, reference)]
    wrong += [f"left over: {path.name}" for path in job.folder.rglob(".*.partial")]
    return Trial(phase, at, round(after, 3), len(closed), (*wrong, *still_running(store)))


def still_running(store: str) -> list[str]:
    """Runs of the store that are open."""
    from mlflow import MlflowClient

    client = MlflowClient(store)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, "attributes.status = 'RUNNING'")
    return [f"run {run.info.run_id} is still RUNNING" for run in runs]


def missing(folder: Path, reference: Path) -> set[Path]:
    """Files of a whole result that a folder has not."""
    return {p.relative_to(reference) for p in reference.rglob("*")} - {p.relative_to(folder) for p in folder.rglob("*")}


def differences(folder: Path, reference: Path) -> list[str]:
    """What two results do not have bit for bit in common, and files that one has not."""
    from layerbits.results.manifest import load_manifest

    one, other = load_manifest(folder), load_manifest(reference)
    arrays = ("scores", "predicted_kl", "sample_kl", "sample_tokens")
    found = [name for name in arrays if getattr(one, name).tobytes() != getattr(other, name).tobytes()]
    found += [name for name in ("allocation", "groups", "calibration") if getattr(one, name) != getattr(other, name)]
    return found + [f"set of files, without {path}" for path in missing(folder, reference)]


def logged(store: str) -> list[str]:
    """What runs with ``outcome=ok`` of one store, all of one run's parameters, have logged otherwise."""
    from mlflow import MlflowClient

    client = MlflowClient(store)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, "tags.outcome = 'ok'")
    scores = [{key: v for key, v in run.data.metrics.items() if key.startswith(("score", "pred"))} for run in runs]
    params = [run.data.params for run in runs]
    files = [{item.path for item in client.list_artifacts(run.info.run_id)} for run in runs]
    kinds = {"metrics": scores, "parameters": params, "artifacts": files}
    return [f"runs with other {name}" for name, values in kinds.items() if any(v != values[0] for v in values)]


def imported() -> None:
    """Imports what a run imports."""
    import hydra  # noqa: F401
    import modelopt.torch.quantization  # noqa: F401
    import pulp  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import layerbits.figures
    import layerbits.report
    import layerbits.scoring.onepass
    import layerbits.sensitivity
    import layerbits.tracking.log  # noqa: F401


def run(
    moments: int,
    seed: int,
    folder: Path,
    store: str,
    settings: Sequence[str],
    reference: Job,
    say: Callable[[str], None],
) -> list[Trial]:
    """Kills ``moments`` runs of some settings, one phase after the other, and starts each again."""
    lasting = times(reference)
    say("seconds of a whole run: " + ", ".join(f"{phase} {lasting[phase]:.1f}" for phase in PHASES))
    (result,) = reference.finished()
    draw, found = random.Random(seed), []
    while len(found) < moments:
        # All phases as often: the late ones are short, but each has its own way to be left half done.
        phase = PHASES[(len(found) * 2 + seed) % len(PHASES)]
        job = Job(folder / f"trial-{len(found)}-{draw.random():.8f}", store, settings)
        done = trial(job, phase, draw.random() * lasting[phase], store, result)
        if done is None:
            say(f"a run ended before it was killed in {phase}; drawn again")
            continue
        found.append(done)
        say(json.dumps(asdict(done)))
    return found


def at_once(job: Job, reference: Path) -> list[str]:
    """Two runs with the same parameters, search checkpoint and result folder; what came out otherwise than alone."""
    processes = [job.start("output_layout=publish") for _ in range(2)]
    wrong = [f"status {status}" for status in map(wait, processes) if status]
    (result,) = (path.parent for path in job.folder.rglob("manifest.json"))
    return [*wrong, *differences(result, reference)]


def main() -> None:
    """Runs it; status 1 where something came out otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", action="store_true", help="two processes with the same parameters as well")
    parser.add_argument("settings", nargs="*", help="more of a run, as model=hf")
    options = parser.parse_args()
    settings = (*SMALL, *options.settings)
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        del os.environ[name]
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads that wait for each other crawl on a busy machine
    imported()
    from layerbits.tracking import open_store

    with tempfile.TemporaryDirectory(prefix="layerbits-kills-") as name:
        folder = Path(name)
        store = open_store(f"sqlite:///{folder}/mlflow.db", folder)
        reference = Job(folder / "reference", store, settings)
        found = run(
            options.moments, options.seed, folder, store, settings, reference, lambda line: print(line, flush=True)
        )
        print(f"{sum(not done.wrong for done in found)} of {len(found)} equal", flush=True)
        both = []
        if options.at_once:
            both = at_once(Job(folder / "at-once", store, settings), reference.finished()[0])
            print(f"two at once: {both or 'equal'}")
        wrong = [line for done in found for line in done.wrong] + both + still_running(store) + logged(store)
        print("\n".join(wrong), end="")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
