"""Model cards of exports after their schemes were measured: which are written, and what never fails a job."""

import json
from types import SimpleNamespace

import pytest

from layerbits.errors import UserError
from layerbits.export import later
from layerbits.export.card import MEASURED
from layerbits.export.card_parts import part
from layerbits.history.checkpoints import ExportedScheme
from layerbits.jobs import JobRun

RUN = JobRun("probe", "probe", SimpleNamespace(tracking_uri="uri", experiment_id="1"))


@pytest.fixture
def exports(tmp_path, monkeypatch):
    """Two exports of an experiment whose schemes were probed."""
    folders = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "layerbits.json").write_text(json.dumps({"record": {"scheme_digest": name}}))
        (folder / "README.md").write_text("\n".join(part(MEASURED)))
        folders.append(folder)
    monkeypatch.setattr(later, "exported", lambda *_: [ExportedScheme(f, f.name, f.name) for f in folders])
    monkeypatch.setattr(later, "probed_kl", lambda uri, experiment, scheme, digest: 0.25)
    monkeypatch.setattr(later, "answers_of", lambda *_: [])
    return folders


def written(folders):
    return [folder.name for folder in folders if "0.25 nats per token." in (folder / "README.md").read_text()]


def test_only_the_schemes_that_were_measured_are_written(exports):
    later.renew_cards(RUN, {"b"})
    assert written(exports) == ["b"]


def test_a_folder_that_has_another_scheme_by_now_is_left_alone(exports):
    (exports[0] / "layerbits.json").write_text(json.dumps({"record": {"scheme_digest": "other"}}))
    later.renew_cards(RUN, {"a", "b"})
    assert written(exports) == ["b"]


def test_a_folder_that_is_elsewhere_is_left_alone(exports):
    (exports[0] / "layerbits.json").unlink()
    later.renew_cards(RUN, {"a"})
    assert written(exports) == []


def test_a_store_that_does_not_answer_is_a_warning(exports, monkeypatch, capsys):
    def fails(*_):
        raise UserError("no answer")

    monkeypatch.setattr(later, "exported", fails)
    later.renew_cards(RUN, {"a"})
    assert capsys.readouterr().err == "warning: model cards of exports stay as they are: no answer\n"


def test_nothing_is_written_where_nothing_is_tracked(exports):
    later.renew_cards(JobRun("probe", "probe", None), {"a"})
    assert written(exports) == []
