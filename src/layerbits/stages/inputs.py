"""What a run is made of, checked before torch is imported: its captions, a local model's files, room on the disk."""

from __future__ import annotations

import shutil
from pathlib import Path

from layerbits.cache import writable_cache
from layerbits.config import Settings
from layerbits.errors import UserError
from layerbits.inputs.captions import count_of
from layerbits.inputs.datasets import WITH_PICTURES, check_dataset
from layerbits.inputs.folder import check_folder, check_processor, local_folder
from layerbits.inputs.pictures import check_pixels
from layerbits.inputs.row_shape import check_samples
from layerbits.paths import output_folder

_FREE_BYTES = 200_000_000  # a result is a few MB; the search checkpoint of a 4B model about 100 MB


def check_inputs(settings: Settings) -> None:
    """Checks what a run reads and where it writes, as far as files say it.

    Raises:
        UserError: There are no such captions or pictures or too few, the model's folder is no whole checkpoint or,
            for pictures, has no processor, the disk is full, a folder cannot be written, or there is no place for a
            cache.
    """
    dataset, model = settings.dataset, settings.model
    check_pixels(dataset.min_pixels, dataset.max_pixels)
    check_dataset(dataset.name, dataset.size, dataset.path, dataset.share)
    check_samples(settings.autoquant.num_score_samples, count_of(dataset.size))
    check_disk(settings.output_root)
    if settings.autoquant.checkpoint is not None:
        output_folder("autoquant.checkpoint", settings.autoquant.checkpoint)
    else:
        writable_cache()  # finished steps go there
    folder = local_folder(model.path)
    if folder is not None:
        check_folder(folder, model.random_weights)
        if dataset.name in WITH_PICTURES:
            check_processor(folder)


def check_disk(root: Path) -> None:
    """Checks that a result can be written below a folder.

    Raises:
        UserError: There is too little room, or no folder can be made there.
    """
    existing = next(p for p in (output_folder("output_root", root), *root.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < _FREE_BYTES:
        raise UserError(f"only {free / 1e6:.0f} MB are free at {existing}; free space or set output_root elsewhere")
