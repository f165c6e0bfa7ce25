"""Every entry point in hard surroundings: ASCII terminal and locale, a notebook's backend, no home, odd paths."""

import shutil
from dataclasses import replace

import pytest

from layerbits.results.manifest import load_manifest
from tests.integration.entries import start_process, start_together
from tests.integration.tracking_support import small_result, write_folder

ODD = "a b, ü数 [v2] (1)=#'x"
SURROUNDINGS = {
    "PYTHONIOENCODING": "ascii",
    "PYTHONUTF8": "0",
    "PYTHONCOERCECLOCALE": "0",
    "LC_ALL": "C",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "HOME": "/proc/none",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, made_store):
    """A project's output root with a store and a result in it."""
    folder = tmp_path_factory.mktemp("odd") / ODD
    folder.mkdir()
    shutil.copy(made_store, folder / "mlflow.db")
    base = small_result()
    settings = {"model": {"name": "tiny", "path": str(folder / "model")}, "dataset": {"name": "everyday"}}
    entries = [{"quantizer_name": "*", "enable": False}]
    entries += [{"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}}]
    candidate = replace(base.candidate, config={"quant_cfg": entries, "algorithm": "max"})
    write_folder(replace(base, settings=settings, candidate=candidate), folder / "result")
    return folder


def place(folder):
    """Where results and runs go."""
    return f"output_root={folder}/outputs", f"tracking.uri=sqlite:///{folder}/mlflow.db"


def ended(script, folder, *arguments):
    """What a script prints, and that it ends without a traceback."""
    done = start_process(script, *place(folder), *arguments, **SURROUNDINGS)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_schemes_are_made_and_logged(folder):
    done = ended("scheme", folder, f"run_id={folder}/result", "schemes=none", "effective_bits=10", "pareto=5")
    assert done.returncode == 0, done.stderr
    (schemes,) = (folder / "outputs" / "tmp").glob("schemes_*")
    assert (schemes / "figures" / "pareto.png").is_file()
    assert "run ok" in done.stdout


def test_a_report_is_rebuilt(folder):
    done = ended("sensitivity", folder, f"report_only={folder}/result", "tracking=none")
    assert done.returncode == 0, done.stderr
    assert (folder / "outputs" / "report_only" / "figures" / "heatmap.png").is_file()
    assert load_manifest(folder / "result").model.name == "tiny"


MISSING = [  # script, what is typed, a part of the refusal
    ("sensitivity", ("dataset=text_file", "dataset.path={}/c.txt"), "no caption file at {}/c.txt"),
    ("grid", ("dataset=text_file", "dataset.path={}/c.txt", "quant_pairs=wint8_afp16"), "no caption file at"),
    ("probe", ("scheme_files={}/none.json",), "no scheme at {}/none.json"),
    ("evaluate", ("scheme_files={}/none.json",), "no scheme at {}/none.json"),
    ("export", ("scheme_files={}/none.json", "export_root={}/export"), "no scheme at {}/none.json"),
    ("validate", ("run_id={}/none/manifest.json",), "no manifest at {}/none/manifest.json"),
    ("verify", ("run_id={}/none/manifest.json",), "no manifest at {}/none/manifest.json"),
    ("serve_check", ("checkpoint={}/none",), "{}/none"),
    ("import_results", ("path={}/none",), "{}/none"),
    ("scheme", ("run_id={}/none/manifest.json",), "no manifest at {}/none/manifest.json"),
    ("scheme", ("run_id={}/result", "schemes=none", "budget_ms=4", "costs={}/none.json"), "no costs at {}/none.json"),
    ("sensitivity", ("tracking=none",), "set LAYERBITS_CACHE to a folder that can be written"),  # there is no home
]


@pytest.fixture(scope="module")
def refused(folder):
    """What the scripts of :data:`MISSING` print."""
    typed = [(script, *(argument.format(folder) for argument in arguments)) for script, arguments, _ in MISSING]
    return start_together(*((*command, *place(folder)) for command in typed), **SURROUNDINGS)


@pytest.mark.parametrize("number", range(len(MISSING)), ids=lambda number: MISSING[number][0])
def test_what_is_missing_is_one_line_that_names_it(folder, refused, number):
    done = refused[number]
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 2
    (error,) = [text for text in done.stderr.splitlines() if text.startswith("error:")]
    assert MISSING[number][2].format(folder).encode("ascii", "replace").decode() in error
