"""Runs a past run again from its record, and logs whether its scores come out the same.

python experiments/verify.py run_id=RUN_ID
python experiments/verify.py run_id=outputs/tmp/RUN bound=1e-6
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layerbits import entry
from layerbits.errors import UserError
from layerbits.paths import user_path
from layerbits.schemes.settings import listed, source_name
from layerbits.tracking.settings import TrackingSpec

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"


def verification(config: dict[str, Any]) -> None:
    """Repeats the run, writes and logs the comparison; fails where it is beyond the bound."""
    from layerbits.trust.verification import Verification, check, verify

    references = listed(config["run_id"])
    if len(references) != 1:
        raise UserError("set run_id to the id of one sensitivity run, or to the folder of its result")
    (reference,) = references
    track = TrackingSpec.from_config(config)
    output = user_path(config["output_root"])

    def repeat(run: str, uri: str | None) -> tuple[Verification, Path]:
        found, folder = verify(run, str(config["bound"]), config["device"], CONFIGS, output, ROOT, uri)
        print(f"\n{found.markdown()}\nverification: {folder}")
        return found, folder

    if not track.enabled:
        found, _ = repeat(reference, track.uri)
        check(found)
        return
    from layerbits import tracking
    from layerbits.provenance import provenance
    from layerbits.trust.again import scored_run

    uri = tracking.open_store(track.uri, ROOT)
    run = scored_run(reference, uri)
    name = track.run_name or f"verification of {source_name(references)}"
    tags = {"layerbits.kind": "verify", "source_run_id": run}
    with tracking.start_run(name, track.experiment, tags=tags, system_metrics=track.system_metrics) as session:
        found, folder = repeat(run, uri)
        about = {**provenance(ROOT), **entry.note(found.markdown())}
        tracking.log_derived(session, folder, found.metrics(), {"eff.device": found.device}, about)
        check(found)  # within the run, which fails with it


if __name__ == "__main__":
    entry.start(verification, CONFIGS, "verify")
