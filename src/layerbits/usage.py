"""What ``--help`` of an entry script prints: its usage, and its settings with the comments of their files."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

_HIDDEN = "hydra"  # the group of how Hydra itself behaves
_SETTING = re.compile(r"(?P<key>\w+): *(?P<value>[^ #]+)(?P<comment> *#.*)?$")


def usage(script: Path, configs: Path, config: str) -> str:
    """The help of an entry script.

    Args:
        script: The script, whose docstring says what it does and how it is called.
        configs: Folder of the configuration.
        config: The file of it that the script starts from, without ``.yaml``.
    """
    about = ast.get_docstring(ast.parse(script.read_text("utf-8"))) or script.stem
    files, groups = _parts(configs, config)
    own = "\n".join(_overlaid([line for file in files for line in _body(file).splitlines()]))
    parts = [about, f"Settings of {script.name}, as key=value:\n\n{own}"]
    for group, choice in groups.items():
        known = ", ".join(sorted(file.stem for file in (configs / group).glob("*.yaml")))
        words = f"{group}=CHOICE, one of: {known}"
        file = configs / group / f"{choice}.yaml"
        if file.is_file():
            words += f"\nSettings of {group}={choice}, the default, as {group}.key=value:\n\n{_body(file)}"
        parts.append(words)
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _parts(configs: Path, config: str) -> tuple[list[Path], dict[str, str | None]]:
    """Files of a configuration in the order in which Hydra lays them over each other, and its groups."""
    file = configs / f"{config}.yaml"
    files: list[Path] = []
    groups: dict[str, str | None] = {}
    for entry in (yaml.safe_load(file.read_text("utf-8")) or {}).get("defaults", []):
        if isinstance(entry, dict):
            groups |= {name.removeprefix("optional "): choice for name, choice in entry.items()}
        elif entry != "_self_":
            above, more = _parts(configs, entry)
            files += above
            groups |= more
    groups.pop(_HIDDEN, None)
    return [*files, file], groups


def _body(file: Path) -> str:
    """The text of a file without its list of defaults and what is said above the settings."""
    return "\n".join(_settings(file.read_text("utf-8").splitlines())).strip("\n")


def _overlaid(lines: list[str]) -> list[str]:
    """Settings that are there once, with the value of their last line and a comment of any."""
    kept: list[str] = []
    first: dict[str, int] = {}
    for line in lines:
        match = _SETTING.match(line)
        at = first.get(match["key"]) if match else None
        if match is None or at is None:
            if match:
                first[match["key"]] = len(kept)
            kept.append(line)
        elif match["comment"]:
            kept[at] = line
        else:
            comment = kept[at].partition("#")[2]
            kept[at] = f"{line:23} #{comment}" if comment else line
    return kept


def _settings(lines: list[str]) -> Iterator[str]:
    begun = in_defaults = False
    for line in lines:
        in_defaults = line.startswith("defaults:") or (in_defaults and line.startswith((" ", "-")))
        begun = begun or not line.startswith("#")
        if begun and not in_defaults:
            yield line
