"""Measures what a run's scores predict, group by group on held-out rows, and logs how well they agree.

python experiments/validate.py run_id=RUN_ID
python experiments/validate.py run_id=outputs/tmp/RUN rankers=none disable_one=true
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


def validation(config: dict[str, Any]) -> None:
    """Reads the run, measures, writes and logs the result."""
    from layerbits.trust.again import load_run
    from layerbits.trust.validate import settings_of, validate, write_validation
    from layerbits.trust.validation import markdown

    settings = settings_of(config, listed(config["rankers"]))
    references = listed(config["run_id"])
    if len(references) != 1:
        raise UserError("set run_id to the id of one sensitivity run, or to the folder of its result")
    (reference,) = references
    root = user_path(config["output_root"])

    def make(uri: str | None) -> entry.Derived:
        found = validate(reference, load_run(reference, uri), settings, CONFIGS, ROOT)
        folder = write_validation(found, root)
        text = markdown(found)
        print(f"\n{text}\nvalidation: {folder}")
        if found.blind:
            raise UserError(f"{found.blind} ({folder})")
        params = {
            "eff.model": found.model.name,
            "eff.model_revision": found.model.revision,
            "eff.candidate": found.candidate,
            "eff.config_hash": found.config_hash,
            "eff.rows": str(found.data.rows),
            "eff.measured_dtype": found.dtype,
            "eff.disable_one": str(settings.disable_one).lower(),
            "eff.rankers": ",".join(settings.rankers),
            "eff.kv_cache": "+".join(one.format for one in found.kv) or "none",
        }
        tags = {**found.provenance, "source_run_id": reference, **entry.note(text)}
        return entry.Derived(folder, found.metrics(), params, tags)

    name = f"validation of {source_name(references)}"
    entry.log_derived("validate", name, TrackingSpec.from_config(config), ROOT, make, True)


if __name__ == "__main__":
    entry.start(validation, CONFIGS, "validate")
