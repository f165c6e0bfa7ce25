"""Tiny checkpoints on disk and the ways to spoil them; needs torch, no ModelOpt and no MLflow."""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

VOCABULARY = 384
WORDS = ("a", "cat", "sits", "on", "the", "red", "mat", "and", "looks", "at", "you")
CAPTIONS = tuple(f"{a} cat {b} on the {c} mat" for a in ("a", "the") for b in ("sits", "looks") for c in ("red", "cat"))


def save_tokenizer(folder, words=WORDS, first=1, **settings):
    """A tokenizer of whole words, with ids from ``first`` on; ``<unk>`` is 0."""
    vocabulary = {"<unk>": 0, **{word: first + i for i, word in enumerate(words)}}
    vocabulary["<eos>"] = max(vocabulary.values()) + 1
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(folder / "tokenizer.json"))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "unk_token": "<unk>", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))


def tensors(folder, change):
    """Rewrites the weights of a folder by what ``change`` does to its dictionary of tensors."""
    file = folder / "model.safetensors"
    held = load_file(file)
    change(held)
    save_file(held, file, metadata={"format": "pt"})


def config(folder, *gone, **changes):
    """Changes ``config.json``."""
    file = folder / "config.json"
    said = {k: v for k, v in json.loads(file.read_text()).items() if k not in gone}
    file.write_text(json.dumps({**said, **changes}))


def write(name, text):
    """A spoiler that writes a file."""

    def spoil(folder):
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return spoil


def only(*names):
    """A spoiler that leaves only some files, empty ones where there are none."""

    def spoil(folder):
        for file in folder.iterdir():
            if file.name not in names:
                file.unlink()
        for name in names:
            (folder / name).touch()

    return spoil


def sharded(folder):
    """The weights in two files with an index."""
    held = load_file(folder / "model.safetensors")
    names = sorted(held)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: held[name] for name in part}, folder / file, metadata={"format": "pt"})
    where = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "model.safetensors").unlink()


def quantized_to_fp8(folder):
    """The linears in FP8 with scales of 128 × 128 blocks, as fine-grained FP8 checkpoints have them.

    Returns:
        Name → the numbers that are stored, in bfloat16.
    """
    numbers = {}

    def change(held):
        for name in [n for n in held if "proj" in n]:
            rows, columns = held[name].shape
            blocks = held[name].float().reshape(rows // 128, 128, columns // 128, 128)
            scale = blocks.abs().amax((1, 3), keepdim=True) / 448
            stored = (blocks / scale).to(torch.float8_e4m3fn)
            numbers[name] = (stored.float() * scale).reshape(rows, columns).bfloat16()
            held[name] = stored.reshape(rows, columns)
            held[f"{name}_scale_inv"] = scale[:, 0, :, 0].contiguous()

    tensors(folder, change)
    said = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}
    config(folder, quantization_config=said)
    return numbers


def copied(source, target):
    """A folder of its own to spoil."""
    shutil.copytree(source, target)
    return target
