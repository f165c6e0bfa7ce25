"""A search that ModelOpt ran elsewhere becomes a run: its checkpoint, read as plain data alone."""

import pickle

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from layerbits.errors import UserError
from layerbits.importing import read_state, state_results
from layerbits.recipes.recipe import load_recipe

from .entries import start
from .recipes_support import stock_search
from .scoring_support import tiny_model

RECIPE = "general/auto_quantize/nvfp4_fp8_at_5p4bits"


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    """The state that ``mtq.auto_quantize`` returns, and its file."""
    from modelopt.torch.utils.serialization import safe_save

    state, unclamped = stock_search(load_recipe(RECIPE), tiny_model("llama"))
    path = tmp_path_factory.mktemp("state") / "search.pt"
    safe_save(state, path)
    return state, unclamped, path


def test_scores_costs_and_choice_are_those_of_the_state(search):
    state, _, path = search
    results = state_results(read_state(path), "tiny")
    assert [r.candidate.name for r in results] == ["wfp4_afp4", "wfp8_afp8"]
    assert [r.candidate.bits for r in results] == [4.5, 8.0]
    stats = list(state["candidate_stats"].values())
    for position, result in enumerate(results):
        assert result.model.name == "tiny"
        np.testing.assert_array_equal(result.scores, [s["scores"][position] for s in stats])
        assert [g.weights for g in result.groups] == [s["uncompressed_cost"] for s in stats]
        assert result.groups[0].modules == tuple(stats[0]["module_names"])
        chosen = [r == s["formats"][position] for r, s in zip(state["best"]["recipe"].values(), stats, strict=True)]
        assert [name is not None for name in result.allocation.assignment] == chosen
        assert result.allocation.effective_bits_modelopt == state["best"]["constraints"]["effective_bits"]
        assert result.tags["scores_clamped"] == "true"


def test_a_state_is_imported_as_a_run_per_format(search, tmp_path):
    store = f"sqlite:///{tmp_path}/mlflow.db"
    done = start(
        "import_results", f"path={search[2]}", "model_name=tiny", f"tracking.uri={store}", f"output_root={tmp_path}"
    )
    assert done.returncode == 0, done.stderr
    client = MlflowClient(store)
    (experiment,) = [e for e in client.search_experiments() if e.name == "layerbits"]
    runs = client.search_runs([experiment.experiment_id], "tags.source = 'imported'")
    assert {r.data.params["eff.quant_pair"] for r in runs} == {"wfp4_afp4", "wfp8_afp8"}
    assert all(r.data.tags["import.layout"] == "AutoQuantize state" for r in runs)


class _Evil:
    def __reduce__(self):
        return (print, ("run",))


def test_a_file_that_would_run_code_is_refused(tmp_path, capsys):
    path = tmp_path / "evil.pt"
    torch.save({"candidate_stats": _Evil()}, path)
    with pytest.raises(UserError, match="more than plain data"):
        read_state(path)
    assert "run" not in capsys.readouterr().out.split()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"nothing", "is not a file of torch.save|more than plain data"),
        (pickle.dumps({"a": 1}), "is no AutoQuantize state|torch.save|plain data"),
    ],
)
def test_other_files_are_refused_in_one_line(content, message, tmp_path):
    path = tmp_path / "other.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_state(path)
    assert "\n" not in str(caught.value)
