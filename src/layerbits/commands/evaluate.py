"""The same questions to the unquantized model and to each scheme."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from layerbits.answers.settings import EvaluateSettings, evaluate_settings
from layerbits.export.target import find_target
from layerbits.history.scheme_inputs import requested_schemes
from layerbits.jobs import note, run_job
from layerbits.paths import output_folder
from layerbits.plain import Composed
from layerbits.schemes.request import SchemeRequest
from layerbits.schemes.scheme import Scheme
from layerbits.scoring.settings import check_device
from layerbits.serving.find_costs import measuring
from layerbits.tracking.contract import digests
from layerbits.tracking.made import Made
from layerbits.tracking.settings import TrackingSpec


def evaluate(config: Composed, root: Path) -> None:
    """Makes or reads the schemes, asks, writes and logs the result."""
    wanted = SchemeRequest.from_config(config, root / "configs" / "scheme")
    device = check_device(config["device"])
    settings = evaluate_settings(config)
    find_target(str(config["target"]))
    output = output_folder("output_root", config["output_root"])
    schemes_done: set[str] = set()

    def make(uri: str | None) -> Made:
        schemes = requested_schemes(wanted, uri, measuring(uri, root, str(config["target"])))
        schemes_done.update(scheme.digest for scheme in schemes)
        return _evaluated(schemes, settings, device, output, root)

    name = f"evaluation of {wanted.source_name}"
    run = run_job(TrackingSpec.from_config(config), root, name, "evaluation", make, system_metrics=True)
    from layerbits.export.later import renew_cards

    renew_cards(run, schemes_done)


def _evaluated(schemes: Sequence[Scheme], settings: EvaluateSettings, device: str, output: Path, root: Path) -> Made:
    from layerbits.answers.job import evaluate_schemes
    from layerbits.answers.report import data, markdown, measured, parameters, remarks, tags, write_evaluation

    result = evaluate_schemes(schemes, settings, device, root)
    folder = write_evaluation(result, output)
    text = markdown(result)
    print(f"\n{text}\nevaluation: {folder}")
    run_tags = {**result.provenance, "source_run_id": schemes[0].source_run_id, **note(text)}
    run_tags |= {**digests({s.scheme: s.digest for s in result.schemes if s.digest}), **tags(result)}
    return Made(
        folder,
        result.metrics(),
        parameters(result),
        run_tags,
        data=data(result),
        measured=measured(result),
        remarks=remarks(result),
    )
