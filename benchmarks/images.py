"""What calibrating with pictures changes, on a real language model behind a vision tower that is not trained.

    python benchmarks/images.py --model QWEN2_5_FOLDER --out benchmarks/results/DATE-images-GPU.json
    python benchmarks/images.py --out benchmarks/results/DATE-images-GPU.json --draw docs/figures
    python benchmarks/images.py --model QWEN2_5_FOLDER --out RECORD.json --device cpu --ranges

The model is Qwen2.5-VL's architecture with the weights of a trained Qwen2.5 (its language part is a Qwen2) and a small
vision tower of random weights. The tower's last linear is set so that its outputs have, feature by feature, the mean
and the spread of the word embeddings times a scale: trained towers are known for more than once that. Nothing is learnt
of what the pictures show: they are noise of a known size in front of words.

For each scale, one pass per calibration scores all pairs: captions, chats about pictures, the words of those chats
alone, or captions and chats, as many samples each. Measured on held-out pictures and captions: the KL divergence of
every linear quantized, and of the half of the weights that the pass ranks as least sensitive. Also how ranks move, what
share of a score image positions have, and what a range of words would clip. The record is written after every scale.
``--ranges`` runs no pass: it compares what enters the linears for captions and for chats about pictures, at image
tokens and at the words of the chats.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from layerbits.candidates import backends  # noqa: E402
from layerbits.candidates.candidate import Candidate, resolve_candidate  # noqa: E402
from layerbits.candidates.formats import QuantPair  # noqa: E402
from layerbits.candidates.granularity import Overlay  # noqa: E402
from layerbits.inputs.calibration import Batch, Calibration, Segment, build_rows  # noqa: E402
from layerbits.inputs.captions import load_captions  # noqa: E402
from layerbits.inputs.drawn import embedded  # noqa: E402
from layerbits.inputs.models import LoadedModel, language_model_linears  # noqa: E402
from layerbits.inputs.picture_rows import Reader  # noqa: E402
from layerbits.inputs.processor import still_class  # noqa: E402
from layerbits.inputs.rows import rows_of  # noqa: E402
from layerbits.probing.apply import apply_scheme, find_ranges  # noqa: E402
from layerbits.probing.unquantized import UnquantizedLogits  # noqa: E402
from layerbits.provenance import provenance  # noqa: E402
from layerbits.results.assignment import Assignment  # noqa: E402
from layerbits.results.frames import spearman  # noqa: E402
from layerbits.results.modality import modality_of  # noqa: E402
from layerbits.results.result import CalibrationInfo, ModelInfo  # noqa: E402
from layerbits.schemes import Scheme  # noqa: E402
from layerbits.scoring import onepass  # noqa: E402
from layerbits.scoring.features import kept_features, picture_inputs  # noqa: E402
from layerbits.scoring.job import Scores, ScoringJob  # noqa: E402
from layerbits.scoring.steps import calibration_forward  # noqa: E402

PAIRS = ("wfp8_afp8", "wint8_aint8", "wfp4_afp4")
CALIBRATIONS = ("text", "words", "pictures", "both")
WITH_PICTURES = CALIBRATIONS[2:]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COMPARED = (("text", "pictures"), ("text", "both"), ("text", "words"), ("words", "pictures"))
MARKS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
"""In the vocabulary of every Qwen2.5, whether its tokenizer marks them as special or not."""
TOWER = {"depth": 4, "hidden_size": 256, "num_heads": 4, "intermediate_size": 512, "fullatt_block_indexes": [1, 3]}
LENGTH = 128  # tokens of a row of captions
BATCH = 8


def build(folder: Path, device: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model and its reader of pictures."""
    from tokenizers import AddedToken
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2_5_VLConfig
    from transformers import Qwen2_5_VLForConditionalGeneration as VisionLanguageModel
    from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor

    source = AutoConfig.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in MARKS.values()], special_tokens=True)
    own = source.to_dict()
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names += ("vocab_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")
    rope = getattr(source, "rope_parameters", None) or {"rope_theta": own["rope_theta"]}
    part = source.hidden_size // source.num_attention_heads // 8  # 1 : 1.5 : 1.5, as in Qwen2.5-VL
    sections = [part, (4 * part - part) // 2, 4 * part - part - (4 * part - part) // 2]
    text = {name: own[name] for name in names} | {
        "rope_parameters": {"rope_type": "default", "rope_theta": rope["rope_theta"], "mrope_section": sections}
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config={**TOWER, "out_hidden_size": source.hidden_size},
        tie_word_embeddings=source.tie_word_embeddings,
        **{key: tokenizer.convert_tokens_to_ids(token) for key, token in MARKS.items()},
    )
    torch.manual_seed(0)
    model = VisionLanguageModel(config)
    trained = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    left = model.model.language_model.load_state_dict(trained.model.state_dict(), strict=True)
    assert not left.missing_keys
    if not source.tie_word_embeddings:
        model.lm_head.load_state_dict(trained.lm_head.state_dict())
    model.config.use_cache = False
    images = _image_processor()(min_pixels=56 * 56, max_pixels=28 * 28 * 128)
    processor = still_class(Qwen2_5_VLProcessor)(images, tokenizer, chat_template=TEMPLATE)
    return model.to(device=device, dtype=dtype).eval(), Reader.of(processor, config)


def _image_processor() -> Any:
    """Qwen2-VL's image processor: Pillow's, where this transformers has it."""
    import transformers

    found = getattr(transformers, "Qwen2VLImageProcessorPil", None)
    return transformers.Qwen2VLImageProcessor if found is None else found


class Tower:
    """Sets the mean and the spread of what the vision tower puts out."""

    def __init__(self, model: Any, batches: Sequence[Batch]) -> None:
        self._last = model.model.visual.merger.mlp[-1]
        self._model, self._batches = model, batches
        self._weight, self._bias = (p.detach().float().clone() for p in (self._last.weight, self._last.bias))
        words = model.get_input_embeddings().weight.detach().float()
        self._words = words.mean(dim=0), words.std(dim=0)
        self._own = self._features()

    def _features(self) -> tuple[Any, Any]:
        made = []
        with torch.no_grad():
            for segment in (s for b in self._batches for s in b.segments if s.pictures):
                given = picture_inputs(self._model, segment)
                found = self._model.model.get_image_features(given["pixel_values"], given["image_grid_thw"])
                made.append(torch.cat(found.pooler_output).float())
        features = torch.cat(made)
        return features.mean(dim=0), features.std(dim=0)

    def scale(self, times: float) -> dict[str, float]:
        """Sets them to those of the word embeddings times a number; returns what came of it."""
        mean, spread = self._own
        factor = times * self._words[1] / spread
        with torch.no_grad():
            self._last.weight.copy_(self._weight * factor[:, None])
            self._last.bias.copy_((self._bias - mean) * factor + times * self._words[0])
        made = self._features()
        return {
            "words_spread": float(self._words[1].mean()),
            "images_spread": float(made[1].mean()),
            "images_mean_error": float((made[0] - times * self._words[0]).abs().mean()),
        }


@dataclass(frozen=True)
class Data:
    """Rows: of each calibration, and held out."""

    calibrations: Mapping[str, tuple[Batch, ...]]
    held_pictures: tuple[Batch, ...]
    held_text: tuple[Batch, ...]

    @classmethod
    def of(cls, reader: Reader, samples: int, held: int) -> Data:
        """As many samples for each calibration."""
        shown, told = embedded(samples + held + 600)[:samples], load_captions("everyday", "medium")
        texts = told.captions[:samples]
        both = [row for i in range(samples // 2) for row in (shown[i], texts[i])]
        tokenizer = reader.processor.tokenizer

        def rows(captions: Sequence[Any]) -> tuple[Batch, ...]:
            return rows_of(captions, tokenizer, reader, "packed", LENGTH, BATCH)

        apart = embedded(600 + held)[600:]
        pictures = rows(shown)
        marks = [tokenizer.convert_tokens_to_ids(token) for token in MARKS.values()]
        return cls(
            {"text": rows(texts), "words": without(pictures, marks), "pictures": pictures, "both": rows(both)},
            rows(apart),
            build_rows(told.held_out[: 2 * held], tokenizer, "packed", LENGTH, BATCH),
        )


def without(batches: Sequence[Batch], marks: Sequence[int]) -> tuple[Batch, ...]:
    """Chats without their pictures: the same rows without the tokens ``marks``, each a segment of its own."""
    made = []
    for batch in batches:
        rows = [s.part(slice(i, i + 1)) for s in batch.segments for i in range(len(s.input_ids))]
        left = [~torch.isin(row.input_ids[0], torch.tensor(marks)) for row in rows]
        made.append(Batch(tuple(
            Segment(row.input_ids[:, kept], None, row.loss_mask[:, kept], row.sample[:, kept])
            for row, kept in zip(rows, left, strict=True)
        )))  # fmt: skip
    return tuple(made)


def candidate(pair: str) -> Candidate:
    """A pair at its default granularity; FP4 is NVFP4."""
    written = yaml.safe_load((ROOT / "configs" / "quant_pair" / f"{pair}.yaml").read_text())
    return resolve_candidate(QuantPair.from_mapping(written), Overlay("default", {}), "nvfp4", experimental=True)


def scored(loaded: LoadedModel, made: Mapping[str, Candidate], rows: tuple[Batch, ...], device: str) -> Scores:
    """One pass of all pairs."""
    configs = {c.info.name: c.search_config() for c in made.values()}
    if device == "cpu":
        backends.register_backends()
        configs = {name: backends.with_reference_backend(config) for name, config in configs.items()}
    samples = 1 + max(int(s.sample.max()) for b in rows for s in b.segments)
    names = tuple(n for n in loaded.linears if n != "lm_head")
    with TemporaryDirectory() as folder:
        job = ScoringJob(
            loaded, names, configs, Calibration(rows, rows, samples, ()), "gradient", 12.0, Path(folder), "images"
        )
        return onepass.score(job)


def scheme(name: str, made: Candidate, scores: Scores, quantized: Sequence[bool], info: ModelInfo) -> Scheme:
    """Some groups under one candidate."""
    data = CalibrationInfo("images", "", "", "", None, None, None, None, None, None, None, (), 0.0)
    assigned = Assignment(made.info.name if flag else None for flag in quantized)
    return Scheme(name, ("none",), info, data, scores.groups, (made.info,), assigned, 0.0, None, 0.0, 0.0, {})


def half(scores: Scores, column: int) -> list[bool]:
    """The least sensitive groups with half of the weights."""
    order = np.argsort(scores.predicted_kl[:, column])
    weights = np.array([g.weights for g in scores.groups])
    inside = np.cumsum(weights[order]) <= weights.sum() / 2
    chosen = set(order[inside].tolist())
    return [i in chosen for i in range(len(weights))]


def ranks(first: Scores, second: Scores, column: int) -> dict[str, float]:
    """How alike two passes rank."""
    one, two = first.predicted_kl[:, column], second.predicted_kl[:, column]
    tops = [set(np.argsort(-values)[:10].tolist()) for values in (one, two)]
    return {"spearman": spearman(one, two), "top10": len(tops[0] & tops[1])}


def clipping(scores: Scores) -> dict[str, Any]:
    """What ranges of words would clip of image tokens, over the modules that have a static range."""
    found = scores.image_ranges
    worst = sorted(found, key=lambda r: -r.clipped)[:8]
    shares = np.array([r.clipped for r in found])
    ratios = np.array([r.images / r.words for r in found])
    return {
        "modules": len(found),
        "mean_share": float(shares.mean()),
        "largest_share": float(shares.max()),
        "modules_above_1_percent": int((shares > 0.01).sum()),
        "median_ratio_of_magnitudes": float(np.median(ratios)),
        "largest_ratio_of_magnitudes": float(ratios.max()),
        "worst": [{"module": r.module, "words": r.words, "images": r.images, "clipped": r.clipped} for r in worst],
    }


def beyond_captions(model: Any, names: Sequence[str], data: Data) -> dict[str, Any]:
    """What ranges of captions clip of chats about pictures, at image tokens and at words, over all linears.

    Returns:
        For each: linears with more than 1% of the tokens clipped and with any, mean share, and quantiles of
        the largest magnitude over that of captions; for words also how many of the clipped are a row's first token.
    """
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}

    def see(name: str) -> Any:
        return lambda _module, args: seen[name].append(args[0].detach().abs().amax(-1).flatten().float().cpu())

    def largest(batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
        for batch in batches:
            calibration_forward(model, batch, False)
        made = {name: torch.cat(parts) for name, parts in seen.items()}
        for parts in seen.values():
            parts.clear()
        return made

    handles = [model.get_submodule(name).register_forward_pre_hook(see(name)) for name in names]
    with torch.no_grad():
        captions, chats = (largest(data.calibrations[name]) for name in ("text", "pictures"))
    for handle in handles:
        handle.remove()
    segments = [s for batch in data.calibrations["pictures"] for s in batch.segments]
    images = torch.cat([s.image_tokens.flatten() for s in segments])
    first = torch.cat([(torch.arange(s.input_ids.shape[1]) == 0).expand_as(s.input_ids).flatten() for s in segments])
    told: dict[str, Any] = {"linears": len(names)}
    for what, at in (("images", images), ("words", ~images), ("words_but_first", ~images & ~first)):
        shares = np.array([float((chats[n][at] > captions[n].max()).float().mean()) for n in names])
        ratios = np.array([float(chats[n][at].max() / captions[n].max()) for n in names])
        told[what] = {
            "tokens": int(at.sum()),
            "linears_clipped": int((shares > 0).sum()),
            "linears_above_1_percent": int((shares > 0.01).sum()),
            "mean_share": float(shares.mean()),
            "ratio_10_50_90_100_percent": [float(q) for q in np.quantile(ratios, (0.1, 0.5, 0.9, 1.0))],
            "largest": [{"linear": names[i], "ratio": float(ratios[i])} for i in np.argsort(-ratios)[:6]],
        }
    return told


def image_shares(scores: Scores, rows: Sequence[Batch], names: Sequence[str]) -> dict[str, Any]:
    """Share of image positions in the summed predicted KL, and by block."""
    assert scores.sample_kl is not None
    assert scores.sample_image_kl is not None
    segments = [s for b in rows for s in b.segments]
    images, tokens = sum(int(s.image_tokens.sum()) for s in segments), sum(s.input_ids.numel() for s in segments)
    blocks = np.array([g.block for g in scores.groups])
    told: dict[str, Any] = {"image_tokens": images, "tokens": tokens}
    for c, name in enumerate(names):
        parts = [v[:, :, c].sum(axis=1)[:, None] for v in (scores.sample_kl, scores.sample_image_kl)]
        whole = modality_of(parts[0], parts[1], images, tokens, ())
        by_block = [
            float(scores.sample_image_kl[:, blocks == b, c].sum() / scores.sample_kl[:, blocks == b, c].sum())
            for b in range(int(blocks.max()) + 1)
        ]
        ends = {k: float(getattr(whole, k)[0]) for k in ("share", "low", "high")}
        told[name] = {**ends, "by_block": by_block}
    return told


def tables(record: Mapping[str, Any]) -> str:
    """The record as Markdown: KL by calibration, ranks, what is clipped."""
    names = " | ".join(CALIBRATIONS)
    lines = [f"| scale | pair | quantized | after pictures: {names} | on text: {names} |", "|---" * 11 + "|"]
    for scale, told in record["scales"].items():
        for pair, by in told["kl"].items():
            for what in ("all", "half"):
                cells = [
                    "{:.3g} ± {:.1g}".format(*by[name][what][where]) if name in by else "–"
                    for where in ("pictures", "text")
                    for name in CALIBRATIONS
                ]
                lines.append(f"| {scale} | `{pair}` | {what} | {' | '.join(cells)} |")
    header = " | ".join(f"{a} and {b}: Spearman | top 10 shared" for a, b in COMPARED)
    lines += [
        "",
        f"| scale | pair | {header} | image share of the score, 90% |",
        "|---" * (3 + 2 * len(COMPARED)) + "|",
    ]
    for scale, told in record["scales"].items():
        for pair, moved in told["ranks"].items():
            share = told["image_share"]["pictures"][pair]
            ends = f"{share['share']:.1%} ({share['low']:.1%} to {share['high']:.1%})"
            alike = [
                f"{moved[name]['spearman']:.3f} | {moved[name]['top10']}" if name in moved else "– | –"
                for name in map("_".join, COMPARED)
            ]
            lines.append(f"| {scale} | `{pair}` | {' | '.join(alike)} | {ends} |")
    lines += ["", "| scale | modules above 1% | mean share | largest share | median, largest ratio of magnitudes |"]
    lines += ["|---|---|---|---|---|"]
    for scale, told in record["scales"].items():
        c = told["clipped"]["both"]
        ratios = f"{c['median_ratio_of_magnitudes']:.2f}, {c['largest_ratio_of_magnitudes']:.2f}"
        shares = f"{100 * c['mean_share']:.2g}% | {100 * c['largest_share']:.2g}%"
        lines.append(f"| {scale} | {c['modules_above_1_percent']} of {c['modules']} | {shares} | {ratios} |")
    return "\n".join(lines)


def draw_shares(record: Mapping[str, Any], path: Path) -> None:
    """Share of image positions in the predicted KL along the blocks."""
    shares = [told["image_share"]["pictures"][pair] for told in record["scales"].values() for pair in told["ranks"]]
    top = max(max(share["by_block"]) for share in shares)

    def plot(ax: Any, pair: str, _: int, told: Mapping[str, Any], style: Mapping[str, Any]) -> None:
        ax.plot(100 * np.array(told["image_share"]["pictures"][pair]["by_block"]), markersize=3, linewidth=1.2, **style)
        ax.set_ylim(0, 105 * top)

    title = "How much of the predicted KL comes from image positions (the vision tower is not trained)"
    _draw(record, path, title, ("Decoder block", "Share of image positions (%)"), plot)


def draw_kl(record: Mapping[str, Any], path: Path) -> None:
    """KL after pictures with every linear quantized, by calibration, with standard errors."""
    names = ["captions", "words of\nchats", "chats with\npictures", "captions\nand chats"]

    def plot(ax: Any, pair: str, n: int, told: Mapping[str, Any], style: Mapping[str, Any]) -> None:
        by = told["kl"][pair]
        at = [i + 0.12 * (n - 1) for i, name in enumerate(CALIBRATIONS) if name in by]
        kl, errors = np.array([by[name]["all"]["pictures"] for name in CALIBRATIONS if name in by]).T
        ax.errorbar(at, kl, errors, markersize=4, linewidth=1.2, capsize=2, **style)
        ax.set_ylim(0, 1.05 * ax.dataLim.ymax)  # of all that was drawn so far
        ax.set_xticks(range(len(CALIBRATIONS)), names)

    title = "Damage after pictures with every linear quantized (the vision tower is not trained)"
    _draw(record, path, title, ("Calibrated on", "KL after pictures, nats per token"), plot)


def _draw(record: Mapping[str, Any], path: Path, title: str, labels: tuple[str, str], plot: Any) -> None:
    """A figure with a panel per pair and a line per scale.

    Args:
        record: What was measured.
        path: The file.
        title: Above all panels.
        labels: Of the axes.
        plot: Called with axes, pair, number of the scale, what was measured at it, and the style of its line.
    """
    from layerbits.figures.style import (
        FONT,
        headline,
        key,
        label_outer,
        legend_below,
        line_style,
        panels,
        plain_axes,
        save_png,
    )

    scales = record["scales"]
    pairs = list(next(iter(scales.values()))["ranks"])
    figure, axes = panels(len(pairs), len(pairs), width=10, height=2.8)
    for ax, pair in zip(axes, pairs, strict=True):
        for n, told in enumerate(scales.values()):
            plot(ax, pair, n, told, line_style(n))
        ax.set_title(pair, fontsize=FONT, loc="left")
        plain_axes(ax, "both")
    label_outer(axes, len(pairs), *labels)
    legend_below(figure, [key(f"spread of image features: words × {s}", **line_style(n)) for n, s in enumerate(scales)])
    headline(figure, title)
    save_png(figure, path)


def main() -> None:
    """Measures each scale and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a trained Qwen2.5")
    parser.add_argument("--draw", type=Path, help="a folder: draw an existing record there, print its tables")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--samples", type=int, default=64, help="of each calibration")
    parser.add_argument("--held-out", type=int, default=32, help="pictures, and twice as many captions")
    parser.add_argument("--scales", default="1,4,16")
    parser.add_argument("--pairs", default=",".join(PAIRS))
    parser.add_argument("--ranges", action="store_true", help="compare what enters the linears alone: no pass, no KL")
    arguments = parser.parse_args()
    if arguments.draw:
        record = json.loads(arguments.out.read_text())
        draw_shares(record, arguments.draw / "images.png")
        draw_kl(record, arguments.draw / "images_kl.png")
        print(tables(record))
        return
    dtype = torch.float32 if arguments.device == "cpu" else torch.bfloat16
    model, reader = build(arguments.model, arguments.device, dtype)
    data = Data.of(reader, arguments.samples, arguments.held_out)
    info = ModelInfo("qwen2_5_vl", str(arguments.model.name), "none", type(model).__name__, str(dtype))
    loaded = LoadedModel(model, reader.processor.tokenizer, info, language_model_linears(model))
    made = {pair: candidate(pair) for pair in arguments.pairs.split(",")}
    tower = Tower(model, data.calibrations["pictures"])
    record = {
        "what": "Qwen2.5-VL with a trained Qwen2.5 and an untrained vision tower",
        "command": " ".join(sys.argv[1:]),
        "model": arguments.model.name,
        "dtype": str(dtype),
        "samples": arguments.samples,
        "held_out": {
            "picture_tokens": sum(b.loss_tokens for b in data.held_pictures),
            "text_tokens": sum(b.loss_tokens for b in data.held_text),
        },
        "provenance": provenance(ROOT),
        "scales": {},
    }
    for scale in (float(s) for s in arguments.scales.split(",")):
        start = time.perf_counter()
        told: dict[str, Any] = {"tower": tower.scale(scale)}
        if arguments.ranges:
            told |= beyond_captions(model, [n for n in loaded.linears if n != "lm_head"], data)
            record["scales"][f"{scale:g}"] = told
            arguments.out.write_text(json.dumps(record, indent=1) + "\n")
            print(scale, json.dumps(told, indent=1), flush=True)
            continue
        passes = {name: scored(loaded, made, rows, arguments.device) for name, rows in data.calibrations.items()}
        told["loss_per_token"] = {name: scores.loss_per_token for name, scores in passes.items()}
        told["image_share"] = {n: image_shares(passes[n], data.calibrations[n], list(made)) for n in WITH_PICTURES}
        told["clipped"] = {name: clipping(passes[name]) for name in WITH_PICTURES}
        told["ranks"] = {
            pair: {f"{a}_{b}": ranks(passes[a], passes[b], c) for a, b in COMPARED} for c, pair in enumerate(made)
        }
        told["seconds"] = {"passes": time.perf_counter() - start}
        with ExitStack() as stack:
            stack.enter_context(kept_features(model, (*data.calibrations["both"], *data.held_pictures)))
            held = {
                "pictures": UnquantizedLogits(model, data.held_pictures),
                "text": UnquantizedLogits(model, data.held_text),
            }
            told["perplexity"] = {name: base.perplexity for name, base in held.items()}
            told["kl"] = {}
            for c, (pair, one) in enumerate(made.items()):
                told["kl"][pair] = {}
                for name, scores in passes.items():
                    whole = scheme("all", one, scores, [True] * len(scores.groups), info)
                    part = scheme("half", one, scores, half(scores, c), info)
                    ranges = find_ranges(model, [whole], data.calibrations[name])
                    told["kl"][pair][name] = {}
                    for chosen in (whole, part):
                        with apply_scheme(model, chosen, ranges):
                            found = {where: base.compare(model)[0] for where, base in held.items()}
                        told["kl"][pair][name][chosen.name] = {w: [d.kl, d.kl_se] for w, d in found.items()}
        told["seconds"]["all"] = time.perf_counter() - start
        record["scales"][f"{scale:g}"] = told
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
        print(scale, json.dumps(told["kl"]), json.dumps(told["ranks"]), told["seconds"], flush=True)


if __name__ == "__main__":
    main()
