"""The reference engine: plain ``mtq.auto_quantize``, one candidate a pass."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pickle
import sys
import time
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from layerbits.atomic import why_unwritable, write_json
from layerbits.candidates.algorithms import ranges_of
from layerbits.errors import UserError
from layerbits.inputs.calibration import Batch
from layerbits.inputs.limits import stock_fails
from layerbits.inputs.linears import is_transposed
from layerbits.inputs.models import output_head, unscored_patterns
from layerbits.results.result import FloatArray, NonFinite
from layerbits.scoring.groups import named_groups, recipe_hparams, weights_of, with_active
from layerbits.scoring.job import Scores, ScoringJob, kl_weights
from layerbits.scoring.state import SearchState, without_quantizers
from layerbits.scoring.steplog import writable
from layerbits.scoring.steps import calibration_forward, loss_backward, loss_logits, summed_loss
from layerbits.scoring.stock_limits import stock_warnings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def score(job: ScoringJob) -> Scores:
    """Scores one candidate with ModelOpt's own search.

    The search checkpoint in ``job.workdir`` lets a killed run, started again with the same parameters, skip
    what was done. Afterwards the model computes what it did before, with all quantizers disabled.

    Raises:
        UserError: The checkpoint belongs to other parameters or cannot be written, or the scores are not usable.
    """
    with writable(job.workdir), _alone(job.workdir):
        return _score(job)


def _score(job: ScoringJob) -> Scores:
    ((name, config),) = job.configs.items()
    model = job.loaded.model
    log = _StepLog(job.workdir / "steps.json", job.fingerprint)
    checkpoint = _checkpoint(job)
    if _discard_damaged(checkpoint):
        warnings.warn(f"{checkpoint} is damaged (a run ended while writing it); scoring again", stacklevel=2)
    resumed = checkpoint.exists()
    head = output_head(model)
    doubts = stock_warnings(model, job.scored, job.calibration.score[0]) if job.method == "gradient" else ()
    callbacks = _Callbacks(job, log, need_logits=head in job.scored)
    with _quiet(), _restored_after(model), _weights_kept(model, config["algorithm"], job.scored):
        state = _search(job, config, callbacks)
        hparams = recipe_hparams(model)
        named = named_groups(model, [(tuple(h.quant_module_names), weights_of(h)) for _, h in hparams], head)
        searched = [bool(h.is_configurable) for _, h in hparams]
    names = [n for (n, _), wanted in zip(hparams, searched, strict=True) if wanted]
    groups = with_active([g for g, wanted in zip(named, searched, strict=True) if wanted], job.active_ratio)
    # One candidate and "unquantized" (score 0) per group: ModelOpt's clamping to the previous format has nothing
    # to bite on, so the first entry is the raw score.
    raw = np.array([state["candidate_stats"][n]["scores"][0] for n in names], dtype=np.float64)[:, None]
    tokens = np.array([b.loss_tokens for b in job.calibration.score], dtype=np.float64)
    if job.method == "gradient":
        kl = np.tensordot(kl_weights(tokens), log.per_batch(len(tokens), len(groups)), axes=1)[:, None]
    else:
        kl = raw / tokens.sum()
    bad = ~np.isfinite(raw) | ~np.isfinite(kl)
    raw[bad] = kl[bad] = np.nan
    return Scores(
        groups=groups,
        raw=raw,
        predicted_kl=kl,
        chosen={name: tuple(state["best"]["recipe"][n].num_bits < 16 for n in names)},
        states={name: without_quantizers(state)},
        other_weights=sum(g.weights for g, wanted in zip(named, searched, strict=True) if not wanted),
        loss_per_token=log.loss(len(tokens)) / float(tokens.sum()),
        nonfinite=tuple(NonFinite(groups[g].key, name, detail="raw score") for g in np.flatnonzero(bad[:, 0])),
        seconds=callbacks.clock.seconds,
        resumed=resumed,
        notes=doubts,
    )


def _search(job: ScoringJob, config: Mapping[str, object], callbacks: _Callbacks) -> SearchState:
    """Runs ModelOpt's search.

    Raises:
        OSError: The checkpoint cannot be written.
        UserError: ModelOpt fails on the architecture.
    """
    import modelopt.torch.quantization as mtq

    model, checkpoint = job.loaded.model, _checkpoint(job)
    unscored = unscored_patterns(model, set(job.scored))
    cost: dict[str, object] = {"excluded_module_name_patterns": unscored}
    if job.cost_model == "active_moe":
        cost["active_moe_expert_ratio"] = job.active_ratio
    callbacks.clock.enter("calibrate")
    try:
        _, state = mtq.auto_quantize(
            model,
            constraints={"effective_bits": job.target_bits, "cost_model": job.cost_model, "cost": cost},
            quantization_formats=[config],
            data_loader=list(zip_longest(job.calibration.calib, job.calibration.score)),
            forward_step=callbacks.forward,
            forward_backward_step=callbacks.forward_backward if job.method == "gradient" else None,
            num_calib_steps=len(job.calibration.calib),
            num_score_steps=len(job.calibration.score),
            disabled_layers=unscored,
            method=job.method,
            checkpoint=str(checkpoint),
        )
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever its conversion and its hooks make of an architecture
        if why_unwritable(error):
            raise
        if _discard_damaged(checkpoint):  # PyTorch's writer has many words for a full disk, and no cause
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise stock_fails(model, error) from error
    callbacks.clock.stop()
    return state


class _Callbacks:
    """What ModelOpt's search calls for a batch to calibrate with and one to score, side by side.

    Args:
        job: The job.
        log: Takes the loss of each scored batch and the scores so far.
        need_logits: Whether the output head is scored and must see every token in calibration.

    Attributes:
        clock: Seconds per phase.
    """

    def __init__(self, job: ScoringJob, log: _StepLog, need_logits: bool) -> None:
        self.clock = _Clock()
        self._job = job
        self._log = log
        self._need_logits = need_logits
        self._last: Batch | None = None

    def forward(self, model: PreTrainedModel, pair: tuple[Batch, Batch]) -> torch.Tensor | None:
        """A forward of either phase: ModelOpt scores ``kl_div`` in inference mode and calibrates outside of it."""
        calibration, scored = pair
        if torch.is_inference_mode_enabled():
            return self._logits(model, scored)
        self.clock.enter("calibrate")
        calibration_forward(model, calibration, self._need_logits)
        return None

    def forward_backward(self, model: PreTrainedModel, pair: tuple[Batch, Batch]) -> None:
        """A forward and its backward, for the scores of ``gradient``."""
        self.clock.enter("score")
        loss = float(loss_backward(model, pair[1]))
        self._watch(loss, pair[1])
        self._log.append(_importances(model), loss)

    def _logits(self, model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        self.clock.enter("score")
        logits = loss_logits(model, batch)
        if batch is not self._last:  # of each batch the unquantized model comes first
            self._last = batch
            loss = summed_loss(logits, batch)
            self._watch(loss, batch)
            self._log.append(None, loss)
        return logits

    def _watch(self, loss: float, batch: Batch) -> None:
        if batch is self._job.calibration.score[0]:
            self._job.watch(loss / batch.loss_tokens, batch.loss_tokens)


def _checkpoint(job: ScoringJob) -> Path:
    """ModelOpt's own file."""
    return job.workdir / "autoquant_checkpoint.pt"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Holds the lock of a search checkpoint: ModelOpt writes its file in place, for one process only."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another process scores the same; waiting for it", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _importances(model: PreTrainedModel) -> list[float]:
    """Running raw score per decision, after a backward pass."""
    totals = []
    for name, hparam in recipe_hparams(model):
        if not hparam.is_configurable:
            continue
        recipe = hparam.choices[0]
        parts = [hparam._importance_dict[recipe][module] for module in hparam.score_modules]
        if any(part is None for part in parts):
            module = name.removesuffix(".quant_recipe")
            raise UserError(f"{module} was never called in a forward pass; leave it out with model.exclude=[{module}]")
        totals.append(torch.stack(parts).sum())
    return torch.stack(totals).double().tolist()


