"""Makes schemes from the scores of sensitivity runs, and logs them; nothing is scored again.

python experiments/scheme.py run_id=RUN_ID
python experiments/scheme.py run_id=outputs/tmp/RUN schemes=none effective_bits=9,11,13
"""

from __future__ import annotations

from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from layerbits import entry
from layerbits.errors import UserError
from layerbits.schemes.folder import write_schemes
from layerbits.schemes.make import curve, make_schemes
from layerbits.schemes.report import markdown, metrics
from layerbits.schemes.settings import SchemeSettings
from layerbits.schemes.source import Source, load_scores

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"


@hydra.main(version_base="1.3", config_path="../configs", config_name="scheme_run")
def main(config: DictConfig) -> None:
    """Composes the configuration and makes the schemes."""
    try:
        schemes(SchemeSettings.from_config(OmegaConf.to_container(config, resolve=True), CONFIGS / "scheme"))
    except UserError as error:
        entry.fail(error)


def schemes(settings: SchemeSettings) -> None:
    """Reads the scores, makes the schemes, writes and logs them."""
    track = settings.tracking
    if not track.enabled:
        _make(settings, load_scores(settings.references, track.uri))
        return
    from layerbits import tracking

    uri = tracking.open_store(track.uri, ROOT)
    name = track.run_name or f"schemes of {settings.source_name}"
    with tracking.start_run(
        name, track.experiment, tags={"layerbits.kind": "schemes"}, system_metrics=False
    ) as session:
        source = load_scores(settings.references, uri)
        folder, values = _make(settings, source)
        tracking.log_derived(session, folder, values, tags={"source_run_id": ",".join(source.run_ids)})


def _make(settings: SchemeSettings, source: Source) -> tuple[Path, dict[str, float]]:
    made = make_schemes(settings.specs, source)
    points = curve(settings.base, source, settings.pareto) if settings.pareto else []
    folder = write_schemes(settings.output_root, source, made, points)
    print(f"\n{markdown(made)}\nschemes: {folder}")
    return folder, metrics(made)


if __name__ == "__main__":
    entry.run(main, CONFIGS, lists=("run_id", "schemes", "controls", "effective_bits", "candidates"))
