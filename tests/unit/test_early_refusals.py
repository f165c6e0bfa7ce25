"""Wrong input of every command is refused in its own words before torch, and before a store is opened."""

import json
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NO_RUN = "set run_id to the id of"
ONE_OF_TWO = "one of them"
NO_SCHEME = "no scheme at /none.json"
REFUSED = [  # command, what is typed, a part of the refusal
    ("costs", [], NO_RUN),
    ("costs", ["run_id=abc", "batches=x"], "batches=x is not a positive whole number"),
    ("costs", ["run_id=abc", "batches=none", "prefill=none"], "there is nothing to time"),
    ("costs", ["run_id=abc", "vllm.python=/none"], "vllm.python=/none is no file"),
    ("evaluate", [], NO_RUN),
    ("evaluate", ["run_id=abc", "rows=x"], "rows=x is not a whole number"),
    ("evaluate", ["run_id=abc", "eval_batch_size=many"], "eval_batch_size=many is not a whole number"),
    ("evaluate", ["run_id=abc", "device=tpu"], "device=tpu is not known"),
    ("evaluate", ["run_id=abc", "task_path=/none"], "task_path=/none is no folder"),
    ("evaluate", ["run_id=abc", "scheme_files=/none.json"], ONE_OF_TWO),
    ("evaluate", ["run_id=abc", "effective_bits=9", "target=x"], "target=x is not known"),
    ("evaluate", ["scheme_files=/none.json"], NO_SCHEME),
    ("export", [], NO_RUN),
    ("export", ["run_id=abc", "format=x"], "format=x is not known"),
    ("export", ["run_id=abc", "target=x"], "target=x is not known"),
    ("export", ["run_id=abc", "artifact_gb=-1"], "artifact_gb=-1 is not a number of GB; use 0 for none"),
    ("export", ["run_id=abc", "artifact_gb=some"], "artifact_gb=some is not a number of GB; use 0 for none"),
    ("export", ["run_id=abc", "device=tpu"], "device=tpu is not known"),
    ("export", ["run_id=abc", "register=true", "registered_model=a/b"], "registered_model=a/b is no name"),
    ("export", ["run_id=abc", "scheme_files=/none.json"], ONE_OF_TWO),
    ("export", ["scheme_files=/none.json"], NO_SCHEME),
    ("grid", ["quant_pairs=x"], "quant_pair=x is not known"),
    ("grid", ["device=tpu"], "device=tpu is not known"),
    ("import_run", [], "no path is given"),
    ("import_run", ["path=/none"], "there is no /none"),
    ("probe", [], NO_RUN),
    ("probe", ["run_id=abc", "rows=x"], "rows=x is not a whole number"),
    ("probe", ["run_id=abc", "dtype=x"], "dtype=x is not known"),
    ("probe", ["run_id=abc", "target=x"], "target=x is not known"),
    ("probe", ["run_id=abc", "device=tpu"], "device=tpu is not known"),
    ("probe", ["run_id=abc", "texts=/none.txt"], "cannot read the texts in /none.txt"),
    ("probe", ["run_id=abc", "scheme_files=/none.json"], ONE_OF_TWO),
    ("probe", ["scheme_files=/none.json"], NO_SCHEME),
    ("schemes", [], NO_RUN),
    ("schemes", ["run_id=abc", "effective_bits=x"], "effective_bits=x is not a number"),
    ("schemes", ["run_id=abc", "budget_gib=3GB"], "budget_gib=3GB is not a number"),
    ("schemes", ["run_id=abc", "budget_ms=-1", "costs=x"], "budget_ms=-1 is no budget; give a number above 0"),
    ("schemes", ["run_id=abc", "budget_ms=3"], "budget_ms needs costs=FILE"),
    ("schemes", ["run_id=abc", "budget_ms=3", "costs=/none.json"], "there are no costs at /none.json; measure one"),
    ("schemes", ["run_id=abc", "target=x"], "target=x is not known"),
    ("schemes", ["run_id=abc", "pareto=-5"], "pareto=-5 is no number of budgets; use 0 for no curve"),
    ("schemes", ["run_id=abc", "vision_bits=nan"], "vision_bits=nan is no budget; give a number above 0"),
    ("schemes", ["run_id=abc", "vision_bits=-3"], "vision_bits=-3 is no budget; give a number above 0"),
    ("schemes", ["run_id=abc", "step=x:1"], "step=x:1 is not known; use decode:BATCH or prefill:LENGTH"),
    ("schemes", ["run_id=abc", "step=decode:8"], "step=decode:8 needs costs=FILE"),
    ("schemes", ["run_id=abc", "context=64"], "context=64 and concurrency=1 count in budget_gib alone; set"),
    ("schemes", ["run_id=abc", "concurrency=4"], "context=0 and concurrency=4 count in budget_gib alone; set"),
    ("sensitivity", ["autoquant.method=x"], "autoquant.method=x is not known"),
    ("sensitivity", ["device=tpu"], "device=tpu is not known"),
    *(
        (command, [*needed, f"{key}=maybe"], f"{key}=maybe is not known; use true or false")
        for command, needed, keys in (
            ("sensitivity", [], ("experimental", "strict", "model.lm_head", "model.trust_remote_code", "model.vision")),
            ("sensitivity", [], ("model.random_weights", "model.dequantize", "tracking.enabled")),
            ("schemes", ["run_id=abc", "effective_bits=9"], ("tracking.system_metrics",)),
            ("grid", [], ("force",)),
            ("export", ["run_id=abc"], ("register",)),
            ("serve_check", ["run_id=abc"], ("strict", "compare")),
        )
        for key in keys
    ),
    ("sensitivity", ["report_only=/none"], "no manifest at /none"),
    ("serve_check", [], ONE_OF_TWO),
    ("serve_check", ["run_id=abc", "checkpoint=/none"], ONE_OF_TWO),
    ("serve_check", ["checkpoint=/none"], "/none is no checkpoint: there is no such folder"),
    ("serve_check", ["checkpoint=/tmp"], "/tmp is no checkpoint: it has no config.json"),
    ("serve_check", ["run_id=abc", "vllm.plugin=/none"], "vllm.plugin=/none is no folder"),
    (
        "serve_check",
        ["run_id=abc", "vllm.arguments=a'b"],
        "vllm.arguments=a'b cannot be split (No closing quotation)",
    ),
    ("serve_check", ["run_id=abc", "speed.measure=maybe"], "speed.measure=maybe is not known; use true or false"),
    ("serve_check", ["run_id=abc", "speed.measure=true", "speed.batches=none"], "nothing to time; give speed.batches"),
    ("serve_check", ["run_id=abc", "vllm.url=host:8000"], "vllm.url=host:8000 is no address; use http://host:port"),
    ("serve_check", ["run_id=abc", "compare=false"], "compare=false leaves nothing to do"),
    ("serve_check", ["checkpoint=/none", "tokens=x"], "tokens=x is not a positive whole number"),
    ("serve_check", ["checkpoint=/none", "device=tpu"], "device=tpu is not known"),
    ("validate", [], NO_RUN),
    ("validate", ["run_id=abc", "rows=x"], "rows=x is not a whole number"),
    ("validate", ["run_id=abc", "disable_one=x"], "disable_one=x is not known"),
    ("validate", ["run_id=abc", "rankers=x"], "x is no ranker"),
    ("validate", ["run_id=abc", "device=tpu"], "device=tpu is not known"),
    ("verify", [], NO_RUN),
    ("verify", ["run_id=abc", "bound=x"], "bound=x is no relative difference"),
    ("verify", ["run_id=abc", "device=tpu"], "device=tpu is not known"),
]
READ = [  # without tracking: what is named is looked for, and nothing else is done
    ("costs", ["run_id=/none", "vllm.python=FAKE"], "no manifest at /none"),
    ("evaluate", ["run_id=/none"], "no manifest at /none"),
    ("export", ["run_id=/none"], "no manifest at /none"),
    ("grid", ["dataset_sizes=x"], "dataset.size=x is not known"),
    ("grid", ["dataset.name=text_file", "dataset.path=/none.txt"], "no caption file at /none.txt"),
    ("grid", ["model.path=/none"], "there is no folder /none"),
    ("probe", ["run_id=/none"], "no manifest at /none"),
    ("schemes", ["run_id=/none/manifest.json"], "no manifest at /none/manifest.json"),
    ("sensitivity", ["dataset.size=x"], "dataset.size=x is not known"),
    ("sensitivity", ["dataset.name=text_file", "dataset.path=/none.txt"], "no caption file at /none.txt"),
    ("sensitivity", ["dataset.name=image_text", "dataset.path=/none.jsonl"], "there is no /none.jsonl"),
    ("sensitivity", ["dataset.name=image_text", "dataset.path=GONE", "dataset.size=1"], "(GONE row 1): there is no"),
    ("sensitivity", ["dataset.name=image_text", "dataset.path=GONE", "dataset.size=9"], "has 1 distinct rows"),
    ("sensitivity", ["dataset.name=image_text", "dataset.max_pixels=0"], "dataset.max_pixels=0 leave no picture"),
    ("sensitivity", ["dataset.name=mixed", "dataset.share=1"], "dataset.share=1 is no share of pictures"),
    ("sensitivity", ["dataset.name=image_text", "model.path=TEXT", "model.random_weights=true"], "has no processor"),
    ("sensitivity", ["model.path=/none"], "there is no folder /none"),
    ("validate", ["run_id=/none"], "no manifest at /none"),
    ("verify", ["run_id=/none"], "no manifest at /none"),
]
NO_ROWS = "rows=0 is nothing to probe on; use 1 or more"
NO_BATCH = "batch_size=0 is not a number of rows; use 1 or more"
NO_TOKEN = "seq_len=1 leaves no token to predict; use 2 or more"
PART_OF_A_BATCH = "rows=9 is not a multiple of batch_size=8; use rows=8, or change batch_size"
WITHOUT_A_RUN = [  # these would leave a failed run if they were refused in it
    *((entry, ["run_id=abc", "rows=0"], NO_ROWS) for entry in ("probe", "validate")),
    *((entry, ["run_id=abc", "batch_size=0"], NO_BATCH) for entry in ("probe", "validate")),
    *((entry, ["run_id=abc", "rows=9"], PART_OF_A_BATCH) for entry in ("probe", "validate")),
    ("probe", ["run_id=abc", "seq_len=1"], NO_TOKEN),
    *((entry, ["autoquant.seq_len=1"], f"autoquant.{NO_TOKEN}") for entry in ("grid", "sensitivity")),
    *((entry, ["autoquant.batch_size=0"], f"autoquant.{NO_BATCH}") for entry in ("grid", "sensitivity")),
    ("sensitivity", ["dataset.packing=x"], "dataset.packing=x is not known; use one of packed, padded"),
    *(
        (entry, [*given, f"{key}={bits}"], f"{key}={said}")
        for entry, given, key in (
            ("sensitivity", [], "autoquant.effective_bits"),
            ("grid", [], "autoquant.effective_bits"),
            ("schemes", ["run_id=abc"], "effective_bits"),
            ("probe", ["run_id=abc"], "effective_bits"),
            ("schemes", ["run_id=abc"], "vision_bits"),
        )
        for bits, said in (
            ("0", "0 is no budget; give a number above 0"),
            ("nan", "nan is no budget; give a number above 0"),
            ("1e9", "1e+09 cannot be reached: weights that stay as they are have 16 bits; give a number up to that"),
        )
    ),
    ("serve_check", ["run_id=abc", "vllm.port=99999999"], "vllm.port=99999999 is no port; give one from 1 to 65535"),
    *(
        (entry, [*given, *more], words)
        for entry, given in (
            *((entry, ["run_id=abc"]) for entry in ("evaluate", "export", "probe", "schemes", "serve_check")),
            *((entry, ["run_id=abc"]) for entry in ("validate", "verify")),
            ("import_run", ["path=."]),
            *((entry, []) for entry in ("grid", "sensitivity")),
        )
        for more, words in (
            (["output_root=none"], "output_root=none names no folder; give one"),
            (["output_root=/dev/null/x"], "/dev/null is no folder; name another one"),
        )
    ),
    ("export", ["run_id=abc", "export_root=/dev/null"], "/dev/null is no folder; name another one"),
]
OTHER_MANIFEST = "give the manifest.json of a finished run"
WITHOUT_A_RUN += [
    *(
        (entry, ["run_id=/none"], f"no manifest at /none; {OTHER_MANIFEST}")
        for entry in ("evaluate", "export", "probe", "schemes", "validate", "verify")
    ),
    (
        "schemes",
        ["run_id=/dev/null"],
        f"/dev/null is not JSON (Expecting value: line 1 column 1 (char 0)); {OTHER_MANIFEST}",
    ),
    ("schemes", ["run_id=/dev/null/x"], f"/dev/null/x cannot be read (Not a directory); {OTHER_MANIFEST}"),
    *(
        (entry, ["run_id=abc", "costs=/dev/null"], "/dev/null is not JSON")
        for entry in ("evaluate", "export", "probe", "schemes")
    ),
    ("schemes", ["run_id=abc", "costs=/dev"], "there are no costs at /dev/costs.json; measure one"),
    ("schemes", ["run_id=abc", "measured=/none"], "no probe at /none; give the folder of a probe, or its run id"),
    ("schemes", ["run_id=abc", "measured=/dev/null"], "/dev/null cannot be read"),
    ("evaluate", ["run_id=abc", "endpoint=host:8000"], "endpoint=host:8000 is no address; use http://host:port"),
    *(
        (
            "serve_check",
            ["run_id=abc", f"vllm.url={address}"],
            f"vllm.url={address} is no address; use http://host:port",
        )
        for address in ("http://", "http://host:99999999", "http://host:x", "http://[x")
    ),
    (
        "schemes",
        ["run_id=abc", "schemes=none"],
        "controls take their bits from schemes and there are none; name a scheme",
    ),
    ("verify", ["run_id=abc", "bound=inf"], "bound=inf is no relative difference; use auto, 0 or a number above"),
    ("serve_check", ["run_id=abc", "vllm.python=/none"], "vllm.python=/none is no file; `make vllm` makes one"),
    *(
        (
            "serve_check",
            ["run_id=abc", f"speed.{key}=x"],
            f"speed.{key}=x is not a positive whole number; give one from 1 on",
        )
        for key in ("batches", "prompt_tokens", "new_tokens", "repeats")
    ),
    *(
        (
            "sensitivity",
            [f"autoquant.num_score_samples={number}"],
            f"num_score_samples={number} must be between 1 and the 16",
        )
        for number in (-1, 0, 17)
    ),
    *(
        (entry, ["run_id=abc", f"tracking.experiment={none}"], "tracking.experiment has no name; give one")
        for entry in ("probe", "schemes", "serve_check", "validate", "verify")
        for none in ("", "null")
    ),
    ("sensitivity", ["autoquant.checkpoint=/dev/null"], "autoquant.checkpoint=/dev/null cannot be written"),
    ("sensitivity", [f"seed={2**64}"], f"seed={2**64} does not fit into 64 bits; give a smaller number"),
    ("sensitivity", ["model.device_map=x"], "model.device_map=x is not known; use null for one device, or auto, bal"),
    ("sensitivity", ["quant_granularity.quant_cfg_overrides=x"], "quant_cfg_overrides=x has no keys; use "),
    *(
        ("grid", [f"{key}=null"], f"the grid is empty: give at least one value for {key}")
        for key in ("quant_pairs", "quant_granularities", "dataset_sizes")
    ),
]
OF_A_CANDIDATE = [  # ModelOpt is asked, which takes its time
    ("sensitivity", ["autoquant.effective_bits=5"], "effective_bits=5 cannot be reached: the floor of wfp8_afp8 is 8"),
    ("sensitivity", ["quant_pair.weight=x"], "quant pair wfp8_afp8 says weight: x, but format FP8_DEFAULT_CFG is fp8"),
    ("sensitivity", ["quant_pair.format=x"], "format 'x' is not known"),
]
PROGRAM = """
import json, sys
from importlib import import_module
from pathlib import Path
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from layerbits.errors import UserError

root, heavy = Path(sys.argv[1]), json.loads(sys.argv[2])
FUNCTIONS = {"validate": "validation", "verify": "verification"}
FILES = {"import_run": "import_results", "schemes": "scheme"}
composed = {}
for config, overrides in json.loads(sys.argv[4]):
    if config not in composed:
        with initialize_config_dir(f"{root}/configs", version_base="1.3"):
            composed[config] = compose(config, json.loads(sys.argv[3]))
        OmegaConf.set_struct(composed[config], False)  # other groups have further keys
    settings = OmegaConf.merge(composed[config], OmegaConf.from_dotlist(overrides))
    file = FILES.get(config, config)
    command = getattr(import_module(f"layerbits.commands.{file}"), FUNCTIONS.get(file, file))
    try:
        command(OmegaConf.to_container(settings, resolve=True), root)
        said = "not refused"
    except UserError as error:
        said = str(error)
    print(json.dumps([said, [name for name in heavy if name in sys.modules]]))
"""