class _StepLog:
    """Running raw scores and the loss of every step, on disk beside ModelOpt's checkpoint."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self._path = path
        self._fingerprint = fingerprint
        self._running: list[list[float]] = []
        self._losses: list[float] = []
        self._from_disk = path.exists()
        if self._from_disk:
            data = json.loads(path.read_text("utf-8"))
            if data["fingerprint"] != fingerprint:
                raise UserError(
                    f"the search checkpoint in {path.parent} was made with other parameters; "
                    "give another folder as autoquant.checkpoint or delete it"
                )
            self._running = [[np.nan if v is None else v for v in step] for step in data["running"]]
            self._losses = [np.nan if v is None else v for v in data.get("losses", [])]
        else:
            self._write()

    def append(self, totals: list[float] | None, loss: float) -> None:
        if self._from_disk:  # ModelOpt scores from the start again: its own checkpoint holds no scores yet
            self._running, self._losses, self._from_disk = [], [], False
        if totals is not None:
            self._running.append(totals)
        self._losses.append(loss)
        self._write()

    def loss(self, batches: int) -> float:
        """Loss of all batches, nats, summed."""
        if len(self._losses) != batches:
            raise self._incomplete()
        return sum(self._losses)

    def per_batch(self, batches: int, groups: int) -> FloatArray:
        running = np.array(self._running, dtype=np.float64)
        if running.shape != (batches, groups):
            raise self._incomplete()
        return np.diff(running, axis=0, prepend=0.0)

    def _incomplete(self) -> UserError:
        return UserError(f"the search checkpoint in {self._path.parent} is incomplete; delete it and run again")

    def _write(self) -> None:
        finite = [[v if np.isfinite(v) else None for v in step] for step in [*self._running, self._losses]]
        content = {"fingerprint": self._fingerprint, "running": finite[:-1], "losses": finite[-1]}
        write_json(self._path, content)


class _Clock:
    """Seconds per phase of a search whose phases only show in its callbacks."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._phase = ""
        self._since = 0.0

    def enter(self, phase: str) -> None:
        if phase != self._phase:
            self.stop()
            self._phase, self._since = phase, time.perf_counter()

    def stop(self) -> None:
        if self._phase:
            spent = time.perf_counter() - self._since
            self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + spent
            self._phase = ""


