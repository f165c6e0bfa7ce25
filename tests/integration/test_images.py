"""Chats about pictures through a pass: equal to ModelOpt's own search on the same batches, whatever the memory mode."""

import json
import re
import shutil
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from layerbits.errors import UserError
from layerbits.inputs.calibration import Batch, Calibration
from layerbits.inputs.drawn import embedded
from layerbits.inputs.loading import load
from layerbits.inputs.models import ModelSpec, load_tokenizer, resolve, vision_linears
from layerbits.inputs.patches import most_patches
from layerbits.inputs.picture_rows import Reader, picture_batches
from layerbits.inputs.pictures import Pictured, read_pictures
from layerbits.inputs.processor import load_processor, missing_packages
from layerbits.inputs.rows import calibration_of, rows_of
from layerbits.results.result import VISION_KINDS
from layerbits.scoring import kl, onepass, quantizers, stock
from layerbits.scoring.features import kept_features, picture_inputs
from layerbits.scoring.refine import refine
from layerbits.scoring.steps import calibration_forward, loss_logits
from layerbits.scoring.taps import Taps
from tests.families import WITH_PICTURES, WITHOUT_PROCESSOR, build_with_processor, picture_batch

from .scoring_support import configs, job, loaded, reached_from_images

PAIR = "wfp8_afp8"
PICTURES = 8
TOLERANCE = 1e-6


@cache
def checkpoint(family, folder):
    build_with_processor(family, folder)
    return folder


@cache
def subject(family):
    """A family's tiny model, its tokenizer and its reader of pictures."""
    folder = checkpoint(family, Path(mkdtemp(prefix=f"pictures-{family}-")))
    resolved = resolve(ModelSpec(family, str(folder)))
    tokenizer = None if family in WITHOUT_PROCESSOR else load_tokenizer(resolved)
    reader = tokenizer and Reader.of(load_processor(resolved, tokenizer), resolved.config)
    return load(resolved, tokenizer, "cpu"), tokenizer, reader


def chats(family, batch_size=4, **changes):
    if family in WITHOUT_PROCESSOR:
        return (picture_batch(family),)
    reader = replace(subject(family)[2], **changes)
    return picture_batches(embedded(PICTURES), reader, batch_size, range(PICTURES))


def rows(batches):
    samples = 1 + max(int(s.sample.max()) for b in batches for s in b.segments)
    return Calibration(batches, batches, samples, ())


def differ(one, other):
    return np.abs(one.raw / other.raw - 1).max()


@pytest.mark.parametrize("family", WITH_PICTURES)
def test_a_pass_over_pictures_equals_stock(family, tmp_path):
    model, data = subject(family)[0], rows(chats(family))
    one = onepass.score(job(model, tmp_path / "one", configs(PAIR), data))
    reference = stock.score(job(model, tmp_path / "stock", configs(PAIR), data))
    assert differ(one, reference) <= TOLERANCE
    assert [g.key for g in one.groups] == [g.key for g in reference.groups]
    shares = one.sample_image_kl.sum(axis=0) / one.sample_kl.sum(axis=0)
    assert ((shares >= 0) & (shares < 1)).all()
    assert ((shares[:, 0] > 0) == reached_from_images(one.groups, data)).all()


@pytest.mark.parametrize("memory", ["lean"])
def test_recomputing_activations_changes_nothing(memory, tmp_path):
    model, data = subject("qwen3_vl")[0], rows(chats("qwen3_vl"))
    fast = onepass.score(job(model, tmp_path / "fast", configs(PAIR), data, memory="fast"))
    other = onepass.score(job(model, tmp_path / memory, configs(PAIR), data, memory=memory))
    assert differ(other, fast) <= TOLERANCE


def test_weights_in_host_memory_change_nothing(tmp_path):
    from layerbits.inputs.offload import offload

    data = rows(chats("qwen3_vl"))
    plain = onepass.score(job(subject("qwen3_vl")[0], tmp_path / "plain", configs(PAIR), data))
    resolved = resolve(ModelSpec("x", subject("qwen3_vl")[0].info.source))
    streamed = load(resolved, None, "cpu")
    offload(streamed.model, "cpu")
    other = onepass.score(job(streamed, tmp_path / "offload", configs(PAIR), data, memory="offload"))
    assert differ(other, plain) <= TOLERANCE


