"""Whole runs of recipes that need more than the default one: ModelOpt's own search, a KV cache, a format on its own."""

import json

import pytest
import yaml
from mlflow import MlflowClient

from layerbits.recipes.recipe import load_recipe

from .entries import start
from .recipes_support import made_recipe
from .scoring_support import small_checkpoint

CAST = {"num_bits": "e4m3", "use_constant_amax": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model with a small tokenizer."""
    folder = tmp_path_factory.mktemp("recipe_runs") / "model"
    small_checkpoint(folder)
    return folder


def run(model, folder, recipe, *more):
    given = ("model=hf", f"model.path={model}", "model.dtype=float32", "dataset.size=8", "autoquant.seq_len=32")
    store = f"tracking.uri=sqlite:///{folder}/mlflow.db"
    return start("sensitivity", f"recipe={recipe}", *given, store, f"output_root={folder}/out", *more)


def results(folder):
    """The runs by candidate, and the folder of the recipe."""
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "layerbits"]
    runs = client.search_runs([experiment.experiment_id])
    assert {r.data.tags["outcome"] for r in runs} == {"ok"}
    (made,) = (folder / "out" / "tmp").glob("recipe_*")
    return {r.data.params["eff.quant_pair"]: r for r in runs if "eff.quant_pair" in r.data.params}, made


@pytest.mark.parametrize(
    ("recipe", "algorithm", "engines"),
    [
        ("general/auto_quantize/w4a8_awq_beta_fp8_at_6p0bits", "awq_lite", {"stock", "onepass"}),
        ("huggingface/gemma/ptq/int8_sq-kv_fp8_cast", "smoothquant", {"stock"}),
    ],
    ids=["awq_lite", "smoothquant"],
)
def test_what_only_modelopt_calibrates_is_run_to_its_end(recipe, algorithm, engines, model, tmp_path):
    done = run(model, tmp_path, recipe)
    assert done.returncode == 0, done.stderr
    runs, made = results(tmp_path)
    assert {r.data.params["eff.engine"] for r in runs.values()} == engines
    assert all(r.data.metrics["summary/score_sum"] > 0 for r in runs.values())
    scheme = json.loads((made / "schemes" / f"{recipe.rsplit('/', 1)[1]}.json").read_text())
    used = [c["config"]["algorithm"] for c in scheme["candidates"]]
    assert algorithm in str(used)
    assert scheme["kv_cache"] == ("fp8_cast" if algorithm == "smoothquant" else "none")


def test_a_fixed_part_with_a_kv_cache_goes_through_the_job_and_into_the_scheme(model, tmp_path):
    fixed = {"algorithm": "max", "quant_cfg": [
        {"$import": "none"},
        {"quantizer_name": "*mlp.down_proj.weight_quantizer", "cfg": {"num_bits": "e4m3"}},
        {"quantizer_name": "*mlp.down_proj.input_quantizer", "cfg": {"num_bits": "e4m3"}},
        {"quantizer_name": "*[kv]_bmm_quantizer", "cfg": CAST},
    ]}  # fmt: skip
    spaces = [{"module_name_patterns": ["*self_attn*"], "candidate_formats": [{"$import": "a"}, {"$import": "b"}]}]
    held = made_recipe(tmp_path, quantize=fixed, module_search_spaces=spaces)
    assert held.held_kv is not None
    budget = "recipe_overrides=auto_quantize.constraints.effective_bits=15.85"  # nearly all weights are the head's
    done = run(model, tmp_path, tmp_path / "mine.yaml", budget)
    assert done.returncode == 0, done.stderr
    _, made = results(tmp_path)
    scheme = json.loads((made / "schemes" / "mine.json").read_text())
    assert scheme["kv_cache"] == "fp8_cast"
    quantized = {m for g, n in zip(scheme["groups"], scheme["assignment"], strict=True) if n for m in g["modules"]}
    assert {f"model.layers.{b}.mlp.down_proj" for b in range(2)} <= quantized
    assert "2 groups that the recipe gives have no predicted KL" in scheme["notes"]
    back = load_recipe(str(made / "modelopt" / "mine.yaml"))
    assert back.cache_settings == {"num_bits": (4, 3), "use_constant_amax": True}
    assert yaml.safe_load((made / "recipe" / "resolved.yaml").read_text())["quantize"]
    refused = run(model, tmp_path, tmp_path / "mine.yaml", "autoquant.kv_cache=fp8")
    assert refused.returncode == 2
    assert "keeps keys and values quantized while it scores" in refused.stderr


def test_what_the_gpu_computes_of_each_format_stands_before_the_pass_and_in_the_reports(model, tmp_path):
    done = run(model, tmp_path, "general/auto_quantize/nvfp4_fp8_at_5p4bits", "target=h200")
    assert done.returncode == 0, done.stderr
    _, made = results(tmp_path)
    said = [line.removeprefix("warning: ") for line in done.stderr.splitlines() if "on Hopper vLLM" in line]
    fp4, fp8 = sorted(said, key=lambda line: "wfp8_afp8 (FP8)" in line)
    assert "does not compute wfp4_afp4 (NVFP4) as it is scored" in fp4
    assert "computes wfp8_afp8 (FP8) as it is scored" in fp8
    assert done.stderr.index(fp4) < done.stderr.index("scoring:")  # the bar of the pass
    text = (made / "recipe.md").read_text()
    assert f"As served:\n\n- {said[0]}\n- {said[1]}\n" in text
    for name, line in (("wfp4_afp4", fp4), ("wfp8_afp8", fp8)):
        (report,) = (tmp_path / "out" / "tmp").glob(f"{name}*/report/layer-sensitivity-report.md")
        assert line in report.read_text()
    assert "As served" not in made.joinpath("schemes.md").read_text()


def test_a_formats_run_is_not_verified_on_its_own(model, tmp_path):
    done = run(model, tmp_path, "general/auto_quantize/nvfp4_fp8_at_5p4bits", "tracking=none")
    assert done.returncode == 0, done.stderr
    (child,) = (tmp_path / "out" / "tmp").glob("wfp8_afp8*")
    refused = start("verify", f"run_id={child}", "tracking=none", f"output_root={tmp_path}/out")
    assert refused.returncode == 2
    assert "is one format of recipe general/auto_quantize/nvfp4_fp8_at_5p4bits" in refused.stderr
