"""Colours of runs: a hue per pair, a shade per granularity."""

import itertools
import math

import numpy as np
import pytest

from layerbits.candidates.shipped import load_overlays, load_pairs
from layerbits.tracking.colors import color

PAIRS = [pair.name for pair in load_pairs()]
PLAIN = [name for name in PAIRS if name.count("_") == 1 and "mx" not in name and "afp4" not in name]
OVERLAYS = [overlay.name for overlay in load_overlays()]
# To the responses of the eye's cones and from their cube roots to OKLab: https://bottosson.github.io/posts/oklab/
CONES = [[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]]
OKLAB = [[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]


def oklab(code):
    """Lightness, green to red, and blue to yellow of ``#rrggbb``."""
    parts = np.frombuffer(bytes.fromhex(code[1:]), np.uint8) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    return OKLAB @ np.cbrt(CONES @ linear)


def hue(code):
    _, a, b = oklab(code)
    return math.degrees(math.atan2(b, a))


def apart(a, b):
    """Degrees between two hues."""
    return abs((a - b + 180) % 360 - 180)


def test_each_pair_has_a_hue_of_its_own_in_every_shade():
    hues = {pair: [hue(color(pair, overlay)) for overlay in OVERLAYS] for pair in PAIRS}
    assert max(apart(a, b) for shades in hues.values() for a, b in itertools.combinations(shades, 2)) < 5
    assert min(apart(a[0], b[0]) for a, b in itertools.combinations(hues.values(), 2)) > 2
    assert min(apart(hues[a][0], hues[b][0]) for a, b in itertools.combinations(PLAIN, 2)) > 18


def test_variants_of_a_pair_are_told_apart_from_it():
    for a, b in itertools.combinations(PAIRS, 2):
        assert math.dist(oklab(color(a)), oklab(color(b))) > 0.03


@pytest.mark.parametrize("pair", PAIRS)
def test_every_shipped_overlay_has_a_shade_of_its_own(pair):
    shades = [oklab(color(pair, overlay)) for overlay in OVERLAYS]
    assert min(math.dist(a, b) for a, b in itertools.combinations(shades, 2)) > 0.028


@pytest.mark.parametrize("pair", PLAIN)
def test_overlays_that_are_compared_most_often_are_told_apart_at_a_glance(pair):
    often = ("default", "a_per_token_dynamic", "w_group64", "w_per_tensor", "recipe_match_channel_token")
    shades = [oklab(color(pair, overlay)) for overlay in often]
    assert min(math.dist(a, b) for a, b in itertools.combinations(shades, 2)) > 0.05


def test_an_overlay_of_a_user_has_a_shade_and_weights_without_a_hue_are_grey():
    assert color("wfp8_afp8", "mine") != color("wfp8_afp8")
    assert len({*bytes.fromhex(color("wint3_afp16")[1:])}) == 1
