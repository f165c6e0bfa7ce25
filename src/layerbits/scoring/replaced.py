"""The scored linears with their quantizers, to be run in place of the model's own."""

from __future__ import annotations

from typing import Any

import numpy as np

from layerbits.scoring.patches import Forward
from layerbits.scoring.search import Search
from layerbits.scoring.suffix import Perturbation
from layerbits.scoring.taps import Taps


class ReplacedLinears(Taps):
    """Makes perturbations of groups; calibrate, and load the ranges, before one of them runs."""

    def perturbations(self, search: Search) -> list[Perturbation]:
        """One per group and candidate, candidates of a group side by side."""
        return [self.quantized(search, g, c) for g in range(len(search.groups)) for c in range(len(self._pairs))]

    def quantized(self, search: Search, group: int, candidate: int) -> Perturbation:
        """The linears of a group, quantized by a candidate."""
        pair = search.settings.pairs[candidate]
        return {self._names[m]: self._quantized(m, *pair) for m in np.flatnonzero(search.group_of == group).tolist()}

    def recomputed(self, search: Search, group: int) -> Perturbation:
        """The linears of a group unquantized, summed in another order: what differs is rounding alone."""
        return {self._names[m]: self._in_halves(m) for m in np.flatnonzero(search.group_of == group).tolist()}

    def unchanged(self, search: Search, group: int) -> Perturbation:
        """The linears of a group as they are."""
        members = np.flatnonzero(search.group_of == group).tolist()
        return {self._names[m]: self._modules[m].forward for m in members}

    def quantized_weight(self, name: str, candidate: int) -> Any:
        """A linear's weight as a candidate quantizes it."""
        index = list(self._names).index(name)
        quantizer = self._weight_quantizers[index][self._pairs[candidate][0]]
        weight = self._modules[index].weight.detach()
        return weight if quantizer is None else quantizer(weight)

    def _quantized(self, index: int, weight_setting: int, input_setting: int) -> Forward:
        import torch

        module = self._modules[index]
        quantize_weight = self._weight_quantizers[index][weight_setting]
        quantize_input = self._input_quantizers[index][input_setting]

        def forward(x: Any) -> Any:
            weight = module.weight if quantize_weight is None else quantize_weight(module.weight)
            x = x if quantize_input is None else quantize_input(x)
            return torch.nn.functional.linear(x, weight, module.bias)

        return forward

    def _in_halves(self, index: int) -> Forward:
        import torch

        module = self._modules[index]
        half = module.in_features // 2

        def forward(x: Any) -> Any:
            low = torch.nn.functional.linear(x[..., :half], module.weight[:, :half], module.bias)
            return low + torch.nn.functional.linear(x[..., half:], module.weight[:, half:])

        return forward
