"""A recipe from the command line on the default model, and its scheme back as a recipe."""

import copy
import json
from pathlib import Path

import pytest
import torch
import yaml
from mlflow import MlflowClient

from layerbits.errors import UserError
from layerbits.history.scheme_inputs import load_scores
from layerbits.probing.apply import apply_scheme
from layerbits.probing.loading import prepare
from layerbits.recipes.recipe import load_recipe
from layerbits.schemes import load_scheme
from layerbits.scoring.steps import calibration_forward

from .entries import start
from .recipes_support import on_cpu

RECIPE = "general/auto_quantize/nvfp4_fp8_at_5p4bits"


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The runs and the folder of the recipe."""
    folder = tmp_path_factory.mktemp("recipe")
    store = f"sqlite:///{folder}/mlflow.db"
    done = start(
        "sensitivity", f"recipe={RECIPE}", "dataset.size=8", f"tracking.uri={store}", f"output_root={folder}/out"
    )
    assert done.returncode == 0, done.stderr
    client = MlflowClient(store)
    (experiment,) = [e for e in client.search_experiments() if e.name == "layerbits"]
    (made,) = (folder / "out" / "tmp").glob("recipe_*")
    return client, client.search_runs([experiment.experiment_id]), made, store


def test_a_recipe_is_one_parent_with_a_child_per_format(job):
    (parent,) = [r for r in job[1] if r.data.tags.get("layerbits.kind") == "recipe"]
    children = [r for r in job[1] if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert {(r.data.params["eff.quant_pair"], r.data.params["eff.format_name"]) for r in children} == {
        ("wfp4_afp4", "NVFP4_DEFAULT_CFG"),
        ("wfp8_afp8", "FP8_DEFAULT_CFG"),
    }
    assert {r.data.tags["recipe"] for r in children} == {RECIPE}
    assert {r.data.tags["outcome"] for r in job[1]} == {"ok"}
    params = parent.data.params
    assert params["eff.recipe"] == RECIPE
    assert params["eff.recipe_digest"] == load_recipe(RECIPE).digest
    assert (params["eff.target_effective_bits"], params["eff.cost_model"]) == ("5.4", "weight")
    metrics = parent.data.metrics
    assert 5.3 < metrics["recipe/effective_bits"] <= 5.4 + 1e-6
    assert metrics["recipe/score"] <= metrics["recipe/modelopt_score"]
    assert metrics["recipe/floor"] == 4.5


def test_its_artifacts_are_the_resolved_recipe_and_the_schemes(job):
    (parent,) = [r for r in job[1] if r.data.tags.get("layerbits.kind") == "recipe"]
    found = {a.path for a in job[0].list_artifacts(parent.info.run_id)}
    assert {"recipe", "recipe.md", "schemes", "modelopt", "exclude", "schemes.md", "schemes.json"} <= found
    resolved = yaml.safe_load((job[2] / "recipe" / "resolved.yaml").read_text())
    assert resolved["auto_quantize"]["constraints"]["effective_bits"] == 5.4
    groups = json.loads((job[2] / "recipe" / "recipe.json").read_text())["groups"]
    assert len(groups) == 30 * 4 + 1
    assert all(set(g["scores"]) == {"wfp4_afp4", "wfp8_afp8"} for g in groups)


def test_schemes_can_be_made_of_its_run(job):
    (parent,) = [r for r in job[1] if r.data.tags.get("layerbits.kind") == "recipe"]
    source = load_scores([parent.info.run_id], job[3])
    assert {c.name for c in source.candidates} == {"wfp4_afp4", "wfp8_afp8"}


def test_its_scheme_comes_back_as_a_recipe_with_equal_logits(job):
    import modelopt.torch.quantization as mtq

    name = RECIPE.rsplit("/", 1)[1]
    scheme = load_scheme(job[2] / "schemes" / f"{name}.json")
    recipe = load_recipe(str(job[2] / "modelopt" / f"{name}.yaml"))
    prepared = prepare(scheme)
    model = prepared.load("cpu").model
    ids = prepared.calibration[0].segments[0].input_ids[:1, :32]
    with apply_scheme(model, scheme, prepared.calibration), torch.no_grad():
        mine = model(ids).logits

    def forward_loop(m):
        for batch in prepared.calibration:
            calibration_forward(m, batch, need_logits=True)

    quantized = mtq.quantize(model, on_cpu(copy.deepcopy(recipe.fixed)), forward_loop)
    with torch.no_grad():
        assert torch.equal(quantized(ids).logits, mine)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipe=general/auto_quantize/nvfp4_fp8"], "did you mean general/auto_quantize/nvfp4_fp8_at_5p4bits"),
        (["recipe=general/speculative_decoding/eagle3"], "is of type speculative_eagle"),
        ([f"recipe={RECIPE}", "recipe_overrides=auto_quantize.constraints.effective_bits=99"], "must be in (0, 16]"),
        ([f"recipe={RECIPE}", "recipe_overrides=auto_quantize.constraints.effective_bits=4.2"], "range is 4.5 to 16"),
        (["recipe=huggingface/minimax_m3_vl/ptq/nvfp4_experts_only"], "it is for another architecture"),
    ],
)
def test_bad_recipes_end_with_one_line_and_status_2(arguments, message, tmp_path):
    done = start("sensitivity", *arguments, f"output_root={tmp_path}", "tracking=none")
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Loading weights" not in done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("metadata: {recipe_type: ptq}\n", "must contain 'quantize'"),
        ("quantize: {}\n", "has no metadata.recipe_type"),
        ("a: [", "is not YAML"),
        ("metadata: {recipe_type: auto_quantize}\nauto_quantize: {}\n", "auto_quantize.constraints: Field required"),
        (
            "metadata: {recipe_type: ptq}\nquantize: {quant_cfg: [{quantizer_name: '*', nope: 1}]}\n",
            "ModelOpt refuses it",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line(text, message, tmp_path):
    path = Path(tmp_path) / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(str(path))
    assert "\n" not in str(caught.value)
    assert "mine.yaml" in str(caught.value)
