"""Schemes on real models: applied, swapped, probed, and the whole way from the command line."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from mlflow import MlflowClient
from transformers import AutoTokenizer

from layerbits import history
from layerbits.candidates.kv_cache import KV_FORMATS
from layerbits.checkpoint.sizes import with_sizes
from layerbits.errors import UserError
from layerbits.history.probed import probed_kl
from layerbits.history.scheme_inputs import load_scores
from layerbits.inputs import smollm2
from layerbits.inputs.calibration import Batch, Segment
from layerbits.inputs.captions import load_captions
from layerbits.probing.apply import apply_scheme, configs_of, find_ranges
from layerbits.probing.loading import prepare
from layerbits.probing.probe import held_out_rows
from layerbits.probing.unquantized import UnquantizedLogits
from layerbits.results.assignment import Assignment
from layerbits.schemes import load_scheme
from layerbits.schemes.kv_cache import toggles
from layerbits.schemes.sizes import GIB, Load
from layerbits.scoring.assigned import fixed_quantization
from layerbits.scoring.kv_cache import KvCache
from layerbits.scoring.steps import calibration_forward
from layerbits.trust.reproduce import load_run

from .entries import start
from .schemes_support import CALIBRATION, INFO, logits, probed, scheme_of
from .scoring_support import candidate, random_segment, search_config, small_checkpoint, tiny_model

ROOT = Path(__file__).resolve().parents[2]


def quantized_by_modelopt(model, scheme, made):
    """ModelOpt's own quantize with a candidate's config, and every other linear disabled."""
    import modelopt.torch.quantization as mtq

    def forward_loop(m):
        for batch in CALIBRATION:
            calibration_forward(m, batch, need_logits=False)

    changed = mtq.quantize(copy.deepcopy(model), search_config(made), forward_loop)
    mtq.disable_quantizer(changed, lambda name: name.rsplit(".", 1)[0] not in scheme.modules)
    return changed


@pytest.mark.parametrize(
    ("pair", "overlay"),
    [
        ("wfp8_afp8", "default"), ("wfp8_afp8", "a_per_token_dynamic"), ("wint8_aint8", "default"),
        ("wint4_afp16", "default"), ("wfp4_afp8", "default"),
    ],
)  # fmt: skip
def test_a_scheme_computes_what_modelopt_computes_with_its_config(pair, overlay):
    model = tiny_model("llama")
    made = candidate(pair, overlay)
    scheme = scheme_of(model, qkv=made, down1=made)
    with apply_scheme(model, scheme, CALIBRATION):
        ours = logits(model)
    assert torch.equal(ours, logits(quantized_by_modelopt(model, scheme, made)))
    assert not torch.equal(ours, logits(model))


def test_a_vision_language_model_runs_under_a_scheme():
    model = tiny_model("qwen3_vl")
    made = candidate("wfp8_afp8")
    scheme = scheme_of(model, gate_up=made)
    with apply_scheme(model, scheme, CALIBRATION):
        ours = logits(model)
    assert torch.equal(ours, logits(quantized_by_modelopt(model, scheme, made)))


def test_schemes_take_turns_and_leave_the_model_bit_for_bit_as_it_was():
    model = tiny_model("llama")
    eight, four = candidate("wfp8_afp8"), candidate("wint4_afp16")
    schemes = [scheme_of(model, qkv=eight), scheme_of(model, qkv=four, down=eight)]
    before, weights = logits(model), copy.deepcopy(model.state_dict())
    attributes = [set(vars(m)) for m in model.modules()]
    ranges = find_ranges(model, schemes, CALIBRATION)
    alone = []
    for scheme in schemes:
        with apply_scheme(model, scheme, ranges):
            alone.append(logits(model))
        assert torch.equal(logits(model), before)
    made = {}
    for scheme, expected in zip([*schemes, schemes[0]], [*alone, alone[0]], strict=True):
        with apply_scheme(model, scheme, ranges, made=made):
            assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), before)
    assert [set(vars(m)) for m in model.modules()] == attributes
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in weights.items())


def test_quantizers_lie_behind_the_hooks_of_accelerate():
    model = tiny_model("llama")
    scheme = scheme_of(model, qkv=candidate("wfp8_afp8"))
    plain = logits(model)
    with apply_scheme(model, scheme, CALIBRATION):
        expected = logits(model)
    called = []

    class Counting(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            called.append(module)
            return args, kwargs

    linears = [model.get_submodule(name) for name in scheme.modules]
    for linear in linears:
        add_hook_to_module(linear, Counting())
    for put_on in (
        lambda: apply_scheme(model, scheme, CALIBRATION),
        lambda: fixed_quantization(model, configs_of(model, scheme), CALIBRATION),
    ):
        with put_on():
            called.clear()
            assert torch.equal(logits(model), expected)
            assert called == linears
        assert torch.equal(logits(model), plain)


def test_a_second_scheme_on_top_of_one_is_refused():
    model = tiny_model("llama")
    scheme = scheme_of(model, o=candidate("wint8_afp16"))
    with apply_scheme(model, scheme, CALIBRATION), pytest.raises(UserError, match="under scheme mine already"):
        apply_scheme(model, scheme, CALIBRATION)


def test_a_scheme_of_another_model_is_refused():
    scheme = scheme_of(tiny_model("llama"), o=candidate("wint8_afp16"))
    with pytest.raises(UserError, match="has no linear model"):
        apply_scheme(tiny_model("qwen3_vl"), scheme, CALIBRATION)


def padded(width, fill):
    """Two held-out rows of 20 and 12 tokens, padded on the right."""
    whole = random_segment(2, 20, seed=9)
    real = torch.arange(width)[None] < torch.tensor([[20], [12]])
    grown = [torch.nn.functional.pad(t, (0, width - 20)) for t in (whole.input_ids, whole.sample)]
    mask = real.clone()
    mask[:, 0] = False
    return Batch(
        (Segment(torch.where(real, grown[0], fill), real.long(), mask, torch.where(real, grown[1], -1).int()),)
    )


def test_padded_tokens_do_not_enter_a_probe():
    model = tiny_model("llama")
    ranges = find_ranges(model, [scheme := scheme_of(model, qkv=candidate("wfp8_afp8"))], CALIBRATION)
    found = []
    for width, fill in ((20, 0), (20, 5), (33, 7)):
        unquantized = UnquantizedLogits(model, [padded(width, fill)])
        with apply_scheme(model, scheme, ranges):
            found.append(unquantized.compare(model)[0])
    assert found[0] == found[1]
    assert found[0].tokens == 19 + 11
    assert found[2].kl == pytest.approx(found[0].kl, rel=1e-4)
    assert found[2].perplexity == pytest.approx(found[0].perplexity, rel=1e-6)


def test_a_probe_measures_what_the_scheme_does():
    model = tiny_model("llama")
    eight, four = (
        scheme_of(model, n, qkv=c, down=c)
        for n, c in (("eight", candidate("wfp8_afp8")), ("four", candidate("wint4_afp16")))
    )
    before = logits(model)
    result = probed(model, [eight, four])
    kl = {s.scheme: s.difference.kl for s in result.schemes}
    assert kl["four"] > kl["eight"] > 10 * result.floor.kl
    with apply_scheme(model, eight, CALIBRATION):
        log_q = logits(model)[:, :-1].double().log_softmax(-1)
    log_p = before[:, :-1].double().log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert kl["eight"] == pytest.approx(float(expected), rel=1e-4)
    assert torch.equal(logits(model), before)


def test_schemes_that_are_the_same_are_measured_once():
    model = tiny_model("llama")
    first, again = (scheme_of(model, n, qkv=candidate("wfp8_afp8")) for n in ("first", "again"))
    one, two = probed(model, [first, again]).schemes
    assert (two.scheme, two.difference) == ("again", one.difference)
    assert two.seconds < one.seconds / 5


def test_a_bf16_model_has_a_noise_floor_and_its_weights_back():
    model = tiny_model("llama").bfloat16()
    weights = copy.deepcopy(model.state_dict())
    result = probed(model, [scheme_of(model, qkv=candidate("wint4_afp16"))], replace(INFO, dtype="bfloat16"), "model")
    assert 0 < result.floor.kl < result.schemes[0].difference.kl
    assert all(torch.equal(v, weights[n]) and v.dtype == weights[n].dtype for n, v in model.state_dict().items())


def test_a_kv_cache_is_in_force_with_the_scheme_and_away_after_it():
    model = tiny_model("llama")
    before = logits(model)
    plain = scheme_of(model, qkv=candidate("wfp8_afp8"))
    cached = replace(plain, kv_cache="nvfp4", kv_prices={"nvfp4": 0.5})
    (toggle,) = toggles([cached])
    alone, both, without = probed(model, [toggle, cached, plain]).schemes
    assert both.difference.kl > alone.difference.kl > without.difference.kl > 0
    assert (alone.predicted_kl, both.predicted_kl, without.predicted_kl) == (0.5, 0.51, 0.01)
    assert torch.equal(logits(model), before)
    cache = KvCache(model, KV_FORMATS["nvfp4"])
    cache.calibrate(CALIBRATION)
    with cache.active():
        expected = logits(model)
    with apply_scheme(model, toggle, CALIBRATION):
        assert torch.equal(logits(model), expected)


def test_another_revision_is_refused_before_anything_runs():
    model = tiny_model("llama")
    with pytest.raises(UserError, match="revision r0, the model here is revision r1"):
        probed(model, [scheme_of(model, qkv=candidate("wint8_afp16"))], replace(INFO, revision="r1"))


def test_a_model_without_finite_logits_is_refused():
    model = tiny_model("llama")
    model.lm_head.weight.data[3] = float("inf")
    with pytest.raises(UserError, match="own logits are not finite"):
        probed(model, [scheme_of(model, qkv=candidate("wint8_afp16"))])


@pytest.mark.parametrize(
    ("captions", "rows", "message"),
    [
        ((), 4, "on every caption of its list, so none is held out to measure on; add captions at the end"),
        (("A cat.", "A dog."), 0, "rows=0 is nothing to probe on"),
        (("A cat.", "A dog."), 6, "rows=6 is not a multiple of batch_size=4"),
        (("A cat.", "A dog."), 4, "fill 1 rows of 16 tokens, not 4; set rows=1"),
    ],
)
def test_rows_that_are_not_there_are_named(captions, rows, message):
    tokenizer = AutoTokenizer.from_pretrained(smollm2.checkpoint())
    with pytest.raises(UserError, match=message):
        held_out_rows(captions, tokenizer, "packed", 16, 4, rows)


def run_script(script, store, out, *arguments):
    return start(script, f"tracking.uri={store}", f"output_root={out}", *arguments)


def runs(store, **tags):
    client = MlflowClient(store)
    (experiment,) = [e for e in client.search_experiments() if e.name == "layerbits"]
    found = client.search_runs([experiment.experiment_id])
    return [r for r in found if all(r.data.tags.get(k.replace("__", ".")) == v for k, v in tags.items())]


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A tiny model with a small tokenizer, in a grid of two pairs; store, output root, run ids, folder."""
    folder = tmp_path_factory.mktemp("schemes")
    small_checkpoint(folder / "model", tie_word_embeddings=True)
    store, out = f"sqlite:///{folder}/mlflow.db", folder / "out"
    done = run_script(
        "grid", store, out, "model=hf", f"model.path={folder}/model", "model.name=tiny", "model.dtype=float32",
        "quant_pairs=wfp8_afp8,wint4_afp16", "autoquant.seq_len=32", f"autoquant.checkpoint={folder}/search",
        "autoquant.kv_cache=fp8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ids = {r.data.params.get("eff.quant_pair", "grid"): r.info.run_id for r in runs(store)}
    return store, out, ids, folder / "model"


@pytest.fixture(scope="module")
def made(scored):
    """Schemes of a grid's two candidates, and their probe."""
    store, out, ids, _ = scored
    arguments = ("schemes=none", "effective_bits=6,9", "controls=random")
    earlier = set((out / "tmp").glob("schemes_*"))  # of tests that ran before
    done = run_script("scheme", store, out, f"run_id={ids['grid']}", *arguments, "pareto=5", "target=a100")
    assert done.returncode == 0, done.stderr
    (folder,) = set((out / "tmp").glob("schemes_*")) - earlier
    first = folder / "schemes" / "bits_6.json"
    probed_ = run_script(
        "probe", store, out, f"scheme_files={first},{folder}/schemes/bits_9.json", "rows=4", "batch_size=4"
    )
    assert probed_.returncode == 0, probed_.stderr
    return done, probed_, folder


def test_schemes_of_a_grid_are_logged_and_printed(scored, made):
    store, _, ids, _ = scored
    (run,) = runs(store, layerbits__kind="schemes")
    assert set(run.data.tags["source_run_id"].split(",")) == {ids["wfp8_afp8"], ids["wint4_afp16"]}
    assert run.data.tags["outcome"] == "ok"
    assert set(run.data.params["eff.candidates"].split(",")) == {"wfp8_afp8", "wint4_afp16"}
    assert run.data.metrics["scheme/bits_6/bits"] <= 6
    paths = {a.path for a in MlflowClient(store).list_artifacts(run.info.run_id)}
    assert paths == {
        "exclude",
        "figures",
        "llm_compressor",
        "modelopt",
        "pareto.json",
        "run.json",
        "schemes",
        "schemes.json",
        "schemes.md",
        "stability.json",
    }
    written = [json.loads((made[2] / "schemes" / f"bits_{bits}.json").read_text()) for bits in (6, 9)]
    assert {c["name"] for data in written for c in data["candidates"]} == {"wfp8_afp8", "wint4_afp16"}
    assert "bits_9: [" in made[0].stdout
    said = run.data.tags["mlflow.note.content"]
    assert "- on Ampere vLLM 0.26.0 does not compute wfp8_afp8 (FP8) as it is scored: it has no kernel for it" in said
    assert "- on Ampere vLLM 0.26.0 computes wint4_afp16 (INT4_GROUP128-A16) as it is scored by MarlinLinear" in said


def test_a_probe_of_scheme_files_is_logged(scored, made):
    store, _, ids, _ = scored
    (run,) = runs(store, layerbits__kind="probe")
    assert set(run.data.tags["source_run_id"].split(",")) == {ids["wfp8_afp8"], ids["wint4_afp16"]}
    assert 0 < run.data.metrics["probe/bits_9/kl"] < run.data.metrics["probe/bits_6/kl"]
    assert run.data.metrics["probe/floor/kl"] < 1e-6
    assert run.data.params["eff.rows"] == "4"
    assert "| bits_6 |" in run.data.tags["mlflow.note.content"]
    best, other, *_ = MlflowClient(store).search_logged_models(
        [run.info.experiment_id], "metrics.bits < 16", order_by=[{"field_name": "metrics.probed_kl"}]
    )
    assert (best.name, other.name) == ("bits_9 wfp8_afp8 tiny", "bits_6 wfp8_afp8 + wint4_afp16 tiny")
    known = {metric.key: metric for metric in best.metrics}
    assert known["probed_kl"].value == known["probe/bits_9/kl"].value == run.data.metrics["probe/bits_9/kl"]
    on = {one.dataset.name for one in run.inputs.dataset_inputs}
    assert on == {known["probed_kl"].dataset_name, known["predicted_kl"].dataset_name}
    assert known["probed_kl"].dataset_name == "everyday-held-out" != known["predicted_kl"].dataset_name
    assert known["probe/bits_9/predicted_kl"].dataset_name == known["predicted_kl"].dataset_name
    assert known["bits"].value == run.data.metrics["probe/bits_9/bits"]
    assert {a.path for a in MlflowClient(store).list_artifacts(run.info.run_id)} == {
        "figures",
        "run.json",
        "probe.json",
        "probe.md",
    }


def test_a_probe_of_texts_of_ones_own_in_longer_rows(scored, made, tmp_path):
    store = scored[0]
    captions = load_captions("everyday", "large").held_out[:100]
    (tmp_path / "short.txt").write_text("\n".join(captions[:50]))
    (tmp_path / "long.txt").write_text("\n".join(" ".join(captions[i : i + 5]) for i in range(50, 100, 5)))
    texts = f"texts={tmp_path}/short.txt,{tmp_path}/long.txt"
    asked = ("probe", store, tmp_path, f"scheme_files={made[2]}/schemes/bits_6.json", "tracking=none", texts)
    done = run_script(*asked, "rows=6", "batch_size=3", "seq_len=96")
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("tmp/probe_*/probe.json")
    found = json.loads(file.read_text())
    assert (found["data"]["dataset"], found["data"]["seq_len"], found["data"]["rows"]) == ("short,long", 96, 6)
    (scheme, _) = found["schemes"]  # and the KV cache alone
    parts = {s["name"]: s for s in scheme["difference"]["slices"]}
    both = [parts["from short"], parts["from long"]]
    assert sum(p["tokens"] for p in both) == scheme["difference"]["tokens"] == 6 * 95
    mean = sum(p["tokens"] * p["kl"] for p in both) / (6 * 95)
    assert mean == pytest.approx(scheme["difference"]["kl"])
    too_long = run_script(*asked, "seq_len=100000")
    assert too_long.returncode == 2
    assert "is longer than the" in too_long.stderr


def test_the_kv_cache_that_the_grid_priced_is_carried_and_measured(scored, made):
    (made_run,), (run,) = (runs(scored[0], layerbits__kind=kind) for kind in ("schemes", "probe"))
    assert {r.data.params["eff.kv_cache"] for r in (made_run, run)} == {"fp8"}
    price = made_run.data.metrics["scheme/bits_9/kv_predicted_kl"]
    found = run.data.metrics
    assert found["probe/kv_fp8/predicted_kl"] == price > 0
    assert found["probe/kv_fp8/bits"] == 16
    assert 0.3 < found["probe/kv_fp8/additivity"] < 3
    told = made_run.data.metrics["scheme/bits_9/predicted_kl"] + price
    assert found["probe/bits_9/predicted_kl"] == pytest.approx(told)
    assert "KV cache fp8: bits_6, bits_9, kv_fp8." in run.data.tags["mlflow.note.content"]
    assert "k_bmm" not in (made[2] / "exclude" / "bits_9.yaml").read_text()
    assert "[kv]_bmm_quantizer" in (made[2] / "modelopt" / "bits_9.yaml").read_text()


def test_the_measured_kl_of_a_scheme_is_found_by_what_it_is(scored, made):
    store = scored[0]
    (run,) = runs(store, layerbits__kind="probe")
    scheme = load_scheme(made[2] / "schemes" / "bits_6.json")
    where = (store, run.info.experiment_id, "bits_6")
    assert probed_kl(*where, scheme.digest) == run.data.metrics["probe/bits_6/kl"]
    assert probed_kl(*where, "another") is None


def test_a_run_without_scores_is_named(scored, made):
    store = scored[0]
    (run,) = runs(store, layerbits__kind="probe")
    with pytest.raises(UserError, match="is a run of kind probe and holds no scores"):
        load_scores([run.info.run_id], store)
    with pytest.raises(UserError, match="is a run of kind probe and holds no scores"):
        load_run(run.info.run_id, store)


def test_an_unknown_run_is_named(scored):
    with pytest.raises(UserError, match="no run 0123456789abcdef0123456789abcdef in"):
        load_scores(["0123456789abcdef0123456789abcdef"], scored[0])


def test_a_failed_run_is_named_with_its_reason(scored):
    store = scored[0]
    client = MlflowClient(store)
    run = client.create_run("1", tags={"outcome": "failed", "reason": "out of memory"})
    with pytest.raises(UserError, match=r"ended as failed \(out of memory\) and holds no scores"):
        load_scores([run.info.run_id], store)


def test_a_budget_below_the_floor_ends_in_one_line(scored):
    store, out, ids, _ = scored
    done = run_script("probe", store, out, f"run_id={ids['wfp8_afp8']}", "schemes=none", "effective_bits=7")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "effective_bits=7 cannot be reached: the feasible range is 8 to 16" in line
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("budget_gib=0.0001,0.0002", "context=64"),
            r"budget_gib=0\.0001 cannot be reached: the least is 0\.0\d+ GiB",
        ),
        (("budget_gib=1", "context=1000000"), r"context=1000000 is longer than the 2,048 positions of the model"),
    ],
)
def test_a_budget_in_gib_is_of_the_model_that_was_scored(scored, arguments, message):
    store, out, ids, _ = scored
    done = run_script("scheme", store, out, f"run_id={ids['grid']}", "schemes=none", "controls=none", *arguments)
    assert done.returncode == 2
    assert re.search(message, done.stderr)
    assert "Traceback" not in done.stderr


