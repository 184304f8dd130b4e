"""The main result: the paper's Table 2 with the study's measured rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genseg.params import Params
from genseg.report.published import published_path, read_published
from genseg.report.render import Column, Table
from genseg.report.scores import SPLITS, ScoredRun, StudyScores
from genseg.report.tables import parts
from genseg.report.text import interval_text, plural


@dataclass(frozen=True)
class _Method:
    """A measured row. Imported methods have no architecture metadata."""

    run: ScoredRun
    diffusion: bool | None
    imported: bool = False


def table2(params: Params, scores: StudyScores) -> Table:
    """Build the paper's Table 2; the measured rows form a group of their own."""
    methods = _measured_methods(scores)
    published_rows = [
        {**record, "shown": record["method"], "source": "published", "data": "PNG", "scores": str(published_path("table2"))}
        for record in read_published("table2")
    ]
    measured_rows: list[dict[str, Any]] = [
        {
            "method": label,
            "shown": parts.SHORT_LABELS.get(Path(method.run.name).name, label),
            "venue": "imported" if method.imported else "this study",
            "diffusion": method.diffusion,
            "ps_pretrain": None if method.imported else False,
            **parts.measured_columns(params, method.run),
        }
        for label, method in methods.items()
    ]
    return Table(
        name="table2",
        caption=f"Average recall (points): published on the PNG benchmark, measured here on {parts.describe_study(params)}.",
        frame=parts.build_frame(
            [*published_rows, *measured_rows],
            ["method", "venue", "diffusion", "ps_pretrain", "source", *SPLITS, "data", "protocol", "n"],
        ),
        columns=[
            Column("shown", "Method", "text"),
            Column("venue", "Venue", "text"),
            Column("diffusion", "Diffusion", "flag"),
            Column("ps_pretrain", "P.S. Pretrain", "flag"),
            *parts.AR_COLUMNS,
        ],
        group_by="source",
        groups={
            "published": "Published, on PNG (Table 2 of the GS paper)",
            "measured": f"Measured here, on {parts.describe_study(params)}, n = {scores.main.phrases}",
        },
        notes=[
            f"Measured on {parts.describe_phrases(params, scores.main)}. {parts.comparability_note(params)}",
            *(_row_note(label, method.run) for label, method in methods.items() if method.run.phrases),
            _methods_note(scores, methods),
        ],
    )


def _measured_methods(scores: StudyScores) -> dict[str, _Method]:
    """Return the measured methods by label: GS, the discriminative control, and the baselines without ground truth."""
    methods = {"GS": _Method(scores.main, True), "Discriminative": _Method(scores.discriminative, False)}
    for run in scores.baselines:
        if run.entry["real"]:
            imported = run.entry["imported"]
            methods[run.entry["label"]] = _Method(run, None if imported else True, imported)
    return methods


def _row_note(label: str, run: ScoredRun) -> str:
    interval = interval_text(run.summary["interval"]["overall"])
    details = [f"95 % interval {interval}", parts.describe_ceilings(run), parts.describe_skipped(run)]
    return f"{label}, overall: {'; '.join(filter(None, details))}."


def _methods_note(scores: StudyScores, methods: dict[str, _Method]) -> str:
    """Describe how GS was sampled, and where the other measured methods come from."""
    entry = scores.main.entry
    note = (
        f"GS was sampled at {entry['size']} × {entry['size']} pixels with {plural(entry['steps'], 'step')} and guidance "
        f"{entry['guidance']:g} ({plural(entry['evaluations'], 'evaluation')} per mask). {parts.EVALUATION_NOTE} "
        "Discriminative: a U-Net of the same size, data and training budget that predicts the mask in one forward pass. "
        "Cross-attention, DiffPNG and DiffSeg: reimplemented here on the study's backbone; assigning DiffSeg's segments to "
        "phrases is our adaptation."
    )
    imported = [label for label, method in methods.items() if method.imported]
    return f"{note} Masks produced by another program and scored here: {', '.join(imported)}." if imported else note
