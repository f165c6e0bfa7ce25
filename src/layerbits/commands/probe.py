"""Schemes measured on held-out rows of a model."""

from __future__ import annotations

from pathlib import Path

from layerbits.export.target import find_target
from layerbits.history.scheme_inputs import requested_schemes
from layerbits.inputs.row_shape import check_held_out, check_length
from layerbits.jobs import note, run_job
from layerbits.paths import output_folder
from layerbits.plain import Composed, unset
from layerbits.probing.report import data, markdown, measured, parameters, write_probe
from layerbits.probing.texts import read_texts
from layerbits.schemes.request import SchemeRequest
from layerbits.schemes.settings import listed_paths, whole
from layerbits.scoring.settings import check_device, check_dtype
from layerbits.serving.find_costs import measuring
from layerbits.tracking.contract import digests
from layerbits.tracking.made import Made
from layerbits.tracking.settings import TrackingSpec


def probe(config: Composed, root: Path) -> None:
    """Makes or reads the schemes, measures them, writes and logs the result."""
    wanted = SchemeRequest.from_config(config, root / "configs" / "scheme")
    rows, batch_size = (whole(key, config[key]) for key in ("rows", "batch_size"))
    dtype, device = check_dtype(str(config["dtype"])), check_device(config["device"])
    check_held_out(rows, batch_size)
    seq_len = None if unset(config["seq_len"]) else check_length("seq_len", whole("seq_len", config["seq_len"]))
    texts = read_texts(listed_paths(config["texts"]))
    find_target(str(config["target"]))
    output = output_folder("output_root", config["output_root"])
    schemes_done: set[str] = set()

    def make(uri: str | None) -> Made:
        from layerbits.probing.probe import probe_schemes

        schemes = requested_schemes(wanted, uri, measuring(uri, root, str(config["target"])))
        result = probe_schemes(schemes, rows, batch_size, device, root, dtype, seq_len, texts)
        folder = write_probe(result, output)
        text = markdown(result)
        print(f"\n{text}\nprobe: {folder}")
        tags = {**result.provenance, "source_run_id": schemes[0].source_run_id, **note(text)}
        tags |= digests({probed.scheme: probed.digest for probed in result.schemes})
        schemes_done.update(probed.digest for probed in result.schemes)
        on = data(result, schemes[0].calibration)
        return Made(folder, result.metrics(), parameters(result), tags, data=on, measured=measured(result, on))

    name = f"probe of {wanted.source_name}"
    run = run_job(TrackingSpec.from_config(config), root, name, "probe", make, system_metrics=True)
    from layerbits.export.later import renew_cards

    renew_cards(run, schemes_done)
