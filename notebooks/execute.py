"""Runs notebooks from top to bottom, in place, against the store that MLFLOW_TRACKING_URI names.

MLFLOW_TRACKING_URI=sqlite:////abs/path/mlflow.db python notebooks/execute.py            # all of them
MLFLOW_TRACKING_URI=http://host:5000 python notebooks/execute.py -p experiment mine compare_pairs

Parameters go to the cell tagged "parameters". What is written back has no time stamps and no paths of this machine,
and the digest of the code that made its outputs.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import papermill
from PIL import Image

from layerbits.figures.style import with_palette

FOLDER = Path(__file__).resolve().parent


def execute(source: Path, target: Path, parameters: dict[str, str]) -> None:
    """Runs one notebook and writes it with its outputs.

    Raises:
        papermill.PapermillExecutionError: A cell failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / source.name
        papermill.execute_notebook(source, made, parameters, cwd=folder, progress_bar=False, kernel_name="python3")
        notebook = nbformat.read(made, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = smaller(output.data["image/png"])
    for part in (notebook, *notebook.cells):
        for name in ("papermill", "execution"):
            part.metadata.pop(name, None)
        if part.metadata.get("tags") == []:
            del part.metadata["tags"]
    notebook.metadata["executed"] = digest(notebook)
    nbformat.write(notebook, target)


def digest(notebook: Any) -> str:
    """Hexadecimal digest of the code cells: a notebook that is edited and not run again has another."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()[:16]


def smaller(png: str) -> str:
    """A picture (base64) with a palette, about a third of the size."""
    packed = io.BytesIO()
    with_palette(Image.open(io.BytesIO(base64.b64decode(png)))).save(packed, "png", optimize=True)
    return base64.b64encode(packed.getvalue()).decode()


def main() -> int:
    """Runs the notebooks that are named on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="notebooks, without .ipynb; all by default")
    parser.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"))
    options = parser.parse_args()
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # Progress bars need ipywidgets, and say so with a path of this machine.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")
    parameters: dict[str, Any] = dict(options.parameter)
    failed = 0
    for name in options.names or sorted(path.stem for path in FOLDER.glob("*.ipynb")):
        path = FOLDER / f"{name}.ipynb"
        try:
            execute(path, path, parameters)
        except FileNotFoundError:
            print(f"error: there is no notebook {path.name}", file=sys.stderr)
            return 2
        except papermill.PapermillExecutionError as error:
            print(f"{name}: {error.ename}: {error.evalue}", file=sys.stderr)
            failed += 1
            continue
        print(f"{name}: {path.stat().st_size / 1000:.0f} kB")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
