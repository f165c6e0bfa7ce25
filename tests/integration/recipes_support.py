"""Recipes on tiny models, and ModelOpt's own search with the same recipe; needs torch and ModelOpt, but no MLflow."""

import copy
import warnings
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
import yaml

from layerbits.candidates import backends
from layerbits.candidates.known import candidates_of
from layerbits.inputs.experts import named_experts
from layerbits.recipes.recipe import load_recipe
from layerbits.recipes.space import lay_out
from layerbits.scoring import kl, onepass
from layerbits.scoring.groups import recipe_hparams
from layerbits.scoring.job import ScoringJob
from layerbits.scoring.steps import calibration_forward, loss_backward, loss_logits

from .scoring_support import loaded, usual_rows


def made_recipe(folder, **changes):
    """A recipe of one's own as a file; ``changes`` are further keys of its auto_quantize section."""
    formats = ["configs/ptq/presets/model/fp8", "configs/ptq/presets/model/int8"]
    quantize = changes.pop("quantize", None)
    data = {
        "imports": {"a": formats[0], "b": formats[1], "none": "configs/ptq/units/base_disable_all"},
        "metadata": {"recipe_type": "auto_quantize", "description": "Made for a test."},
        **({} if quantize is None else {"quantize": quantize}),
        "auto_quantize": {"constraints": {"effective_bits": 10.0}, **changes},
    }
    path = Path(folder) / "mine.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return load_recipe(str(path))


def on_cpu(config):
    """A ModelOpt configuration whose FP4 quantizers are computed by our reference."""
    backends.register_backends()
    return backends.with_reference_backend(config)


def raw_scores(recipe, model, folder, rows=None):
    """The space of a recipe on a model and its raw scores by one pass, ``[searched slots, C]``."""
    subject = loaded(model)
    space = lay_out(recipe, model, subject.linears)
    names = [c.info.name for c in space.candidates]
    configs = {c.info.name: on_cpu(c.search_config()) for c in space.candidates}
    scored = sorted({c for slot in space.searched for c in slot.choices})
    job = ScoringJob(
        subject,
        space.scored,
        {names[c]: configs[names[c]] for c in scored},
        rows or usual_rows(),
        recipe.method,
        12.0,
        Path(folder),
        "fingerprint",
        fixed={module: configs[names[c]] for module, c in space.held.items()},
        fixed_kv_cache=recipe.held_kv,
    )
    found = (kl if recipe.method == "kl_div" else onepass).score(job)
    raw = np.full((len(space.searched), len(names)), np.nan)
    row_of = {slot.modules: s for s, slot in enumerate(space.searched)}
    for g, group in enumerate(found.groups):
        raw[row_of[group.modules], scored] = found.raw[g]
    return space, raw


def stock_search(recipe, model, rows=None):
    """``mtq.auto_quantize`` with a recipe: its state and the unclamped score of each group and format."""
    import modelopt.torch.quantization as mtq

    rows = rows or usual_rows()
    arguments = copy.deepcopy(recipe.stock_arguments())
    head = model.get_output_embeddings()
    if named_experts(model):
        model.set_experts_implementation("eager")  # what ModelOpt's wrapper of fused experts can intercept
    for formats in (
        arguments["quantization_formats"] or [],
        *(s["quantization_formats"] for s in arguments.get("module_search_spaces", [])),
    ):
        formats[:] = [on_cpu(config) for config in formats]
    if "fixed_quantization_config" in arguments:
        arguments["fixed_quantization_config"] = on_cpu(arguments["fixed_quantization_config"])

    def forward_step(m, pair):  # ModelOpt scores kl_div in inference mode, and calibrates outside
        if torch.is_inference_mode_enabled():
            return loss_logits(m, pair[1])
        return calibration_forward(m, pair[0], need_logits=head is not None)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, state = mtq.auto_quantize(
            model,
            **arguments,
            data_loader=list(zip_longest(rows.calib, rows.score)),
            forward_step=forward_step,
            forward_backward_step=None if recipe.method == "kl_div" else lambda m, pair: loss_backward(m, pair[1]),
            num_calib_steps=len(rows.calib),
            num_score_steps=len(rows.score),
        )
    scores = {
        name: {str(r): h.get_score(r) for r in h.choices if r.num_bits < 16}
        for name, h in recipe_hparams(model)
        if h.is_configurable
    }
    return state, scores


__all__ = ["candidates_of", "made_recipe", "on_cpu", "raw_scores", "stock_search", "torch"]
