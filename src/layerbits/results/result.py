"""What a sensitivity run found, as plain typed data (no torch, no modelopt, no mlflow).

Shapes: ``S`` calibration samples, ``G`` groups, ``C`` candidates. What an imported result does not say is an empty
text, list or mapping, ``None`` for a count, NaN for another number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from layerbits.atomic import atomic
from layerbits.errors import UserError
from layerbits.results.intervals import Intervals

SCHEMA_VERSION = 1
KINDS = ("qkv", "o", "gate_up", "down", "lm_head", "other")
"""Kinds of linear in the order of a decoder block."""

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Group:
    """Linears that runtimes fuse and that share one format and one score.

    Attributes:
        key: Short name, ``B00.qkv`` for the fused q/k/v of decoder block 0.
        block: Decoder block, numbered from 0; ``None`` outside the blocks (lm_head).
        kind: One of :data:`KINDS`.
        modules: Full module names in the model.
        weights: Number of weights in all of its linears.
    """

    key: str
    block: int | None
    kind: str
    modules: tuple[str, ...]
    weights: int


@dataclass(frozen=True)
class CandidateInfo:
    """One effective quantization format: a quant pair under a granularity overlay.

    Attributes:
        name: ``<quant_pair>`` or ``<quant_pair>/<granularity>``.
        config: Effective ModelOpt config, plain JSON types (``quant_cfg`` list and ``algorithm``).
        config_hash: Content hash of ``config``, canonical and independent of the machine.
        bits: Weight storage bits per weight, block scales included, activations never.
        bits_modelopt: What ModelOpt counts: the minimum over weight and activation quantizers.
        adjustments: What differs from the named format and why, a line each.
    """

    name: str
    quant_pair: str
    granularity: str
    format_name: str
    weight_precision: str
    activation_precision: str
    config: dict[str, Any]
    config_hash: str
    bits: float
    bits_modelopt: float
    adjustments: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelInfo:
    """The model that was scored; ``revision`` is a resolved commit or a content digest."""

    name: str
    source: str
    revision: str
    architecture: str
    dtype: str
    language_model: str = ""


@dataclass(frozen=True)
class CalibrationInfo:
    """What it was scored on.

    Attributes:
        digest: Digest of the captions, in order.
        loss_tokens: Tokens that the loss was taken over in the scoring batches.
        batch_loss_tokens: The same per scoring batch (``N_b`` of the predicted KL).
        padding_share: Share of padded tokens in the scoring batches.
    """

    dataset: str
    size: str
    digest: str
    packing: str
    seq_len: int | None
    batch_size: int | None
    calib_samples: int | None
    score_samples: int | None
    calib_rows: int | None
    score_rows: int | None
    loss_tokens: int | None
    batch_loss_tokens: tuple[int, ...]
    padding_share: float

    @property
    def row_shape(self) -> tuple[str, int, int]:
        """Packing, sequence length and batch size: what the rows can be built from again.

        Raises:
            UserError: They are not known.
        """
        if not self.packing or self.seq_len is None or self.batch_size is None:
            raise UserError("the calibration rows of this result are not known (it was imported); score the model anew")
        return self.packing, self.seq_len, self.batch_size


@dataclass(frozen=True)
class Recipe:
    """What the solver chose for a budget.

    Attributes:
        target_bits: The budget, weight storage bits per weight over the searched groups.
        chosen: Candidate name per group, ``None`` = left unquantized, in the order of the groups; empty where the
            choice is not known.
        effective_bits: Weight storage bits per weight that the choice takes.
        effective_bits_modelopt: ModelOpt's own figure for the same choice.
        score: Raw score summed over the quantized groups.
    """

    target_bits: float
    chosen: tuple[str | None, ...]
    effective_bits: float
    effective_bits_modelopt: float
    score: float


@dataclass(frozen=True)
class NonFinite:
    """A score that is not a number: where it arose."""

    group: str
    candidate: str
    sample: int | None = None
    detail: str = ""


@dataclass(frozen=True)
class SensitivityResult:
    """Everything one scoring pass measured.

    Attributes:
        method: ``gradient`` or ``kl_div``.
        engine: ``onepass`` or ``stock``.
        scores: ``[G, C]`` raw scores, ModelOpt's definition; NaN where nothing finite was measured.
        predicted_kl: ``[G, C]`` nats per token (for ``kl_div``: measured on the calibration rows).
        sample_kl: ``[S, G, C]`` share of each calibration sample in ``predicted_kl`` (sums to it), or ``None``.
        sample_tokens: ``[S]`` loss tokens of each sample, or ``None``.
        recipe: The solver's choice for the target budget.
        intervals: ``None`` where they are not known.
        settings: The composed configuration of the run.
        provenance: Versions, hardware, git commit.
        seconds: Wall time per phase. memory: peak GB per kind.
        tags: Further facts for the tracking server (``fp4_numerics``, ``deployable``, …).
    """

    model: ModelInfo
    calibration: CalibrationInfo
    method: str
    engine: str
    seed: int | None
    device: str
    groups: tuple[Group, ...]
    candidates: tuple[CandidateInfo, ...]
    scores: FloatArray
    predicted_kl: FloatArray
    recipe: Recipe
    sample_kl: FloatArray | None = None
    sample_tokens: npt.NDArray[np.int64] | None = None
    intervals: Intervals | None = None
    nonfinite: tuple[NonFinite, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    memory: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    created: str = ""

    def __post_init__(self) -> None:
        """Checks the shapes.

        Raises:
            ValueError: An array does not fit the groups and candidates.
        """
        shape = (len(self.groups), len(self.candidates))
        for name in ("scores", "predicted_kl"):
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} has shape {getattr(self, name).shape}, expected {shape}")
        if self.sample_kl is not None and self.sample_kl.shape[1:] != shape:
            raise ValueError(f"sample_kl has shape {self.sample_kl.shape}, expected (samples, *{shape})")

    @property
    def blocks(self) -> int:
        """Number of decoder blocks that have a scored group."""
        return 1 + max((g.block for g in self.groups if g.block is not None), default=-1)

    @property
    def run_name(self) -> str:
        """Name of the run: model, pair, granularity and dataset size, as far as they are known."""
        pairs = "+".join(dict.fromkeys(c.quant_pair for c in self.candidates))
        grains = "+".join(dict.fromkeys(c.granularity for c in self.candidates))
        return " ".join(filter(None, (self.model.name, pairs, grains, self.calibration.size)))

    def rows(self) -> list[dict[str, Any]]:
        """One plain record per group and candidate, most sensitive first within a candidate.

        Returns:
            Records with block, kind, layer, candidate, score, predicted_kl, bits, chosen (``None`` where the recipe
            is not known), rank (1 = most sensitive; non-finite scores come last), weights and modules. Where intervals
            are known, also low and high (of the predicted KL), rank_low and rank_high (``None`` where the predicted KL
            is not finite), and tied: the groups whose order against this one is not supported.
        """
        records = []
        chosen = self.recipe.chosen
        keys = [g.key for g in self.groups]
        for c, candidate in enumerate(self.candidates):
            column = self.scores[:, c]
            order = np.argsort(np.where(np.isfinite(column), -column, np.inf), kind="stable")
            for rank, g in enumerate(order, start=1):
                group = self.groups[g]
                records.append(
                    {
                        "block": group.block,
                        "kind": group.kind,
                        "layer": group.key,
                        "candidate": candidate.name,
                        "score": float(column[g]),
                        "predicted_kl": float(self.predicted_kl[g, c]),
                        "bits": candidate.bits,
                        "chosen": chosen[g] == candidate.name if chosen else None,
                        "rank": rank,
                        "weights": group.weights,
                        "modules": list(group.modules),
                        **(self.intervals.row(g, c, keys) if self.intervals else {}),
                    }
                )
        return records

    def total(self, what: str = "predicted_kl", candidate: int = 0) -> float:
        """Sum of the finite ``scores`` or ``predicted_kl`` over all groups, as if all were quantized."""
        column = getattr(self, what)[:, candidate]
        return float(column[np.isfinite(column)].sum())

    def shares(self, candidate: int = 0) -> dict[str, float]:
        """Share of the total raw score by kind of linear; kinds without groups are left out."""
        total = self.total("scores", candidate)
        shares: dict[str, float] = {}
        for g, group in enumerate(self.groups):
            value = self.scores[g, candidate]
            shares.setdefault(group.kind, 0.0)
            if math.isfinite(value) and total > 0:
                shares[group.kind] += float(value) / total
        return {kind: shares[kind] for kind in KINDS if kind in shares}

    def select(self, name: str, recipe: Recipe) -> SensitivityResult:
        """The part of one candidate, with the recipe that the solver found for it alone."""
        index = [c.name for c in self.candidates].index(name)
        return replace(
            self,
            candidates=(self.candidates[index],),
            scores=self.scores[:, [index]],
            predicted_kl=self.predicted_kl[:, [index]],
            sample_kl=None if self.sample_kl is None else self.sample_kl[:, :, [index]],
            intervals=None if self.intervals is None else self.intervals.select(index),
            nonfinite=tuple(n for n in self.nonfinite if n.candidate == name),
            recipe=recipe,
        )

    def to_manifest(self) -> dict[str, Any]:
        """Plain JSON data of everything but the per-sample scores, with its schema version."""
        return {
            "schema_version": SCHEMA_VERSION,
            "created": self.created,
            "model": asdict(self.model),
            "calibration": _plain(self.calibration),
            "method": self.method,
            "engine": self.engine,
            "seed": self.seed,
            "device": self.device,
            "candidates": [_plain(c) for c in self.candidates],
            "groups": [asdict(g) for g in self.groups],
            "recipe": _plain(self.recipe),
            "intervals": self.intervals.told([c.name for c in self.candidates]) if self.intervals else None,
            "layers": [_finite(row) for row in self.rows()],
            "nonfinite": [asdict(n) for n in self.nonfinite],
            "settings": dict(self.settings),
            "provenance": dict(self.provenance),
            "seconds": dict(self.seconds),
            "memory": dict(self.memory),
            "tags": dict(self.tags),
            "warnings": list(self.warnings),
        }

    @classmethod
    def from_manifest(cls, data: Mapping[str, Any]) -> SensitivityResult:
        """Reads :meth:`to_manifest`'s data back (without per-sample scores).

        Raises:
            UserError: Not a LayerBits manifest, or one of a later schema.
        """
        version = data.get("schema_version") if isinstance(data, Mapping) else None
        if not isinstance(version, int):
            raise UserError("not a LayerBits manifest: it has no schema_version; give the manifest.json of a run")
        if version > SCHEMA_VERSION:
            raise UserError(
                f"manifest has schema_version {version}, this LayerBits reads up to {SCHEMA_VERSION}; upgrade layerbits"
            )
        try:
            groups = tuple(Group(**{**g, "modules": tuple(g["modules"])}) for g in data["groups"])
            candidates = tuple(
                CandidateInfo(**{**_numbers(c, "bits", "bits_modelopt"), "adjustments": tuple(c["adjustments"])})
                for c in data["candidates"]
            )
            row_of = {g.key: i for i, g in enumerate(groups)}
            column_of = {c.name: i for i, c in enumerate(candidates)}
            scores = np.full((len(groups), len(candidates)), np.nan)
            predicted_kl = np.full_like(scores, np.nan)
            for layer in data["layers"]:
                at = row_of[layer["layer"]], column_of[layer["candidate"]]
                scores[at] = np.nan if layer["score"] is None else layer["score"]
                predicted_kl[at] = np.nan if layer["predicted_kl"] is None else layer["predicted_kl"]
            calibration = _numbers(data["calibration"], "padding_share")
            calibration["batch_loss_tokens"] = tuple(calibration["batch_loss_tokens"])
            recipe = _numbers(data["recipe"], "target_bits", "effective_bits", "effective_bits_modelopt", "score")
            recipe["chosen"] = tuple(recipe["chosen"])
            return cls(
                model=ModelInfo(**data["model"]),
                calibration=CalibrationInfo(**calibration),
                method=data["method"],
                engine=data["engine"],
                seed=data["seed"],
                device=data["device"],
                groups=groups,
                candidates=candidates,
                scores=scores,
                predicted_kl=predicted_kl,
                recipe=Recipe(**recipe),
                intervals=Intervals.from_told(data.get("intervals"), data["layers"], row_of, column_of),
                nonfinite=tuple(NonFinite(**n) for n in data["nonfinite"]),
                settings=data["settings"],
                provenance=data["provenance"],
                seconds=data["seconds"],
                memory=data["memory"],
                tags=data["tags"],
                warnings=tuple(data["warnings"]),
                created=data["created"],
            )
        except (KeyError, TypeError) as error:
            raise UserError(f"manifest is damaged ({error!r}); fetch it again or run the job again") from error

    def sample_frame(self) -> Any:
        """Long pandas frame of the per-sample scores: sample, tokens, layer, candidate, predicted_kl.

        Raises:
            ValueError: The engine kept no per-sample scores.
        """
        import pandas as pd

        if self.sample_kl is None or self.sample_tokens is None:
            raise ValueError("this result holds no per-sample scores")
        samples, groups, candidates = self.sample_kl.shape
        index = np.indices((samples, groups, candidates)).reshape(3, -1)
        return pd.DataFrame(
            {
                "sample": index[0].astype(np.int32),
                "tokens": self.sample_tokens[index[0]].astype(np.int32),
                "layer": pd.Categorical.from_codes(index[1], [g.key for g in self.groups]),
                "candidate": pd.Categorical.from_codes(index[2], [c.name for c in self.candidates]),
                "predicted_kl": self.sample_kl.reshape(-1).astype(np.float32),
            }
        )


def with_samples(result: SensitivityResult, frame: Any) -> SensitivityResult:
    """The result with the per-sample scores of :meth:`SensitivityResult.sample_frame` put back."""
    samples = int(frame["sample"].max()) + 1
    sample_kl = np.zeros((samples, len(result.groups), len(result.candidates)))
    rows = frame["layer"].map({g.key: i for i, g in enumerate(result.groups)}).to_numpy(dtype=np.int64)
    columns = frame["candidate"].map({c.name: i for i, c in enumerate(result.candidates)}).to_numpy(dtype=np.int64)
    at = frame["sample"].to_numpy()
    sample_kl[at, rows, columns] = frame["predicted_kl"].to_numpy()
    tokens = np.zeros(samples, dtype=np.int64)
    tokens[at] = frame["tokens"].to_numpy()
    return replace(result, sample_kl=sample_kl, sample_tokens=tokens)


def load_manifest(path: str | Path) -> SensitivityResult:
    """Reads a ``manifest.json`` and the ``sensitivity/scores.parquet`` beside it where there is one.

    Raises:
        UserError: No such file, not JSON, or not a manifest that this version reads.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "manifest.json"
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"no manifest at {path}; give the manifest.json of a finished run") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}); fetch it again") from None
    result = SensitivityResult.from_manifest(data)
    samples = path.parent / "sensitivity" / "scores.parquet"
    if samples.exists():
        import pandas as pd

        result = with_samples(result, pd.read_parquet(samples))
    return result


def write_json(path: Path, data: Any) -> None:
    """Writes JSON so that a reader sees the whole file or none."""
    text = json.dumps(data, indent=2, allow_nan=False)
    with atomic(path) as file:
        file.write(f"{text}\n".encode())


def by_kind(groups: Sequence[Group]) -> Iterator[tuple[str, list[int]]]:
    """Kinds in block order, each with the positions of its groups."""
    for kind in KINDS:
        positions = [i for i, group in enumerate(groups) if group.kind == kind]
        if positions:
            yield kind, positions


def _plain(info: Any) -> dict[str, Any]:
    """Fields of a dataclass as JSON data."""
    return _finite(asdict(info))


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with ``None`` for numbers that JSON cannot express."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _numbers(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The values of :func:`_finite` with NaN for those numbers that it left out."""
    return {**values, **{name: math.nan for name in names if values[name] is None}}
