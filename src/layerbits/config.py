"""The composed Hydra configuration as typed settings, checked before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from layerbits.candidates.formats import QuantPair
from layerbits.candidates.granularity import Overlay
from layerbits.candidates.kv_cache import kv_formats
from layerbits.errors import UserError
from layerbits.inputs.datasets import WITH_PICTURES
from layerbits.inputs.model_spec import ModelSpec
from layerbits.inputs.row_shape import check_rows
from layerbits.paths import named_folder
from layerbits.plain import Composed, flag, unset
from layerbits.results.naming import run_name
from layerbits.results.result import COST_MODELS
from layerbits.schemes.budgets import check_bits, tower_budget
from layerbits.scoring.settings import check_device
from layerbits.tracking.settings import TrackingSpec

METHODS = ("gradient", "fisher", "kl_div")
ENGINES = ("onepass", "stock")
LAYOUTS = ("tmp", "publish")
MEMORY = ("auto", "fast", "lean", "offload")
FP4 = ("mxfp4", "nvfp4")


@dataclass(frozen=True)
class DatasetSpec:
    """Which captions or pictures: the ``dataset`` group.

    Attributes:
        min_pixels: Smaller pictures are enlarged to that. max_pixels: Larger ones are reduced.
        share: Share of pictures in ``mixed``.
    """

    name: str
    size: str
    path: str | None
    packing: str
    min_pixels: int | None = None
    max_pixels: int | None = None
    share: float | None = None

    def pictured(self) -> list[int | float | None]:
        """What rows with pictures depend on besides; empty for captions alone."""
        values = [self.min_pixels, self.max_pixels, self.share]
        return [] if values == [None] * 3 else values


@dataclass(frozen=True)
class AutoQuantSpec:
    """How to score: the ``autoquant`` group.

    Attributes:
        vision_bits: Budget of a scored vision tower alone, beside which ``effective_bits`` counts over all other
            groups; ``None`` = they share ``effective_bits``.
        num_score_samples: Captions to score on, a prefix of the calibration captions; ``None`` = all.
        draws: Passes of ``method=fisher``, each with predicted tokens drawn anew.
        cost_model: What ``effective_bits`` counts: ``weight`` = all weights alike, ``active_moe`` = routed experts by
            the share of them that a token uses.
        active_expert_ratio: That share; ``None`` = from the model's config.
        kv_cache: Formats of the KV cache to score beside the candidates.
        memory: ``fast`` keeps activations and quantized weights, ``lean`` recomputes them, ``offload`` keeps
            the weights in host memory besides, ``auto`` picks by estimate.
        checkpoint: Folder for the search checkpoint; ``None`` = one per set of parameters in the cache.
        refine: Groups per candidate that are measured after the pass; ``auto`` = those whose rank decides.
    """

    method: str
    engine: str
    effective_bits: float
    num_score_samples: int | None
    draws: int
    batch_size: int
    seq_len: int
    memory: str
    checkpoint: str | None
    cost_model: str = "weight"
    active_expert_ratio: float | None = None
    kv_cache: tuple[str, ...] = ()
    refine: int | str = 0
    vision_bits: float | None = None


@dataclass(frozen=True)
class Settings:
    """Everything that one sensitivity run depends on; ``composed`` is the configuration as written."""

    model: ModelSpec
    quant_pair: QuantPair
    overlay: Overlay
    dataset: DatasetSpec
    autoquant: AutoQuantSpec
    tracking: TrackingSpec
    fp4: str
    experimental: bool
    strict: bool
    seed: int
    device: str
    recipe: str | None
    recipe_overrides: tuple[str, ...]
    output_layout: str
    output_root: Path
    report_only: str | None
    composed: Composed

    @property
    def run_name(self) -> str:
        """Name of the run: pair, dataset size, granularity and model."""
        return run_name(self.model.name, self.quant_pair.name, self.overlay.name, self.dataset.size)

    @classmethod
    def from_config(cls, config: Composed) -> Settings:
        """Reads a resolved configuration.

        Raises:
            UserError: A value is not one of its choices or out of range.
        """
        model = ModelSpec.from_mapping(config["model"])
        autoquant = dict(config["autoquant"])
        samples = autoquant["num_score_samples"]
        samples = None if samples in (None, "all") else _int("autoquant.num_score_samples", samples)
        autoquant["num_score_samples"] = samples
        autoquant.setdefault("draws", 4)  # a record of an earlier version has none
        for key in ("draws", "batch_size", "seq_len"):
            autoquant[key] = _int(f"autoquant.{key}", autoquant[key])
        if autoquant["draws"] < 1:
            raise UserError(f"autoquant.draws={autoquant['draws']} draws nothing; use 1 or more")
        if autoquant["method"] == "fisher" and autoquant["engine"] == "stock":
            raise UserError("ModelOpt has no method=fisher; use autoquant.engine=onepass, or method=gradient")
        check_rows(config["dataset"]["packing"], autoquant["seq_len"], autoquant["batch_size"])
        bits = _float("autoquant.effective_bits", autoquant["effective_bits"])
        autoquant["effective_bits"] = check_bits("autoquant.effective_bits", bits)
        ratio = autoquant.get("active_expert_ratio")
        if ratio is not None:
            autoquant["active_expert_ratio"] = _float("autoquant.active_expert_ratio", ratio)
            if not 0 < autoquant["active_expert_ratio"] <= 1:
                raise UserError(
                    f"autoquant.active_expert_ratio={ratio} is not in (0, 1]; give the share of the experts that a "
                    "token uses, or null to read it from the model's config"
                )
        autoquant["kv_cache"] = _kv_formats(autoquant)
        autoquant["refine"] = _refine(config)
        autoquant["vision_bits"] = _vision_bits(config)
        _choice("autoquant.cost_model", autoquant.get("cost_model", "weight"), COST_MODELS)
        _choice("autoquant.method", autoquant["method"], METHODS)
        _choice("autoquant.engine", autoquant["engine"], ENGINES)
        _choice("autoquant.memory", autoquant["memory"], MEMORY)
        _choice("output_layout", config["output_layout"], LAYOUTS)
        check_device(config["device"])
        _choice("fp4", config["fp4"], FP4)
        if model.vision:
            _check_vision(config["dataset"]["name"], autoquant)
        dataset = {**config["dataset"]} | {key: str(config["dataset"][key]) for key in ("name", "size")}
        for key, number in (("min_pixels", _int), ("max_pixels", _int), ("share", _float)):
            if dataset.get(key) is not None:
                dataset[key] = number(f"dataset.{key}", dataset[key])
        return cls(
            model=model,
            quant_pair=QuantPair.from_mapping(config["quant_pair"]),
            overlay=Overlay.from_mapping(config["quant_granularity"]),
            dataset=DatasetSpec(**dataset),
            autoquant=AutoQuantSpec(**autoquant),
            tracking=TrackingSpec.from_config(config),
            fp4=config["fp4"],
            experimental=flag("experimental", config["experimental"]),
            strict=flag("strict", config["strict"]),
            seed=_seed(config["seed"]),
            device=config["device"],
            recipe=_named(config, "recipe"),
            recipe_overrides=tuple((_named(config, "recipe_overrides") or "").split()),
            output_layout=config["output_layout"],
            output_root=named_folder("output_root", config["output_root"]),
            report_only=_named(config, "report_only"),
            composed=config,
        )


def _named(config: Composed, key: str) -> str | None:
    value = config.get(key)  # a record of an earlier version has none
    return None if unset(value) else str(value)


def _seed(value: object) -> int:
    seed = _int("seed", value)
    if not -(2**63) <= seed < 2**64:
        raise UserError(f"seed={value} does not fit into 64 bits; give a smaller number")
    return seed


def _kv_formats(autoquant: Composed) -> tuple[str, ...]:
    names = kv_formats(autoquant.get("kv_cache"), "autoquant.kv_cache")
    if not names:
        return ()
    if autoquant["method"] != "gradient" or autoquant["engine"] != "onepass":
        raise UserError(
            "autoquant.kv_cache is scored by method=gradient and engine=onepass; use those, or kv_cache=none"
        )
    return names


def _refine(config: Composed) -> int | str:
    autoquant = config["autoquant"]
    value = autoquant.get("refine")  # a record of an earlier version has none
    if value in (None, "", "none", 0, "0"):
        return 0
    if value != "auto" and (not str(value).isdecimal()):
        raise UserError(f"autoquant.refine={value} is not known; use none, a number of groups, or auto")
    if autoquant["method"] == "kl_div":
        raise UserError("method=kl_div measures every group already; use autoquant.refine=none")
    if autoquant["engine"] == "stock":
        raise UserError("ModelOpt's own search measures no group; use autoquant.engine=onepass, or refine=none")
    if _named(config, "recipe") is not None:
        raise UserError("a recipe holds groups quantized while others are scored; use autoquant.refine=none")
    return "auto" if value == "auto" else int(value)


def _vision_bits(config: Composed) -> float | None:
    """The budget of the vision tower alone; a record of an earlier version has none."""
    bits = tower_budget(config["autoquant"].get("vision_bits"), "autoquant.vision_bits")
    if bits is None:
        return None
    if not config["model"].get("vision"):
        raise UserError(
            f"autoquant.vision_bits={bits:g} is the budget of a vision tower, which model.vision=true scores; set that "
            "too, or use vision_bits=none"
        )
    if _named(config, "recipe") is not None:
        raise UserError("a recipe has one budget, which counts the vision tower too; use autoquant.vision_bits=none")
    return bits


def _check_vision(dataset: str, autoquant: Composed) -> None:
    if dataset not in WITH_PICTURES:
        raise UserError(
            "model.vision=true scores a vision tower, which needs pictures; use dataset=image_text or mixed"
        )
    if autoquant["method"] == "fisher":
        raise UserError("method=fisher has no meaning for the patches of a vision tower; use autoquant.method=gradient")
    if autoquant["refine"] or (autoquant["method"] == "kl_div" and autoquant["engine"] != "stock"):
        raise UserError(
            "refine and method=kl_div run a language model from block to block, a vision tower has blocks of its own; "
            "use method=gradient and refine=none with model.vision=true"
        )


def _choice(key: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{key}={value} is not known; use one of {', '.join(choices)}")


def _int(key: str, value: object) -> int:
    try:
        return int(str(value))
    except ValueError:
        raise UserError(f"{key}={value} is not a whole number; give one") from None


def _float(key: str, value: object) -> float:
    try:
        return float(str(value))
    except ValueError:
        raise UserError(f"{key}={value} is not a number; give one") from None
