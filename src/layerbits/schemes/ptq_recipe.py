"""A scheme as a ModelOpt PTQ recipe: what ``hf_ptq.py --recipe`` runs and ``mtq.quantize`` takes."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence

import yaml

from layerbits.candidates.kv_cache import KV_FORMATS, NO_CACHE
from layerbits.candidates.linear import INPUT, QUANTIZERS, WEIGHT, BlockSizes, Cfg, read_config
from layerbits.errors import Unsupported
from layerbits.results.result import CandidateInfo
from layerbits.schemes.scheme import Scheme

_NOT_LANGUAGE = ("*visual*", "*vision_tower*", "*vision_model*", "*multi_modal_projector*", "*embed_vision*")
_OWN_BACKENDS = "layerbits_"


def ptq_recipe(scheme: Scheme) -> dict[str, object]:
    """The recipe as plain data: every linear by name, in ModelOpt's spelling.

    Names are those below the language model, with a wildcard before them, so that they match both in the whole model
    and in the language model alone, which ``hf_ptq.py`` quantizes of a vision-language model.

    Args:
        scheme: The scheme.

    Raises:
        Unsupported: ModelOpt cannot express it: a quantizer of our own, or formats that need different calibrations.
    """
    entries: list[dict[str, object]] = [{"quantizer_name": "*", "enable": False}]
    cfgs = {info.name: _cfgs(info, scheme.name) for info in scheme.candidates}
    experts = {module for group in scheme.groups if group.kind == "experts" for module in group.modules}
    for module, info in scheme.modules.items():
        between = "*" if module in experts else ""  # its quantizers have the names of its projections before theirs
        for quantizer, cfg in cfgs[info.name].items():
            entries.append({"quantizer_name": f"{_pattern(module, scheme)}.{between}{quantizer}", "cfg": cfg})
    vision = [p for p in _NOT_LANGUAGE if not any(fnmatch.fnmatch(module, p) for module in scheme.modules)]
    entries += [{"quantizer_name": pattern, "enable": False} for pattern in vision]
    if scheme.kv_cache != NO_CACHE:
        entries.append({"quantizer_name": "*[kv]_bmm_quantizer", "cfg": _listed(KV_FORMATS[scheme.kv_cache])})
    bits = f"{scheme.effective_bits:.4g} effective bits"
    description = f"{scheme.name} of {scheme.model.name}: {', '.join(cfgs)} at {bits}, scheme digest {scheme.digest}."
    algorithm = calibration(scheme.candidates, scheme.name)
    if algorithm is None and scheme.kv_cache != NO_CACHE:
        algorithm = "max"  # ranges of keys and values
    return {
        "metadata": {"recipe_type": "ptq", "description": description},
        "quantize": {"algorithm": algorithm, "quant_cfg": entries},
    }


def ptq_recipe_yaml(scheme: Scheme) -> str:
    """The recipe as a file.

    Raises:
        Unsupported: As :func:`ptq_recipe`.
    """
    usage = "#   python hf_ptq.py --pyt_ckpt_path MODEL --recipe THIS_FILE --export_path OUT\n"
    return scheme.heading + usage + yaml.dump(ptq_recipe(scheme), Dumper=_Dumper, sort_keys=False, width=120)


def calibration(candidates: Sequence[CandidateInfo], name: str) -> object:
    """The one calibration algorithm that gives every candidate its own.

    ``max`` finds what formats without an algorithm need not, and an ``mse`` sweep over FP8 scales touches none but
    static NVFP4 weights; other algorithms would calibrate the candidates beside them too.

    Raises:
        Unsupported: There is none.
    """
    algorithms = [info.config.get("algorithm") for info in candidates]
    special = [a for a in algorithms if a not in (None, "max", {"method": "max"})]
    if not special:
        return None if all(a is None for a in algorithms) else "max"
    distinct = [a for i, a in enumerate(special) if a not in special[:i]]
    alone = len(special) == len(algorithms)
    if len(distinct) > 1 or not (alone or _sweeps(distinct[0])):
        names = ", ".join(info.name for info in candidates)
        raise Unsupported(
            f"scheme {name}: a PTQ recipe has one calibration algorithm, and {names} need different ones; "
            "make the scheme of candidates that share one"
        )
    return distinct[0]


def _sweeps(algorithm: object) -> bool:
    return (
        isinstance(algorithm, Mapping) and algorithm.get("method") == "mse" and bool(algorithm.get("fp8_scale_sweep"))
    )


def _cfgs(info: CandidateInfo, name: str) -> dict[str, object]:
    linear = read_config(info.config)
    cfgs = {q: cfg for q in QUANTIZERS if (cfg := linear.cfgs[q]) is not None}
    for quantizer in (WEIGHT, INPUT):
        for stage in linear.stages_of(quantizer):
            if str(stage.get("backend") or "").startswith(_OWN_BACKENDS):
                raise Unsupported(
                    f"scheme {name}: {info.name} scales groups of activations by a kernel of our own, which ModelOpt "
                    "has not; make the scheme of other candidates"
                )
    return {q: _spelled(cfg) for q, cfg in cfgs.items()}


def _spelled(cfg: Cfg | list[Cfg]) -> object:
    """Settings as ModelOpt's YAML spells them: dimensions as integers."""
    if isinstance(cfg, list):
        return [_spelled(stage) for stage in cfg]
    spelled = cfg.copy()
    if blocks := spelled.get("block_sizes"):
        spelled["block_sizes"] = integer_dimensions(blocks)
    return spelled


def integer_dimensions(blocks: BlockSizes) -> BlockSizes:
    """Block sizes with their dimensions as integers, which JSON keeps as text."""
    return {int(k) if str(k).lstrip("-").isdigit() else k: v for k, v in blocks.items()}


def _listed(value: object) -> object:
    """The value with lists for tuples, which YAML has not."""
    if isinstance(value, Mapping):
        return {k: _listed(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _pattern(module: str, scheme: Scheme) -> str:
    prefix = scheme.model.language_model
    return f"*{module.removeprefix(f'{prefix}.')}" if prefix and module.startswith(f"{prefix}.") else module


class _Dumper(yaml.SafeDumper):
    """Spells out equal parts instead of naming one and pointing at it."""

    def ignore_aliases(self, data: object) -> bool:
        return True
