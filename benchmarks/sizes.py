"""Predicted bytes of exported checkpoints beside those of their files.

    python benchmarks/sizes.py EXPORT_FOLDER [EXPORT_FOLDER ...]

An export says in its ``layerbits.json`` which scheme it is of; the model that was scored is found by it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from layerbits.checkpoint.reader import open_checkpoint
from layerbits.checkpoint.sizes import with_sizes
from layerbits.schemes.scheme import Scheme
from layerbits.schemes.sizes import Load
from layerbits.schemes.source import Source


def main(folders: list[str]) -> None:
    """Prints a line per checkpoint: predicted bytes, bytes of its tensors and of its files."""
    for folder in map(Path, folders):
        scheme = Scheme.from_json(json.loads((folder / "layerbits.json").read_text("utf-8"))["scheme"])
        unknown = np.zeros((len(scheme.groups), len(scheme.candidates)))
        source = Source(
            scheme.source_run_ids,
            scheme.model,
            scheme.calibration,
            "gradient",
            scheme.groups,
            scheme.candidates,
            unknown,
            unknown,
            "weight",
            None,
            scheme.settings,
            kv_cache=scheme.kv_cache,
        )
        sizes = with_sizes(source, Load()).sizes
        assert sizes is not None
        predicted = sizes.checkpoint(scheme.assignment)
        tensors = sum(entry.stop - entry.start for entry in open_checkpoint(folder).entries.values())
        files = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        print(
            f"{folder.name}: predicted {predicted:,.0f} bytes, tensors {tensors:,} ({tensors / predicted - 1:+.4%}), "
            f"files {files:,} ({files / predicted - 1:+.4%})"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
