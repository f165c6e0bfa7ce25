"""Times of vLLM's linears on this card, as a run."""

from __future__ import annotations

from pathlib import Path

from layerbits.atomic import dated, whole_folder
from layerbits.history.scheme_inputs import load_scores
from layerbits.jobs import note, run_job
from layerbits.paths import output_folder
from layerbits.plain import Composed, unset
from layerbits.schemes.cost_table import FILE, CostTable
from layerbits.schemes.settings import runs_of, source_name
from layerbits.schemes.source import Source
from layerbits.serving.environment import find_environment
from layerbits.serving.server import Launch
from layerbits.serving.settings import CostRequest, positive, split_arguments
from layerbits.tracking.made import Made
from layerbits.tracking.settings import TrackingSpec


def costs(config: Composed, root: Path) -> None:
    """Reads the runs, measures, writes and logs the table."""
    references = runs_of(config["run_id"])
    asked = CostRequest.of(config["batches"], config["prefill"], config["repeats"])
    vllm = {key: None if unset(value) else str(value) for key, value in config["vllm"].items()}
    launch = Launch(
        find_environment(vllm["python"], root),
        arguments=split_arguments("vllm.arguments=", vllm["arguments"]),
        seconds=positive("vllm.seconds", vllm["seconds"]),
    )
    output = output_folder("output_root", config["output_root"])

    def make(uri: str | None) -> Made:
        return _measured(load_scores(references, uri), asked, launch, output)

    name = f"costs of {source_name(references)}"
    run_job(TrackingSpec.from_config(config), root, name, "costs", make, system_metrics=True)


def _measured(source: Source, asked: CostRequest, launch: Launch, output: Path) -> Made:
    from layerbits.serving.costs import in_words, measure_costs

    final = dated(output, f"costs_{source.model.name}")
    with whole_folder(final) as partial:
        table = measure_costs(source, asked, launch, final.with_name(f"{final.name}.work"))
        table.save(partial / FILE)
        text = in_words(table)
        (partial / "costs.md").write_text(text, "utf-8")
    print(f"\n{text}\ncosts: {final}")
    tags = {"source_run_id": ",".join(source.run_ids), "costs.device": table.device, **note(text)}
    return Made(final, _metrics(table), _parameters(table), tags)


def _metrics(table: CostTable) -> dict[str, float]:
    steps = {f"costs/{one.step.replace(':', '_')}": one for one in table.steps}
    values = {f"{key}/ms": 1000 * one.median for key, one in steps.items()}
    values |= {f"{key}/remainder_ms": 1000 * one.remainder for key, one in steps.items()}
    return {**values, "costs/layouts": float(len(table.layouts)), "costs/refused": float(len(table.refused))}


def _parameters(table: CostTable) -> dict[str, str]:
    return {
        "eff.model": table.model,
        "eff.model_revision": table.revision,
        "eff.runtime": f"{table.package} {table.version}",
        "eff.runtime_dtype": table.dtype,
    }
