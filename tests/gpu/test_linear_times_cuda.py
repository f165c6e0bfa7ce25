"""Times of linears on a GPU: captured in a graph where tokens are few, launched one by one where they are many."""

import pytest
import torch

from layerbits.serving.speed_worker import _time_linears

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ASKED = {"warmup": 3, "repeats": 5, "graph_tokens": 512}


@pytest.fixture
def linears():
    return [torch.nn.Linear(4096, 4096, dtype=torch.bfloat16, device="cuda") for _ in range(8)]


@pytest.mark.parametrize(("tokens", "graph"), [(1, True), (512, True), (513, False)])
def test_few_tokens_run_as_a_graph(linears, tokens, graph):
    x = torch.randn(tokens, 4096, dtype=torch.bfloat16, device="cuda")
    with torch.inference_mode():
        seconds, captured = _time_linears(linears, x, ASKED)
    assert captured == graph
    assert len(seconds) == 5
    assert all(1e-6 < one < 1e-2 for one in seconds)


def test_what_cannot_be_captured_is_timed_all_the_same(linears):
    def waits(x):
        linears[0](x).sum().item()  # a copy to the host

    x = torch.randn(8, 4096, dtype=torch.bfloat16, device="cuda")
    with torch.inference_mode():
        seconds, captured = _time_linears([waits], x, ASKED)
    assert not captured
    assert len(seconds) == 5