def test_a_scheme_by_memory_says_how_sure_it_is_in_the_report_the_figure_and_the_history(scored):
    store, out, ids, _ = scored
    sizes = with_sizes(load_scores([ids["grid"]], store), Load()).sizes
    groups = len(next(iter(sizes.formats.values())).choices)
    gib = f"{sizes.checkpoint(Assignment(['wfp8_afp8'] * groups)) / GIB:.6g}"  # of all groups in eight bits
    asked = ("schemes=none", "controls=none", f"budget_gib={gib}", "pareto=0")
    done = run_script("scheme", store, out, f"run_id={ids['grid']}", *asked)
    assert done.returncode == 0, done.stderr
    assert "## How sure" in done.stdout
    folder = Path(done.stdout.split("schemes: ")[1].splitlines()[0])
    (sure,) = json.loads((folder / "stability.json").read_text())
    assert (sure["scheme"], sure["choices"]) == (f"gib_{gib}", ["wfp8_afp8", "wint4_afp16", None])
    assert (folder / "figures" / f"stability_gib_{gib}.png").exists()
    row = history.schemes("layerbits", tracking_uri=store).set_index("scheme").loc[f"gib_{gib}"]
    assert row["stable_groups"] == sure["stable"]
    assert row["regret"] == sure["regret"] >= 0


def test_a_model_that_changed_since_it_was_scored_is_refused(scored, made):
    _, _, _, model = scored
    config = model / "config.json"
    text = config.read_text()
    config.write_text(text + "\n")
    try:
        with pytest.raises(UserError, match=r"was made from scores of tiny revision files-\w+, the model here is"):
            prepare(load_scheme(made[2] / "schemes" / "bits_9.json"))
    finally:
        config.write_text(text)
