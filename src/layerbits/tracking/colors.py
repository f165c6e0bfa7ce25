"""The colour of a run in MLflow's UI: its hue tells the quant pair, its shade the granularity."""

from __future__ import annotations

import math
import zlib

# Hue in degrees of a pair's weights, and what its activations add to it and to the lightness, for eyes that miss some
# hues. Plain pairs are 22.5 degrees apart, activations that are compared most often further; variants lie between.
_HUES = {"fp4": 25.0, "int8": 115.0, "fp8": 205.0, "int4": 295.0}
_ACTIVATIONS = {
    "fp16": (0.0, -0.06),
    "fp4": (11.25, 0.06),
    "int4": (22.5, 0.0),
    "fp8": (45.0, 0.06),
    "int8": (67.5, 0.0),
}
_VARIANTS = {"4o6": (-6.0, 0.06), "mse": (-14.0, 0.0), "mx": (11.25, 0.06)}
_LIGHTNESS, _CHROMA = 0.62, 0.14
# What an overlay of configs/quant_granularity adds to the lightness of its pair, and its share of the pair's chroma.
# Any two are at least 0.028 apart in OKLab, of plain pairs those that are compared most often 0.05.
_SHADES = {
    "default": (0.0, 1.0),
    "a_per_token_dynamic": (-0.15, 1.0),
    "w_group64": (0.13, 1.0),
    "w_group128": (-0.27, 1.0),
    "w_group32": (-0.18, 0.4),
    "w_per_tensor": (-0.04, 0.4),
    "w_per_out_channel": (-0.115, 0.4),
    "recipe_match_channel_token": (0.097, 0.4),
    "w_group128_a_token": (0.065, 1.0),
    "w_per_in_channel": (-0.24, 0.4),
    "a_per_tensor_static": (-0.075, 1.0),
    "a_per_tensor_dynamic": (0.03, 0.4),
    "a_group128": (-0.21, 1.0),
    "a_per_hidden_channel": (0.165, 0.4),
    "w_shared": (-0.04, 0.7),
}


def color(quant_pair: str, granularity: str = "default") -> str:
    """A pair's colour in the shade of an overlay as ``#rrggbb``.

    Args:
        quant_pair: ``w<weights>_a<activations>``; without a known kind of weights the colour is grey.
        granularity: The overlay; a user's own gets the shade of one that is shipped.
    """
    weights, _, activations = quant_pair.lower().rpartition("_a")
    hue = next((angle for name, angle in _HUES.items() if name in weights), None)
    parts = [next((add for name, add in _ACTIVATIONS.items() if name in activations), _ACTIVATIONS["fp16"])]
    parts += [add for name, add in _VARIANTS.items() if name in weights]
    another = sorted(_SHADES)[zlib.crc32(granularity.encode()) % len(_SHADES)]
    shade, share = _SHADES.get(granularity, _SHADES[another])
    lightness = _LIGHTNESS + shade + sum(lighter for _, lighter in parts)
    angle = math.radians((hue or 0.0) + sum(turn for turn, _ in parts))
    rgb = _rgb(min(lightness, 0.9), 0.0 if hue is None else _CHROMA * share, angle)
    return "#" + "".join(f"{round(255 * part):02x}" for part in rgb)


def _rgb(lightness: float, chroma: float, hue: float) -> list[float]:
    """Lightness, chroma and hue of OKLab as sRGB, with as much of the chroma as a screen has.

    The matrices are Ottosson's (https://bottosson.github.io/posts/oklab/), the curve is that of IEC 61966-2-1.
    """
    while True:
        a, b = chroma * math.cos(hue), chroma * math.sin(hue)
        l_ = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
        m_ = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
        s_ = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
        linear = (
            4.0767416621 * l_ - 3.3077115913 * m_ + 0.2309699292 * s_,
            -1.2684380046 * l_ + 2.6097574011 * m_ - 0.3413193965 * s_,
            -0.0041960863 * l_ - 0.7034186147 * m_ + 1.7076147010 * s_,
        )
        if all(0.0 <= part <= 1.0 for part in linear):
            return [12.92 * x if x <= 0.0031308 else 1.055 * x ** (1 / 2.4) - 0.055 for x in linear]
        chroma -= 0.002  # grey of any lightness is on every screen
