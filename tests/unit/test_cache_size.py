"""Keys and values that a model keeps, by its config."""

from types import SimpleNamespace

import pytest

from layerbits.errors import Unsupported, UserError
from layerbits.inputs.cache_size import attention_layers, cached_numbers

PLAIN = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 512}
PER_TOKEN = 2 * 2 * 64


def config(**values):
    """A config whose language model has these values."""
    text = SimpleNamespace(**{**PLAIN, **values})
    return SimpleNamespace(get_text_config=lambda: text)


@pytest.mark.parametrize(
    ("values", "numbers"),
    [
        ({}, 4 * 1000 * PER_TOKEN),
        ({"head_dim": 128}, 4 * 1000 * 2 * PER_TOKEN),
        ({"num_key_value_heads": None}, 4 * 1000 * 4 * PER_TOKEN),
        ({"sliding_window": 100}, 4 * 100 * PER_TOKEN),
        ({"sliding_window": 4096}, 4 * 1000 * PER_TOKEN),
        ({"layer_types": ["sliding_attention"] * 3 + ["full_attention"], "sliding_window": 100}, 1300 * PER_TOKEN),
        ({"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 64}, 1064 * PER_TOKEN),
        ({"layer_types": ["linear_attention"] * 3 + ["full_attention"]}, 1000 * PER_TOKEN),
        ({"layers_block_type": ["mamba", "attention", "mamba", "moe"]}, 1000 * PER_TOKEN),
        ({"num_kv_shared_layers": 1}, 3 * 1000 * PER_TOKEN),
        ({"kv_lora_rank": 512, "qk_rope_head_dim": 64}, 4 * 1000 * 576),
    ],
)
def test_every_layer_keeps_what_its_kind_keeps(values, numbers):
    assert cached_numbers(config(**values), 1000) == numbers


def test_a_context_beyond_the_positions_is_refused():
    with pytest.raises(UserError, match=r"context=1001 is longer than the 1,000 positions of the model; use 1000 or"):
        cached_numbers(config(max_position_embeddings=1000), 1001)
    assert cached_numbers(config(max_position_embeddings=1000), 0) == 0


def test_a_kind_of_layer_that_is_not_known_is_not_guessed():
    with pytest.raises(Unsupported, match="layers of the kind retention are not known"):
        attention_layers(config(layer_types=["full_attention", "retention"]))
