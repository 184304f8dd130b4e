"""The main result: the paper's Table 2, with the published and the measured rows, and the measured rows under all protocols."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genseg.diffusion.guidance import count_evaluations
from genseg.params import Params
from genseg.report.render import Column, Table, interval_text, plural, points_text, sentence, to_points
from genseg.report.scores import SPLITS, ScoredRun, StudyScores
from genseg.report.tables import parts

_PROTOCOLS = {  # protocols in words
    "native": "masks at the size of the image; plural: the flag of the phrase table",
    "png-official": "masks resized to 256 × 256 and back, with a soft ground truth; plural: at least two segments",
    "ppmn": "masks on a quarter of an image of at most 800 × 1333, with a dilated ground truth; plural: at least two segments",
}


def table2(params: Params, scores: StudyScores) -> Table:
    """Build the paper's Table 2; the measured rows form a group of their own.

    The CSV has the measured rows under every protocol, print has them under the study's own (see `protocols` for the others).
    """
    runs = {label: by_protocol[params.score.protocol] for label, by_protocol in scores.measured.items()}
    imported = [label for label, run in runs.items() if run.entry.get("imported")]
    measured_rows = [
        {
            "method": label,
            "shown": _short_label(label, run),
            "venue": "imported" if label in imported else "this study",
            "diffusion": None if label in imported else label != "Discriminative",  # unknown for imported methods
            "ps_pretrain": None if label in imported else False,
            **parts.measured_columns(params, by_protocol[protocol]),
        }
        for protocol in params.score.protocols
        for (label, run), by_protocol in zip(runs.items(), scores.measured.values(), strict=True)
    ]
    if scores.seeds:
        measured_rows.append(_seeds_row(params, scores, scores.seeds))
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
    intervals = [f"{label} {interval_text(run.summary['interval']['overall'])}" for label, run in runs.items() if run.phrases]
    notes = [
        f"Measured on {parts.describe_phrases(params, scores.main)}. {parts.comparability_note(params)} Measured rows under "
        "every protocol: table protocols. Shares of stuff and of plurals that the published rows imply: table shares.",
        f"95 % intervals of overall: {'; '.join(intervals)}. {sentence(parts.describe_ceilings(scores.main))}",
        *(f"{label}: {skipped}." for label, run in runs.items() if (skipped := parts.describe_skipped(run))),
        _methods_note(params, imported),
    ]
    if scores.seeds:
        notes.append(_seeds_note(scores.seeds))
    groups = {
        "published": "Published, on PNG (Table 2 of the GS paper)",
        "measured": f"Measured here, on {study}, n = {scores.main.phrases}, protocol {params.score.protocol}",
    }
    printed = (frame["source"] == "published") | (frame["protocol"] == params.score.protocol)
    return Table("table2", caption, frame, columns, notes, group_by="source", groups=groups, printed=printed)


def _seeds_row(params: Params, scores: StudyScores, seeds: dict[str, Any]) -> dict[str, Any]:
    """Return the row of Table 2 with the mean of GS over several trainings."""
    label = f"GS, mean of {plural(len(seeds['seeds']), 'training')}"
    means = {split: (seeds["points"][split] or [None])[0] for split in SPLITS}
    facts = {key: parts.measured_columns(params, scores.main)[key] for key in ("source", "data", "protocol", "n", "images")}
    row = {"method": label, "shown": label, "venue": "this study", "diffusion": True, "ps_pretrain": False}
    return row | facts | means | {"scores": seeds["path"]}


def _seeds_note(seeds: dict[str, Any]) -> str:
    values = {("mIoU" if name == "miou" else name): value for name, value in seeds["points"].items() if value}
    texts = (f"{name} {points_text(mean)} ± {points_text(sd)}" for name, (mean, sd) in values.items())
    trainings = ", ".join(map(str, seeds["seeds"]))
    return f"GS, mean ± standard deviation over trainings with the seeds {trainings}: {', '.join(texts)}."


def protocols(params: Params, scores: StudyScores) -> Table:
    """Compare the protocols, each a group of columns: their ceilings, and the measured rows of Table 2."""
    gs = scores.measured["GS"]
    rows = [_protocols_row("ceiling", "Perfect prediction", gs, "ceiling")]
    if "native" in gs:  # The latent's ceiling is a native AR.
        rows.append(_protocols_row("ceiling", "Latent-size truth", {"native": gs["native"]}, "ceiling_latent"))
    rows += [_protocols_row("method", label, runs, "ar") for label, runs in scores.measured.items()]
    study = parts.describe_study(params)
    caption = f"Highest possible and measured average recall (points) under each protocol, on {study}."
    short_heads = {"overall": "all", "singulars": "sing.", "plurals": "plur."}
    columns = [Column("shown", "Prediction", "text")]
    columns += [
        Column(f"{protocol}_{split}", short_heads.get(split, split), over=protocol) for protocol in gs for split in SPLITS
    ]
    notes = [
        f"Measured on {parts.describe_phrases(params, scores.main)}; the other columns use the other protocols. "
        f"{parts.comparability_note(params)}",
        " ".join(f"{protocol}: {_PROTOCOLS[protocol]}." for protocol in gs),
        "Latent-size truth: the ground truth reduced by area averaging to the size of the latent that GS generates, and read "
        "bilinearly. It has the highest AR that this resolution allows.",
    ]
    groups = {"ceiling": "Highest possible", "method": f"Measured here, on {study}, n = {scores.main.phrases}"}
    frame = parts.build_frame(rows, ["method", "kind"])
    return Table("protocols", caption, frame, columns, notes, group_by="kind", groups=groups)


def _protocols_row(kind: str, label: str, runs: Mapping[str, ScoredRun], key: str) -> dict[str, Any]:
    """Return one row of `protocols`: a value of the summaries of `runs` (protocol -> scores) for every group of phrases."""
    values = {
        f"{protocol}_{split}": to_points((run.summary[key] or {}).get(split))
        for protocol, run in runs.items()
        for split in SPLITS
    }
    shown = _short_label(label, next(iter(runs.values()))) if key == "ar" else label
    paths = "; ".join(str(run.path) for run in runs.values())
    return {"method": label, "shown": shown, "kind": kind, **values, "source": "measured", "scores": paths}


def _short_label(label: str, run: ScoredRun) -> str:
    return parts.SHORT_LABELS.get(Path(run.name).name, label)


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
