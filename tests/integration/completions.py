"""A completions server over a small model: log-probabilities of the prompt and greedy text, as the harness asks."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


@contextmanager
def completions(folder, name="tiny", echo=True, waits=0):
    """Serves the checkpoint of a folder, each answer some seconds late; gives its address."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lock = threading.Lock()

    def scored(ids):
        with torch.no_grad(), lock:
            told = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        chosen = [None, *(float(told[i - 1, ids[i]]) for i in range(1, len(ids)))]
        best = [None, *({"best": float(told[i - 1].max())} for i in range(1, len(ids)))]
        end = float(told[-1].max())
        return {"token_logprobs": [*chosen, end], "top_logprobs": [*best, {"best": end}]}

    def written(ids, most, stop):
        with torch.no_grad(), lock:
            made = model.generate(torch.tensor([ids]), max_new_tokens=most, do_sample=False)
        text = tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)
        return text[: min((at for s in stop or () if (at := text.find(s)) >= 0), default=len(text))]

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self, data):
            body = json.dumps(data).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with suppress(BrokenPipeError):  # who asked has gone
                self.wfile.write(body)

        def do_GET(self):
            self.answer({"data": [{"id": name}]})

        def do_POST(self):
            time.sleep(waits)
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            prompts = asked["prompt"] if isinstance(asked["prompt"][0], list) else [asked["prompt"]]
            if asked.get("echo"):
                choices = [{"index": i, "logprobs": scored(p) if echo else None} for i, p in enumerate(prompts)]
            else:
                choices = [
                    {"index": i, "text": written(p, asked["max_tokens"], asked.get("stop"))}
                    for i, p in enumerate(prompts)
                ]
            self.answer({"choices": choices})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
