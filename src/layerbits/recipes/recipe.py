"""A ModelOpt recipe as plain typed data, read with ModelOpt's own loader."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import cast

from layerbits.candidates.formats import plain
from layerbits.candidates.known import config_of
from layerbits.candidates.kv_cache import QUANTIZERS as KV_QUANTIZERS
from layerbits.candidates.linear import Config
from layerbits.errors import UserError
from layerbits.paths import home_path
from layerbits.plain import JsonMapping, JsonObject

KINDS = ("auto_quantize", "ptq")
"""Types of recipe that can be run: a search, or one configuration."""


@dataclass(frozen=True)
class SearchSpace:
    """What linears may become whose names match.

    Attributes:
        patterns: Globs over full module names; a group matches with all of its linears or with none.
        formats: Positions among the recipe's formats.
        allow_no_quant: Whether they may stay as they are.
    """

    patterns: tuple[str, ...]
    formats: tuple[int, ...]
    allow_no_quant: bool


@dataclass(frozen=True)
class LoadedRecipe:
    """One recipe, every import resolved.

    Attributes:
        name: As ModelOpt's library names it, or the file's name without its ending.
        kind: One of :data:`KINDS`.
        formats: Candidate formats of a search, each once, as ModelOpt configurations with bare quantizer names.
        default: Positions of the formats for linears outside every search space; empty where ``fixed`` covers them.
        spaces: Search spaces of their own, each for the linears that it names.
        fixed: The configuration of what is not searched (a search's baseline), or all of a PTQ recipe.
        effective_bits: Budget of a search, by ModelOpt's count; ``None`` for a PTQ recipe.
        cost_model: ``weight`` or ``active_moe``. cost: Its parameters.
        disabled: Globs of linears that stay as they are. cost_excluded: Globs of those that cost nothing.
        method: ``gradient`` or ``kl_div``.
        score_size: Samples to score on; ``None`` for a PTQ recipe.
        kv_cache: Configuration of the KV cache, ``None`` = not quantized by the recipe.
    """

    name: str
    kind: str
    description: str
    formats: tuple[Config, ...] = ()
    default: tuple[int, ...] = ()
    spaces: tuple[SearchSpace, ...] = ()
    fixed: Config | None = None
    effective_bits: float | None = None
    cost_model: str = "weight"
    cost: JsonMapping = field(default_factory=dict)
    disabled: tuple[str, ...] = ()
    cost_excluded: tuple[str, ...] = ()
    method: str = "gradient"
    score_size: int | None = None
    kv_cache: Config | None = None

    @cached_property
    def digest(self) -> str:
        """Content hash, 16 hex digits: not of its name and description, nor of how its file spells it."""
        content = {key: value for key, value in self.resolved().items() if key != "metadata"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def resolved(self) -> dict[str, object]:
        """The whole recipe in ModelOpt's layout and JSON's types, imports and defaults spelled out."""
        metadata = {"recipe_type": self.kind, "description": self.description}
        fixed = {} if self.fixed is None else {"quantize": self.fixed}
        if self.kind == "ptq":
            return plain({"metadata": metadata, **fixed})  # type: ignore[no-any-return]
        search = {
            "constraints": {"effective_bits": self.effective_bits, "cost_model": self.cost_model, "cost": self.cost},
            "candidate_formats": [self.formats[i] for i in self.default],
            "module_search_spaces": [
                {
                    "module_name_patterns": space.patterns,
                    "candidate_formats": [self.formats[i] for i in space.formats],
                    "allow_no_quant": space.allow_no_quant,
                }
                for space in self.spaces
            ],
            "auto_quantize_method": self.method,
            "score_size": self.score_size,
            "disabled_layers": self.disabled,
            "cost_excluded_layers": self.cost_excluded,
            "kv_cache": self.kv_cache,
        }
        return plain({"metadata": metadata, **fixed, "auto_quantize": search})  # type: ignore[no-any-return]

    @cached_property
    def cache_settings(self) -> Mapping[str, object] | None:
        """Quantizer settings of keys and values of any block, ``None`` = as they are.

        Raises:
            UserError: The recipe treats keys and values differently.
        """
        config = self.kv_cache or self.fixed
        if config is None:
            return None
        keys, values = (setting_of(config, f"model.layers.0.self_attn.{q}") for q in KV_QUANTIZERS)
        if keys != values:
            raise UserError(
                f"recipe {self.name} quantizes keys and values differently; LayerBits has one format for both"
            )
        return cast("Config | None", keys)

    @property
    def held_kv(self) -> Mapping[str, object] | None:
        """Of a search: what its fixed part does to keys and values, also while others are scored."""
        return self.cache_settings if self.kind == "auto_quantize" and self.kv_cache is None else None

    @property
    def short_name(self) -> str:
        """The last part of its name, for names of runs and files."""
        return self.name.rsplit("/", 1)[-1]

    def stock_arguments(self) -> JsonObject:
        """What ``mtq.auto_quantize`` is called with for this recipe, less the model, its data and the steps."""
        cost = {**self.cost, **({"excluded_module_name_patterns": [*self.cost_excluded]} if self.cost_excluded else {})}
        arguments: JsonObject = {
            "constraints": {"effective_bits": self.effective_bits, "cost_model": self.cost_model, "cost": cost},
            "quantization_formats": [self.formats[i] for i in self.default] or None,
            "disabled_layers": [*self.disabled],
            "method": self.method,
        }
        if self.spaces:
            arguments["module_search_spaces"] = [
                {
                    "module_name_patterns": [*space.patterns],
                    "quantization_formats": [self.formats[i] for i in space.formats],
                    "allow_no_quant": space.allow_no_quant,
                }
                for space in self.spaces
            ]
        if self.fixed is not None:
            arguments["fixed_quantization_config"] = self.fixed
        return arguments


def load_recipe(name: str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Reads a recipe of ModelOpt's library or a file; loads no model.

    Args:
        name: Name in the library (``general/auto_quantize/nvfp4_fp8_at_5p4bits``) or path of a file; the ending may be
            left out.
        overrides: ``key.path=value`` each, laid over the file.

    Raises:
        UserError: No such recipe, one that ModelOpt refuses, or one of another type.
    """
    _check_type(name)
    from modelopt import recipe as library

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it tells what it loads
            loaded = library.load_recipe(name, overrides=list(overrides) or None)
    except Exception as error:  # pydantic's, YAML's and the loader's own
        where = "the file or recipe_overrides" if overrides else "the file"
        raise UserError(f"recipe {name}: ModelOpt refuses it ({_reason(error)}); correct {where}") from None
    common: JsonObject = {
        "name": shipped_name(name) or Path(name).name.removesuffix(".yaml").removesuffix(".yml"),
        "description": " ".join(loaded.description.split()),
    }
    if isinstance(loaded, library.ModelOptPTQRecipe):
        return LoadedRecipe(kind="ptq", fixed=config_of(loaded.quantize), **common)
    searched = loaded.auto_quantize
    formats: dict[str, int] = {}
    configs: list[Config] = []

    def positions(candidates: Sequence[object]) -> tuple[int, ...]:
        for candidate in candidates:
            config = config_of(candidate)
            key = json.dumps(plain(config), sort_keys=True)
            if key not in formats:
                formats[key] = len(configs)
                configs.append(config)
        return tuple(dict.fromkeys(formats[json.dumps(plain(config_of(c)), sort_keys=True)] for c in candidates))

    default = positions(searched.candidate_formats)
    spaces = tuple(
        SearchSpace(tuple(s.module_name_patterns), positions(s.candidate_formats), s.allow_no_quant)
        for s in searched.module_search_spaces
    )
    _check_bare(name, configs)
    limits = searched.constraints
    return LoadedRecipe(
        kind="auto_quantize",
        formats=tuple(configs),
        default=default,
        spaces=spaces,
        fixed=None if loaded.quantize is None else config_of(loaded.quantize),
        effective_bits=float(limits.effective_bits),
        cost_model=limits.cost_model,
        cost={} if limits.cost is None else limits.cost.model_dump(exclude_none=True),
        disabled=tuple(dict.fromkeys(searched.disabled_layers)),
        cost_excluded=tuple(dict.fromkeys(searched.cost_excluded_layers)),
        method=searched.auto_quantize_method,
        score_size=int(searched.score_size),
        kv_cache=None if searched.kv_cache is None else config_of(searched.kv_cache),
        **common,
    )


@cache
def shipped(kind: str = "") -> tuple[str, ...]:
    """Names of ModelOpt's shipped recipes, of one kind or of both; reads no recipe, only where they lie."""
    import modelopt_recipes

    root = Path(modelopt_recipes.__file__).parent
    wanted = (kind,) if kind else KINDS
    files = (p.relative_to(root) for p in root.rglob("*.yaml") if p.relative_to(root).parts[0] != "configs")
    names = {f.with_suffix("").as_posix() for f in files if f.parent.name in wanted}
    return tuple(sorted(n for n in names if not n.endswith((".quant_cfg", "/disabled_quantizers"))))


def shipped_name(name: str) -> str | None:
    """The name in the library, ``None`` for a file of one's own."""
    bare = name.removesuffix(".yaml").removesuffix(".yml")
    return bare if bare in shipped() else None


def setting_of(config: Config, quantizer: str) -> Config | list[Config] | None:
    """Settings of a quantizer by its full name, ``None`` = disabled; the last entry that matches wins."""
    cfg, enabled = None, True
    for entry in config["quant_cfg"]:
        if entry.get("parent_class") in (None, "nn.Linear") and fnmatch.fnmatch(quantizer, entry["quantizer_name"]):
            enabled = entry.get("enable", True)
            cfg = entry.get("cfg", cfg)
    return cfg if enabled else None


def _check_type(name: str) -> None:
    """Checks that there is such a recipe, of a type that can be run, before ModelOpt is imported.

    Raises:
        UserError: There is none, or it is of another type.
    """
    import modelopt_recipes
    import yaml

    name = str(home_path(name))
    root = Path(modelopt_recipes.__file__).parent
    endings = ("", ".yaml", ".yml")
    path = next((p for base in (root, Path()) for e in endings if (p := base / f"{name}{e}").is_file()), None)
    if path is None:
        if (root / name).is_dir() or Path(name).is_dir():
            raise UserError(f"recipe {name} is a folder; name one of its YAML files")
        close = difflib.get_close_matches(name, shipped(), 3, 0.6)
        hint = f"did you mean {' or '.join(close)}?" if close else f"shipped are {', '.join(shipped('auto_quantize'))}"
        raise UserError(f"recipe {name} is neither a file nor shipped with ModelOpt; {hint}")
    try:
        data = yaml.safe_load(path.read_text("utf-8"))
        kind = data["metadata"]["recipe_type"]
    except yaml.YAMLError as error:
        raise UserError(f"recipe {path} is not YAML ({' '.join(str(error).split())}); correct it") from None
    except (KeyError, TypeError, UnicodeDecodeError):
        raise UserError(f"recipe {path} has no metadata.recipe_type; write one of {', '.join(KINDS)}") from None
    if kind not in KINDS:
        raise UserError(f"recipe {name} is of type {kind}; LayerBits runs recipes of type {' and '.join(KINDS)}")


def _check_bare(name: str, configs: Sequence[Config]) -> None:
    """Checks that candidate formats set quantizers of any linear, as ModelOpt's search matches them.

    Raises:
        UserError: One sets those of some modules alone; the search would quantize nothing there.
    """
    for config in configs:
        for entry in config["quant_cfg"]:
            pattern, on = entry["quantizer_name"], entry.get("enable", True)
            bare = pattern.lstrip("*")
            if on and entry.get("cfg") is not None and bare.endswith("_quantizer") and "." in bare:
                raise UserError(
                    f"recipe {name}: a candidate format sets {pattern}, and a search matches formats by the bare "
                    "names *weight_quantizer and *input_quantizer; use module_search_spaces for some modules"
                )


def _reason(error: Exception) -> str:
    """One line of what pydantic tells in many."""
    details = getattr(error, "errors", None) or getattr(error.__cause__, "errors", None)
    if details is None:
        return " ".join(str(error).split()) or type(error).__name__
    first = details()[0]
    where = ".".join(str(part) for part in first["loc"] if "[" not in str(part))
    return f"{where}: {first['msg']}" if where else str(first["msg"])
