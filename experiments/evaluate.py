"""Puts the same questions to the unquantized model and to each scheme, and logs what became of the answers.

python experiments/evaluate.py run_id=RUN_ID
python experiments/evaluate.py run_id=outputs/tmp/RUN tasks=cloze,sums limit=200 margin=0.02
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layerbits import entry
from layerbits.answers.report import markdown, parameters, tags, write_evaluation
from layerbits.answers.settings import evaluate_settings
from layerbits.paths import user_path
from layerbits.schemes.report import digests
from layerbits.schemes.request import SchemeRequest
from layerbits.tracking.settings import TrackingSpec

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"


def evaluate(config: dict[str, Any]) -> None:
    """Makes or reads the schemes, asks, writes and logs the result."""
    settings = evaluate_settings(config)
    wanted = SchemeRequest.from_config(config, CONFIGS / "scheme")
    root = user_path(config["output_root"])

    def make(uri: str | None) -> entry.Derived:
        from layerbits.answers.job import evaluate_schemes

        schemes = wanted.schemes(uri)
        result = evaluate_schemes(schemes, settings, config["device"], ROOT)
        folder = write_evaluation(result, root)
        print(f"\n{markdown(result)}\nevaluation: {folder}")
        told = {**result.provenance, "source_run_id": schemes[0].source_run_id, **entry.note(markdown(result))}
        told |= {**digests({s.scheme: s.digest for s in result.schemes if s.digest}), **tags(result)}
        return entry.Derived(folder, result.metrics(), parameters(result), told)

    name = f"evaluation of {wanted.source_name}"
    entry.log_derived("evaluation", name, TrackingSpec.from_config(config), ROOT, make, system_metrics=True)


if __name__ == "__main__":
    entry.start(evaluate, CONFIGS, "evaluate")
