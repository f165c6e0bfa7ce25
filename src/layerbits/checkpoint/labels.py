"""Which label says what a candidate is, and which candidates no label is right for.

:mod:`layerbits.checkpoint.modelopt` has those of ModelOpt's exports, :mod:`layerbits.checkpoint.compressed` those of
compressed-tensors; a candidate that neither can say is refused by name. ``docs/export.md`` lists all of
them.
"""

from __future__ import annotations

from layerbits.candidates.description import SHARED, describe
from layerbits.candidates.formats import algorithm_settings, normalise
from layerbits.candidates.fused import shares_range
from layerbits.candidates.linear import FP4, INPUT, WEIGHT, block_lengths, read_config
from layerbits.checkpoint import compressed, modelopt
from layerbits.checkpoint.files import read_json
from layerbits.checkpoint.label import COMPRESSED, Label
from layerbits.checkpoint.quantization import Quantization
from layerbits.checkpoint.reader import Checkpoint
from layerbits.errors import Unsupported
from layerbits.plain import JsonMapping
from layerbits.results.result import CandidateInfo

STAYS = "it stays available as fake quantization"

_GRANULARITY = {"num_bits", "axis", "block_sizes", "type", "effective_bits"}
_METHODS = {"max_calibrate", "_no_calibrate"}


def label_of(info: CandidateInfo, format: str) -> Label:
    """The label of one format that says what a candidate is.

    Raises:
        Unsupported: None does; the candidate stays available as fake quantization.
    """
    label, why = label_or_reason(info, format)
    if label is None:
        raise Unsupported(f"{info.name} cannot be exported as {format}: {why}; {STAYS}")
    return label


def label_or_reason(info: CandidateInfo, format: str) -> tuple[Label | None, str]:
    """The label of one format that says what a candidate is, or ``None`` and why none does."""
    config = normalise(info.config)
    cfgs = read_config(config).cfgs
    if why := _beyond_labels(config, cfgs):
        return None, why
    # Who shares a range says where a scale comes from, not what a runtime does with it.
    weights, inputs = describe(cfgs[WEIGHT]).removesuffix(SHARED), describe(cfgs[INPUT])
    known = compressed if format == COMPRESSED else modelopt
    label = known.find(weights, inputs)
    return label, "" if label is not None else known.why_not(info, weights, inputs)


def check_shape(info: CandidateInfo, label: Label, module: str, rows: int, columns: int) -> None:
    """Checks that a weight fits the layout of a label.

    Raises:
        Unsupported: Its blocks would be cut.
    """
    layout = label.layout
    whole = layout.block or layout.packed[1]
    if columns % whole:
        raise Unsupported(
            f"{module} has {columns} columns, not a multiple of {whole}: {label.algo} stores whole blocks only; "
            f"leave it unquantized, or use another candidate than {info.name}"
        )
    if rows % layout.packed[0]:
        raise Unsupported(f"{module} has {rows} rows, {label.algo} packs two in one; leave it unquantized")


def read_quantization(checkpoint: Checkpoint) -> Quantization:
    """Reads the configuration of an export.

    Raises:
        UserError: It is missing or damaged, or has a label that is not understood.
    """
    embedded = read_json(checkpoint.folder / "config.json").get("quantization_config") or {}
    module = compressed if embedded.get("quant_method") == COMPRESSED else modelopt
    return module.read(checkpoint)


def _beyond_labels(config: JsonMapping, cfgs: JsonMapping) -> str | None:
    """What a configuration asks for that no label could express."""
    from modelopt.torch.quantization.config import QuantizerAttributeConfig

    methods = [name for name, _ in algorithm_settings(config["algorithm"])]
    if not set(methods) <= _METHODS:
        return f"it is calibrated by {', '.join(methods)}, only max is proven"
    for quantizer, cfg in cfgs.items():
        if isinstance(cfg, list):
            return f"its {quantizer} has {len(cfg)} stages"
        if cfg is None:
            continue
        known = {"backend", "backend_extra_args"} if shares_range(cfg) else {"backend"}
        settings = QuantizerAttributeConfig(**{k: v for k, v in cfg.items() if k not in known})
        if unknown := sorted(set(settings.model_dump(exclude_defaults=True)) - _GRANULARITY):
            return f"its {quantizer} sets {', '.join(unknown)}, which no label expresses"
        blocks = cfg.get("block_sizes") or {}
        if cfg.get("num_bits") == FP4 and block_lengths(cfg) and blocks.get("type") != "dynamic":
            return f"the block scales of its {quantizer} are static, only dynamic ones are proven"
    return None
