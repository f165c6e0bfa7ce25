"""Makes schemes from the scores of sensitivity runs, and logs them; nothing is scored again.

python experiments/scheme.py run_id=RUN_ID
python experiments/scheme.py run_id=outputs/tmp/RUN schemes=none effective_bits=9,11,13
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layerbits import entry
from layerbits.errors import UserError
from layerbits.schemes.additivity import load_factors
from layerbits.schemes.folder import write_schemes
from layerbits.schemes.make import curve, make_schemes
from layerbits.schemes.report import digests, excludes, markdown, metrics, parameters
from layerbits.schemes.settings import SchemeSettings, listed
from layerbits.schemes.sureness import sureness

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"


def scheme(config: dict[str, Any]) -> None:
    """Reads the scores, makes the schemes, writes and logs them."""
    settings = SchemeSettings.from_config(config, CONFIGS / "scheme")
    probes = listed(config["measured"])
    if len(probes) > 1:
        raise UserError(f"measured={','.join(probes)} names several probes; give one")
    measured = probes[0] if probes else None

    def make(uri: str | None) -> entry.Derived:
        source = settings.source(uri)
        made = make_schemes(settings.specs, source)
        points = curve(settings.base, source, settings.pareto) if settings.pareto else []
        sure = sureness(settings.specs, source)
        known = [] if measured is None else load_factors(measured, uri, source.model.revision)
        folder = write_schemes(settings.output_root, source, made, points, sure=sure, known=known)
        text = markdown(made, sure, known)
        print(f"\n{excludes(made)}\n{text}\nschemes: {folder}")
        tags = {"source_run_id": ",".join(source.run_ids), **entry.note(text)}
        tags |= digests({scheme.name: scheme.digest for scheme in made})
        return entry.Derived(folder, metrics(made, sure, known), parameters(settings.specs, source), tags)

    entry.log_derived(
        "schemes", f"schemes of {settings.source_name}", settings.tracking, ROOT, make, system_metrics=False
    )


if __name__ == "__main__":
    entry.start(scheme, CONFIGS, "schemes")
