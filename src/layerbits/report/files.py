"""Reports and figures on disk."""

from __future__ import annotations

from pathlib import Path

from layerbits.atomic import atomic, optional_part, write_json
from layerbits.errors import UserError
from layerbits.report.content import json_report
from layerbits.report.markdown import markdown_report
from layerbits.results.manifest import load_manifest, sample_frame, to_manifest
from layerbits.results.result import SensitivityResult

MARKDOWN = Path("report") / "layer-sensitivity-report.md"
JSON = Path("report") / "layer-sensitivity-report.json"
MANIFEST = Path("manifest.json")
SAMPLES = Path("sensitivity") / "scores.parquet"


def write_report(result: SensitivityResult, directory: Path) -> list[Path]:
    """Writes what a result leaves that needs no torch; each file is whole or not there.

    The manifest follows the per-sample scores, so that one without them says that none were kept.

    Args:
        result: What was measured.
        directory: Made where missing.

    Returns:
        Paths of ``sensitivity/scores.parquet`` (where the engine kept samples), ``manifest.json``, the reports and the
        figures.
    """
    paths = []
    if result.sample_kl is not None and result.sample_tokens is not None:
        paths.append(directory / SAMPLES)
        with atomic(paths[-1]) as file:
            sample_frame(result).to_parquet(file)
    write_json(directory / MANIFEST, to_manifest(result))
    return [*paths, directory / MANIFEST, *_render(result, directory)]


def rebuild(manifest_path: Path, out_dir: Path) -> Path:
    """Makes the reports and figures of a past run again, from its manifest alone.

    Args:
        manifest_path: ``manifest.json`` of a run, or its folder.
        out_dir: Where ``report/`` and ``figures/`` go; may be the run's own folder.

    Returns:
        Path of the Markdown report.

    Raises:
        UserError: The manifest is missing or not one, or no report can be made of it.
    """
    report = out_dir / MARKDOWN
    if report not in _render(load_manifest(manifest_path), out_dir):
        raise UserError(f"{report} cannot be made; see the warning above")
    return report


def _render(result: SensitivityResult, directory: Path) -> list[Path]:
    """Writes what is made of the manifest; a part that cannot be made is left out."""
    paths = []
    with optional_part(str(JSON)):
        write_json(directory / JSON, json_report(result))
        paths.append(directory / JSON)
    with optional_part(str(MARKDOWN)), atomic(directory / MARKDOWN) as file:
        file.write(markdown_report(result).encode())
        paths.insert(0, directory / MARKDOWN)
    with optional_part("figures"):
        from layerbits.figures import save_figures  # matplotlib takes a second to import

        paths += save_figures(result, directory / "figures")
    return paths