def test_fisher_and_kl_div_score_pictures(tmp_path):
    model, data = subject("qwen3_vl")[0], rows(chats("qwen3_vl"))
    fisher = onepass.score(job(model, tmp_path / "f", configs(PAIR), data, method="fisher", draws=2))
    assert np.isfinite(fisher.raw).all()
    assert fisher.sample_image_kl is not None
    measured = kl.score(job(model, tmp_path / "k", configs(PAIR), data, method="kl_div"))
    reference = stock.score(job(model, tmp_path / "s", configs(PAIR), data, method="kl_div"))
    assert differ(measured, reference) <= 2e-3  # stock subtracts logarithms in float32
    assert measured.sample_image_kl is None  # a KL divergence is that of words


def test_measured_groups_keep_the_share_of_image_positions(tmp_path):
    subject_job = job(subject("qwen2_5_vl")[0], tmp_path, configs(PAIR), rows(chats("qwen2_5_vl")))
    before = onepass.score(subject_job)
    after = refine(subject_job, before, 4)
    assert (after.measured_se > 0).sum() == 4
    shares = [s.sample_image_kl / s.sample_kl for s in (before, after)]
    assert shares[0].max() > 0
    np.testing.assert_allclose(shares[1], shares[0], rtol=1e-5)


def test_a_killed_pass_goes_on(tmp_path):
    model, data = subject("qwen2_5_vl")[0], rows(chats("qwen2_5_vl", batch_size=2))
    whole = onepass.score(job(model, tmp_path / "whole", configs(PAIR), data))
    onepass.score(job(model, tmp_path / "cut", configs(PAIR), data))
    (tmp_path / "cut" / "step-00002.npz").unlink()
    again = onepass.score(job(model, tmp_path / "cut", configs(PAIR), data))
    assert again.resumed
    assert (again.raw == whole.raw).all()
    assert again.image_ranges == whole.image_ranges
    assert (again.sample_image_kl == whole.sample_image_kl).all()


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", "internvl", "smolvlm"])
def test_image_features_are_made_once_per_row_and_change_nothing(family):
    model, batches = subject(family)[0].model, chats(family)
    tower = next(m for n, m in model.named_modules() if n.endswith(("visual", "vision_tower", "vision_model")))
    seen = []
    handle = tower.register_forward_hook(lambda *_: seen.append(1))

    def logits():
        with torch.no_grad():
            return [loss_logits(model, batch) for batch in batches]

    try:
        plain = logits()
        seen.clear()
        with kept_features(model, batches):
            kept = [logits(), logits()]
        assert len(seen) == sum(len(s.pictures) for b in batches for s in b.segments)
    finally:
        handle.remove()
    for again in kept:
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, again, strict=True))


def test_pixels_whose_features_are_kept_do_not_travel_again():
    model, batches = subject("qwen3_vl")[0].model, chats("qwen3_vl")
    segment = batches[0].segments[0]
    with kept_features(model, batches), torch.no_grad():
        first = picture_inputs(model, segment)["pixel_values"]
        loss_logits(model, batches[0])
        second = picture_inputs(model, segment)["pixel_values"]
    assert second.shape == first.shape
    assert first.untyped_storage().nbytes() == first.nbytes
    assert second.untyped_storage().nbytes() == second.element_size()


def test_the_loss_counts_the_words_of_the_answer_alone():
    _, tokenizer, reader = subject("qwen2_5_vl")
    (batch,) = picture_batches(embedded(1), reader, 1, [0])
    (segment,) = batch.segments
    words = tokenizer.decode(segment.input_ids[0][segment.loss_mask[0]])
    assert words == embedded(1)[0].texts[-1] + "<|end|>\n"
    assert not bool((segment.loss_mask & segment.image_mask).any())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"packing": "x"}, "packing=x"),
        ({"num_score_samples": 0}, "num_score_samples=0 must be between 1 and the 2"),
    ],
)
def test_rows_of_no_shape_are_refused(given, said):
    _, tokenizer, reader = subject("qwen2_5_vl")
    shape = {"packing": "packed", "seq_len": 32, "batch_size": 2, "num_score_samples": None}
    with pytest.raises(UserError, match=said):
        calibration_of(embedded(2), tokenizer, reader, **{**shape, **given})


def test_captions_and_pictures_take_turns():
    _, tokenizer, reader = subject("qwen2_5_vl")
    both = [row for picture in embedded(4) for row in (picture, "A dog runs over a field.")]
    batches = rows_of(both, tokenizer, reader, "packed", 32, 2)
    owners = [set(s.sample.flatten().tolist()) for b in batches for s in b.segments]
    assert set.union(*owners) == set(range(8))
    assert [bool(b.segments[0].pictures) for b in batches].count(True) == 2
    for batch in batches:
        for segment in batch.segments:
            assert all(bool(segment.pictures) == (n % 2 == 0) for n in segment.sample.unique().tolist())


