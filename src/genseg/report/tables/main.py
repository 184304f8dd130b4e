"""The main result: the paper's Table 2, with the published and the measured rows."""

from pathlib import Path

from genseg.diffusion.guidance import count_evaluations
from genseg.params import Params
from genseg.report.render import Column, Table, interval_text, plural
from genseg.report.scores import SPLITS, ScoredRun, StudyScores
from genseg.report.tables import parts


def table2(params: Params, scores: StudyScores) -> Table:
    """Build the paper's Table 2; the measured rows form a group of their own."""
    # The measured runs: GS, the discriminative control, and the baselines without ground truth.
    runs = {"GS": scores.main, "Discriminative": scores.discriminative}
    runs |= {run.entry["label"]: run for run in scores.baselines if run.entry["real"]}
    imported = [label for label, run in runs.items() if run.entry.get("imported")]
    measured_rows = [
        {
            "method": label,
            "shown": parts.SHORT_LABELS.get(Path(run.name).name, label),
            "venue": "imported" if label in imported else "this study",
            "diffusion": None if label in imported else label != "Discriminative",  # unknown for imported methods
            "ps_pretrain": None if label in imported else False,
            **parts.measured_columns(params, run),
        }
        for label, run in runs.items()
    ]
    origin = {"source": "published", "data": "PNG", "scores": str(parts.published_path("table2"))}
    published_rows = [{**row, "shown": row["method"]} | origin for row in parts.read_published("table2")]
    first = ["method", "venue", "diffusion", "ps_pretrain", "source", *SPLITS, "data", "protocol", "n"]
    frame = parts.build_frame([*published_rows, *measured_rows], first)
    study = parts.describe_study(params)
    caption = f"Average recall (points): published on the PNG benchmark, measured here on {study}."
    columns = [
        Column("shown", "Method", "text"),
        Column("venue", "Venue", "text"),
        Column("diffusion", "Diffusion", "flag"),
        Column("ps_pretrain", "P.S. Pretrain", "flag"),
        *parts.AR_COLUMNS,
    ]
    notes = [
        f"Measured on {parts.describe_phrases(params, scores.main)}. {parts.comparability_note(params)}",
        *(_row_note(label, run) for label, run in runs.items() if run.phrases),
        _methods_note(params, imported),
    ]
    groups = {
        "published": "Published, on PNG (Table 2 of the GS paper)",
        "measured": f"Measured here, on {study}, n = {scores.main.phrases}",
    }
    return Table("table2", caption, frame, columns, notes, group_by="source", groups=groups)


def _row_note(label: str, run: ScoredRun) -> str:
    interval = interval_text(run.summary["interval"]["overall"])
    details = [f"95 % interval {interval}", parts.describe_ceilings(run), parts.describe_skipped(run)]
    return f"{label}, overall: {'; '.join(filter(None, details))}."


def _methods_note(params: Params, imported: list[str]) -> str:
    """Describe how GS was sampled, and where the other measured methods come from."""
    point = params.sample.main
    note = (
        f"GS was sampled at {point.size} × {point.size} pixels with {plural(point.num_inference_steps, 'step')} and guidance "
        f"{point.guidance_scale:g} ({plural(count_evaluations(point), 'evaluation')} per mask). {parts.EVALUATION_NOTE} "
        f"Discriminative: {parts.DISCRIMINATIVE}. Cross-attention, DiffPNG and DiffSeg: reimplemented here on the study's "
        "backbone; assigning DiffSeg's segments to phrases is our adaptation."
    )
    return f"{note} Masks produced by another program and scored here: {', '.join(imported)}." if imported else note
