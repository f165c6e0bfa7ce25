"""A pass with pictures beside a pass over captions of as many tokens, per step; random weights.

    python benchmarks/image_pass.py --out benchmarks/results/DATE-image-pass-GPU.json
    python benchmarks/image_pass.py --shape tiny-vl --device cpu --side 64 --words 12

Both have rows of one length, and the loss counts the same positions, so that they differ in nothing but the pictures.
``tower`` is the vision tower alone on a step's pictures: it runs once per row, in the calibration forward. ``vision``
is the pass that scores the tower's linears too, for which every row is a segment of its own; ``apart`` is the plain
pass over such segments.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from one_pass import SIX, configs
from passes import Passes
from shapes import SHAPES, random_model

from layerbits.inputs.calibration import Batch, Calibration, PictureRow, Segment
from layerbits.inputs.models import vision_linears
from layerbits.scoring import distributed, onepass
from layerbits.scoring.features import picture_inputs

_LEAD = 8  # tokens before a picture


def rows_of(config: object, steps: int, rows: int, side: int, words: int, pictures: bool, every: bool) -> Calibration:
    """Rows with a square picture and words after it, or of random tokens in the same shape.

    Args:
        config: Of the model.
        steps: Batches.
        rows: Rows a batch.
        side: Pixels.
        words: Tokens after the picture.
        pictures: Whether there are any.
        every: Whether the loss counts every token, not only those after the picture.
    """
    vision = config.vision_config  # type: ignore[attr-defined]
    vocabulary = config.text_config.vocab_size  # type: ignore[attr-defined]
    image, start, end = (getattr(config, f"{n}_token_id") for n in ("image", "vision_start", "vision_end"))
    grid = side // vision.patch_size
    tokens = (grid // vision.spatial_merge_size) ** 2
    length = _LEAD + 2 + tokens + words
    features = 3 * vision.temporal_patch_size * vision.patch_size**2
    generator = torch.Generator().manual_seed(1)
    least = 8 if vocabulary < 5000 else 0  # the tiny shape has its marks there
    batches = []
    for step in range(steps):
        ids = torch.randint(least, min(vocabulary, 150000), (rows, length), generator=generator)
        mask = torch.zeros(rows, length, dtype=torch.bool)
        mask[:, 1 if every else -words :] = True
        sample = (step * rows + torch.arange(rows))[:, None].expand(rows, length).int().contiguous()
        if not pictures:
            batches.append(Batch((Segment(ids, None, mask, sample),)))
            continue
        at_image = torch.zeros_like(mask)
        at_image[:, _LEAD + 1 : _LEAD + 1 + tokens] = True
        ids[:, _LEAD], ids[:, _LEAD + 1 + tokens] = start, end
        ids[at_image] = image
        shown = tuple(
            PictureRow(
                {
                    "pixel_values": torch.randn(grid * grid, features, generator=generator),
                    "image_grid_thw": torch.tensor([[1, grid, grid]]),
                    "mm_token_type_ids": at_image[i : i + 1].int(),
                }
            )
            for i in range(rows)
        )
        batches.append(Batch((Segment(ids, None, mask, sample, shown, at_image),)))
    made = tuple(batches)
    return Calibration(made, made, steps * rows, ())


def _apart(batches: tuple[Batch, ...]) -> tuple[Batch, ...]:
    """The same rows, each a segment."""
    return tuple(
        Batch(tuple(s.part(slice(i, i + 1)) for s in batch.segments for i in range(len(s.input_ids))))
        for batch in batches
    )


def main() -> None:
    """Runs the passes in turns and writes the record after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(s for s in SHAPES if "vl" in s), default="qwen3-vl-4b")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--side", type=int, default=640, help="pixels: 640 are 400 image tokens")
    parser.add_argument("--words", type=int, default=102, help="tokens after the picture")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--memory", default="fast")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    dtype = torch.float32 if arguments.device == "cpu" else torch.bfloat16
    loaded = random_model(arguments.shape, distributed.device(arguments.device), dtype)
    size = (arguments.steps, arguments.rows, arguments.side, arguments.words)
    made = {
        name: rows_of(loaded.model.config, *size, pictures, every)
        for name, pictures, every in (("images", True, False), ("text", False, False), ("text_every", False, True))
    }
    bench = Passes(arguments, loaded, made["images"], "image-pass")
    bench.record["tokens_a_step"] = made["text"].score[0].segments[0].input_ids.numel()
    wanted = configs(SIX, arguments.device)

    def tower() -> None:
        given = picture_inputs(loaded.model, made["images"].score[0].segments[0])
        with torch.no_grad():
            loaded.model.model.get_image_features(given["pixel_values"], given["image_grid_thw"])

    apart = _apart(made["images"].score)
    made["apart"] = made["vision"] = Calibration(apart, apart, made["images"].score_samples, ())
    language, tower_too = bench.scored, (*bench.scored, *vision_linears(loaded.model))
    loaded.linears.update(vision_linears(loaded.model))

    def choose(name: str) -> None:
        bench.rows, bench.scored = made[name], tower_too if name == "vision" else language

    for name in made:  # builds and warms every kernel
        choose(name)
        onepass.score(bench.job(wanted, arguments.memory, steps=1))
    tower()
    bench.timed("tower", tower, repeats=3)
    for turn in range(arguments.turns):
        for name in made:
            choose(name)
            bench.timed(f"{name}_{turn}", lambda: onepass.score(bench.job(wanted, arguments.memory)))
            bench.write(arguments.out)
    scored = {n: min(bench.record[f"{n}_{t}"]["seconds_score"] for t in range(arguments.turns)) for n in made}
    bench.record["seconds_a_step"] = {name: seconds / arguments.steps for name, seconds in scored.items()}
    bench.record["images_over_text"] = scored["images"] / scored["text"]
    bench.record["vision_over_apart"] = scored["vision"] / scored["apart"]
    print(bench.record["seconds_a_step"], bench.record["images_over_text"], flush=True)
    bench.write(arguments.out)


if __name__ == "__main__":
    main()
