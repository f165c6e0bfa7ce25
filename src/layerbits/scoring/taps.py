"""The scored linears under observation: ranges, quantized weights, and scores as gradients arrive."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from layerbits.errors import Unsupported, UserError
from layerbits.inputs.calibration import Batch
from layerbits.scoring import quantizers
from layerbits.scoring.reduction import token_scores
from layerbits.scoring.steps import Labels, calibration_forward, loss_backward


class Taps:
    """Hooks on the scored linears of a model; the model itself stays as it is.

    Args:
        model: The whole model.
        names: Its scored linears (``M`` of them).
        settings: Distinct quantizer settings of ``C`` candidates.
        keep_weights: Whether to keep the quantized weights from one batch to the next.

    Raises:
        Unsupported: A scored module is no plain linear.
    """

    def __init__(self, model: Any, names: Sequence[str], settings: quantizers.Settings, keep_weights: bool) -> None:
        import torch

        self.model = model
        self._names = names
        self._modules = [model.get_submodule(n) for n in names]
        for name, module in zip(names, self._modules, strict=True):
            if not isinstance(module, torch.nn.Linear):
                kind = type(module).__name__
                raise Unsupported(f"{name} is a {kind}; one pass scores linears, use autoquant.engine=stock")
        self._pairs = settings.pairs
        self._runs = _runs(settings)
        devices = [m.weight.device for m in self._modules]
        self._weight_quantizers = [[quantizers.make_quantizer(s, d) for s in settings.weights] for d in devices]
        self._input_quantizers = [[quantizers.make_quantizer(s, d) for s in settings.inputs] for d in devices]
        self._kept: list[Any] | None = [] if keep_weights else None
        self._calls = [0] * len(names)
        self._tokens: Any = None
        self._sizes: list[int] = []
        self._signed = False
        self._at = 0

    def calibrate(self, batches: Sequence[Batch], need_logits: bool) -> None:
        """Finds the static input ranges, all of them in one forward over the batches.

        Raises:
            UserError: An input is not finite.
        """
        import torch

        axes = {q.axis for row in self._input_quantizers for q in row if quantizers.needs_range(q)}
        if not axes or not batches:  # a process of a torchrun may have none
            return
        running: list[dict[Any, Any]] = [{} for _ in self._modules]
        last: list[Any] = [None, {}]  # fused linears share one input tensor; its ranges are found once

        def see(index: int) -> Any:
            def hook(_module: Any, args: tuple[Any, ...]) -> None:
                if last[0] is not args[0]:
                    last[:] = [args[0], {axis: quantizers.largest(args[0], axis) for axis in axes}]
                known = running[index]
                for axis, amax in last[1].items():
                    known[axis] = torch.maximum(known[axis], amax) if axis in known else amax

            return hook

        handles = [m.register_forward_pre_hook(see(i)) for i, m in enumerate(self._modules)]
        try:
            with torch.no_grad():
                for batch in progress(batches, "calibrating"):
                    calibration_forward(self.model, batch, need_logits)
        finally:
            last.clear()
            for handle in handles:
                handle.remove()
        for name, row, known in zip(self._names, self._input_quantizers, running, strict=True):
            for quantizer in row:
                if quantizers.needs_range(quantizer):
                    if quantizer.axis not in known:
                        raise UserError(f"{name} is never called in a forward pass; exclude it")
                    if not bool(torch.isfinite(known[quantizer.axis]).all()):
                        raise UserError(f"the input of {name} is not finite; try model.dtype=float32 or bfloat16")
                    quantizer.amax = known[quantizer.axis]

    def ranges(self) -> dict[str, Any]:
        """Static input ranges as float32 arrays by name."""
        return {
            f"{name}.{i}": q.amax.float().cpu().numpy()
            for name, row in zip(self._names, self._input_quantizers, strict=True)
            for i, q in enumerate(row)
            if quantizers.needs_range(q) and q.amax is not None
        }

    def load_ranges(self, ranges: dict[str, Any]) -> None:
        """Takes the ranges of :meth:`ranges` and finds those of the weights.

        Raises:
            UserError: A weight is not finite.
        """
        import torch

        with torch.no_grad():
            for name, module, weights, inputs in zip(
                self._names, self._modules, self._weight_quantizers, self._input_quantizers, strict=True
            ):
                if not bool(torch.isfinite(module.weight).all()):
                    raise UserError(f"the weight of {name} is not finite; the checkpoint is damaged, fetch it again")
                for i, quantizer in enumerate(inputs):
                    if quantizers.needs_range(quantizer):
                        amax = torch.as_tensor(ranges[f"{name}.{i}"]).to(module.weight)
                        quantizer.amax = amax
                for quantizer in weights:
                    quantizers.calibrate_weight(quantizer, module.weight)
            if self._kept is not None:
                self._kept = [self._quantized_weights(i) for i in range(len(self._modules))]

    def drop_weights(self) -> None:
        """Frees the kept weights; from then on weights are quantized on the fly."""
        self._kept = None

    def score(self, batch: Batch, chunked: bool, labels: Labels | None = None) -> tuple[Any, Any]:
        """Scores one batch.

        Args:
            batch: The rows.
            chunked: Whether to make the logits in pieces.
            labels: Takes the loss for these tokens, and leaves the sums over output features signed and unsquared.

        Returns:
            Per-token scores, float32 ``[M, C, T]``, and the sample of each token, ``[T]`` (-1: padding).

        Raises:
            UserError: A linear is not called exactly once a forward, on every token.
        """
        import torch

        owner = torch.cat([s.sample.flatten() for s in batch.segments])
        shape = (len(self._names), len(self._pairs), len(owner))
        self._tokens = torch.zeros(shape, device=self._modules[0].weight.device)
        self._at = 0
        self._calls = [0] * len(self._names)
        self._signed = labels is not None
        self._sizes = [s.input_ids.numel() for s in batch.segments]
        with self._observed(), _no_parameter_gradients(self.model):
            if labels is None:
                loss_backward(self.model, batch, self._next_segment, chunked)
            else:
                loss_backward(self.model, batch, self._next_segment, chunked, labels)
        return self._tokens, owner

    def _next_segment(self) -> None:
        for name, calls in zip(self._names, self._calls, strict=True):
            if calls != 1:
                times = "never called" if calls == 0 else f"called {calls} times"
                raise UserError(f"{name} is {times} in a forward pass; exclude it or use autoquant.engine=stock")
        self._calls = [0] * len(self._names)
        self._at += self._sizes.pop(0)

    @contextmanager
    def _observed(self) -> Iterator[None]:
        embedding = self.model.get_input_embeddings()
        handles = [embedding.register_forward_hook(lambda _m, _a, output: output.requires_grad_())]
        handles += [m.register_forward_hook(self._keep(i)) for i, m in enumerate(self._modules)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, index: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
            tokens = output.numel() // module.out_features
            if tokens != self._sizes[0]:  # an expert, say: which tokens these are cannot be known here
                raise UserError(
                    f"{self._names[index]} is called on {tokens} of {self._sizes[0]} tokens in a forward pass; "
                    "exclude it or use autoquant.engine=stock"
                )
            if output.requires_grad:
                held = [args[0].detach(), output.detach()]
                output.register_hook(lambda gradient: self._add(index, held, gradient))

        return hook

    def _add(self, index: int, held: list[Any], gradient: Any) -> None:
        import torch

        x, y = held
        held.clear()  # the graph outlives this hook, the tensors need not
        self._calls[index] += 1
        module = self._modules[index]
        features = module.out_features
        span = slice(self._at, self._at + y.numel() // features)
        with torch.no_grad():
            weights = self._quantized_weights(index) if self._kept is None else self._kept[index]
            for setting, quantizer in enumerate(self._input_quantizers[index]):
                seen = x if quantizer is None else quantizer(x)
                for first, last, candidates in self._runs[setting]:
                    bias = None if module.bias is None else module.bias.repeat(last - first)
                    outputs = torch.nn.functional.linear(seen, weights[first * features : last * features], bias)
                    scores = token_scores(gradient, outputs, y, self._signed)
                    self._tokens[index, candidates, span] = scores.to(self._tokens.device)

    def _quantized_weights(self, index: int) -> Any:
        """The weights of all settings under each other, ``[W * out_features, in_features]``."""
        import torch

        weight = self._modules[index].weight.detach()
        return torch.cat([weight if q is None else q(weight) for q in self._weight_quantizers[index]])


def _runs(settings: quantizers.Settings) -> list[list[tuple[int, int, list[int]]]]:
    """Per input setting, runs of neighbouring weight settings: one matrix product serves all candidates of a run.

    Returns:
        (first weight setting, one past the last, positions of the candidates), lists of lists.
    """
    runs: list[list[tuple[int, int, list[int]]]] = []
    for setting in range(len(settings.inputs)):
        mine = sorted((w, c) for c, (w, i) in enumerate(settings.pairs) if i == setting)
        found: list[tuple[int, int, list[int]]] = []
        for w, c in mine:
            if found and found[-1][1] == w:
                found[-1] = (found[-1][0], w + 1, [*found[-1][2], c])
            else:
                found.append((w, w + 1, [c]))
        runs.append(found)
    return runs


def progress(items: Sequence[Any], what: str) -> Any:
    """The items under a progress bar."""
    from tqdm import tqdm

    return tqdm(items, desc=what, unit="batch")


@contextmanager
def _no_parameter_gradients(model: Any) -> Iterator[None]:
    """Only activations need gradients here; a parameter's would cost a third of the backward pass."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
