"""The files that a result leaves, complete or not at all."""

from __future__ import annotations

import io
from pathlib import Path

import yaml

from layerbits.atomic import dated, whole_folder, write_json
from layerbits.config import Settings
from layerbits.plain import finite
from layerbits.report import write_report
from layerbits.results.manifest import to_manifest
from layerbits.results.result import SensitivityResult
from layerbits.stages.run import Outcome


def write(outcome: Outcome, settings: Settings) -> Path:
    """Writes everything that a run leaves, complete or not at all.

    Returns:
        The result's folder.

    Raises:
        UserError: The disk is full.
    """
    final = output_directory(outcome.result, settings)
    with whole_folder(final) as partial:
        _write_files(partial, outcome)
    return final


def output_directory(result: SensitivityResult, settings: Settings) -> Path:
    """Folder of a result: ``tmp`` names it by run and time, ``publish`` by what was measured alone."""
    info, data = result.candidate, result.calibration
    if settings.output_layout == "publish":
        folder = f"weight-{info.weight_precision}-act-{info.activation_precision}/{info.granularity}"
        name = f"{result.model.name}_{info.quant_pair}_{data.dataset}_{data.size}"
        return settings.output_root / "publish" / folder / name
    return dated(settings.output_root, result.run_name)


def _write_files(folder: Path, outcome: Outcome) -> None:
    from modelopt.torch.utils.serialization import safe_save

    result = outcome.result
    write_report(result, folder)
    info = result.candidate
    quantization = folder / "quantization"
    write_json(quantization / "effective_quant_config.json", info.config)
    (quantization / "effective_quant_config.yaml").write_text(yaml.safe_dump(info.config, sort_keys=False), "utf-8")
    (folder / "config").mkdir()
    (folder / "config" / "composed.yaml").write_text(yaml.safe_dump(dict(result.settings), sort_keys=False), "utf-8")
    write_json(folder / "autoquant" / "state.json", solver_state(result))
    # without the calibrated ranges: megabytes that a new calibration finds again
    state = {key: value for key, value in outcome.state.items() if key != "quantizer_states"}
    packed = io.BytesIO()  # PyTorch's own writer does not say what keeps it from writing
    safe_save(state, packed)
    (folder / "autoquant" / "autoquant_state.pt").write_bytes(packed.getvalue())


def solver_state(result: SensitivityResult) -> dict[str, object]:
    """Plain data that is enough to solve any other budget: weights, scores and bits per group."""
    manifest, info = to_manifest(result), result.candidate
    return {
        "schema_version": manifest["schema_version"],
        "method": result.method,
        "candidates": {info.name: {"bits": info.bits, "config_hash": info.config_hash}},
        "groups": [{"layer": g.key, "modules": list(g.modules), "weights": g.weights} for g in result.groups],
        "scores": {info.name: finite(result.scores.tolist())},
        "predicted_kl": {info.name: finite(result.predicted_kl.tolist())},
        "recipe": manifest["recipe"],
    }
