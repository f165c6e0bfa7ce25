"""What was measured of a served checkpoint, and whether that is explained: plain data (no torch)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from layerbits.results.bootstrap import standard_error
from layerbits.results.result import FloatArray

LOADS, REFUSED, DIVERGES, SKIPPED = "loads", "refused", "diverges", "skipped"

TIMED = "timed"
"""It was loaded and timed, and not asked: whether it answers as scored is not known."""

BOUND = 2.0
"""Times what rounding explains that a served scheme may be away from what the checkpoint's files say.

Two sound computations of one scheme are as far apart as rounding makes them, so 1 is expected; ``docs/serving.md`` has
what was found of good and of corrupted checkpoints.
"""

DAMAGE_BOUND = 1.5
"""Times the files' damage that a runtime may do, or the files times the runtime's, beside twice its noise."""

FALSE_ALARM = 1e-3
"""Probability that a sound checkpoint is blamed for the gain of some linear, were the captions' sums normal."""

GAIN_BOUND = 0.01
"""Share that a linear's gain may be off: a scale in bfloat16 is itself rounded by up to 0.4%, and where rounding is
all the noise there is, what one runtime rounds and another does not is significant long before it matters."""

LEFT_BOUND = 4.0
"""Times nearer to the quantized weights alone than to what the files say: then the activations were not rounded.

A runtime that rounds them, but elsewhere than PyTorch, is at most twice as far from PyTorch's rounding as from none.
"""

NOISE_BOUND = 10.0
"""Times what rounding explains that the served unquantized model may be away from PyTorch's: a runtime rounds more
often than a module at a time (2.2 was found), but one that is further away computes another model."""


@dataclass(frozen=True)
class Divergence:
    """Mean KL divergence per token, nats, with its standard error over the captions."""

    kl: float
    se: float

    def __str__(self) -> str:
        return f"{self.kl:.4g} ± {self.se:.1g}"


UNKNOWN = Divergence(math.nan, math.nan)


@dataclass(frozen=True)
class Gain:
    """The linear whose gain would best explain how a served model deviates (:mod:`layerbits.serving.gain_score_test`).

    Attributes:
        linear: Its name.
        t: Student's t, over the captions, of what its gain is off beyond :data:`GAIN_BOUND`; 0 within it, positive
            where its output comes out too large.
        off: By what share it is, roughly (to a fifth for small ones).
        captions: Their number.
        linears: Of how many it is the one with the largest ``|t|``.
    """

    linear: str
    t: float
    off: float
    captions: int
    linears: int

    @property
    def allowed(self) -> float:
        """``|t|`` that the largest of so many exceeds with probability :data:`FALSE_ALARM` or less (Bonferroni)."""
        from scipy.stats import t

        freedom = self.captions - 1
        return float(t.isf(FALSE_ALARM / (2 * self.linears), freedom)) if freedom > 0 else math.inf

    @property
    def wrong(self) -> bool:
        """Whether chance does not explain it."""
        return not abs(self.t) <= self.allowed


