"""The schemes that a job works on: read from files, or made from runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from layerbits.errors import UserError
from layerbits.plain import Composed
from layerbits.schemes.budget_kinds import Measure, Timed
from layerbits.schemes.kv_cache import AUTO, kv_choice, with_cache
from layerbits.schemes.make import make_schemes
from layerbits.schemes.scheme import Scheme, load_scheme
from layerbits.schemes.settings import SchemeSettings, asked_times, listed_paths, source_name
from layerbits.schemes.source import Source
from layerbits.schemes.timed import with_milliseconds


@dataclass(frozen=True)
class SchemeRequest:
    """Which schemes, checked as far as that goes without a store.

    Attributes:
        files: Scheme files.
        read: Their schemes.
        settings: What to make where there are no files.
        timed: Which milliseconds the schemes of the files are given; ``None`` = those that they have.
    """

    files: tuple[str, ...]
    read: tuple[Scheme, ...]
    settings: SchemeSettings | None
    timed: Timed | None = None

    @classmethod
    def from_config(cls, config: Composed, folder: Path) -> SchemeRequest:
        """Reads a configuration on top of ``configs/scheme_run.yaml`` with ``scheme_files``.

        Raises:
            UserError: No such file, both files and runs, or as :meth:`SchemeSettings.from_config`, where no files are
                given.
        """
        files = tuple(listed_paths(config["scheme_files"]))
        cache = kv_choice(config.get("kv_cache", AUTO))
        if not files:
            return cls((), (), SchemeSettings.from_config(config, folder))
        if listed_paths(config.get("run_id")):
            raise UserError("set run_id to runs that schemes are made from, or scheme_files to schemes: one of them")
        read = tuple(with_cache(load_scheme(path), cache) for path in files)
        return cls(files, read, None, asked_times(config))

    @property
    def source_name(self) -> str:
        """The files or runs in a few words."""
        return source_name(self.files) if self.settings is None else self.settings.source_name

    def schemes(self, measure: Measure, source: Source | None = None) -> list[Scheme]:
        """Those of the files, or made now.

        Args:
            measure: Finds the bytes and seconds of schemes.
            source: The scores of the settings' runs; ``None`` where there are files.

        Raises:
            UserError: They cannot be made of the scores, or not be measured.
        """
        if self.settings is None or source is None:
            timed = self.timed
            return [one if timed is None else with_milliseconds(one, timed, measure) for one in self.read]
        return make_schemes(self.settings.specs, self.settings.applied(source, measure))
