"""The schemes that a job works on: read from files, or made from runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from layerbits.plain import Composed
from layerbits.schemes.budget_kinds import Measure
from layerbits.schemes.kv_cache import AUTO, kv_choice, with_cache
from layerbits.schemes.make import make_schemes
from layerbits.schemes.scheme import Scheme, load_scheme
from layerbits.schemes.settings import SchemeSettings, listed_paths, source_name
from layerbits.schemes.source import Source


@dataclass(frozen=True)
class SchemeRequest:
    """Which schemes, checked as far as that goes without a store.

    Attributes:
        files: Scheme files.
        settings: What to make where there are no files.
        kv_cache: What the schemes of the files do to keys and values; ``auto`` = as they say.
    """

    files: tuple[str, ...]
    settings: SchemeSettings | None
    kv_cache: str

    @classmethod
    def from_config(cls, config: Composed, folder: Path) -> SchemeRequest:
        """Reads a configuration on top of ``configs/scheme_run.yaml`` with ``scheme_files``.

        Raises:
            UserError: As :meth:`SchemeSettings.from_config`, where no files are given.
        """
        files = tuple(listed_paths(config["scheme_files"]))
        made = None if files else SchemeSettings.from_config(config, folder)
        return cls(files, made, kv_choice(config.get("kv_cache", AUTO)))

    @property
    def source_name(self) -> str:
        """The files or runs in a few words."""
        return source_name(self.files) if self.settings is None else self.settings.source_name

    def schemes(self, measure: Measure, source: Source | None = None) -> list[Scheme]:
        """Reads them from the files, or makes them.

        Args:
            measure: Finds the bytes and seconds of schemes, where a budget counts them.
            source: The scores of the settings' runs; ``None`` where there are files.

        Raises:
            UserError: No such file, or schemes that cannot be made of the scores.
        """
        if self.settings is None or source is None:
            return [with_cache(load_scheme(path), self.kv_cache) for path in self.files]
        return make_schemes(self.settings.specs, self.settings.applied(source, measure))
