"""What somebody sees who opens MLflow's UI on an experiment: a real server, a real browser.

Screenshots stay in outputs/screenshots, or in the folder that LAYERBITS_SCREENSHOTS names.
"""

import json
import os
import urllib.parse
from dataclasses import replace

import mlflow
import pytest

from layerbits import tracking
from layerbits.atomic import write_json
from layerbits.grid import cells, run_names
from layerbits.report import write_report
from layerbits.results.manifest import to_manifest
from layerbits.tracking import contract
from layerbits.tracking.uris import run_link
from layerbits.tracking.view import view_links
from tests.integration.servers import running_mlflow
from tests.unit.conftest import synthetic

pytest_plugins = ["tests.integration.servers"]

PAIRS = ("wfp8_afp8", "wfp8_afp16", "wint8_afp16", "wint8_aint8", "wfp4_afp8", "wfp4_afp16")
GRANULARITIES = ("default", "a_per_token_dynamic", "w_per_tensor", "w_group64")
TITLES = {"qkv": "qkv", "o": "attention out", "gate_up": "gate and up", "down": "down"}
CELLS = cells(["wfp8_afp8", "wint8_afp16"], ["default", "a_per_token_dynamic", "w_group64"], ["small", "medium"])
CARD = "[data-testid=experiment-view-compare-runs-card]"
DRAWN = f"[...document.querySelectorAll('{CARD}:has(.js-plotly-plot)')]"
# Of each chart: the title, the scale of its values, and its lines by run, without their shadows.
CHARTS = f"""{DRAWN}.map(card => {{
  const plot = card.querySelector('.js-plotly-plot');
  const lines = plot.data.filter(t => t.type === 'scatter' && t.hoverinfo !== 'skip');
  return {{
    title: card.innerText.split('\\n')[0], type: plot.data[0].type, scale: plot.layout.yaxis.type,
    lines: Object.fromEntries(lines.map(t => [t.uuid, {{x: [...t.x], y: [...t.y], color: t.marker.color}}])),
    bars: plot.data.filter(t => t.type === 'bar').flatMap(t => [...t.x]),
  }}
}})"""


@pytest.fixture(scope="module")
def results():
    return {pair: synthetic(blocks=8, pair=pair, seed=seed) for seed, pair in enumerate(PAIRS)}


@pytest.fixture(scope="module")
def site(chromium, results, tmp_path_factory):
    """A server on six runs side by side (``pairs``), on a grid of 2 pairs x 3 granularities x 2 sizes (``grid``), and
    on one pair under several overlays (``granularities``)."""
    folder = tmp_path_factory.mktemp("site")
    backend = f"sqlite:///{folder / 'mlflow.db'}"
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("MLFLOW_", "LAYERBITS_"))]:
            patch.delenv(name)
        tracking.open_store(backend, folder)
        for pair, result in results.items():
            if pair == PAIRS[-1]:
                write_report(result, folder / pair)
            else:
                write_json(folder / pair / "manifest.json", to_manifest(result))
            log(result, folder / pair, "pairs")
        with tracking.parent_run("grid tiny_llama", "grid"):
            for cell, name in run_names(CELLS, "tiny_llama").items():
                result = of_cell(cell)
                write_json(folder / name / "manifest.json", to_manifest(result))
                log(result, folder / name, "grid", name)
        for seed, granularity in enumerate(GRANULARITIES):
            result = synthetic(blocks=8, pair="wint8_afp16", seed=seed)
            result = replace(result, candidate=replace(result.candidate, granularity=granularity))
            write_json(folder / granularity / "manifest.json", to_manifest(result))
            log(result, folder / granularity, "granularities")
        mlflow.set_tracking_uri(None)
    with running_mlflow(folder, backend) as server:
        yield server


def log(result, folder, experiment, name=None):
    with tracking.start_run(name or result.run_name, experiment, system_metrics=False) as session:
        tracking.log_result(session, result, folder)


def of_cell(cell):
    result = synthetic(blocks=8, pair=cell.quant_pair, seed=CELLS.index(cell))
    return replace(
        result,
        candidate=replace(result.candidate, granularity=cell.granularity),
        calibration=replace(result.calibration, size=cell.dataset_size),
    )


@pytest.fixture(scope="module")
def client(site):
    return mlflow.MlflowClient(site.url)


@pytest.fixture(scope="module")
def links(site, client):
    return view_links(client, site.url)


@pytest.fixture(scope="module")
def runs(client):
    """Pair → its run in ``pairs``."""
    found = client.search_runs([client.get_experiment_by_name("pairs").experiment_id])
    return {run.data.params["eff.quant_pair"]: run for run in found}


def charts(page, count):
    """What the first ``count`` charts of the page show, once they are drawn; MLflow draws what is in sight."""
    drawn = f"{DRAWN}.length >= {count} && {DRAWN}.every(card => card.querySelectorAll('.main-svg').length >= 3)"
    page.wait_for_function(drawn)
    return page.evaluate(CHARTS)[:count]


def test_the_link_opens_on_the_overlay_of_all_pairs(page, links, results, shoot):
    page.goto(links["pairs"])
    found = charts(page, 6)
    shoot("overlay-pairs")
    for chart, kind in zip(found[:4], TITLES, strict=True):
        assert chart["scale"] == "log"
        shown = {line["color"]: list(zip(line["x"], line["y"], strict=True)) for line in chart["lines"].values()}
        assert shown == {color(result): by_block(result, kind) for result in results.values()}


