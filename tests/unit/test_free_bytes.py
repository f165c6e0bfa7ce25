"""What is free on a GPU, by a CUDA that answers as PyTorch's does: a share takes a card's number, or none."""

import pytest
import torch

from layerbits.scoring.memory import free_bytes


@pytest.fixture
def card(monkeypatch):
    """A current card of 80 GB, of which others use 10 and this process 30, 5 of them not handed out."""

    def share(device=None):
        if isinstance(device, torch.device) and device.index is None:
            raise ValueError("Expected a torch.device with a specified index or an integer")
        return shares["now"]

    shares = {"now": 1.0}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (40e9, 80e9))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _device: 25e9)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: 30e9)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", share)
    return shares


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_what_is_free_and_what_was_not_handed_out(card, name):
    assert free_bytes(torch.device(name)) == 45e9


def test_no_more_than_the_process_may_take(card):
    card["now"] = 0.5
    assert free_bytes(torch.device("cuda")) == 15e9
