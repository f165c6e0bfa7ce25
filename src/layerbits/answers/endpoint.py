"""A served model as the harness takes it: an OpenAI-compatible completions endpoint, such as vLLM's."""

from __future__ import annotations

import http.client
import json
import os
import sys
import urllib.error
import urllib.request
from contextlib import contextmanager
from typing import TYPE_CHECKING

from layerbits.errors import UserError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lm_eval.api.model import LM

_SECONDS = 300
_CONCURRENT = 4
_FAR = 0.5
"""Nats per token between two computations of one text, above which they are of two models."""


def served(url: str, name: str | None, tokenizer: str, max_length: int) -> LM:
    """The model at an endpoint.

    Args:
        url: ``http://host:port``; its key is ``VLLM_API_KEY``, where it asks for one.
        name: Its name there; ``None`` = the only one.
        tokenizer: Where the tokenizer of the same model is.
        max_length: Tokens that a request may have.

    Raises:
        UserError: The endpoint does not answer, or has no such model.
    """
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    base = url.rstrip("/").removesuffix("/v1")
    return LocalCompletionsAPI(
        model=_chosen(base, name),
        base_url=f"{base}/v1/completions",
        tokenizer=tokenizer,
        tokenizer_backend="huggingface",
        num_concurrent=_CONCURRENT,
        max_retries=2,
        timeout=_SECONDS,
        max_length=max_length,
        batch_size=1,
        header={"Authorization": f"Bearer {key}"} if (key := os.environ.get("VLLM_API_KEY")) else None,
    )


def _chosen(base: str, name: str | None) -> str:
    request = urllib.request.Request(f"{base}/v1/models")
    if key := os.environ.get("VLLM_API_KEY"):
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            names = [str(model["id"]) for model in json.load(answer)["data"]]
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{base} does not answer as an OpenAI-compatible server ({first_line(error)}); start one, or leave "
            "endpoint out"
        ) from None
    if name is None and len(names) == 1:
        return names[0]
    if name not in names:
        wanted = "endpoint_model is not set" if name is None else f"there is no {name}"
        raise UserError(f"{base} serves {', '.join(names)}, and {wanted}; set endpoint_model to one of them")
    return str(name)


def check_same_model(ours: LM, theirs: LM, text: str) -> None:
    """Checks on one text that an endpoint serves the model, quantized or not, and not another one.

    Raises:
        UserError: The likelihoods of the text are far apart, or the endpoint does not tell any.
    """
    from lm_eval.api.instance import Instance

    start, _, rest = text.partition(" ")
    tokens = len(ours.tokenizer(" " + rest)["input_ids"])
    nats = []
    for lm in (ours, theirs):
        with answering():
            (scored,) = lm.loglikelihood([Instance("loglikelihood", {}, (start, " " + rest), 0)], disable_tqdm=True)
        nats.append(float(scored[0]))
    if abs(nats[0] - nats[1]) > _FAR * tokens:
        raise UserError(
            f"the endpoint serves another model: a caption has {nats[1] / tokens:.2f} nats per token there and "
            f"{nats[0] / tokens:.2f} here; give the endpoint of this model, or of a scheme of it"
        )


@contextmanager
def answering() -> Iterator[None]:
    """Turns what the harness raises of an endpoint that breaks into one line.

    Raises:
        UserError: It broke, took too long, or does not give what was asked for.
    """
    errors: tuple[type[Exception], ...] = (OSError, TimeoutError, ValueError, KeyError, TypeError, RuntimeError)
    try:
        import aiohttp
        import requests
        import tenacity

        errors = (*errors, aiohttp.ClientError, requests.RequestException, tenacity.RetryError)
    except ImportError:
        pass
    try:
        yield
    except errors as error:
        print(file=sys.stderr)  # after the harness's own progress, which ends where it stood
        raise UserError(
            f"the endpoint did not answer as asked ({type(error).__name__}: {first_line(error)[:200]}); it must give "
            "log-probabilities of the prompt (echo), as vLLM does, within "
            f"{_SECONDS} s a request"
        ) from error
