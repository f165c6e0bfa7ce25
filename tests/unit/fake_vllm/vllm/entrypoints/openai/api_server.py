"""Answers as vLLM's server does, without a model; ``--mode`` says how it misbehaves."""

import argparse
import json
import math
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

VOCABULARY = 16
ROOT_CAUSE = """\
(EngineCore pid=7) ERROR 11-25 14:21:31 [core.py:1510] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-25 14:21:31 [core.py:1510]     raise ValueError("no such kernel")
(EngineCore pid=7) ERROR 11-25 14:21:31 [core.py:1510] ValueError: no such kernel
Traceback (most recent call last):
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


LACKING = """\
(APIServer pid=7) ERROR 11-30 02:56:40 [registry.py:1120] ModuleNotFoundError: No module named 'torchvision'
pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, Model architectures ['Qwen2_5_VLForConditionalGeneration'] failed to be inspected."""
"""What vLLM 0.32.0 says, as ``make vllm`` installs it on a CPU, of a Qwen2.5-VL."""


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--port", type=int)
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--max-logprobs", type=int)
    parser.add_argument("--served-model-name")
    parser.add_argument("--mode", default="well")
    settings, _ = parser.parse_known_args()
    if settings.mode == "dies":
        sys.exit(ROOT_CAUSE)
    if settings.mode == "lacks":
        sys.exit(LACKING)
    if settings.mode == "killed":
        signal.raise_signal(signal.SIGKILL)
    if settings.mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen(
            [sys.executable, "-c", "import time, signal; signal.signal(15, signal.SIG_IGN); time.sleep(300)"]
        )
    if settings.mode == "never":
        time.sleep(300)
    ThreadingHTTPServer(("127.0.0.1", settings.port), handler(settings)).serve_forever()


def handler(settings):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            model = {
                "id": settings.served_model_name,
                "root": settings.model,
                "max_model_len": settings.max_model_len,
            }
            answers = {"/health": {}, "/version": {"version": "0.0.1"}, "/v1/models": {"data": [model]}}
            self.answer(answers.get(self.path, {}))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            k = body.get("prompt_logprobs")
            if k is None:
                self.answer({"choices": [{"text": " and"} for _ in body["prompt"]]})
            elif k > settings.max_logprobs:
                message = (
                    f"Requested prompt logprobs of {k}, which is greater than max allowed: {settings.max_logprobs}"
                )
                self.answer({"error": {"message": message}}, 400)
            elif settings.mode == "breaks":
                print(ROOT_CAUSE, flush=True)
                self.answer({"error": {"message": "EngineCore encountered an issue."}}, 500)
            else:
                rows = [None, *(told(token, k) for token in body["prompt"][1:])]
                self.answer({"choices": [{"prompt_logprobs": rows}]})

        def answer(self, data, status=200):
            text = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_):
            pass

    return Handler


def told(token, k):
    """Half of the mass on the first token, half of the rest on the second, and so on; and the text's own token."""
    chosen = [*range(VOCABULARY if k < 0 else k), token]
    return {str(t): {"logprob": -(t + 1) * math.log(2)} for t in chosen}


if __name__ == "__main__":
    main()
