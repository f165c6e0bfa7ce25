"""The files of a set of schemes: complete on disk, or not there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from layerbits.atomic import dated, optional_part, whole_folder, write_json
from layerbits.errors import Unsupported
from layerbits.report.remarks import with_remarks
from layerbits.schemes.additivity import Factor
from layerbits.schemes.llm_compressor import compressor_recipe_yaml
from layerbits.schemes.ptq_recipe import ptq_recipe_yaml
from layerbits.schemes.report import exclude_yaml, excludes, markdown, rows
from layerbits.schemes.scheme import Scheme
from layerbits.schemes.source import Source
from layerbits.schemes.sureness import Sureness

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COSTS = ("gib", "ms")
"""What people pay for, where it was counted: a figure of its own for each, beside that of bits."""


def write_schemes(
    root: Path,
    source: Source,
    schemes: Sequence[Scheme],
    points: Sequence[Mapping[str, float]] = (),
    name: str = "",
    more: Mapping[str, str] | None = None,
    sure: Sequence[Sureness] = (),
    known: Sequence[Factor] = (),
    answers: Mapping[str, str] | None = None,
) -> Path:
    """Writes each scheme with its exclude list and as recipes, ``schemes.md``, ``schemes.json`` and the Pareto curve.

    Where captions were drawn again, ``stability.json`` and a figure per scheme, too.

    Args:
        root: Output root; the folder is made below its ``tmp``.
        source: Where the schemes come from.
        schemes: What to write.
        points: The Pareto curve.
        name: Of the folder, less the time; made of the model by default.
        more: Further files, path → text.
        sure: How sure the schemes are.
        known: Factors by measured schemes.
        answers: Scheme → what an evaluation said of its answers.

    Returns:
        The folder.

    Raises:
        UserError: The disk is full or cannot be written.
    """
    final = dated(root, name or f"schemes_{source.model.name}")
    with whole_folder(final) as partial:
        for scheme in schemes:
            scheme.save(partial / "schemes" / f"{scheme.name}.json")
            exclude = partial / "exclude" / f"{scheme.name}.yaml"
            exclude.parent.mkdir(exist_ok=True)
            exclude.write_text(exclude_yaml(scheme), "utf-8")
            write_recipes(partial, scheme)
        for path, text in (more or {}).items():
            (partial / path).parent.mkdir(parents=True, exist_ok=True)
            (partial / path).write_text(text, "utf-8")
        write_json(partial / "schemes.json", {"source_run_ids": list(source.run_ids), "schemes": rows(schemes)})
        with optional_part("schemes.md"):
            text = f"{with_remarks(markdown(schemes, sure, known), answers or {})}\n{excludes(schemes)}"
            (partial / "schemes.md").write_text(text, "utf-8")
        if sure:
            write_json(partial / "stability.json", [one.to_json() for one in sure])
        for one in sure:
            with optional_part(f"figures/stability_{one.scheme}.png"):
                _save_strips(source, one, partial / "figures" / f"stability_{one.scheme}.png")
        if points:
            write_json(partial / "pareto.json", list(points))
        if points or schemes:
            with optional_part("figures/pareto.png"):
                from layerbits.figures.style import save_png  # matplotlib takes a second to import

                save_png(_figure(source, schemes, points), partial / "figures" / "pareto.png")
                for cost in _COSTS:
                    if sum(cost in scheme.size for scheme in schemes) > 1:
                        save_png(_figure(source, schemes, (), cost), partial / "figures" / f"pareto_{cost}.png")
    return final


def write_recipes(folder: Path, scheme: Scheme) -> None:
    """Writes ``modelopt/<scheme>.yaml`` and ``llm_compressor/<scheme>.yaml``, or the reason why there is none."""
    for kind, made in (("modelopt", ptq_recipe_yaml), ("llm_compressor", compressor_recipe_yaml)):
        target = folder / kind / f"{scheme.name}.yaml"
        target.parent.mkdir(exist_ok=True)
        try:
            target.write_text(made(scheme), "utf-8")
        except Unsupported as error:
            target.with_suffix(".txt").write_text(f"{error}\n", "utf-8")


def _save_strips(source: Source, one: Sureness, path: Path) -> None:
    from layerbits.figures import choice_strips
    from layerbits.figures.style import save_png

    title = f"{source.model.name} {one.scheme}: choices on {one.draws} draws of {one.captions} captions"
    save_png(choice_strips(one.blocks, one.kinds, one.choices, one.shares, one.chosen, title), path)


def _figure(
    source: Source, schemes: Sequence[Scheme], points: Sequence[Mapping[str, float]], cost: str = "bits"
) -> Figure:
    """A cost against what is predicted; against the raw score where the source has no predicted KL."""
    from layerbits.figures import pareto

    records = [{**point, "label": "least score at each budget"} for point in points]
    records += [{**row, "label": row["scheme"]} for row in rows(schemes) if not row["control"]]
    records += [
        {**row, "label": "random" if s.how["method"] == "random" else "first_last"}
        for row, s in zip(rows(schemes), schemes, strict=True)
        if row["control"]
    ]
    frame = pd.DataFrame(records)
    value = "predicted_kl" if frame["predicted_kl"].notna().any() else "score"
    number = len(source.candidates)
    scored = source.candidates[0].name if number == 1 else f"{number} scored candidates"
    return pareto(frame, value, cost, title=f"{source.model.name}: schemes from {scored}")
