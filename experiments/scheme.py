"""Makes schemes from the scores of sensitivity runs, and logs them; nothing is scored again.

python experiments/scheme.py run_id=RUN_ID
python experiments/scheme.py run_id=outputs/tmp/RUN schemes=none effective_bits=9,11,13
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layerbits import entry
from layerbits.schemes.folder import write_schemes
from layerbits.schemes.make import curve, make_schemes
from layerbits.schemes.report import digests, excludes, markdown, metrics, parameters
from layerbits.schemes.settings import SchemeSettings

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"


def scheme(config: dict[str, Any]) -> None:
    """Reads the scores, makes the schemes, writes and logs them."""
    settings = SchemeSettings.from_config(config, CONFIGS / "scheme")

    def make(uri: str | None) -> entry.Derived:
        source = settings.source(uri)
        made = make_schemes(settings.specs, source)
        points = curve(settings.base, source, settings.pareto) if settings.pareto else []
        folder = write_schemes(settings.output_root, source, made, points)
        print(f"\n{excludes(made)}\n{markdown(made)}\nschemes: {folder}")
        tags = {"source_run_id": ",".join(source.run_ids), **entry.note(markdown(made))}
        tags |= digests({scheme.name: scheme.digest for scheme in made})
        return entry.Derived(folder, metrics(made), parameters(settings.specs, source), tags)

    entry.log_derived(
        "schemes", f"schemes of {settings.source_name}", settings.tracking, ROOT, make, system_metrics=False
    )


if __name__ == "__main__":
    entry.start(scheme, CONFIGS, "scheme_run")