@dataclass(frozen=True)
class Measured:
    """KL divergences between models on the same tokens.

    All but ``scored_damage_whole`` are over the tokens that the runtime tells of both models one by one and the others
    as one event: a lower bound of what they are over the whole vocabulary, and so much of it in all of them.

    Attributes:
        tokens: Positions compared.
        top_k: Tokens that the runtime listed per position; -1 = all.
        mass: Mean mass of the events that are listed one by one, under the unquantized model.
        served_damage: The served scheme from the served unquantized model; unknown where that was not served.
        restored_damage: The restored checkpoint from the unquantized model, in PyTorch.
        rounded_damage: The same with both models rounded to the runtime's dtype: what a sound runtime measures.
        scored_damage: The scheme as it was scored from the unquantized model, in PyTorch.
        scored_damage_whole: The same over the whole vocabulary.
        noise: The served unquantized model from PyTorch's.
        rounding_noise: The unquantized model rounded to the runtime's dtype from that in float32, in PyTorch.
        from_restored: The served scheme from the restored checkpoint.
        from_scored: The served scheme from the scheme as it was scored.
        rounding: The restored checkpoint rounded to the runtime's dtype from that in float32, in PyTorch.
        files: The restored checkpoint from the scheme as it was scored, in PyTorch.
        gain: The linear that deviates most.
        perplexity: Of the served scheme.
        from_weights: The served scheme from the restored checkpoint without its activation rounding; unknown where it
            has none.
    """

    tokens: int
    top_k: int
    mass: float
    served_damage: Divergence
    restored_damage: Divergence
    rounded_damage: Divergence
    scored_damage: Divergence
    scored_damage_whole: Divergence
    noise: Divergence
    rounding_noise: Divergence
    from_restored: Divergence
    from_scored: Divergence
    rounding: Divergence
    files: Divergence
    gain: Gain
    perplexity: float
    from_weights: Divergence = UNKNOWN

    @property
    def explained(self) -> float:
        """KL between the served scheme and the restored checkpoint that rounding explains.

        What rounding to the runtime's dtype does to the scheme, and the runtime's own noise on the unquantized model:
        measured where that was served, but no more than :data:`NOISE_BOUND` allows, and at least what rounding does.
        """
        noise = self.rounding_noise.kl
        if math.isfinite(self.noise.kl):
            noise = min(max(self.noise.kl, noise), NOISE_BOUND * noise)
        return self.rounding.kl + noise

    @property
    def ratio(self) -> float:
        """KL of the served scheme from the restored checkpoint / :attr:`explained`; above :data:`BOUND` it diverges."""
        return self.from_restored.kl / self.explained if self.explained > 0 else math.inf

    @property
    def other_damage(self) -> bool:
        """Whether the damage as served is not that of the files, by :data:`DAMAGE_BOUND` and twice the noise."""
        served, files, noise = self.served_damage.kl, self.restored_damage.kl, 2 * self.noise.kl
        return served > DAMAGE_BOUND * files + noise or files > DAMAGE_BOUND * (served + noise)

    @property
    def activations_left(self) -> bool:
        """Whether the runtime left activations in 16 bits that the files say are rounded, by :data:`LEFT_BOUND`."""
        return LEFT_BOUND * self.from_weights.kl < self.from_restored.kl

    @property
    def diverges(self) -> bool:
        """Whether it is beyond what is explained."""
        return not self.ratio <= BOUND or self.other_damage or self.gain.wrong or self.activations_left

    @property
    def sentence(self) -> str:
        """The verdict, in one line."""
        gain = self.gain
        text = (
            f"over {self.tokens} tokens the served scheme is {self.from_restored.kl:.3g} nats per token from what the "
            f"files say, {self.ratio:.2f} times what rounding explains ({self.explained:.3g}); {BOUND:g} is allowed"
        )
        if not self.diverges:
            return f"{text}; and no linear is off (t of {gain.linear} {gain.t:.1f}, {gain.allowed:.1f} is allowed)"
        if self.noise.kl > NOISE_BOUND * self.rounding_noise.kl:
            return f"{text}: the runtime computes another unquantized model, too"
        if self.activations_left:
            return (
                f"{text}; it is {self.from_weights.kl:.3g} from the quantized weights alone: activations left in 16 "
                "bits, so what was scored is not what is computed; score the pair with afp16, which is"
            )
        if self.other_damage:
            text += f"; it does {self.served_damage.kl:.3g} of damage, the files {self.restored_damage.kl:.3g}"
        if gain.wrong:
            text += (
                f"; the output of {gain.linear}, or of one beside it, is about {abs(gain.off):.0%} too "
                f"{'large' if gain.t > 0 else 'small'} (t {gain.t:.1f}, {gain.allowed:.1f} is allowed)"
            )
        return f"{text}: the runtime computes something else than the files say"

    def metrics(self) -> dict[str, float]:
        """Numbers by the names of ``docs/tracking.md``; those that are not known are left out."""
        named = {
            "serve/kl": self.served_damage,
            "serve/kl_restored": self.restored_damage,
            "serve/kl_rounded": self.rounded_damage,
            "serve/kl_scored": self.scored_damage,
            "serve/kl_scored_whole": self.scored_damage_whole,
            "serve/noise": self.noise,
            "serve/from_restored": self.from_restored,
            "serve/from_scored": self.from_scored,
            "serve/from_weights": self.from_weights,
            "serve/rounding": self.rounding,
        }
        values = {"serve/tokens": float(self.tokens), "serve/top_k": float(self.top_k), "serve/mass": self.mass}
        for key, value in named.items():
            values |= {key: value.kl, f"{key}_se": value.se}
        values |= {"serve/explained": self.explained, "serve/ratio": self.ratio, "serve/perplexity": self.perplexity}
        values |= {"serve/gain_t": abs(self.gain.t), "serve/gain_t_allowed": self.gain.allowed}
        values |= {"serve/gain_off": self.gain.off}
        return {key: value for key, value in values.items() if math.isfinite(value)}


def divergence(per_token: FloatArray, caption: object) -> Divergence:
    """The mean of a KL divergence per token, and its standard error over the captions.

    Args:
        per_token: ``[n]`` nats.
        caption: ``[n]`` number of the caption of each token.
    """
    import numpy as np

    numbers = np.asarray(caption)
    sums = np.bincount(numbers, per_token).astype(np.float64)
    return Divergence(*standard_error(sums, np.bincount(numbers).tolist()))


def largest_gain(linears: Sequence[str], scores: FloatArray, information: FloatArray) -> Gain:
    """The linear with the largest ``|t|``.

    Args:
        linears: Names of ``L`` linears.
        scores: ``[L, captions]`` as :class:`layerbits.serving.gain_score_test.GainScores` has them.
        information: ``[L]`` likewise.
    """
    import numpy as np

    captions = scores.shape[1]
    if captions < 2:
        return Gain(linears[0], 0.0, 0.0, captions, len(linears))
    with np.errstate(divide="ignore", invalid="ignore"):
        t = scores.mean(1) / (scores.std(1, ddof=1) / np.sqrt(captions))
        off = scores.sum(1) / information
        t *= np.maximum(0.0, 1.0 - GAIN_BOUND / np.abs(off))
    t, off = (np.where((scores == 0).all(1), 0.0, x) for x in (t, off))
    worst = int(np.argmax(np.where(np.isfinite(t), np.abs(t), np.inf)))
    return Gain(linears[worst], float(t[worst]), float(off[worst]), captions, len(linears))
