from contextlib import contextmanager


@contextmanager
def set_forward_context(attn_metadata, vllm_config):
    yield
