"""A past run again from its record."""

from __future__ import annotations

from pathlib import Path

from layerbits.jobs import Tracker, note, refusal
from layerbits.paths import output_folder
from layerbits.plain import Composed
from layerbits.provenance import provenance
from layerbits.schemes.settings import one_run, source_name
from layerbits.scoring.settings import check_device
from layerbits.tracking.made import Made
from layerbits.tracking.settings import TrackingSpec
from layerbits.trust.reproduce import load_run, scored_run
from layerbits.trust.verification import DEVICES, bound_of, check, verify


def verification(config: Composed, root: Path) -> None:
    """Repeats the run, writes and logs the comparison; fails where it is beyond the bound."""
    reference = one_run(config["run_id"])
    bound, device = bound_of(str(config["bound"])), check_device(config["device"], DEVICES)
    output = output_folder("output_root", config["output_root"])
    tracker = Tracker(TrackingSpec.from_config(config), root)
    scored = scored_run(reference, tracker.uri)
    tags = {"source_run_id": scored}
    with tracker.run(f"verification of {source_name([reference])}", "verify", tags, system_metrics=True) as run:
        before = load_run(scored, tracker.uri)
        result, folder = verify(scored, before, bound, device, root / "configs", output, root)
        text = result.markdown()
        print(f"\n{text}\nverification: {folder}")
        tags = {**tags, **provenance(root), **note(text)}
        run.log(Made(folder, result.metrics(), {"eff.device": result.device}, tags, refusal(lambda: check(result))))
