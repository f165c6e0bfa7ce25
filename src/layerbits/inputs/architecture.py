"""Whether a config names an architecture that can be scored, and whose code it would run."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from layerbits.errors import UserError, first_line
from layerbits.inputs.files import read_json
from layerbits.plain import JsonMapping

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


_AUTO = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModel")


def check_code(config: JsonMapping, source: str, trusted: bool) -> None:
    """Refuses an architecture that transformers does not have, unless it comes as code that is trusted.

    Args:
        config: Contents of ``config.json``.
        source: How to name the checkpoint.
        trusted: ``model.trust_remote_code``.

    Raises:
        UserError: The architecture is not known, or is in files that are not trusted.
    """
    from transformers import __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config.get("model_type")
    if not isinstance(kind, str) or not kind:
        raise UserError(f"config.json of {source} names no model_type; give a checkpoint of transformers")
    if kind in CONFIG_MAPPING:
        return
    code = config.get("auto_map")
    if not isinstance(code, Mapping) or not code:
        raise UserError(
            f"{source} is a {kind}, which transformers {__version__} does not know; choose another model, or a version "
            "of the checkpoint that brings its code"
        )
    if not trusted:
        raise UserError(f"{source} brings code of its own ({_modules(code)}); {_TRUST}")


def check_tokenizer_code(source: str, trusted: bool) -> None:
    """Refuses a tokenizer that comes as code which is not trusted (where the checkpoint is on this machine).

    Raises:
        UserError: It does.
    """
    file = Path(source) / "tokenizer_config.json"
    if trusted or not file.is_file():
        return
    said = read_json(file)
    code = said.get("auto_map")
    if not isinstance(code, Mapping) or not code.get("AutoTokenizer"):
        return
    import transformers

    if not hasattr(transformers, str(said.get("tokenizer_class"))):
        raise UserError(f"the tokenizer of {source} brings code of its own ({_modules(code)}); {_TRUST}")


def check_causal(config: PreTrainedConfig, source: str) -> None:
    """Refuses an architecture that does not predict the next token.

    Args:
        config: The ``transformers`` config.
        source: How to name the checkpoint.

    Raises:
        UserError: It does not.
    """
    from transformers import AutoModelForCausalLM, GenerationMixin

    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{source} is an encoder-decoder ({config.model_type}); LayerBits scores decoders that predict the next "
            "token, choose one of those"
        )
    architecture = model_class(config)
    name = architecture.__name__
    if name not in _AUTO and not issubclass(architecture, GenerationMixin):
        raise UserError(
            f"{source} is a {name}, which predicts no next token; give a checkpoint of a causal language model"
        )
    if name in _AUTO and not is_remote(config) and type(config) not in AutoModelForCausalLM._model_mapping:
        raise UserError(f"{source} is a {config.model_type}, of which transformers has no causal language model")
    if getattr(config, "is_decoder", True) is False and _reads_is_decoder(architecture):
        raise UserError(f"{source} says is_decoder=false, so its attention sees later tokens; give a decoder")


def not_built(config: PreTrainedConfig, source: str, error: Exception) -> UserError:
    """The line for a config that no model can be built of: the key that explains it, or what the library said.

    Args:
        config: The ``transformers`` config.
        source: How to name the checkpoint.
        error: What building raised.
    """
    culprit = next(_impossible_values(config), None)
    if culprit is not None:
        return UserError(f"config.json of {source} has {culprit}; put the model's own value there")
    words = f"{type(error).__name__}: {first_line(error)}"
    return UserError(f"config.json of {source} makes no model ({words}); fetch it again, or correct that value")


def _impossible_values(config: PreTrainedConfig) -> Iterator[str]:
    """Values that building a model is known to fail on, in the words of ``config.json``."""
    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    for part in filter(None, parts):
        pad, vocabulary = getattr(part, "pad_token_id", None), getattr(part, "vocab_size", None)
        if isinstance(pad, int) and isinstance(vocabulary, int) and not -vocabulary <= pad < vocabulary:
            yield f"pad_token_id={pad}, beyond its vocab_size={vocabulary}"
        for key in ("hidden_act", "hidden_activation", "activation_function", "activation"):
            if isinstance(name := getattr(part, key, None), str) and name not in ACT2FN:
                yield f"{key}={name!r}, which transformers does not know"
        rope = getattr(part, "rope_parameters", None) or {}
        for one in (rope, *(value for value in rope.values() if isinstance(value, Mapping))):
            if (kind := one.get("rope_type", "default")) not in ("default", *ROPE_INIT_FUNCTIONS):
                yield f"a rope_type {kind!r}, which transformers does not know"


def _reads_is_decoder(model_type: type[PreTrainedModel]) -> bool:
    """Whether the code of a model goes by ``is_decoder``, as BERT's and its kin's, which can be either.

    GPT-NeoX has the setting and no code that reads it.
    """
    source = inspect.getsource(inspect.getmodule(model_type) or model_type)
    return any("config.is_decoder" in line and ">>>" not in line for line in source.splitlines())


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class of ``transformers`` that a config is built with."""
    import transformers

    if is_remote(config):
        return next((getattr(transformers, name) for name in _AUTO if name in (config.auto_map or {})), None) or (
            transformers.AutoModelForCausalLM
        )
    for architecture in config.architectures or []:
        if hasattr(transformers, architecture):
            return getattr(transformers, architecture)
    return transformers.AutoModelForCausalLM


def is_remote(config: PreTrainedConfig) -> bool:
    """Whether a config's class came with the checkpoint."""
    return type(config).__module__.partition(".")[0] == "transformers_modules"


_TRUST = "read it, then set model.trust_remote_code=true to run it"


def _modules(code: JsonMapping) -> str:
    """Files of an ``auto_map``: ``modeling_x.py``."""
    values = [v for value in code.values() for v in (value if isinstance(value, list | tuple) else [value]) if v]
    files = dict.fromkeys(f"{str(v).rpartition('--')[2].rpartition('.')[0]}.py" for v in values)
    return ", ".join(files)
