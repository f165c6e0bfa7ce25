"""A trained model with every linear under one candidate: exported and proven, for one candidate after the other.

    python benchmarks/uniform.py --out exports wint8_aint8/recipe_match_channel_token wint4_afp16/w_group64
    python benchmarks/uniform.py --out exports --format compressed-tensors wfp4_afp16/default/nvfp4

Nothing is scored: what a format makes of a model, and which files it writes, needs no ranking. A candidate is written
``pair/overlay`` or ``pair/overlay/fp4``. Prints a line per export (the proof's summary, the seconds); checkpoints lie
in ``OUT/<pair>-<overlay>[-fp4]``, their reports beside them.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

from layerbits.candidates.candidate import Candidate, resolve_candidate  # noqa: E402
from layerbits.config import Settings  # noqa: E402
from layerbits.errors import UserError  # noqa: E402
from layerbits.export.plan import plan_export  # noqa: E402
from layerbits.export.scheme import export_scheme  # noqa: E402
from layerbits.probing.loading import Prepared  # noqa: E402
from layerbits.results.assignment import Assignment  # noqa: E402
from layerbits.results.result import CalibrationInfo, Group, ModelInfo  # noqa: E402
from layerbits.schemes import Scheme  # noqa: E402
from layerbits.scoring.groups import named_groups  # noqa: E402
from layerbits.stages.workbench import Workbench, workbench  # noqa: E402

FAMILIES = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


def compose(overrides: list[str]) -> Settings:
    """The settings of a sensitivity run."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        composed = OmegaConf.to_container(hydra_compose("sensitivity", overrides), resolve=True)
    assert isinstance(composed, dict)
    return Settings.from_config({str(key): value for key, value in composed.items()})


def groups_of(bench: Workbench, candidate: Candidate) -> tuple[Group, ...]:
    """The linears that a candidate covers, with those together that runtimes fuse."""
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name in bench.scored(candidate):
        parent, _, leaf = name.rpartition(".")
        family = next((f for f in FAMILIES if leaf in f), (leaf,))
        found.setdefault((parent, family), []).append(name)
    sizes = {name: sum(rows * columns for rows, columns in shapes) for name, shapes in bench.linears.items()}
    return named_groups(None, [(tuple(names), sum(sizes[n] for n in names)) for names in found.values()], None)


def scheme_of(bench: Workbench, candidate: Candidate, name: str) -> Scheme:
    """Every covered linear under one candidate."""
    settings, data, spec = bench.settings, bench.settings.dataset, bench.settings.autoquant
    groups = groups_of(bench, candidate)
    tokens = tuple(batch.loss_tokens for batch in bench.calibration.score)
    model = settings.model
    return Scheme(
        name=name,
        source_run_ids=("none",),
        model=ModelInfo(model.name, model.path, bench.resolved.revision, "", model.dtype),
        calibration=CalibrationInfo(
            dataset=data.name,
            size=data.size,
            digest=bench.captions.digest,
            packing=data.packing,
            seq_len=spec.seq_len,
            batch_size=spec.batch_size,
            calib_samples=None,
            score_samples=None,
            calib_rows=None,
            score_rows=None,
            loss_tokens=sum(tokens),
            batch_loss_tokens=tokens,
            padding_share=0.0,
        ),
        groups=groups,
        candidates=(candidate.info,),
        assignment=Assignment([candidate.info.name] * len(groups)),
        effective_bits=candidate.info.bits,
        effective_bits_modelopt=None,
        predicted_kl=float("nan"),
        score=0.0,
        how={"method": "uniform"},
        settings={key: settings.composed[key] for key in ("model", "dataset", "autoquant", "seed")},
    )


def prepared(bench: Workbench, scheme: Scheme) -> Prepared:
    """A scheme with its model and rows."""
    return Prepared(scheme, bench.resolved, bench.tokenizer, bench.captions, bench.calibration.calib)


def main() -> None:
    """Exports what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("candidates", nargs="+", help="pair/overlay or pair/overlay/fp4")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoints")
    parser.add_argument("--format", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--overrides", default="", help="of the composed configuration, separated by spaces")
    arguments = parser.parse_args()
    for wanted in arguments.candidates:
        pair, overlay, *fp4 = wanted.split("/")
        chosen = [f"quant_pair={pair}", f"quant_granularity={overlay}", *(f"fp4={v}" for v in fp4)]
        settings = compose([*chosen, *arguments.overrides.split()])
        candidate = resolve_candidate(settings.quant_pair, settings.overlay, settings.fp4, settings.experimental)
        bench = workbench(replace(settings, device=arguments.device))
        name = "-".join((pair, overlay, *fp4))
        start = time.perf_counter()
        try:
            plan = plan_export(
                prepared(bench, scheme_of(bench, candidate, name)), arguments.out / name, format=arguments.format
            )
            made = export_scheme(plan, arguments.device)
        except UserError as error:
            print(f"{name}: {error}", flush=True)
            continue
        print(f"{plan.format}: {made.proof.summary} ({time.perf_counter() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