def test_rows_of_one_length_share_a_segment_and_compute_the_same(tmp_path):
    model, _, reader = subject("qwen3_vl")
    twice = [embedded(1)[0]] * 2
    together = picture_batches(twice, reader, 2, range(2))
    apart = picture_batches(twice, replace(reader, apart=True), 2, range(2))
    assert (len(together[0].segments), len(apart[0].segments)) == (1, 2)
    one, other = (
        onepass.score(job(model, tmp_path / str(i), configs(PAIR), rows(b))) for i, b in enumerate((together, apart))
    )
    assert differ(one, other) <= TOLERANCE


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "gemma3", "llava", "internvl"])
def test_the_vision_tower_is_scored_in_the_same_pass(family, tmp_path):
    model = subject(family)[0]
    whole = replace(model, linears={**model.linears, **vision_linears(model.model)})
    data = rows(chats(family, apart=True))
    one = onepass.score(job(whole, tmp_path / "one", configs(PAIR), data))
    lean = onepass.score(job(whole, tmp_path / "lean", configs(PAIR), data, memory="lean"))
    reference = stock.score(job(whole, tmp_path / "stock", configs(PAIR), data))
    assert differ(one, reference) <= TOLERANCE
    assert differ(lean, one) <= TOLERANCE
    seen = [g for g in one.groups if g.kind in VISION_KINDS]
    assert {g.kind for g in seen} >= {"vision_qkv", "vision_out", "vision_fc1", "vision_fc2"}
    assert all(g.block is None for g in seen)
    at = [i for i, g in enumerate(one.groups) if g.kind in VISION_KINDS]
    assert np.allclose(one.sample_image_kl[:, at], one.sample_kl[:, at])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "gemma3", "llava", "internvl"])
def test_the_estimate_of_memory_counts_the_patches_of_a_tower(family):
    model = subject(family)[0].model
    names = list(vision_linears(model))
    batch = chats(family, apart=True)[0]
    seen = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _module, args, name=name: seen.__setitem__(name, args[0].numel() // args[0].shape[-1])
        )
        for name in names
    ]
    segment = max(batch.segments, key=lambda s: sum(row.inputs["pixel_values"].numel() for row in s.pictures))
    with torch.no_grad():
        loss_logits(model, Batch((segment,)))
    for hook in hooks:
        hook.remove()
    patches = most_patches(batch.segments, model.config)
    pixels = [row.inputs["pixel_values"] for row in segment.pictures]
    pictures = sum(len(p) for p in pixels if p.dim() > 2)
    assert seen[names[0]] <= patches <= seen[names[0]] + pictures  # a token for the class, or none
    taps, tokens = Taps(model, names, quantizers.UNQUANTIZED), segment.input_ids.numel()
    wanted = taps.footprints(tokens)[0].kept * patches
    assert wanted <= taps.footprints(tokens, patches)[0].kept * tokens < wanted + tokens  # rounded up


def test_a_block_of_the_tower_that_is_not_used_scores_nothing(tmp_path):
    model = subject("llava")[0]
    whole = replace(model, linears={**model.linears, **vision_linears(model.model)})
    config = model.model.config
    was, config.vision_feature_layer = config.vision_feature_layer, -2
    try:
        scores = onepass.score(job(whole, tmp_path, configs(PAIR), rows(chats("llava", apart=True))))
    finally:
        config.vision_feature_layer = was
    unused = [i for i, g in enumerate(scores.groups) if g.key.startswith("V00.")]
    assert unused
    assert (scores.raw[unused] == 0).all()
    assert (scores.raw[[i for i in range(len(scores.groups)) if i not in unused]] > 0).all()