def test_a_grid_on_a_laptop_has_titled_charts_with_a_line_for_each_cell(page, links, shoot):
    page.set_viewport_size({"width": 1500, "height": 1000})
    page.goto(links["grid"])
    found = charts(page, 4)
    shoot("overlay-grid")
    assert [chart["title"] for chart in found] == list(TITLES.values())
    titles = page.locator(f"{CARD} h4").all()[:4]
    assert [title.evaluate("e => e.scrollWidth > e.clientWidth") for title in titles] == [False] * 4
    wanted = {color(of_cell(cell)) for cell in CELLS}
    assert len(wanted) == 6  # two sizes share a colour
    for chart in found:
        assert len(chart["lines"]) == len(CELLS)
        assert {line["color"] for line in chart["lines"].values()} == wanted


def test_names_in_the_list_of_a_grid_begin_with_what_differs(page, links):
    page.set_viewport_size({"width": 1500, "height": 1000})
    page.goto(links["grid"])
    names = page.locator(".ag-center-cols-container [role=row] a, .ag-pinned-left-cols-container [role=row] a")
    names.nth(len(CELLS) - 1).wait_for()
    seen = [name[:16] for name in names.all_inner_texts()]  # so many letters are not cut
    assert {name[:14] for name in seen} == {f"{c.quant_pair} {c.dataset_size}"[:14] for c in CELLS}


def color(result):
    return contract.tags(result)["mlflow.runColor"]


def by_block(result, kind):
    return [(at, value) for key, value, at in contract.metrics(result) if key == f"predicted_kl_by_layer/{kind}"]


def test_bars_follow_and_the_rest_is_folded(page, links, results, shoot):
    page.goto(links["pairs"])
    bars = charts(page, 6)[4:]
    page.locator(CARD).nth(4).scroll_into_view_if_needed()
    shoot("bars")
    titles = ["summary/predicted_kl_sum", "summary/effective_bits"]
    assert [(bar["title"], bar["type"]) for bar in bars] == [(title, "bar") for title in titles]
    assert sorted(bars[0]["bars"]) == pytest.approx(sorted(result.total() for result in results.values()))
    headers = page.get_by_test_id("experiment-view-compare-runs-section-header").all_inner_texts()
    names = [header.split("\n")[0] for header in headers]
    assert names[:4] == ["Predicted KL by block (nats per token)", "Whole model", "share", "score_by_layer"]
    assert "Model metrics" not in names


def test_the_list_shows_pair_granularity_bits_and_sums(page, links, runs, shoot):
    page.goto(links["pairs"].replace("&compareRunsMode=CHART", ""))
    page.locator(".ag-center-cols-container [role=row]").nth(len(PAIRS) - 1).wait_for()
    shoot("list")
    cells = page.locator(".ag-header-cell").all()
    header = [cell.inner_text() for cell in sorted(cells, key=lambda cell: cell.bounding_box()["x"])]
    columns = [text for text in header if text.startswith(("eff.", "summary/"))]
    sums = ["summary/effective_bits", "summary/score_sum", "summary/predicted_kl_sum"]
    assert columns == ["eff.quant_pair", "eff.granularity", *sums]
    for pair, run in runs.items():
        row = page.locator("[role=row]", has=page.get_by_text(pair, exact=True)).last
        assert f"{run.data.metrics['summary/effective_bits']:.6f}"[:-1] in row.inner_text()


def test_the_compare_page_has_a_table_of_the_runs(page, site, runs, shoot):
    ids = json.dumps([run.info.run_id for run in runs.values()])
    experiments = json.dumps([next(iter(runs.values())).info.experiment_id])
    query = urllib.parse.urlencode({"runs": ids, "experiments": experiments})
    page.goto(f"{site.url}/#/compare-runs?{query}&workflowType=machine_learning")
    table = page.locator("table", has_text="eff.quant_pair").last
    table.scroll_into_view_if_needed()
    shoot("compare")
    row = table.locator("tr", has_text="eff.quant_pair")
    assert [text for text in row.locator("td").all_inner_texts() if text] == list(runs)


def test_the_report_is_rendered(page, site, runs, shoot):
    run = runs[PAIRS[-1]]
    at = f"{site.url}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    page.goto(f"{at}/artifacts/report/layer-sensitivity-report.md?workflowType=machine_learning")
    page.get_by_role("heading", name=f"Layer sensitivity: {run.info.run_name}").wait_for()
    shoot("report")
    scores = {key: value for key, value in run.data.metrics.items() if key.startswith("score/")}
    most = max(scores, key=scores.get).removeprefix("score/")
    table = page.locator("[role=table], table", has_text="predicted KL").nth(1)
    assert most in table.locator("[role=row], tr").nth(1).inner_text()


def test_the_link_of_a_run_opens_its_page_with_the_note(page, site, runs, shoot):
    run = runs[PAIRS[-1]]
    page.goto(run_link(site.url, run.info.experiment_id, run.info.run_id))
    page.locator("strong", has_text=run.info.run_name).wait_for()
    page.get_by_text("deployable").wait_for()
    shoot("run")
    # Among the pages for training, not for GenAI; and without the tags that are for programs.
    assert page.get_by_role("link", name="Model registry").count() == 1
    assert page.get_by_role("link", name="Prompts").count() == 0
    assert "layerbits.process.pid" in " ".join(run.data.tags)
    assert page.get_by_text("process.").count() == page.get_by_text("layers.0").count() == 0


def test_granularities_of_a_pair_are_lines_of_different_colour(page, site, client, links, shoot):
    page.goto(links["granularities"])
    found = charts(page, 6)
    shoot("overlay-granularities")
    assert {len({line["color"] for line in chart["lines"].values()}) for chart in found[:4]} == {len(GRANULARITIES)}
