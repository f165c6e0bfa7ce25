"""Measures schemes on held-out rows of a model, beside the noise floor, and logs the probe.

python experiments/probe.py run_id=RUN_ID
python experiments/probe.py scheme_files=outputs/tmp/SCHEMES/schemes/fp8_autoquant_full.json rows=16
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layerbits import entry
from layerbits.paths import user_path
from layerbits.probing.report import markdown, parameters, write_probe
from layerbits.schemes.report import digests
from layerbits.schemes.request import SchemeRequest
from layerbits.schemes.settings import whole
from layerbits.scoring.precision import check_dtype
from layerbits.tracking.settings import TrackingSpec

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"


def probe(config: dict[str, Any]) -> None:
    """Makes or reads the schemes, measures them, writes and logs the result."""
    wanted = SchemeRequest.from_config(config, CONFIGS / "scheme")
    rows, batch_size = (whole(key, config[key]) for key in ("rows", "batch_size"))
    dtype = check_dtype(str(config["dtype"]))
    root = user_path(config["output_root"])

    def make(uri: str | None) -> entry.Derived:
        from layerbits.probing.probe import probe_schemes

        schemes = wanted.schemes(uri)
        result = probe_schemes(schemes, rows, batch_size, config["device"], ROOT, dtype)
        folder = write_probe(result, root)
        print(f"\n{markdown(result)}\nprobe: {folder}")
        tags = {**result.provenance, "source_run_id": schemes[0].source_run_id, **entry.note(markdown(result))}
        tags |= digests({probed.scheme: probed.digest for probed in result.schemes})
        return entry.Derived(folder, result.metrics(), parameters(result), tags)

    name = f"probe of {wanted.source_name}"
    entry.log_derived("probe", name, TrackingSpec.from_config(config), ROOT, make, system_metrics=True)


if __name__ == "__main__":
    entry.start(probe, CONFIGS, "probe")