def test_ranges_tell_image_positions_from_words(tmp_path):
    model, batches = subject("qwen2_5_vl")[0], chats("qwen2_5_vl")
    scores = onepass.score(job(model, tmp_path, configs(PAIR), rows(batches)))
    seen = {}

    def see(name, segment):
        def hook(_module, args):
            largest = args[0].abs().amax(-1).flatten()
            images = segment[0].image_tokens.flatten()
            words, pictures = seen.setdefault(name, ([], []))
            words.append(largest[~images])
            pictures.append(largest[images])

        return hook

    now = [None]
    handles = [
        model.model.get_submodule(r.module).register_forward_pre_hook(see(r.module, now)) for r in scores.image_ranges
    ]
    with torch.no_grad():
        for batch in batches:
            for segment in batch.segments:
                now[0] = segment
                calibration_forward(model.model, Batch((segment,)), False)
    for handle in handles:
        handle.remove()
    assert len(scores.image_ranges) == 14
    for found in scores.image_ranges:
        words, pictures = (torch.cat(part) for part in seen[found.module])
        assert found.words == pytest.approx(float(words.max()))
        assert found.images == pytest.approx(float(pictures.max()))
        assert found.clipped == pytest.approx(float((pictures > words.max()).float().mean()))


def test_a_text_model_has_no_pictures(tmp_path):
    from transformers import LlamaConfig

    resolved = resolve(ModelSpec("x", subject("llava")[0].info.source))
    text = replace(resolved, config=LlamaConfig())
    with pytest.raises(UserError, match="reads text alone"):
        load_processor(text, None)


def test_a_folder_without_a_processor_is_told(tmp_path):
    build_with_processor("mistral3", tmp_path)
    with pytest.raises(UserError, match="has no processor"):
        load_processor(resolve(ModelSpec("x", str(tmp_path))), None)


PROCESSORS = {
    "smolvlm": ("SmolVLMProcessor", "SmolVLMImageProcessor"),
    "idefics3": ("Idefics3Processor", "Idefics3ImageProcessor"),
    "mistral3": ("PixtralProcessor", "PixtralImageProcessor"),
}


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is there")
@pytest.mark.parametrize("family", PROCESSORS)
def test_a_processor_that_needs_a_package_names_it(family, tmp_path):
    build_with_processor("mistral3" if family == "mistral3" else "smolvlm", tmp_path)
    for file in checkpoint("qwen2_5_vl", Path(mkdtemp())).glob("*token*"):
        shutil.copy(file, tmp_path)
    processor, images = PROCESSORS[family]
    says = {"image_processor_type": images, "processor_class": processor, "patch_size": 14}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(says))
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": processor}))
    resolved = resolve(ModelSpec("tiny", str(tmp_path)))
    words = r"^the processor of .* needs torchvision, not installed here; add it with pip$"
    with pytest.raises(UserError, match=words):
        load_processor(resolved, load_tokenizer(resolved))


@pytest.mark.parametrize(
    ("error", "packages"),
    [
        (ImportError("Package `num2words` is required to run SmolVLM processor."), ["num2words"]),
        (
            ImportError("\nA requires the Torchvision library but it was not found in your environment. Check …\n"
                        "\nA requires the PIL library but it was not found in your environment."),
            ["torchvision", "pil"],
        ),
        (ImportError("This modeling file requires the following packages that were not found in your environment: "
                     "timm, einops. Run `pip install timm einops`"), ["timm", "einops"]),
        (ModuleNotFoundError("No module named 'torchvision.transforms'"), ["torchvision"]),
        (ValueError("size must contain 'shortest_edge'"), []),
    ],
)  # fmt: skip
def test_packages_that_are_missing_are_read_from_an_error(error, packages):
    assert missing_packages(error) == packages


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}",
         r"has 0 places .* for 1 pictures"),
        ("{% for m in messages %}{{ m.role }", r"fails on it \(.*\); use the chat template that came with"),
    ],
)  # fmt: skip
def test_a_template_without_a_place_for_the_picture_is_told(template, words):
    _, _, reader = subject("qwen2_5_vl")
    own, reader.processor.chat_template = reader.processor.chat_template, template
    try:
        with pytest.raises(UserError, match=f"embedded picture 1: the chat template {words}"):
            picture_batches(embedded(1), reader, 1, [0])
    finally:
        reader.processor.chat_template = own


def test_a_model_without_a_template_gets_pictures_and_answers_and_is_warned_of():
    _, tokenizer, reader = subject("llava")
    shape = (tokenizer, reader, "packed", 32, 1, None)
    before = calibration_of(embedded(1), *shape)
    own, reader.processor.chat_template = reader.processor.chat_template, None
    bare = replace(reader, known={})
    of_tokenizer, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        rows = calibration_of(embedded(1), tokenizer, bare, *shape[2:])
    finally:
        reader.processor.chat_template, tokenizer.chat_template = own, of_tokenizer
    assert not any("no chat template" in warning for warning in before.warnings)
    assert any("no chat template" in warning for warning in rows.warnings)
    (segment,) = rows.score[0].segments
    assert tokenizer.decode(segment.input_ids[0][segment.loss_mask[0]]) == embedded(1)[0].texts[-1]


