"""What of a result comes from pictures and what from words, as plain typed data (no torch)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from layerbits.plain import JsonMapping, finite

if TYPE_CHECKING:
    from layerbits.results.result import Group

FloatArray = npt.NDArray[np.float64]
LEVEL = 0.9
LEAST = 8
"""Captions from which on there are intervals."""
_DRAWS, _SEED = 2000, 0


@dataclass(frozen=True)
class ImageRange:
    """The input of a module that has a static activation range.

    Attributes:
        group: Key of its group.
        block: Its block.
        module: Its name.
        words: Largest magnitude at words.
        images: Largest magnitude at image positions.
        clipped: Share of the image tokens that have a larger magnitude than any word: what a range that was found on
            these words alone would clip.
    """

    group: str
    block: int | None
    module: str
    words: float
    images: float
    clipped: float


@dataclass(frozen=True)
class Modality:
    """The part of image positions.

    Attributes:
        image_tokens: Image tokens in the scored rows. tokens: All of them.
        share: ``[G]`` of the predicted KL; NaN where there is none, or where the score is not by token (``kl_div``).
        low, high: ``[G]`` ends of its 90% interval over the captions; NaN below eight captions.
        ranges: Inputs with a static range.
    """

    image_tokens: int
    tokens: int
    share: FloatArray
    low: FloatArray
    high: FloatArray
    ranges: tuple[ImageRange, ...] = ()

    def row(self, group: int) -> dict[str, float]:
        """Share of image positions in one predicted KL, and the ends of its interval."""
        names = {"image_share": self.share, "image_low": self.low, "image_high": self.high}
        return {name: float(values[group]) for name, values in names.items()}

    def by_block(self, groups: Sequence[Group], values: FloatArray) -> dict[int, tuple[float, float]]:
        """Block → what image positions and what words add of some values, summed over its groups.

        Args:
            groups: The groups.
            values: ``[G]``.
        """
        blocks: dict[int, tuple[float, float]] = {}
        for group, value, share in zip(groups, values.tolist(), self.share.tolist(), strict=True):
            if group.block is not None and np.isfinite(value * share):
                images, words = blocks.get(group.block, (0.0, 0.0))
                blocks[group.block] = images + value * share, words + value * (1 - share)
        return blocks

    def whole(self, values: FloatArray) -> float:
        """Share of image positions in the sum of some values ``[G]``; NaN where not known."""
        shares = self.share
        known = np.isfinite(values) & np.isfinite(shares)
        total = float(values[known].sum())
        return float((values[known] * shares[known]).sum()) / total if total > 0 else float("nan")

    @property
    def clipped(self) -> float:
        """The largest share of image tokens that a range of words would clip; NaN without a static range."""
        return max((r.clipped for r in self.ranges), default=float("nan"))

    def to_json(self) -> dict[str, object]:
        """As JSON data."""
        return {
            "image_tokens": self.image_tokens,
            "tokens": self.tokens,
            **{name: finite(getattr(self, name).tolist()) for name in ("share", "low", "high")},
            "ranges": [asdict(r) for r in self.ranges],
        }

    @classmethod
    def from_json(cls, data: JsonMapping | None) -> Modality | None:
        """Reads :meth:`to_json`."""
        if data is None:
            return None
        arrays = {n: np.array(data[n], dtype=np.float64) for n in ("share", "low", "high")}
        ranges = tuple(ImageRange(**r) for r in data["ranges"])
        return cls(data["image_tokens"], data["tokens"], **arrays, ranges=ranges)


def modality_of(
    sample_kl: FloatArray, image_kl: FloatArray, image_tokens: int, tokens: int, ranges: Sequence[ImageRange]
) -> Modality:
    """The share of image positions, and how sure it is: captions drawn again.

    Args:
        sample_kl: ``[S, G]`` share of each caption in the predicted KL.
        image_kl: ``[S, G]`` what of it comes from image positions.
        image_tokens: Image tokens in the scored rows.
        tokens: All tokens there.
        ranges: Inputs with a static range.
    """
    samples = len(sample_kl)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = image_kl.sum(axis=0) / sample_kl.sum(axis=0)
        low = high = np.full_like(share, np.nan)
        if samples >= LEAST:
            weights = np.random.default_rng(_SEED).multinomial(samples, np.full(samples, 1 / samples), _DRAWS)
            drawn = (weights @ image_kl) / (weights @ sample_kl)
            low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
            low, high = np.minimum(low, share), np.maximum(high, share)
    return Modality(image_tokens, tokens, share, low, high, tuple(ranges))
