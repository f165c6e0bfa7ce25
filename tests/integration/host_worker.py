"""One process of a run over hosts, for ``test_hosts.py``: scores a small model, and may take its host down half-way."""

import os
import signal
import sys
from pathlib import Path

import numpy as np

from layerbits import entry
from layerbits.errors import UserError
from layerbits.scoring import distributed, onepass
from tests.integration.scoring_support import configs, job, loaded, random_segment, rows, tiny_model

STEPS = 8
DIES_AFTER = 2


def calibration():
    """Eight batches."""
    return rows(*([random_segment(1, 16, seed=i, first=4 * i)] for i in range(STEPS)))


def scored(folder):
    """The job's scores."""
    return onepass.score(job(loaded(tiny_model("llama")), folder, configs("wfp8_afp8", "wint8_afp16"), calibration()))


def main(host: Path, dies: bool) -> None:
    """Scores into the host's own folder; with ``dies``, the first start ends with the whole host."""
    step, mine = onepass.BatchScorer.step, []
    start = os.environ["TORCHELASTIC_RESTART_COUNT"]

    def counted(scorer, index):
        if dies and len(mine) == DIES_AFTER and start == "0":
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        mine.append(index)
        return step(scorer, index)

    onepass.BatchScorer.step = counted
    print(f"start {start}: process {distributed.rank()} of {distributed.world()}", flush=True)
    try:
        scores = scored(host / "search")
    except UserError as error:
        entry.fail(error)
    np.savez(host / f"scores-{distributed.rank()}.npz", raw=scores.raw, scored=mine, world=distributed.world())


if __name__ == "__main__":
    main(Path(sys.argv[1]), "--dies" in sys.argv[2:])
