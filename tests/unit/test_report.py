"""Reports: what they tell, and what is on disk."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest

from layerbits.atomic import atomic
from layerbits.errors import UserError
from layerbits.report import files, json_report, markdown_report, note, rebuild, write_report
from layerbits.report.wording import config_words, modules_words, quantizer_words, rows_words
from layerbits.results.assignment import Assignment
from layerbits.results.bootstrap import with_intervals
from layerbits.results.manifest import load_manifest
from layerbits.results.result import NonFinite

PAIRS = ("wint8_afp16", "wfp8_afp8", "wfp4_afp16")


def section(text, title):
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def cells(text, title):
    """Cells of the first table of a section, the titles first."""
    lines = [line for line in section(text, title).splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_tables_are_well_formed(make_result):
    text = markdown_report(make_result(lm_head=True, nonfinite=["B00.o"]))
    for table in re.findall(r"(?:^\|.*\|\n?)+", text, re.MULTILINE):
        counts = {len(re.split(r"(?<!\\)\|", row)) for row in table.strip().splitlines()}
        assert len(counts) == 1


def test_a_bar_inside_a_cell_does_not_split_it(make_result):
    result = make_result()
    text = markdown_report(replace(result, model=replace(result.model, source="a|b")))
    assert "`a\\|b`" in text


def test_the_ten_most_and_least_sensitive_are_listed(make_result):
    result = make_result(blocks=6)
    text = markdown_report(result)
    order = [row["layer"] for row in result.rows()]
    assert [row[1].strip("`") for row in cells(text, "Most sensitive groups")[1:]] == order[:10]
    assert [row[1].strip("`") for row in cells(text, "Least sensitive groups")[1:]] == order[:-11:-1]


def test_few_groups_are_listed_once(make_result):
    result = make_result(blocks=3)
    text = markdown_report(result)
    assert len(cells(text, "Least sensitive groups")) == 1 + 2
    assert "## Least" not in markdown_report(make_result(blocks=2))


def test_the_exclude_list_can_be_pasted(make_result):
    result = make_result(blocks=6)
    pasted = json.loads(re.search(r"```json\n(.*?)```", markdown_report(result), re.DOTALL)[1])
    pairs = zip(result.groups, result.allocation.assignment, strict=True)
    assert pasted == [m for group, chosen in pairs if chosen is None for m in group.modules]
    assert pasted


def test_time_and_memory_are_in_words(make_result):
    text = markdown_report(make_result())
    assert "| peak memory of the process (GB) | 1.75 |" in text
    assert not re.search(r"^\| \w+_(gb|mode|candidates) \|", text, re.MULTILINE)


def test_an_empty_exclude_list_is_said(make_result):
    text = markdown_report(make_result(target_bits=8.0))
    assert "Every group is quantized" in section(text, "Recipe")
    assert "```" not in text


def test_both_counts_of_bits_are_told(make_result):
    result = make_result(pair="wfp4_afp16", target_bits=6.0)
    text = section(markdown_report(result), "In short")
    assert f"**Effective bits {result.allocation.effective_bits:.3f}**" in text
    assert f"ModelOpt counts {result.allocation.effective_bits_modelopt:.3f}" in text
    assert "wfp4_afp16 4.25 (ModelOpt 4)" in text


def test_the_budget_of_a_tower_is_told_beside_the_other(make_result):
    shared = make_result(pair="wfp4_afp16", blocks=4, target_bits=6.0)
    groups = tuple(replace(g, block=None, kind="vision_fc1") if g.block == 3 else g for g in shared.groups)
    names = ["wfp4_afp16" if g.kind != "vision_fc1" or g.key.endswith("down") else None for g in groups]
    apart = replace(shared.allocation, vision_bits=14.0, assignment=Assignment(names))
    result = replace(shared, groups=groups, allocation=apart)
    weights = {g.key.split(".")[1]: g.weights for g in groups if g.kind == "vision_fc1"}
    tower = 16 - 11.75 * weights["down"] / sum(weights.values())
    words = f"6 over all but the vision tower and 14 over the tower (they take 4.250 and {tower:.3f})"
    assert words in markdown_report(result)
    assert words in note(result)
    recipe = json_report(result)["recipe"]
    assert (recipe["vision_bits"], recipe["other_effective_bits"]) == (14, 4.25)
    assert recipe["vision_effective_bits"] == pytest.approx(tower)
    assert "vision_bits" not in json_report(shared)["recipe"]
    unknown = markdown_report(replace(result, allocation=replace(apart, assignment=Assignment())))
    assert "14 over the tower:" in unknown


def test_warnings_stand_before_every_number(make_result):
    result = replace(make_result(nonfinite=["B02.down"]), warnings=("only 12 rows: too few to rank by",))
    top = markdown_report(result).split("## In short")[0]
    assert "1 of 24 groups is not finite: B02.down (overflow)" in top
    assert "- only 12 rows: too few to rank by" in top


def test_a_clean_result_has_nothing_to_read_first(make_result):
    assert "Read this first" not in markdown_report(make_result())


def test_a_sample_that_is_not_finite_is_told_though_its_group_has_a_score(make_result):
    result = replace(make_result(), nonfinite=(NonFinite("B01.o", "wint8_afp16", 3, "inf gradient"),))
    (sentence,) = json_report(result)["attention"]
    assert "B01.o sample 3 (inf gradient)" in sentence


def test_many_bad_groups_are_counted_not_all_named(make_result):
    keys = [f"B{b:02d}.{k}" for b in range(10) for k in ("qkv", "o", "down")]
    (sentence,) = json_report(make_result(blocks=10, nonfinite=keys))["attention"]
    assert "30 of 40 groups" in sentence
    assert "and 10 more" in sentence


def test_an_unknown_predicted_kl_is_said_not_shown_as_zero(make_result):
    result = make_result()
    unknown = replace(result, predicted_kl=np.full_like(result.scores, np.nan))
    assert json_report(unknown)["candidates"][0]["predicted_kl_sum"] is None
    assert "not known for this result" in markdown_report(unknown)
    assert "predicted KL not known" in note(unknown)


def test_json_is_strict_and_versioned(make_result):
    data = json_report(make_result(nonfinite=["B00.qkv"]))
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert data["schema_version"] == 1
    assert data["candidates"][0]["layers"][-1]["score"] is None


def test_sums_and_shares_agree_with_the_result(make_result):
    result = make_result(nonfinite=["B00.qkv"])
    (candidate,) = json_report(result)["candidates"]
    assert candidate["predicted_kl_sum"] == result.total("predicted_kl")
    assert candidate["score_sum"] == result.total("scores")
    assert {k["kind"]: k["share"] for k in candidate["kinds"]} == result.shares()
    assert sum(x["share"] or 0 for x in candidate["layers"]) == pytest.approx(1)
    assert sum(k["predicted_kl"] for k in candidate["kinds"]) == pytest.approx(candidate["predicted_kl_sum"])


def test_intervals_become_columns_with_ties(make_result):
    result = with_intervals(make_result(blocks=6, samples=64))
    rows = cells(markdown_report(result), "Most sensitive groups")
    shown = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    for row, known in zip(shown, result.rows(), strict=False):
        assert row["low"] == f"{known['low']:.3g}"
        assert row["high"] == f"{known['high']:.3g}"
        assert row["ranks"].split("–")[0] == str(known["rank_low"])
        assert row["tied with"].startswith(f"`{known['tied'][0]}`" if known["tied"] else "–")


def test_the_captions_for_a_stable_top_are_told(make_result):
    result = with_intervals(make_result(blocks=6, samples=64))
    ends = replace(result.intervals, top_overlap=8.04, top_captions=128.0)
    text = markdown_report(replace(result, intervals=ends))
    assert "With 64 more captions the top 10 would be stable" in text
    assert "would share 8.0 of the top 10" in note(replace(result, intervals=ends))


def test_a_result_without_single_captions_says_that_it_has_no_intervals(make_result):
    result = with_intervals(make_result(samples=0))
    text = markdown_report(result)
    assert "low" not in cells(text, "Most sensitive groups")[0]
    assert "There are no intervals" in text
    assert json_report(result)["intervals"] is None


def test_kl_div_is_called_measured(make_result):
    text = markdown_report(make_result(method="kl_div"))
    assert "measured KL (nats/token)" in text
    assert "redicted KL" not in text


def test_the_note_has_ten_lines_with_the_top_five(make_result):
    result = make_result(blocks=30)
    lines = note(result).splitlines()
    assert len(lines) == 10
    assert [re.search(r"`(.+?)`", line)[1] for line in lines[5:]] == [row["layer"] for row in result.rows()[:5]]
    assert f"{result.total('predicted_kl'):.3g} nats/token" in lines[3]


def test_the_note_points_to_warnings(make_result):
    assert "1 warning: read the report first" in note(make_result(nonfinite=["B00.o"]))


@pytest.fixture(scope="module")
def written(make_result, tmp_path_factory):
    """A result with every kind of content, on disk: the result, the folder, the paths that were returned."""
    result = with_intervals(make_result(blocks=3, samples=8, nonfinite=["B01.o"]))
    folder = tmp_path_factory.mktemp("run")
    return result, folder, write_report(result, folder)


def files_of(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_report_names_every_figure_that_is_written(written):
    _, folder, paths = written
    report = (folder / "report" / "layer-sensitivity-report.md").read_text()
    drawn = {str(path.relative_to(folder)) for path in paths if path.suffix == ".png"}
    assert len(drawn) == 4
    assert set(re.findall(r"`(figures/\S+?)`", report)) == drawn


def test_report_has_no_relative_links_which_the_viewer_of_mlflow_disables(written):
    report = (written[1] / "report" / "layer-sensitivity-report.md").read_text()
    assert not re.findall(r"\]\((?!https?://)", report)


def test_write_report_returns_exactly_what_it_wrote(written):
    _, folder, paths = written
    assert {p.relative_to(folder) for p in paths} == set(files_of(folder))
    assert folder / "sensitivity" / "scores.parquet" in paths


def test_written_samples_are_read_back_with_the_manifest(written):
    result, folder, _ = written
    again = load_manifest(folder)
    assert np.allclose(again.sample_kl, result.sample_kl, rtol=1e-6, equal_nan=True)
    assert np.array_equal(again.sample_tokens, result.sample_tokens)


def test_json_report_on_disk_is_the_json_report(written):
    result, folder, _ = written
    assert json.loads((folder / "report" / "layer-sensitivity-report.json").read_text()) == json_report(result)


def test_a_result_without_samples_writes_none(make_result, tmp_path):
    write_report(make_result(blocks=1, samples=0), tmp_path)
    assert (tmp_path / "manifest.json").is_file()
    assert not (tmp_path / "sensitivity").exists()


def test_rebuild_gives_the_same_files_without_a_heavy_import(written, tmp_path, python):
    code = (
        "import sys; from pathlib import Path; from layerbits.report import rebuild; "
        "print(rebuild(Path(sys.argv[1]), Path(sys.argv[2]))); "
        "print([m for m in ('torch', 'modelopt', 'mlflow', 'transformers', 'matplotlib.pyplot') if m in sys.modules])"
    )
    out = python(code, written[1] / "manifest.json", tmp_path)
    assert out == [str(tmp_path / "report" / "layer-sensitivity-report.md"), "[]"]
    rebuilt, first = files_of(tmp_path), files_of(written[1])
    assert len(rebuilt) == 6
    assert rebuilt == {path: first[path] for path in rebuilt}


@pytest.mark.parametrize("content", ["", "[1, 2]", '{"layers": {}}', '{"schema_version": 99}'])
def test_rebuild_refuses_what_is_no_manifest(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError):
        rebuild(tmp_path / "manifest.json", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "report.md"
    path.write_text("old")
    with pytest.raises(TypeError), atomic(path) as file:
        file.writelines([b"half", None])
    assert [p.name for p in tmp_path.iterdir()] == ["report.md"]
    assert path.read_text() == "old"


def test_atomic_makes_a_file_that_others_can_read(tmp_path):
    with atomic(tmp_path / "folder" / "file") as file:
        file.write(b"x")
    assert (tmp_path / "folder" / "file").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    ("cfg", "quantizer", "words"),
    [
        (None, "input_quantizer", "not quantized, compute dtype"),
        ({"num_bits": 8, "axis": 0}, "weight_quantizer", "INT8, a scale per output channel, static"),
        ({"num_bits": 8, "axis": 1}, "weight_quantizer", "INT8, a scale per input channel, static"),
        ({"num_bits": [4, 3], "axis": None}, "input_quantizer", "FP8 (E4M3), a scale per tensor, static"),
        (
            {"num_bits": 8, "type": "dynamic", "block_sizes": {"-1": None}},
            "input_quantizer",
            "INT8, a scale per token, dynamic",
        ),
        (
            {"num_bits": [2, 1], "block_sizes": {"-1": 32, "type": "dynamic", "scale_bits": [8, 0]}},
            "weight_quantizer",
            "FP4 (E2M1), blocks of 32 with E8M0 scales, dynamic",
        ),
        ({"num_bits": 8, "axis": [0]}, "weight_quantizer", "INT8, a scale per output channel, static"),
        ({"num_bits": 8, "axis": [0, 1]}, "input_quantizer", "INT8, a scale per axis (0, 1), static"),
        (
            [{"num_bits": 4, "block_sizes": {"-1": 128, "type": "static"}}, {"num_bits": [4, 3]}],
            "weight_quantizer",
            "INT4, blocks of 128, static, then FP8 (E4M3), a scale per tensor, static",
        ),
    ],
)
def test_quantizer_settings_in_words(cfg, quantizer, words):
    assert quantizer_words(cfg, quantizer) == words


def test_an_unknown_configuration_is_not_known():
    assert set(config_words({}).values()) == {"not known"}


def test_module_names_say_what_they_share_once():
    assert modules_words(["a.mlp.gate_proj", "a.mlp.up_proj"]) == "`a.mlp`: `gate_proj`, `up_proj`"
    assert modules_words(["a.x", "b.y"]) == "`a.x`, `b.y`"
    assert modules_words(["lm_head"]) == "`lm_head`"


def test_synthetic_result_is_consistent(make_result):
    result = make_result()
    assert np.allclose(result.sample_kl.sum(axis=0), result.predicted_kl)
    tokens = np.array(result.calibration.batch_loss_tokens)
    assert tokens.sum() == result.calibration.loss_tokens == result.sample_tokens.sum()
    per_batch = result.scores / len(tokens)
    assert np.allclose(0.5 * (tokens**2).sum() * per_batch / tokens.sum(), result.predicted_kl)
    assert math.isclose(result.allocation.score, sum(r["score"] for r in result.rows() if r["chosen"]))


def test_published_table_gets_a_full_report(published):
    text = markdown_report(published("qwen3_vl_4b_lm_medium/wfp8_afp8"))
    assert cells(text, "In short")[1][2] == "3.98"
    assert cells(text, "Most sensitive groups")[1][1] == "`B04.gate_up`"


def test_a_report_that_cannot_be_made_leaves_the_rest(make_result, tmp_path, monkeypatch, capsys):
    def broken(_result):
        raise KeyError("gone")

    monkeypatch.setattr(files, "markdown_report", broken)
    written = files.write_report(make_result(), tmp_path)
    assert {path.name for path in written} > {"manifest.json", "layer-sensitivity-report.json", "heatmap.png"}
    assert not (tmp_path / files.MARKDOWN).exists()
    assert "layer-sensitivity-report.md is left out (KeyError" in capsys.readouterr().err


def test_a_report_that_cannot_be_made_again_is_an_error(make_result, tmp_path, monkeypatch):
    files.write_report(make_result(), tmp_path)
    monkeypatch.setattr(files, "markdown_report", lambda _result: 1 / 0)
    with pytest.raises(UserError, match="cannot be made"):
        files.rebuild(tmp_path / "manifest.json", tmp_path / "again")


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ("everyday", "packed, 128 tokens each"),
        ("image_text", "a chat about pictures each, never cut"),
        ("mixed", "a chat about pictures each, never cut; captions packed, 128 tokens each"),
    ],
)
def test_rows_are_said_as_they_are_made(dataset, words):
    assert rows_words(dataset, "packed", 128) == words
