"""Which layer moves which answers: the first-order change of each document's log-odds, with its sign.

A candidate changes the output ``y`` of a linear by ``Δy``. To first order the log-odds ``o`` of a right answer change
by ``Σ ∂o/∂y · Δy`` over the tokens of its document. AutoQuant's gradient score sums the square of these products over
all data, of the loss; here the sign is kept, and each document stays apart. One forward and one backward over the
documents serve all linears and candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from layerbits.errors import Unsupported
from layerbits.results.result import FloatArray

if TYPE_CHECKING:
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

    from layerbits.probing.apply import Ranges
    from layerbits.schemes import Scheme
    from layerbits.scoring.patches import Forward

_DOCUMENTS = {"cpu": 2, "cuda": 8}
"""Documents a forward, with all of their choices; at most half as many as there are requests a forward otherwise."""


@dataclass(frozen=True, eq=False)
class PredictedChanges:
    """First-order changes of the log-odds of ``D`` documents.

    Attributes:
        task: The task.
        changes: (group, candidate's configuration hash) → ``[D]`` change in nats.
    """

    task: str
    changes: Mapping[tuple[str, str], FloatArray]

    def of_scheme(self, scheme: Scheme) -> FloatArray:
        """``[D]`` sum over the quantized groups of a scheme, nats."""
        hashes = {c.name: c.config_hash for c in scheme.candidates}
        parts = [
            self.changes[group.key, hashes[name]]
            for group, name in zip(scheme.groups, scheme.assignment, strict=True)
            if name is not None
        ]
        documents = len(next(iter(self.changes.values()))) if self.changes else 0
        return np.sum(parts, axis=0) if parts else np.zeros(documents)


def predict_changes(lm: LM, task: Task, schemes: Sequence[Scheme], ranges: Ranges) -> PredictedChanges:
    """Predicts the change of each document's log-odds for all groups and candidates that some schemes use.

    Args:
        lm: The unquantized model, as the harness takes it.
        task: With its requests built; its answers are chosen among several.
        schemes: Schemes of the model.
        ranges: Activation ranges that cover them.

    Raises:
        Unsupported: A scheme quantizes something else than plain linears.
    """
    import torch

    from layerbits.inputs.offload import offloaded
    from layerbits.probing.apply import configs_of
    from layerbits.scoring.assigned import Made, quantized_forwards

    model = lm.model
    keep = offloaded(model) is None
    made: Made = {}
    owner: dict[str, str] = {}
    forwards: dict[str, dict[str, Forward]] = {}
    for scheme in schemes:
        for name, forward in quantized_forwards(model, configs_of(model, scheme), ranges.inputs, keep, made).items():
            if not isinstance(model.get_submodule(name), torch.nn.Linear):
                raise Unsupported(f"{name} is no plain linear; changes of answers are predicted for those alone")
            forwards.setdefault(name, {})[scheme.modules[name].config_hash] = forward
        owner |= {module: group.key for group in scheme.groups for module in group.modules}

    documents = _documents(lm, task)
    totals = {
        (owner[name], config): np.zeros(len(documents)) for name, configs in forwards.items() for config in configs
    }
    size = max(1, min(_DOCUMENTS[model.device.type], lm.batch_size_per_gpu // 2))
    with _Tap(model, forwards) as tap:
        for start in range(0, len(documents), size):
            for (name, config), values in tap.changes(documents[start : start + size]).items():
                totals[owner[name], config][start : start + len(values)] += values
    return PredictedChanges(str(task.config.task), totals)


@dataclass(frozen=True)
class _Document:
    """Token rows of a document, a row per choice: context and choice, and how many tokens the choice has."""

    rows: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]
    right: int


def _documents(lm: LM, task: Task) -> list[_Document]:
    by_document: dict[int, list[Instance]] = {}
    for instance in task.instances:
        by_document.setdefault(instance.doc_id, []).append(instance)
    documents = []
    for _, instances in sorted(by_document.items()):
        pairs = [lm._encode_pair(*instance.args) for instance in sorted(instances, key=lambda i: i.idx)]
        right = task.doc_to_target(instances[0].doc)
        rows = tuple(tuple(context) + tuple(choice) for context, choice in pairs)
        documents.append(_Document(rows, tuple(len(choice) for _, choice in pairs), int(right)))
    return documents


class _Tap:
    """Hooks that multiply what a candidate changes at each linear's output with the gradient that arrives there."""

    def __init__(self, model: PreTrainedModel, forwards: Mapping[str, Mapping[str, Forward]]) -> None:
        self._model = model
        self._forwards = forwards
        self._found: dict[tuple[str, str], torch.Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._trainable = {p: p.requires_grad for p in model.parameters()}

    def __enter__(self) -> _Tap:
        for parameter in self._trainable:
            parameter.requires_grad_(False)
        embeddings = self._model.get_input_embeddings()
        self._handles.append(embeddings.register_forward_hook(lambda _m, _i, out: out.requires_grad_(True)))
        for name in self._forwards:
            module = self._model.get_submodule(name)
            self._handles.append(module.register_forward_hook(self._recorder(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        for parameter, trainable in self._trainable.items():
            parameter.requires_grad_(trainable)

    def changes(self, documents: Sequence[_Document]) -> dict[tuple[str, str], FloatArray]:
        """(linear, configuration hash) → ``[documents]`` change of the log-odds, nats."""
        import torch

        device = next(self._model.parameters()).device
        rows = [row for document in documents for row in document.rows]
        lengths = [length for document in documents for length in document.lengths]
        width = max(map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        ids, mask = ids.to(device), mask.to(device)
        self._found = {}
        with torch.enable_grad():
            logits = self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            owners, columns = _choice_tokens(rows, lengths, device)
            logprobs = logits[owners, columns - 1].float().log_softmax(-1)
            logprobs = logprobs.gather(1, ids[owners, columns, None])[:, 0]
            likelihoods = torch.zeros(len(rows), device=device).index_add(0, owners, logprobs)
            odds, start = [], 0
            for document in documents:
                end = start + len(document.rows)
                lls = likelihoods[start:end]
                others = torch.cat([lls[: document.right], lls[document.right + 1 :]])
                odds.append(lls[document.right] - others.logsumexp(0))
                start = end
            torch.stack(odds).sum().backward()
        counts = [len(document.rows) for document in documents]
        return {
            key: np.asarray([float(part.sum()) for part in values.double().cpu().split(counts)])
            for key, values in self._found.items()
        }

    def _recorder(self, name: str) -> Callable[..., None]:
        import torch

        def record(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            x, y = inputs[0].detach(), output.detach()

            def collect(gradient: torch.Tensor) -> None:
                with torch.no_grad():
                    for config, forward in self._forwards[name].items():
                        products = gradient.float() * (forward(x) - y).float()
                        self._found[name, config] = products.flatten(1).sum(1)

            output.register_hook(collect)

        return record


def _choice_tokens(
    rows: Sequence[Sequence[int]], lengths: Sequence[int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns of all tokens of the choices, which end the rows."""
    import torch

    owners = [i for i, length in enumerate(lengths) for _ in range(length)]
    columns = [at for row, length in zip(rows, lengths, strict=True) for at in range(len(row) - length, len(row))]
    return torch.tensor(owners, device=device), torch.tensor(columns, device=device)
