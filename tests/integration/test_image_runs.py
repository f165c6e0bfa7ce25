"""Runs on pictures from the command line: scored, told by modality, exported and proven."""

import csv
import json
from unittest import mock

import numpy as np
import pytest
from mlflow import MlflowClient
from modelopt.torch.utils.serialization import safe_load
from PIL import Image

from layerbits.inputs.drawn import embedded
from layerbits.results.manifest import load_manifest
from layerbits.results.result import VISION_KINDS
from layerbits.schemes import load_scheme
from tests.families import WITH_PICTURES, WITHOUT_PROCESSOR, build_with_processor

from .entries import start
from .scoring_support import knowing

FAMILIES = [family for family in WITH_PICTURES if family not in WITHOUT_PROCESSOR]
_MADE = {}


def checkpoint(family, factory):
    """A tiny model that predicts the captions of the embedded pictures better than guessing."""
    if family not in _MADE:
        from transformers import AutoTokenizer

        folder = factory.mktemp(family) / family
        model = build_with_processor(family, folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokens = {t for row in embedded(8) for t in tokenizer(row.texts[-1])["input_ids"]}
        model.config.hidden_size = model.config.text_config.hidden_size
        knowing(model, tokens)
        del model.config.hidden_size
        model.save_pretrained(folder)
        _MADE[family] = folder
    return _MADE[family]


def run(folder, out, *more):
    done = start(
        "sensitivity", "model=hf", f"model.path={folder}", "model.name=tiny", "dataset=image_text", "dataset.size=8",
        "autoquant.batch_size=4", "autoquant.effective_bits=10", "device=cpu", "tracking=none", f"output_root={out}",
        *more,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (result,) = (out / "tmp").iterdir()
    return result


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Runs of families and arguments, each made once; who takes one only reads it."""
    made = {}

    def once(family, *more):
        if (family, *more) not in made:
            made[family, *more] = run(checkpoint(family, tmp_path_factory), tmp_path_factory.mktemp("scored"), *more)
        return made[family, *more]

    return once


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_on_pictures_ends_in_a_proven_export(family, scored, tmp_path):
    result = scored(family)
    told = json.loads((result / "manifest.json").read_text())["modality"]
    assert 0 < told["image_tokens"] < told["tokens"]
    assert len(told["ranges"]) == 14 or family.endswith("moe")
    assert all(low <= share <= high for share, low, high in zip(told["share"], told["low"], told["high"], strict=True))
    report = (result / "report" / "layer-sensitivity-report.md").read_text()
    assert "## Pictures and words" in report
    assert (result / "figures" / "modality.png").is_file()
    assert load_manifest(result).modality.to_json() == told
    exported = start(
        "export", f"run_id={result}", "schemes=none", "effective_bits=10", "device=cpu", "tracking=none",
        f"output_root={tmp_path}", f"export_root={tmp_path / 'exports'}",
    )  # fmt: skip
    assert exported.returncode == 0, exported.stderr + exported.stdout


@pytest.mark.parametrize("form", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("family", ["qwen3_vl", "llava", "gemma3", "internvl"])
def test_a_scored_vision_tower_is_exported_and_proven(family, form, scored, tmp_path):
    result = scored(family, "model.vision=true")
    kinds = {g.kind for g in load_manifest(result).groups}
    into = {"merger"} if family != "gemma3" else set()  # Gemma 3 has a bare matrix there
    assert kinds >= {*VISION_KINDS[:-1], *into, "qkv", "down"}
    exported = start(
        "export", f"run_id={result}", "schemes=none", "effective_bits=9", "vision_bits=12", f"format={form}",
        "device=cpu", "tracking=none", f"output_root={tmp_path}", f"export_root={tmp_path / 'exports'}",
    )  # fmt: skip
    assert exported.returncode == 0, exported.stderr + exported.stdout
    scheme = load_scheme(tmp_path / "exports" / "bits_9.report" / "scheme.json")
    bits = {c.name: c.bits for c in scheme.candidates}
    for tower, most in ((True, 12), (False, 9)):
        part = [
            (g.weights, bits.get(name, 16.0))
            for g, name in zip(scheme.groups, scheme.assignment, strict=True)
            if (g.kind in VISION_KINDS) == tower
        ]
        assert any(b < 16 for _, b in part)
        assert sum(w * b for w, b in part) <= (most + 1e-6) * sum(w for w, _ in part)


def test_a_probe_tells_words_after_pictures_from_text(scored, tmp_path):
    result = scored("qwen2_5_vl")
    done = start(
        "probe", f"run_id={result}", "schemes=none", "controls=none", "effective_bits=10", "rows=4", "batch_size=2",
        "device=cpu", "tracking=none", f"output_root={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "KL after pictures" in done.stdout
    (folder,) = (tmp_path / "tmp").glob("probe_*")
    found = json.loads((folder / "probe.json").read_text())
    assert found["pictured"] == 4
    (scheme,) = found["schemes"]
    assert set(scheme["by_modality"]) == {"pictures", "text"}
    parts = {s["name"]: s for s in scheme["difference"]["slices"]}
    for source, part in (("pictures", "pictures"), ("everyday", "text")):
        assert parts[f"from {source}"]["kl"] == pytest.approx(scheme["by_modality"][part][0])


def test_a_validation_measures_words_after_pictures(scored, tmp_path):
    result = scored("qwen2_5_vl")
    done = start(
        "validate", f"run_id={result}", "rows=4", "batch_size=2", "rankers=none", "device=cpu", "tracking=none",
        f"output_root={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "On plain text" in done.stdout


@pytest.fixture(scope="module")
def with_tower(scored):
    """A run that scored its vision tower."""
    return scored("qwen3_vl", "model.vision=true")


@pytest.fixture(scope="module")
def with_budgets(scored):
    """Runs that scored a tower under some budgets of its own, by budget."""
    return {
        (bits, *more): scored(
            "qwen3_vl", "model.vision=true", "autoquant.effective_bits=9", f"autoquant.vision_bits={bits}", *more
        )
        for bits, more in ((12, ()), (12, ("autoquant.engine=stock",)), (16, ()))
    }


def test_a_run_gives_its_tower_a_budget_of_its_own(with_tower, with_budgets):
    own, stock, none = map(load_manifest, with_budgets.values())
    shared = load_manifest(with_tower)
    tower = np.array([g.kind in VISION_KINDS for g in own.groups])
    weights = np.array([g.weights for g in own.groups])
    for result, most in ((own, (12, 9)), (none, (16, 9))):
        bits = np.array([16.0 if n is None else result.candidate.bits for n in result.allocation.assignment])
        for part, budget in ((tower, most[0]), (~tower, most[1])):
            assert (bits * weights)[part].sum() <= (budget + 1e-6) * weights[part].sum()
    quantized = np.array([n is not None for n in own.allocation.assignment])
    assert quantized[tower].any()
    assert quantized[~tower].any()
    assert not any(n for n, inside in zip(none.allocation.assignment, tower, strict=True) if inside)
    assert stock.allocation.assignment == own.allocation.assignment
    np.testing.assert_array_equal(own.scores, shared.scores)
    for folder, result in zip(with_budgets.values(), (own, stock, none), strict=True):
        state = safe_load(folder / "autoquant" / "autoquant_state.pt")
        best = state["best"]["recipe"]
        modules = [s["module_names"] for n, s in state["candidate_stats"].items() if best[n].num_bits < 16]
        pairs = zip(result.groups, result.allocation.assignment, strict=True)
        assert sorted(map(tuple, modules)) == sorted(group.modules for group, name in pairs if name is not None)
    assert len({r.tags["cell"] for r in (own, none, shared)}) == 3  # a grid takes none for another
    assert len({r.tags["fingerprint"] for r in (own, none, shared)}) == 1  # and scores them once


def test_a_run_and_a_scheme_solve_the_same_budgets(with_budgets, tmp_path):
    result = with_budgets[(12,)]
    done = start(
        "scheme", f"run_id={result}", "schemes=none", "controls=none", "effective_bits=9", "vision_bits=12", "pareto=0",
        "tracking=none", f"output_root={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("tmp/*/schemes/bits_9.json")
    assert load_scheme(file).assignment == load_manifest(result).allocation.assignment
    report = (result / "report" / "layer-sensitivity-report.md").read_text()
    assert "target of 9 over all but the vision tower and 12 over the tower (they take " in report


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["autoquant.vision_bits=12"], "which model.vision=true scores"),
        (
            ["model.vision=true", "autoquant.vision_bits=5"],
            "vision_bits=5 cannot be reached: the floor of wfp8_afp8",
        ),
        (
            ["model.vision=true", "autoquant.vision_bits=12", "model.exclude=[model.visual]"],
            "vision_bits=12, but no vision tower is scored",
        ),
    ],
)
def test_a_tower_budget_out_of_place_is_refused_before_the_model_is_loaded(tmp_path_factory, tmp_path, given, words):
    folder = checkpoint("qwen3_vl", tmp_path_factory)
    with mock.patch("layerbits.stages.run.load_model", side_effect=AssertionError("loaded")):
        done = start(
            "sensitivity", "model=hf", f"model.path={folder}", "dataset=image_text", "dataset.size=2", "device=cpu",
            "tracking=none", f"output_root={tmp_path}", *given,
        )  # fmt: skip
    assert done.returncode == 2
    assert words in done.stderr


def test_a_scheme_with_a_tower_is_probed(with_tower, tmp_path):
    given = (f"run_id={with_tower}", "schemes=none", "controls=none", "rows=4", "batch_size=2", "device=cpu")
    kl = {}
    for tower in (9, 16):
        out = tmp_path / str(tower)
        done = start(
            "probe", *given, "effective_bits=16", f"vision_bits={tower}", "tracking=none", f"output_root={out}"
        )
        assert done.returncode == 0, done.stderr
        (file,) = out.glob("tmp/probe_*/probe.json")
        (scheme,) = json.loads(file.read_text())["schemes"]
        kl[tower] = {name: value for name, (value, _) in scheme["by_modality"].items()}
    assert kl[9]["pictures"] > 1e-7
    assert kl[9]["text"] < 1e-12  # the tower has no part in plain text
    assert max(kl[16].values()) < 1e-12


def test_a_run_with_a_tower_is_validated(with_tower, tmp_path):
    done = start(
        "validate", f"run_id={with_tower}", "rows=4", "batch_size=2", "rankers=gradient,fisher,weight_mse",
        "device=cpu", "tracking=none", f"output_root={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "fisher cannot score a vision tower and are left out" in done.stdout
    (file,) = tmp_path.glob("tmp/validation_*/validation.csv")
    rows = list(csv.DictReader(file.open()))
    tower = [row for row in rows if row["kind"] in VISION_KINDS]
    assert {row["kind"] for row in tower} == set(VISION_KINDS)
    assert all(float(row["measured_kl"]) > 0 for row in rows)


def test_a_recipe_that_leaves_the_tower_out_says_so(tmp_path_factory, tmp_path):
    folder = checkpoint("qwen3_vl", tmp_path_factory)
    done = start(
        "sensitivity", "recipe=general/auto_quantize/nvfp4_fp8_at_5p4bits", "model=hf", f"model.path={folder}",
        "model.name=tiny", "dataset=image_text", "dataset.size=8", "autoquant.batch_size=4", "model.vision=true",
        "device=cpu", "tracking=none", f"output_root={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "leaves the vision tower out, so model.vision=true scores nothing of it" in done.stderr


def test_a_run_on_pictures_is_evaluated_on_words(with_tower, tmp_path):
    pytest.importorskip("lm_eval", reason="needs the extra `eval`")
    done = start(
        "evaluate", f"run_id={with_tower}", "schemes=none", "effective_bits=9", "vision_bits=12", "tasks=cloze",
        "limit=8", "rows=2", "device=cpu", "tracking=none", f"output_root={tmp_path}",
        LAYERBITS_CACHE=tmp_path / "cache", HF_HOME=tmp_path / "hf",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("tmp/evaluation_*/evaluation.json")
    found = json.loads(file.read_text())
    (scheme,) = found["schemes"]
    assert scheme["kl"] > 0
    changes = [
        abs(a["log_odds"] - b["log_odds"])
        for a, b in zip(found["unquantized"]["cloze"]["answers"], scheme["tasks"]["cloze"]["answers"], strict=True)
    ]
    assert len(changes) == 8
    assert min(changes) > 0


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        ("words.png", "words.png (LIST row 2) is no picture that can be read"),
        ("ok.png", "its words contain <|image_pad|>"),
    ],
)
def test_a_bad_row_ends_a_run_in_one_line(tmp_path_factory, tmp_path, picture, words):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "ok.png")
    (tmp_path / "words.png").write_text("no picture")
    rows = [{"image": "ok.png", "text": "a red square"}, {"image": picture, "text": "a <|image_pad|> square"}]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    done = start(
        "sensitivity", "model=hf", f"model.path={checkpoint('qwen2_5_vl', tmp_path_factory)}", "dataset=image_text",
        f"dataset.path={tmp_path}/list.jsonl", "dataset.size=2", "device=cpu", f"output_root={tmp_path}/out",
        f"tracking.uri=sqlite:///{tmp_path}/mlflow.db",
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert words.replace("LIST", f"{tmp_path}/list.jsonl") in line
    (run_of_it,) = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").search_runs(["1"])
    assert (run_of_it.info.status, run_of_it.data.tags["outcome"]) == ("FAILED", "failed")


def test_a_tower_without_pictures_is_refused(tmp_path_factory, tmp_path):
    folder = checkpoint("qwen2_5_vl", tmp_path_factory)
    done = start("sensitivity", "model=hf", f"model.path={folder}", "model.vision=true", "tracking=none", "device=cpu")
    assert done.returncode == 2
    assert "needs pictures" in done.stderr


def test_a_text_model_is_refused(tmp_path):
    done = start("sensitivity", "dataset=image_text", "tracking=none", "device=cpu", f"output_root={tmp_path}")
    assert done.returncode == 2
    assert "reads text alone" in done.stderr
