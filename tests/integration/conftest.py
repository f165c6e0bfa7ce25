"""What several integration tests share."""

import sys
from contextlib import suppress

import mlflow
import pytest
from mlflow.exceptions import MlflowException

from layerbits import tracking


@pytest.fixture(autouse=True)
def no_run_stays_active():
    """A run that a test leaves active would become the parent of the next test's."""
    yield
    left = []
    while (run := mlflow.active_run()) is not None:
        left.append(run.info.run_id)
        with suppress(MlflowException):  # its store may be gone
            mlflow.end_run()
    assert not left, f"left active: {left}"


@pytest.fixture
def nobody_is_asked(monkeypatch, tmp_path):
    """Code that comes with a checkpoint goes to a folder of the test, and a question on the terminal fails it."""
    import transformers.dynamic_module_utils

    def forget():
        for name in [n for n in sys.modules if n.partition(".")[0] == "transformers_modules"]:
            del sys.modules[name]

    forget()
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    yield
    forget()


@pytest.fixture(scope="session")
def made_store(tmp_path_factory):
    """A store as MLflow makes it, once: that takes two seconds; each test copies the file."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        tracking.open_store(None, folder)
        mlflow.set_tracking_uri(None)
    return folder / "mlflow.db"
