"""Command lines as they are typed, and what Hydra makes of them."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from layerbits import overrides
from layerbits.errors import UserError
from layerbits.overrides import as_typed, check_grammar, hydra_arguments, split_overrides
from layerbits.paths import split_at_commas

NAMES = (
    *("captions (1).txt", "run=3/c.txt", "josé/c.txt", "数据/c.txt", "#1/c.txt", "[v2]/c.txt", "it's", "a,b"),
    *('say "hi"', "back\\slash", "end\\", "{x}", "${x}", "a:b", "%d", "-m", "$(x)", "no;w&x", "a\\'b", "[1", "(a,b)"),
)


def value_of(argument):
    return OverridesParser.create().parse_override(argument).value()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("there", [True, False])
def test_a_path_arrives_as_typed(tmp_path, monkeypatch, name, there):
    monkeypatch.chdir(tmp_path)
    if there:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for key in ("dataset.path", "scheme_files"):
        if name.startswith("[") and not there and key in overrides.LISTS:
            continue  # a list in Hydra's words
        typed = as_typed(f"{key}={name}")
        check_grammar([typed])
        assert value_of(typed).replace("\\${", "${") == name


def test_a_path_like_a_reference_is_no_reference(tmp_path, monkeypatch):
    (tmp_path / "job.yaml").write_text("path: none\nother: 5\n")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "${other}").touch()
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        assert compose("job", [as_typed("path=${other}")]).path == "${other}"
        (tmp_path / "${other}").unlink()
        assert compose("job", [as_typed("path=${other}")]).path == 5


def test_what_says_nothing_or_is_quoted_stays():
    for argument in ("report_only=null", "dataset.path=", "run_id='a b'", "scheme_files=[a,b]", "seed=3", "model=x"):
        assert as_typed(argument) == argument


def test_the_home_directory_is_meant_by_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert value_of(as_typed("dataset.path=~/c.txt")) == f"{tmp_path}/c.txt"
    assert value_of(as_typed("scheme_files=a.json,~/b.json")) == f"a.json,{tmp_path}/b.json"


def test_without_a_home_directory_a_tilde_is_an_error(monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    with pytest.raises(UserError, match="needs a home directory and there is none"):
        as_typed("dataset.path=~/c.txt")


def test_a_comma_starts_no_sweep_over_a_path_that_exists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b.txt").touch()
    assert hydra_arguments(["dataset.path=a,b.txt", "-m"]) == ["-m", "dataset.path='a,b.txt'"]
    assert hydra_arguments(["dataset.path=x,a,b.txt,y", "-m"]) == ["-m", "dataset.path='x','a,b.txt','y'"]


def test_a_comma_in_the_name_of_a_folder_does_not_separate_either(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a, b").mkdir()
    assert split_at_commas("a, b/gone.json,c") == ["a, b/gone.json", "c"]
    assert split_at_commas("x/a, b/gone.json") == ["x/a", "b/gone.json"]


def test_a_sweep_over_paths_stays_a_sweep():
    assert hydra_arguments(["-m", "dataset.path=x (1),y"]) == ["-m", "dataset.path='x (1)','y'"]
    assert hydra_arguments(["-m", "dataset.path=glob(x*)"]) == ["-m", "dataset.path=glob(x*)"]
    assert hydra_arguments(["-m", "run_id=a,b"]) == ["-m", "run_id='a,b'"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("none", []),
        ("a=1 b.c=2", ["a=1", "b.c=2"]),
        ("a='x y' b=2", ["a=x y", "b=2"]),
        ("dataset.path=my file (1).txt seed=2", ["dataset.path=my file (1).txt", "seed=2"]),
        ("dataset.path=it's seed=2", ["dataset.path=it's", "seed=2"]),
        ("dataset.path=it's -m", ["dataset.path=it's", "-m"]),
        ("~a +b=1 ++c=2", ["~a", "+b=1", "++c=2"]),
    ],
)
def test_overrides_in_one_text_are_split(text, parts):
    assert split_overrides(text) == parts


@pytest.mark.parametrize("argument", ["seed=(", "seed=é{", "somewhere", "a b=3("])
def test_what_hydra_cannot_read_is_one_line(argument):
    with pytest.raises(UserError, match=r"is not a value that Hydra reads|is no setting"):
        check_grammar(hydra_arguments([argument]))


def test_flags_of_hydra_with_a_value_are_no_settings():
    check_grammar(["--cfg", "job", "-m", "~seed", "seed=1,2", "--config-dir", "x"])