@pytest.mark.parametrize(
    ("family", "mark"), [("qwen2_5_vl", "<|image_pad|>"), ("gemma3", "<boi>"), ("gemma3", "<image_soft_token>")]
)
def test_words_with_the_mark_of_a_picture_are_told(family, mark):
    chat = Pictured.of_caption(embedded(1)[0].pictures[0], f"before {mark} after")
    with pytest.raises(UserError, match=f"its words contain {re.escape(mark)}, the mark"):
        picture_batches([chat], subject(family)[2], 1, [0])


def test_a_processor_may_name_the_token_of_the_text_as_that_of_images():
    """As Gemma 3's does in transformers 5.17."""
    model, tokenizer, reader = subject("gemma3")
    later = SimpleNamespace(
        tokenizer=tokenizer, image_token="<boi>", boi_token="<boi>", image_token_id=3, image_token_ids=[5]
    )
    assert Reader.of(later, model.model.config).image_token == reader.image_token == 5


def test_a_row_beyond_the_positions_is_told():
    _, _, reader = subject("qwen2_5_vl")
    for positions, change in ((50, "shorten its words"), (142, "lower dataset.max_pixels")):
        with pytest.raises(UserError, match=f"more than the {positions} positions of the model; {change}"):
            picture_batches(embedded(1), replace(reader, positions=positions, known={}), 1, [0])


@pytest.mark.parametrize(
    "turns",
    [
        [("user", "image", "What is it?"), ("assistant", " ")],
        [("user", "Draw it."), ("assistant", "image")],
        [("user", "image", "What is it?"), ("assistant", "A field."), ("user", "image", "And this?")],
    ],
)
def test_marks_of_a_template_are_no_words_after_a_picture(turns):
    picture = embedded(1)[0].pictures[0]
    parts = [[{"type": "image"} if p == "image" else {"type": "text", "text": p} for p in said] for _, *said in turns]
    messages = tuple({"role": role, "content": part} for (role, *_), part in zip(turns, parts, strict=True))
    shown = sum(said.count("image") for _, *said in turns)
    chat = Pictured(messages, (picture,) * shown, "list row 1")
    with pytest.raises(UserError, match="list row 1: there are no words after the picture"):
        picture_batches([chat], subject("qwen2_5_vl")[2], 1, [0])


def test_a_picture_that_a_processor_cannot_take_is_told_with_its_file(tmp_path):
    Image.new("RGB", (2000, 5)).save(tmp_path / "long.png")
    pair = {"image": "long.png", "text": "A line."}
    content = [{"type": "image", "image": "long.png"}, {"type": "text", "text": "What is it?"}]
    chat = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A line."}]}
    (tmp_path / "list.jsonl").write_text(f"{json.dumps(pair)}\n{json.dumps(chat)}\n")
    for number, row in enumerate(read_pictures(tmp_path / "list.jsonl"), start=1):
        with pytest.raises(UserError, match=r"the processor cannot take it \(.*aspect ratio.*\); leave it out") as said:
            picture_batches([row], subject("qwen2_5_vl")[2], 1, [0])
        assert f"{tmp_path}/long.png" in str(said.value)
        assert f"{tmp_path}/list.jsonl row {number}" in str(said.value)


def test_another_models_processor_is_told():
    model, _, reader = subject("qwen2_5_vl")
    config = model.model.config
    was, config.image_token_id = config.image_token_id, 9
    try:
        with pytest.raises(UserError, match="not of one model"):
            Reader.of(reader.processor, config)
    finally:
        config.image_token_id = was


def test_pixels_are_kept_within_limits():
    _, _, reader = subject("qwen2_5_vl")
    picture = embedded(1)[0].pictures[0].pixels()
    small = replace(reader, max_pixels=10_000).sized(picture)
    large = replace(reader, min_pixels=1_000_000).sized(picture)
    assert small.width * small.height <= 10_000
    assert large.width * large.height >= 1_000_000
    assert small.width / small.height == pytest.approx(picture.width / picture.height, rel=0.02)


def test_a_model_as_it_was_loaded_reads_text_too(tmp_path):
    from .scoring_support import usual_rows

    model = subject("qwen2_5_vl")[0]
    scores = onepass.score(job(loaded(model.model), tmp_path, configs(PAIR), usual_rows()))
    assert scores.sample_image_kl is None
    assert scores.image_ranges == ()
