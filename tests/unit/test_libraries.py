"""What is left out of what libraries print, and that the rest is not."""

import logging
import sys
import warnings

import pytest

from layerbits import libraries
from layerbits.libraries import known_lines_left_out, other_lines_to, short_bars_left_out


@pytest.mark.parametrize(
    "line",
    [
        "Inserted 756 quantizers",
        "Registered <class 'transformers.models.llama.modeling_llama.LlamaAttention'> to _QuantAttention for KV Cache "
        "quantization",
        "Loaded extension modelopt_cuda_ext in 0.1 seconds",
    ],
)
def test_known_lines_are_left_out_and_the_others_printed_in_order(line, capsys):
    with known_lines_left_out():
        print("before")
        print(line)
        print(f"{line} and more")
    print(line)
    assert capsys.readouterr().out == f"before\n{line} and more\n{line}\n"


def test_an_extension_that_compiles_for_minutes_is_announced(capsys):
    with known_lines_left_out():
        print("Loading extension modelopt_cuda_ext_fp8...")
    assert capsys.readouterr().out == "Loading extension modelopt_cuda_ext_fp8...\n"


def test_a_line_is_printed_where_it_is_flushed_and_at_the_end_of_the_job(capsys):
    with known_lines_left_out():
        print("asked: ", end="", flush=True)
        assert capsys.readouterr().out == "asked: "
        print("Inserted 3 quantizers, and", "a line without an end", end="")
    assert capsys.readouterr().out == "Inserted 3 quantizers, and a line without an end"


def test_what_was_printed_before_an_error_is_shown_and_the_error_goes_on(capsys):
    def fails():
        print("Error: no such format", end="")
        raise ValueError("no kernel")

    with pytest.raises(ValueError, match="no kernel"), known_lines_left_out():
        fails()
    assert capsys.readouterr().out == "Error: no such format"


def test_lines_may_go_to_the_standard_error(capsys):
    with other_lines_to(sys.stderr):
        print("Inserted 3 quantizers")
        print("Warning: Failed to run dummy forward")
    assert capsys.readouterr() == ("", "Warning: Failed to run dummy forward\n")


def test_known_warnings_are_left_out_and_the_others_shown():
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with known_lines_left_out():
            warnings.warn("transformers 5.17.0 is not tested with current version of modelopt and may", stacklevel=1)
            warnings.warn("To copy construct from a tensor, it is recommended to use sourceTensor", stacklevel=1)
            warnings.warn("Expert 3 gate_up_proj weight quantizer was not calibrated", stacklevel=1)
    assert [str(one.message) for one in shown] == ["Expert 3 gate_up_proj weight quantizer was not calibrated"]


def test_known_messages_of_loggers_are_left_out_and_the_others_shown(caplog):
    exporter = logging.getLogger("modelopt.torch.export.quant_utils")
    with known_lines_left_out(), caplog.at_level("WARNING"):
        exporter.warning("Tied weight (declared): dropping 1 alias key(s) for 'lm_head.weight'; canonical kept.")
        exporter.warning("Large KV activations detected. Quantized KV cache may lead to higher accuracy drop.")
        logging.getLogger("transformers.configuration_utils").warning("`torch_dtype` is deprecated! Use `dtype`")
    assert [record.getMessage()[:9] for record in caplog.records] == ["Large KV "]


@pytest.mark.parametrize(("seconds", "shown"), [(60.0, False), (0.0, True)])
def test_a_bar_is_shown_of_what_takes_long(monkeypatch, capsys, seconds, shown):
    from transformers.utils.logging import tqdm

    monkeypatch.setattr(libraries, "BAR_SECONDS", seconds)
    with short_bars_left_out():
        list(tqdm(range(3), desc="Loading weights"))
    assert ("Loading weights: 100%" in capsys.readouterr().err) == shown
    list(tqdm(range(3), desc="Writing"))
    assert "Writing: 100%" in capsys.readouterr().err


def test_bars_that_nobody_can_change_are_shown(monkeypatch, capsys):
    from transformers.utils import logging as transformers_logging

    monkeypatch.delattr(transformers_logging, "set_tqdm_hook")
    with short_bars_left_out():
        list(transformers_logging.tqdm(range(3), desc="Loading weights"))
    assert "Loading weights: 100%" in capsys.readouterr().err
