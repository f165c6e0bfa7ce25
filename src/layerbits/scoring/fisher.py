"""The ``fisher`` reading of a pass: what the gradient score would be without its two short cuts.

To second order the KL divergence of a small change ``Δy`` of a group's outputs is ``½ · E_ŷ (Σ g_ŷ · Δy)²``, with
``g_ŷ`` the gradient of the loss for a token ``ŷ`` that the *model* predicts (the Fisher information; Martens 2020, "New
insights and perspectives on the natural gradient method"). ModelOpt's gradient score takes the token that came true
instead of ``ŷ``, and squares every feature of every token by itself, as if errors never added up or cancelled. Here
``ŷ`` is drawn from the model's own prediction, and the sum inside the square runs over the features of a group's
linears and over a window of neighbouring tokens. Each draw costs what a gradient pass costs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from layerbits.inputs.calibration import Batch
from layerbits.scoring.steps import Labels

WINDOW = 32
"""Tokens whose errors are summed before squaring. More catch longer correlations and leave fewer, noisier squares:
``docs/trust.md`` compares 1 to 128."""


def drawn_labels(seed: int, batch: int, draw: int) -> Labels:
    """Draws tokens from the model's predictions; the same ones for the same seed, batch and draw.

    Args:
        seed: The run's.
        batch: Position of the batch.
        draw: Number of the draw.
    """
    (number,) = np.random.SeedSequence((seed % (1 << 63), batch, draw)).generate_state(1)
    generators: list[
        torch.Generator
    ] = []  # one, where the logits are: in a model spread over GPUs not where its tokens enter

    def labels(logits: torch.Tensor, _targets: torch.Tensor) -> torch.Tensor:
        if not generators:
            generators.append(torch.Generator(logits.device).manual_seed(int(number)))
        return torch.multinomial(logits.softmax(dim=-1), 1, generator=generators[0])[:, 0]

    return labels


def windowed(
    signed: torch.Tensor, owner: torch.Tensor, batch: Batch, group_of: npt.ArrayLike, groups: int, window: int = WINDOW
) -> torch.Tensor:
    """Squares of window sums, handed out to the window's tokens in proportion to what each put into the sum.

    Args:
        signed: ``[M, C, T]`` signed sums of the linears.
        owner: ``[T]`` sample of each token, -1 at padding, which counts nothing.
        batch: The rows that they come from; no window reaches from one row into the next.
        group_of: ``[M]`` group of each linear.
        groups: How many groups there are.
        window: Tokens.

    Returns:
        float32 ``[groups, C, T]``; over a window they sum to the square of its sum. A token's own may be negative.
    """
    # not index_add_: on a GPU it adds in any order, and these sums cancel
    members = [np.flatnonzero(np.asarray(group_of) == group).tolist() for group in range(groups)]
    summed = torch.stack([signed[linears].sum(dim=0) for linears in members])
    summed = summed.masked_fill((owner < 0).to(signed.device), 0)
    parts, at = [], 0
    for segment in batch.segments:
        rows, length = segment.input_ids.shape
        part = summed[..., at : at + rows * length].unflatten(-1, (rows, length))
        at += rows * length
        padded = torch.nn.functional.pad(part, (0, -length % window)).unflatten(-1, (-1, window))
        squares = (padded * padded.sum(dim=-1, keepdim=True)).flatten(-2)[..., :length]
        parts.append(squares.flatten(-2))
    return torch.cat(parts, dim=-1)
