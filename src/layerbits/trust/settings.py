"""What is asked of validations: ``configs/validate.yaml``, read and checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from layerbits.candidates.kv_cache import kv_formats
from layerbits.errors import UserError
from layerbits.inputs.row_shape import check_held_out
from layerbits.plain import Composed, flag
from layerbits.schemes.settings import listed, whole
from layerbits.scoring.settings import check_device, check_dtype

RANKERS = ("gradient", "gradient_token", "fisher", "kl_div", "weight_mse", "output_mse")


@dataclass(frozen=True)
class ValidateSettings:
    """How to validate.

    Attributes:
        rows: Held-out rows, a multiple of ``batch_size`` or fewer.
        disable_one: Whether to measure leaving one group unquantized among quantized ones too.
        rankers: Further metrics to rank on the rows of the run, of :data:`RANKERS`.
        device: ``auto``, ``cpu`` or ``cuda``.
        kv_cache: Formats of the KV cache to measure block by block; ``None`` = all that the run scored.
        dtype: What to measure in, one of :data:`layerbits.scoring.settings.DTYPES`.
    """

    rows: int
    batch_size: int
    disable_one: bool
    rankers: tuple[str, ...]
    device: str
    kv_cache: tuple[str, ...] | None
    dtype: str = "auto"

    @classmethod
    def from_config(cls, config: Composed) -> ValidateSettings:
        """Reads a resolved configuration.

        Raises:
            UserError: A value is not one of its choices.
        """
        rows, batch_size = (whole(key, config[key]) for key in ("rows", "batch_size"))
        check_held_out(rows, batch_size)
        return cls(
            rows=rows,
            batch_size=batch_size,
            disable_one=flag("disable_one", config["disable_one"]),
            rankers=chosen_rankers(listed(config["rankers"])),
            device=check_device(config["device"]),
            kv_cache=None if config["kv_cache"] == "auto" else kv_formats(config["kv_cache"]),
            dtype=check_dtype(str(config["dtype"])),
        )


def chosen_rankers(wanted: Sequence[str]) -> tuple[str, ...]:
    """Names of rankers from what a user wrote: ``all``, ``none``, or a list.

    Raises:
        UserError: There is no such ranker.
    """
    if list(wanted) == ["all"]:
        return RANKERS
    for name in wanted:
        if name not in RANKERS:
            raise UserError(f"{name} is no ranker; use {', '.join(RANKERS)}, all or none")
    return tuple(dict.fromkeys(wanted))
