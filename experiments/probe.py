"""Measures schemes on held-out rows of a model, beside the noise floor, and logs the probe.

python experiments/probe.py run_id=RUN_ID
python experiments/probe.py scheme_files=outputs/tmp/SCHEMES/schemes/fp8_autoquant_full.json rows=16
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from layerbits import entry
from layerbits.errors import UserError
from layerbits.schemes import Scheme, load_scheme
from layerbits.schemes.make import make_schemes
from layerbits.schemes.measured import ProbeResult
from layerbits.schemes.settings import SchemeSettings, listed, source_name
from layerbits.schemes.source import load_scores

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"


@hydra.main(version_base="1.3", config_path="../configs", config_name="probe")
def main(config: DictConfig) -> None:
    """Composes the configuration and probes."""
    try:
        probe(OmegaConf.to_container(config, resolve=True))
    except UserError as error:
        entry.fail(error)


def probe(config: dict[str, Any]) -> None:
    """Makes or reads the schemes, measures them, writes and logs the result."""
    from layerbits.config import TrackingSpec

    track = TrackingSpec(**config["tracking"])
    if not track.enabled:
        _measure(config, _schemes(config, track.uri))
        return
    from layerbits import tracking

    uri = tracking.open_store(track.uri, ROOT)
    name = track.run_name or f"probe of {source_name(listed(config['scheme_files']) or listed(config['run_id']))}"
    with tracking.start_run(name, track.experiment, tags={"layerbits.kind": "probe"}) as session:
        schemes = _schemes(config, uri)
        result, folder = _measure(config, schemes)
        tracking.log_derived(session, folder, result.metrics(), tags={"source_run_id": schemes[0].source_run_id})


def _schemes(config: dict[str, Any], uri: str | None) -> list[Scheme]:
    files = listed(config["scheme_files"])
    if files:
        return [load_scheme(path) for path in files]
    settings = SchemeSettings.from_config(config, CONFIGS / "scheme")
    return make_schemes(settings.specs, load_scores(settings.references, uri))


def _measure(config: dict[str, Any], schemes: list[Scheme]) -> tuple[ProbeResult, Path]:
    from layerbits.probe import probe_schemes

    result = probe_schemes(schemes, config["rows"], config["batch_size"], config["device"], ROOT)
    folder = result.write(Path(config["output_root"]).expanduser().absolute())
    print(f"\n{result.markdown()}\nprobe: {folder}")
    return result, folder


if __name__ == "__main__":
    entry.run(main, CONFIGS, lists=("run_id", "schemes", "controls", "effective_bits", "candidates", "scheme_files"))
