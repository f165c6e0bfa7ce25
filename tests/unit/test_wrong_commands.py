"""What the command ``layerbits`` refuses in one line, before a store is opened or anything is measured."""

import pytest

from layerbits.cli import main


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (("compare", "abc", "abc"), "run abc is compared with itself; give two runs"),
        (("serve", "abc", "--port", "99999999"), "--port 99999999 is no port; give one from 1 to 65535"),
        (("view", "--port", "0"), "--port 0 is no port; give one from 1 to 65535"),
        (("costs", "abc", "--python", "/none"), "vllm.python=/none is no file; `make vllm` makes one"),
        (("costs", "abc", "--arguments", "a'b"), "--arguments a'b cannot be split (No closing quotation)"),
        (("stability", "abc", "--bits", "5", "--target", "x"), "target=x is not known; use"),
        (("push", "FILE"), "FILE is not JSON"),
        (("costs", "abc", "-o", "."), "cannot be written (Is a directory); name a file of a folder"),
        (("costs", "abc", "-o", "FILE/costs.json"), "cannot be written (Not a directory); name a file of a folder"),
        (("costs", "abc", "--candidates", ","), "--candidates names none; give PAIR or PAIR/GRANULARITY"),
    ],
)
def test_wrong_commands_are_one_line(typed, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "FILE"
    file.touch()
    with pytest.raises(SystemExit) as exit:
        main(list(typed))
    said = capsys.readouterr().err.strip().splitlines()
    assert (exit.value.code, len(said)) == (2, 1)
    assert said[0].startswith("error: ")
    assert words in said[0]
    assert [path.name for path in tmp_path.iterdir()] == ["FILE"]
