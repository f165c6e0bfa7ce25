"""What several integration tests share."""

import mlflow
import pytest

from layerbits import tracking


@pytest.fixture(scope="session")
def made_store(tmp_path_factory):
    """A store as MLflow makes it, once: that takes two seconds; each test copies the file."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        tracking.open_store(None, folder)
        mlflow.set_tracking_uri(None)
    return folder / "mlflow.db"
