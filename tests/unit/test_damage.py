"""The tables of damage as a GPU serves it."""

import pytest

from tools.docs.damage import agreement, table, tables, verdict


def figure(kl):
    return {"kl": kl, "se": 0.001}


def layout(served, rounded=0.1, noise=0.001, **more):
    row = {"label": "FP8", "kernels": {"CutlassFP8ScaledMMLinearKernel": 8}, "tokens": 4000}
    row |= {"served_damage": figure(served), "rounded_damage": figure(rounded), "noise": figure(noise)}
    row |= {key: figure(rounded) for key in ("restored_damage", "scored_damage", "scored_damage_whole")}
    return row | {"diverges": False, "ratio": 1.0, "gain": {"t": 0.0}, "from_restored": figure(0.01)} | more


@pytest.mark.parametrize(
    ("served", "rounded", "words"),
    [
        (0.105, 0.1, "+5.0%"),
        (0.08, 0.1, "**−20.0%**"),
        (0.0015, 0.001, "+50.0%, within the noise"),
        (0.0025, 0.001, "**+150.0%**"),
    ],
)
def test_what_is_neither_near_nor_within_the_noise_stands_out(served, rounded, words):
    assert agreement(layout(served, rounded)) == words


def test_the_verdict_is_what_decided():
    assert verdict(layout(0.1)) == "loads"
    assert verdict(layout(0.1, diverges=True, ratio=2.5)) == "diverges (ratio 2.50, t 0.0)"
    assert verdict(layout(0.1, diverges=True, from_weights=figure(0.002))) == "activations in 16 bits"
    assert verdict(layout(0.1, from_weights=figure(0.004))) == "loads"


def test_what_was_served_and_not_compared_is_named():
    about = {"model": "m", "runtime": "vllm", "machine": "NVIDIA H200", "date": "2026-11-30"}
    made = table({**about, "layouts": [layout(0.1), {"label": "NVFP4", "kernels": {}}]})
    assert "m, vllm on an H200, 2026-11-30, 4,000 tokens:" in made
    assert "Served, not compared: `NVFP4`." in made


def test_the_layouts_that_hopper_leaves_in_16_bits_are_found_on_trained_models():
    left = {line.split("`")[1] for line in tables().splitlines() if line.endswith("activations in 16 bits |")}
    assert left == {"MXFP4-MXFP4", "MXFP4-FP8_TOKEN", "MXFP8-MXFP8", "NVFP4-NVFP4", "NVFP4"}
