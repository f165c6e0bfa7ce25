"""Weights in host memory: every engine finds on a streamed model what it finds on an ordinary one."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from layerbits.errors import Unsupported, UserError
from layerbits.export.scheme import export_scheme
from layerbits.inputs import offload as module
from layerbits.inputs.model_spec import ModelSpec
from layerbits.inputs.models import resolve
from layerbits.inputs.offload import offload, offloaded, parts_of
from layerbits.inputs.residence import device_of, resident
from layerbits.probing.measured import Rows
from layerbits.probing.probe import probe
from layerbits.scoring import kl, memory, onepass, placement
from layerbits.scoring.search import Search
from layerbits.scoring.steps import calibration_forward
from layerbits.trust.measure import measure_damage
from layerbits.trust.validate import calibrated_linears
from tests.integration.export_support import planned, saved
from tests.integration.schemes_support import scheme_of
from tests.integration.scoring_support import candidate, configs, job, loaded, tiny_model, usual_rows

BLOCKS = 4
PAIRS = ("wfp8_afp8", "wint8_afp16")


def model(kind="llama", dtype=torch.float32, **changes):
    return loaded(tiny_model(kind, num_hidden_layers=BLOCKS, **changes).to(dtype))


@pytest.fixture
def strict(monkeypatch):
    """A weight that is used while its block is away is not a number."""
    enter, leave = module._Block.enter, module._Block.leave
    home = {}

    def left(self):
        leave(self)
        for parameter in self.parameters:
            parameter.data = home.setdefault(id(parameter), torch.full_like(parameter, torch.nan))

    def made(self, *arguments):
        original(self, *arguments)
        left(self)

    original = module._Block.__init__
    monkeypatch.setattr(module._Block, "__init__", made)
    monkeypatch.setattr(module._Block, "leave", left)
    return enter


def scored(subject, folder, method="gradient", wanted=PAIRS, **changes):
    engine = kl if method == "kl_div" else onepass
    return engine.score(job(subject, folder, configs(*wanted), method=method, draws=2, **changes))


@pytest.mark.parametrize("kind", ["llama", "qwen3_vl"])
@pytest.mark.parametrize("method", ["gradient", "fisher", "kl_div"])
def test_scores_are_those_of_lean(kind, method, tmp_path, strict):
    lean = scored(model(kind), tmp_path / "lean", method, memory="lean")
    subject = model(kind)
    offload(subject.model, "cpu")
    streamed = scored(subject, tmp_path / "offload", method, memory="offload")
    np.testing.assert_allclose(streamed.raw, lean.raw, rtol=1e-6)
    if method != "kl_div":
        assert streamed.mode == "offload"


def test_a_scored_head_and_tied_embeddings_stay_on_the_device(tmp_path, strict):
    found = []
    for streamed in (False, True):
        subject = model(tie_word_embeddings=True)
        if streamed:
            offload(subject.model, "cpu")
        names = tuple(subject.linears)
        found.append(
            onepass.score(job(subject, tmp_path / str(streamed), configs(*PAIRS), scored=names, memory="auto"))
        )
    np.testing.assert_allclose(found[1].raw, found[0].raw, rtol=1e-6)


def test_block_inputs_that_wait_in_host_memory_change_nothing(tmp_path, strict, monkeypatch):
    lean = scored(model(), tmp_path / "lean", memory="lean")
    saved = []
    on_cpu = torch.autograd.graph.save_on_cpu
    monkeypatch.setattr(
        torch.autograd.graph, "save_on_cpu", lambda **options: saved.append(options) or on_cpu(**options)
    )
    monkeypatch.setattr(memory, "free_bytes", lambda _device: 0)
    subject = model()
    offload(subject.model, "cpu")
    streamed = scored(subject, tmp_path / "offload")
    np.testing.assert_allclose(streamed.raw, lean.raw, rtol=1e-6)
    assert len(saved) == 3 * BLOCKS, "one for each block and segment"


def test_a_pass_copies_each_block_once_a_forward_and_once_a_backward(tmp_path):
    subject = model()
    streaming = offload(subject.model, "cpu")
    batch = usual_rows().calib[0]
    with torch.no_grad():
        calibration_forward(subject.model, batch, need_logits=False)
        calibration_forward(subject.model, batch, need_logits=False)
    before = streaming.copied_bytes
    with torch.no_grad():
        for _ in range(3):
            calibration_forward(subject.model, batch, need_logits=False)
    assert streaming.copied_bytes - before == 3 * streaming.parts.total_bytes


def test_the_next_block_is_there_before_it_is_wanted():
    order = module._Order(4)
    up_and_down = [0, 1, 2, 3, 3, 2, 1, 0]
    missed = 0
    for block in up_and_down * 3:
        expected = order.upcoming(1)
        missed += block != order.current and expected != [block]
        order.visit(block)
    assert missed == 1, "only the very first block is a surprise"


def test_the_order_of_suffix_runs_is_learned():
    order = module._Order(5)
    missed = 0
    for block in [2, 3, 4] * 5:
        missed += order.upcoming(1) != [block]
        order.visit(block)
    assert missed <= 4


def test_a_weight_can_be_had_outside_a_forward(strict):
    subject = model()
    expected = {n: subject.model.get_submodule(n).weight.clone() for n in subject.linears}
    offload(subject.model, "cpu")
    for name, weight in expected.items():
        linear = subject.model.get_submodule(name)
        assert device_of(linear).type == "cpu"
        torch.testing.assert_close(resident(linear).weight, weight, rtol=0, atol=0)


def test_closing_gives_an_ordinary_model_back():
    subject = model()
    expected = {n: p.clone() for n, p in subject.model.named_parameters()}
    streaming = offload(subject.model, "cpu")
    calibration_forward(subject.model, usual_rows().calib[0], need_logits=False)
    streaming.close()
    assert offloaded(subject.model) is None
    for name, parameter in subject.model.named_parameters():
        torch.testing.assert_close(parameter.data, expected[name].data, rtol=0, atol=0)
    calibration_forward(subject.model, usual_rows().calib[0], need_logits=False)


def test_experts_are_streamed_with_their_block(tmp_path, strict):
    lean = scored(model("qwen3_moe"), tmp_path / "lean", memory="lean")
    subject = model("qwen3_moe")
    offload(subject.model, "cpu")
    streamed = scored(subject, tmp_path / "offload", memory="offload")
    np.testing.assert_allclose(streamed.raw, lean.raw, rtol=1e-6)


def test_a_model_without_blocks_is_refused():
    layers = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(4, 4))])
    subject = model()
    subject.model.model.other = layers
    with pytest.raises(Unsupported, match=r"decoder blocks in .*layers and .*other; .*memory=lean"):
        parts_of(subject.model)


def test_offload_is_not_taken_from_a_model_on_its_device(tmp_path):
    with pytest.raises(UserError, match="memory=offload needs a model that was loaded for it"):
        scored(model(), tmp_path, memory="offload")


def test_an_export_of_a_streamed_model_is_proven(tmp_path):
    plan = planned("qwen3_vl", tmp_path, **dict.fromkeys(("qkv", "o", "gate_up", "down"), candidate("wfp8_afp8")))
    scheme = replace(plan.scheme, settings={**plan.scheme.settings, "autoquant": {"memory": "offload"}})
    plan = replace(plan, prepared=replace(plan.prepared, scheme=scheme))
    assert offloaded(plan.prepared.load("cpu").model) is not None
    made = export_scheme(plan, "cpu")
    assert made.proof.passed
    assert made.proof.logits.deviation == 0.0


def test_an_export_of_a_streamed_model_is_the_same_file(tmp_path):
    files = []
    for memory_mode in ("lean", "offload"):
        folder = tmp_path / memory_mode
        plan = planned("llama", folder, **dict.fromkeys(("qkv", "down"), candidate("wfp8_afp8")))
        scheme = replace(plan.scheme, settings={**plan.scheme.settings, "autoquant": {"memory": memory_mode}})
        plan = replace(plan, prepared=replace(plan.prepared, scheme=scheme))
        made = export_scheme(plan, "cpu")
        assert made.proof.passed
        files.append((folder / "exports" / "mine" / "model.safetensors").read_bytes())
    assert files[0] == files[1]


@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_a_validation_of_a_streamed_model_measures_the_same(kind, tmp_path, strict):
    found = []
    for streamed in (False, True):
        subject = model(kind)
        if streamed:
            offload(subject.model, "cpu")
        made = job(subject, tmp_path / str(streamed), configs("wfp8_afp8"))
        search = Search.of(made)
        linears = calibrated_linears(made, search)
        found.append(measure_damage(subject.model, linears, search, made.calibration.score, disable_one=True))
    lean, away = found
    assert (lean.alone.kl.sum(axis=0) > 0).all()
    np.testing.assert_allclose(away.alone.kl, lean.alone.kl, rtol=1e-6)
    np.testing.assert_allclose(away.all_but.kl, lean.all_but.kl, rtol=1e-6)
    np.testing.assert_allclose(away.loss_change, lean.loss_change, rtol=1e-6)


def test_a_probe_of_a_streamed_model_finds_the_same(strict):
    found = []
    for streamed in (False, True):
        subject = model(dtype=torch.bfloat16)
        if streamed:
            offload(subject.model, "cpu")
        scheme = scheme_of(subject.model, "mine", qkv=candidate("wfp8_afp8"), down=candidate("wint8_afp16"))
        rows = usual_rows()
        result = probe(subject.model, scheme.model, [scheme], rows.calib, rows.score, Rows("d", "packed", 20, 4, 0))
        found.append((result.schemes[0].difference, result.floor))
    assert found[0] == found[1]


def test_too_little_host_memory_is_said_before_loading(tmp_path, monkeypatch):
    saved("llama", tmp_path)
    resolved = resolve(ModelSpec("tiny", str(tmp_path)))
    monkeypatch.setattr(placement, "free_host_bytes", lambda: 1000)
    with pytest.raises(UserError, match=r"memory=offload needs 0\.0 GB of host memory and 0\.0 GB are free"):
        placement.in_host_memory(resolved, ["model.layers.0.mlp.down_proj"], 64, "cpu", "offload")


def test_auto_streams_where_lean_does_not_fit_the_gpu(tmp_path, monkeypatch):
    saved("llama", tmp_path)
    resolved = resolve(ModelSpec("tiny", str(tmp_path)))
    where = (resolved, ["model.layers.0.mlp.down_proj"], 64, "cuda", "auto")
    lean = placement.needs_of(*where[:3]).device_bytes("lean")
    for free, expected in ((lean * 1.2, False), (lean * 0.9, True)):
        monkeypatch.setattr(placement, "free_bytes", lambda _device, free=free: free)
        assert placement.in_host_memory(*where) is expected
