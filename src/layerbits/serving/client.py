"""An OpenAI-compatible vLLM server over HTTP."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from layerbits.errors import UserError
from layerbits.plain import JsonObject
from layerbits.serving.distributions import Distributions, read

_SECONDS = 900.0
"""For one request: a CPU takes seconds for a text, and sends megabytes of log-probabilities."""


class ServerError(Exception):
    """The server answered with an error, or not at all; the message is its own."""


@dataclass(frozen=True)
class Served:
    """A model of a server.

    Attributes:
        name: As requests name it.
        root: What the server loaded it from.
        max_length: Tokens of a request and its answer, at most.
    """

    name: str
    root: str
    max_length: int


class Client:
    """Talks to the server at ``url`` (``http://host:port``); its key is ``VLLM_API_KEY``, where it asks for one."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")

    def healthy(self) -> bool:
        """Whether the server is ready."""
        try:
            self._get("/health", 5.0)
        except (ServerError, UserError):
            return False
        return True

    def version(self) -> str:
        """The version of vLLM there."""
        return str(self._get("/version").get("version", "unknown"))

    def models(self) -> list[Served]:
        """What it serves.

        Raises:
            UserError: It is no vLLM server.
        """
        try:
            models = self._get("/v1/models")["data"]
            return [
                Served(str(m["id"]), str(m.get("root") or m["id"]), int(m.get("max_model_len") or 0)) for m in models
            ]
        except (ServerError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.url} does not answer as a vLLM server ({error}); start `vllm serve`, or leave vllm.url out"
            ) from None

    def distributions(self, model: str, texts: Sequence[Sequence[int]], top_k: int) -> list[Distributions]:
        """The most likely tokens at each position of some texts but the first.

        Args:
            model: Its name on the server.
            texts: Token ids.
            top_k: How many tokens; -1 = the whole vocabulary.

        Raises:
            ServerError: The server refused, or broke.
            UserError: What came back is of other texts.
        """
        rows = []
        for text in texts:  # one by one: an answer has megabytes
            answer = self._post({"model": model, "prompt": list(text), "max_tokens": 1, "prompt_logprobs": top_k})
            rows += read([answer["choices"][0]["prompt_logprobs"]], [text])
        return rows

    def generate(self, model: str, prompts: Sequence[Sequence[int]], tokens: int) -> list[str]:
        """Greedy continuations.

        Raises:
            ServerError: The server refused, or broke.
        """
        body = {"model": model, "prompt": [list(p) for p in prompts], "max_tokens": tokens}
        return [str(choice["text"]) for choice in self._post(body)["choices"]]

    def _post(self, body: dict[str, object]) -> JsonObject:
        data = json.dumps({"temperature": 0.0, **body}).encode()
        headers = {"Content-Type": "application/json"}
        return self._ask(urllib.request.Request(f"{self.url}/v1/completions", data, headers), _SECONDS)

    def _get(self, path: str, seconds: float = 30.0) -> JsonObject:
        try:
            request = urllib.request.Request(f"{self.url}{path}")
        except ValueError:
            raise UserError(f"vllm.url={self.url} is no address; use http://host:port") from None
        return self._ask(request, seconds)

    @staticmethod
    def _ask(request: urllib.request.Request, seconds: float) -> JsonObject:
        if key := os.environ.get("VLLM_API_KEY"):
            request.add_header("Authorization", f"Bearer {key}")
        try:
            with urllib.request.urlopen(request, timeout=seconds) as answer:
                text = answer.read()
        except urllib.error.HTTPError as error:
            raise ServerError(_words(error.read().decode(errors="replace")) or str(error)) from None
        except TimeoutError:
            raise ServerError(f"it gave no answer within {seconds:.0f} s") from None
        except urllib.error.URLError as error:
            raise ServerError(str(error.reason)) from None
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(str(error) or type(error).__name__) from None
        try:
            return json.loads(text) if text else {}
        except json.JSONDecodeError:
            raise ServerError("its answer is not JSON") from None


def choose(models: Sequence[Served], url: str, name: str | None, folders: Sequence[str]) -> Served:
    """The model of a running server that is a checkpoint.

    Args:
        models: What it serves.
        url: For the errors.
        name: Its name there, as the user gave it; ``None`` = the one whose folder has one of the names.
        folders: Names that the checkpoint's folder may have there, the usual one first.

    Raises:
        UserError: It serves another model.
    """
    names = ", ".join(f"{m.name} (from {m.root})" for m in models) or "nothing"
    if name is not None:
        matching = [m for m in models if m.name == name]
        advice = "name one of these with vllm.model"
    else:
        matching = [m for m in models if PurePath(m.root).name in folders]
        advice = f"serve {folders[0]} there, or name it with vllm.model if it is under another folder's name"
    if not matching:
        raise UserError(f"{url} serves {names}, not {name or folders[0]}; {advice}")
    return matching[0]


def check_length(served: Served, url: str, tokens: int) -> None:
    """Checks that a server takes texts of some tokens.

    Raises:
        UserError: Its limit is smaller.
    """
    if 0 < served.max_length < tokens:
        raise UserError(
            f"{served.name} at {url} takes {served.max_length} tokens, the texts and their continuation have {tokens}; "
            f"serve it with --max-model-len {tokens} or more"
        )


def _words(text: str) -> str:
    """The message of an error answer."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError:
        return text.strip()[:500]
    error = data.get("error", data) if isinstance(data, dict) else data
    return str(error.get("message", error) if isinstance(error, dict) else error)
