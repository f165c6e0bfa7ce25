"""Errors of Hydra about keys of a configuration, as one line that says which key may have been meant."""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path

from layerbits.errors import UserError, first_line
from layerbits.plain import JsonMapping

_NO_SUCH_KEY = re.compile(r"Could not override '([^']+)'")


def composition_error(error: Exception, configs: Path, config: str) -> UserError:
    """What keeps a configuration from being composed, for a user.

    Args:
        error: What Hydra raised.
        configs: Folder of the configuration.
        config: The file of it that was composed, without ``.yaml``.
    """
    match = _NO_SUCH_KEY.match(str(error))
    if match is None:
        return UserError(first_line(error))
    return UserError(f"there is no key {match[1]} in configs/{config}.yaml; {_hint(match[1], configs, config)}")


def _hint(key: str, configs: Path, config: str) -> str:
    above, _, last = key.rpartition(".")
    known = list(known_keys(configs, config))
    ends: dict[str, list[str]] = {}
    for name in known:
        ends.setdefault(name.rpartition(".")[2], []).append(name)
    meant = [name for end in get_close_matches(last, ends, cutoff=0.75) for name in ends[end]]
    meant = meant or get_close_matches(key, known, cutoff=0.8)
    if not meant and len(last) > 2:
        meant = [name for end, names in ends.items() if last in end for name in names]
    if meant:
        return f"did you mean {' or '.join(meant[:3])}?"
    beside = [name for name in known if name.rpartition(".")[0] == above] or known
    return f"choose one of {', '.join(beside)}"


def known_keys(configs: Path, config: str) -> Iterator[str]:
    """Keys that a configuration has by default, with dots: the values, and what they lie in.

    Args:
        configs: Folder of the configuration.
        config: A file of it, without ``.yaml``.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    GlobalHydra.instance().clear()  # what failed may have left its own
    with initialize_config_dir(str(configs), version_base="1.3"):
        plain: JsonMapping = OmegaConf.to_container(compose(config))  # type: ignore[assignment]
    yield from _names(plain)


def _names(data: JsonMapping, prefix: str = "") -> Iterator[str]:
    for key, value in data.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _names(value, f"{prefix}{key}.")
