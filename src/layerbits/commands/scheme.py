"""Schemes from the recorded scores of finished runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from layerbits.errors import UserError
from layerbits.export.target import as_served, find_target
from layerbits.history.evaluated import verdicts
from layerbits.history.scheme_inputs import load_factors, load_scores, read_probe
from layerbits.jobs import Tracker, note
from layerbits.paths import names_file
from layerbits.plain import Composed
from layerbits.report.remarks import with_remarks
from layerbits.schemes.folder import write_schemes
from layerbits.schemes.make import curve, make_schemes
from layerbits.schemes.report import excludes, markdown, metrics, parameters
from layerbits.schemes.settings import SchemeSettings, listed_paths
from layerbits.schemes.sureness import sureness
from layerbits.serving.environment import warn_of_version
from layerbits.serving.find_costs import measuring
from layerbits.tracking.contract import digests
from layerbits.tracking.made import Made
from layerbits.tracking.settings import TrackingSpec


def scheme(config: Composed, root: Path) -> None:
    """Reads the scores, makes the schemes, writes and logs them."""
    settings = SchemeSettings.from_config(config, root / "configs" / "scheme")
    probes = listed_paths(config["measured"])
    if len(probes) > 1:
        raise UserError(f"measured={','.join(probes)} names several probes; give one")
    measured = probes[0] if probes else None
    if measured is not None and names_file(measured):
        read_probe(measured)
    named = str(config["target"])
    target = find_target(named)
    warn_of_version(named, root)

    def make(uri: str | None, said: Mapping[str, str]) -> Made:
        source = settings.applied(load_scores(settings.references, uri), measuring(uri, root, named))
        made = make_schemes(settings.specs, source)
        points = curve(settings.base, source, settings.pareto) if settings.pareto else []
        sure = sureness(settings.specs, source)
        known = [] if measured is None else load_factors(measured, uri, source.model.revision)
        answers = {scheme.name: said[scheme.digest] for scheme in made if scheme.digest in said}
        folder = write_schemes(settings.output_root, source, made, points, sure=sure, known=known, answers=answers)
        used = [info for info in source.candidates if any(info in scheme.candidates for scheme in made)]
        served = "".join(f"- {line}\n" for line in as_served(used, target))
        text = with_remarks(markdown(made, sure, known) + (f"\nAs served:\n\n{served}" if served else ""), answers)
        print(f"\n{excludes(made)}\n{text}\nschemes: {folder}")
        tags = {"source_run_id": ",".join(source.run_ids), **note(text)}
        tags |= digests({scheme.name: scheme.digest for scheme in made})
        return Made(folder, metrics(made, sure, known), parameters(settings.specs, source), tags)

    tracker = Tracker(TrackingSpec.from_config(config), root)
    with tracker.run(f"schemes of {settings.source_name}", "schemes") as run:
        at = run.session
        run.log(make(tracker.uri, {} if at is None else verdicts(at.tracking_uri, at.experiment_id)))
