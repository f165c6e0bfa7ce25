"""Model cards of checkpoints that lie here, after a probe or an evaluation measured their schemes."""

from __future__ import annotations

import sys
from collections.abc import Collection

from layerbits.errors import UserError
from layerbits.export.card import write_measured
from layerbits.export.scheme import record_of
from layerbits.history.checkpoints import exported
from layerbits.history.evaluated import answers_of
from layerbits.history.probed import probed_kl
from layerbits.jobs import JobRun


def renew_cards(run: JobRun, digests: Collection[str]) -> None:
    """Writes the latest probe and evaluation of schemes into the cards of their exports of the same experiment.

    A card that cannot be written, and a store that does not answer, is a warning.

    Args:
        run: What measured; it has ended. Nothing is done where nothing is tracked.
        digests: Of the schemes that it measured.
    """
    if run.session is None:
        return
    uri, experiment = run.session.tracking_uri, run.session.experiment_id
    try:
        for export in exported(uri, experiment):
            if export.digest not in digests or record_of(export.folder).get("scheme_digest") != export.digest:
                continue
            kl = probed_kl(uri, experiment, export.scheme, export.digest)
            answers = answers_of(uri, experiment, export.digest)
            if (card := write_measured(export.folder, kl, answers)) is not None:
                print(f"model card: {card}", flush=True)
    except UserError as error:
        print(f"warning: model cards of exports stay as they are: {error}", file=sys.stderr, flush=True)