def _discard_damaged(checkpoint: Path) -> bool:
    """Removes a torn file, which is no result; returns whether it was one."""
    if not checkpoint.exists():
        return False
    try:
        torch.load(checkpoint, map_location="cpu")
    except (EOFError, OSError, RuntimeError, zipfile.BadZipFile, pickle.UnpicklingError):
        checkpoint.unlink()
        return True
    return False


@contextmanager
def _restored_after(model: PreTrainedModel) -> Iterator[None]:
    """Undoes what ModelOpt's search leaves behind: gradient checkpointing, train mode, converted linears."""
    use_cache = model.config.use_cache
    implementations = [(config, config._experts_implementation) for config in _experts_configs(model)]
    requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    patched = {m for m in model.modules() if "forward" in vars(m)}
    transposed = {m: m.weight for m in model.modules() if is_transposed(m)}
    try:
        yield
    finally:
        if getattr(model, "is_gradient_checkpointing", False):
            model.gradient_checkpointing_disable()
        model.eval()
        model.config.use_cache = use_cache
        for config, implementation in implementations:
            config._experts_implementation = implementation
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(requires_grad.get(name, False))
            parameter.grad = None
        _plain_again(model, patched)
        for module, weight in transposed.items():  # of these, ModelOpt makes linears for good
            module.weight = weight
            for name in ("in_features", "out_features"):
                vars(module).pop(name, None)


def _experts_configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Configurations that say how experts run; ModelOpt sets them to its own way for good."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return [config for config in configs if hasattr(config, "_experts_implementation")]


@contextmanager
def _weights_kept(model: PreTrainedModel, algorithm: object, names: Sequence[str]) -> Iterator[None]:
    """Puts weights back that ModelOpt changes: AWQ and SmoothQuant fold their scales into those that were chosen.

    Args:
        model: The model.
        algorithm: Of the candidate; those of one pass change nothing, so that nothing is kept for them.
        names: The scored modules.
    """
    modules = {} if ranges_of(algorithm) is not None else {name: model.get_submodule(name) for name in names}
    before = {name: [p.detach().cpu().clone() for p in module.parameters()] for name, module in modules.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, module in modules.items():
                for parameter, kept in zip(module.parameters(), before[name], strict=True):
                    parameter.copy_(kept)


def _plain_again(model: PreTrainedModel, patched: set[nn.Module]) -> None:
    """Turns ModelOpt's dynamic modules back into what they were."""
    from modelopt.torch.opt.conversion import ModeloptStateManager
    from modelopt.torch.opt.dynamic import DynamicModule
    from modelopt.torch.quantization.nn import TensorQuantizer

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            lists = isinstance(child, nn.ModuleList) and name.endswith("_weight_quantizers")
            if isinstance(child, TensorQuantizer) or lists:
                delattr(module, name)
        module.__dict__.pop("_hparams_for_scoring", None)
        module.__dict__.pop("output_diff_dict", None)
        if isinstance(module, DynamicModule):
            module.export()
        if module not in patched:
            vars(module).pop("forward", None)  # scoring put the forward of the converted class here
    if ModeloptStateManager.is_converted(model):
        ModeloptStateManager.remove_state(model)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hides the warnings that every search gives and that ask nothing of the user."""
    with warnings.catch_warnings():
        for message in (
            ".*custom quantization formats.*",
            ".*gradient checkpointing.*",
            ".*does not exist! Initializing from scratch.*",
            ".*Per-rank checkpoint.*",
            ".*torch.utils.checkpoint.*",
        ):
            warnings.filterwarnings("ignore", message=message)
        yield