def check(python, heavy, cases, change):
    typed = [(config, overrides) for config, overrides, _ in cases]
    lines = python(PROGRAM, ROOT, *map(json.dumps, (heavy, [change], typed)))
    for (said, loaded), (config, overrides, words) in zip(map(json.loads, lines), cases, strict=True):
        assert words in said, (config, overrides, said)
        assert loaded == [], (config, overrides)


def test_wrong_values_are_refused_before_torch_and_the_store(python, tmp_path):
    no_store = f"tracking.uri=sqlite:///{tmp_path}/none/mlflow.db"  # would be refused where it was opened
    check(python, ["torch", "transformers", "modelopt", "mlflow", "scipy"], REFUSED, no_store)


def test_wrong_values_leave_no_run(python, tmp_path):
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    list(
        python(
            "import sys; from layerbits import tracking; tracking.open_store(sys.argv[1], sys.argv[2])", uri, tmp_path
        )
    )
    check(python, [], [*WITHOUT_A_RUN, *OF_A_CANDIDATE], f"tracking.uri={uri}")
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as store:
        assert store.execute("select count(*) from runs").fetchone() == (0,)


def test_what_is_missing_is_refused_before_torch(python, tmp_path):
    vllm = tmp_path / "python"
    vllm.write_text(f'#!/bin/sh\nPYTHONPATH={Path(__file__).parent / "fake_vllm"} exec {sys.executable} "$@"\n')
    vllm.chmod(0o755)
    gone = tmp_path / "list.jsonl"
    gone.write_text('{"image": "gone.png", "text": "words"}\n')

    reads_text = tmp_path / "model"
    reads_text.mkdir()
    (reads_text / "config.json").write_text('{"model_type": "llama"}')

    def filled(text):
        return text.replace("FAKE", str(vllm)).replace("GONE", str(gone)).replace("TEXT", str(reads_text))

    cases = [(config, [filled(one) for one in given], filled(words)) for config, given, words in READ]
    check(python, ["torch", "transformers", "modelopt", "mlflow"], cases, "tracking=none")


def test_a_store_that_cannot_be_used_is_refused_before_torch(python, tmp_path):
    file = tmp_path / "mlflow.db"
    file.write_text("no database")
    cases = [("sensitivity", ["device=cpu"], "it is not a database or damaged")]
    check(python, ["torch", "transformers", "modelopt"], cases, f"tracking.uri=sqlite:///{file}")
