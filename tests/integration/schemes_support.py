"""A scheme on a tiny model, its calibration and its held-out rows; needs torch and ModelOpt, but no MLflow."""

import torch

from layerbits.inputs.calibration import Batch
from layerbits.probing.measured import Rows
from layerbits.probing.probe import probe
from layerbits.results.assignment import Assignment
from layerbits.results.result import CalibrationInfo, Group, ModelInfo
from layerbits.schemes import Scheme

from .scoring_support import loaded, random_segment

INFO = ModelInfo("tiny", "tiny", "r0", "LlamaForCausalLM", "float32")
DATA = CalibrationInfo("everyday", "small", "d1", "packed", 20, 2, 8, 8, 2, 2, 76, (38, 38), 0.0)
CALIBRATION = (Batch((random_segment(2, 20, seed=1),)), Batch((random_segment(2, 20, seed=2, first=8),)))
HELD_OUT = (Batch((random_segment(3, 20, seed=7),)),)
KINDS = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


def scheme_of(model, name="mine", **assigned):
    """A scheme from group kind → candidate; a kind of one block alone is written ``down1``."""
    groups, names = [], []
    linears = loaded(model).linears
    for block in range(2):
        for kind, parts in KINDS.items():
            modules = tuple(n for n in linears if f".{block}." in n and n.rsplit(".", 1)[1] in parts)
            groups.append(Group(f"B{block:02d}.{kind}", block, kind, modules, 1000))
            made = assigned.get(kind, assigned.get(f"{kind}{block}"))
            names.append(made.info.name if made else None)
    used = {made.info.name: made.info for made in assigned.values()}
    candidates, how = tuple(used.values()), {"method": "budget"}
    return Scheme(name, ("run",), INFO, DATA, tuple(groups), candidates, Assignment(names), 9.0, None, 0.01, 1e-6, how)


def logits(model, batches=HELD_OUT):
    with torch.no_grad():
        return torch.cat(
            [model(s.input_ids, attention_mask=s.attention_mask).logits for b in batches for s in b.segments]
        )


def probed(model, schemes, info=INFO, dtype="auto"):
    return probe(model, info, schemes, CALIBRATION, HELD_OUT, Rows("everyday", "packed", 20, 3, 0), dtype=dtype)
