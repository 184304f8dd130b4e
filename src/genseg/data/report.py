"""The report of data assembly: skipped items with reasons, and statistics of the data next to those of the GS paper."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from genseg.artifacts.files import write_json, write_text
from genseg.artifacts.phrases import SPLITS
from genseg.data import Skip
from genseg.errors import UserError

VERSION = 1
MAX_EXAMPLES = 3
"""Examples in the report for each reason."""
PUBLISHED = Path("data/published/gs_section41.csv")
STATISTICS = {
    "narratives_train": "narratives, train + val (called images in the paper)",
    "narratives_test": "narratives, test (called images in the paper)",
    "images": "images",
    "images_train": "images, train",
    "images_val": "images, val",
    "images_test": "images, test",
    "noun_phrases": "noun phrases, grounded or not",
    "grounded_phrases": "grounded noun phrases",
    "ungrounded_phrases": "ungrounded noun phrases (counted, not evaluated)",
    "masks": "segments of grounded phrases",
    "distinct_segments": "distinct segments of grounded phrases",
    "phrases_per_caption": "noun phrases per caption",
    "grounded_per_caption": "grounded noun phrases per caption",
    "things": "phrases, things",
    "stuff": "phrases, stuff",
    "singulars": "phrases, singular",
    "plurals": "phrases, plural",
}
"""Label of every statistic, in the order of the report."""


@dataclass
class SkipSummary:
    """Counts and examples of all skips with the same unit and reason."""

    count: int = 0
    narratives: int = 0
    phrases: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, skip: Skip) -> None:
        self.count += 1
        self.narratives += skip.narratives
        self.phrases += skip.phrases
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(skip.message)


def skip_line(unit: str, reason: str, summary: SkipSummary) -> str:
    """Return a line for stderr, e.g. `data: skipped 2 phrases: empty mask, e.g. FILE: row 3 ...`."""
    details = f" ({summary.narratives} narratives, {summary.phrases} phrases)" if unit == "image" else ""
    plural = "" if summary.count == 1 else "s"
    return f"data: skipped {summary.count} {unit}{plural}{details}: {reason}, e.g. {summary.examples[0]}"


def compute_statistics(phrases: pd.DataFrame, counts: dict[str, Counter[str]]) -> dict[str, Any]:
    """Compute the statistics of section 4.1 of the GS paper for these data.

    Args:
        phrases: phrase table.
        counts: `images`, `narratives`, `ungrounded` and `segments` by split.

    Returns:
        Value by key of `STATISTICS`, in its order; None if undefined.
    """
    total = sum(counts.values(), Counter())
    grounded = len(phrases)
    nouns = grounded + total["ungrounded"]
    segments = phrases[["image_id", "segment_ids"]].explode("segment_ids").dropna()
    values: dict[str, Any] = {
        "narratives_train": counts["train"]["narratives"] + counts["val"]["narratives"],
        "narratives_test": counts["test"]["narratives"],
        "images": total["images"],
        "noun_phrases": nouns,
        "grounded_phrases": grounded,
        "ungrounded_phrases": total["ungrounded"],
        "masks": total["segments"],
        "distinct_segments": len(segments.drop_duplicates()),
        "phrases_per_caption": nouns / total["narratives"] if total["narratives"] else None,
        "grounded_per_caption": grounded / total["narratives"] if total["narratives"] else None,
        "things": int(phrases["is_thing"].sum()),
        "stuff": int((~phrases["is_thing"]).sum()),
        "plurals": int(phrases["is_plural"].sum()),
        "singulars": int((~phrases["is_plural"]).sum()),
    }
    values |= {f"images_{split}": counts[split]["images"] for split in SPLITS}
    return {key: values[key] for key in STATISTICS}


def read_published(path: Path = PUBLISHED) -> dict[str, float]:
    """Read the paper's values by key of `STATISTICS`, empty if the file is missing. Raises UserError if it is malformed."""
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    try:
        return {row["statistic"]: float(row["paper"]) for row in rows}
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: expected the columns statistic, paper and source, with numbers in column paper") from None


def write_report(
    directory: Path,
    source: str,
    phrases: pd.DataFrame,
    counts: dict[str, Counter[str]],
    skipped: dict[tuple[str, str], SkipSummary],
    notes: Counter[str],
) -> dict[str, Any]:
    """Write report.json and report.md to `directory` and return the statistics.

    Args:
        source: name of the data source.
        counts: as in `compute_statistics`.
        skipped: summaries by (unit, reason).
        notes: further counts by description; zeros are left out.
    """
    statistics, published = compute_statistics(phrases, counts), read_published()
    splits = {
        split: {
            "images": counts[split]["images"],
            "narratives": counts[split]["narratives"],
            "phrases": int((phrases["split"] == split).sum()),
            "images_with_phrases": int(phrases.loc[phrases["split"] == split, "image_id"].nunique()),
        }
        for split in SPLITS
    }
    document = {
        "version": VERSION,
        "source": source,
        "statistics": statistics,
        "paper": published,
        "splits": splits,
        "skipped": [{"unit": unit, "reason": reason, **vars(summary)} for (unit, reason), summary in sorted(skipped.items())],
        "notes": {text: count for text, count in sorted(notes.items()) if count},
    }
    write_json(directory / "report.json", document)
    write_text(directory / "report.md", _markdown(document))
    return statistics


def _markdown(document: dict[str, Any]) -> str:
    """Return report.json as Markdown."""
    published = document["paper"]
    rows = [
        f"| {text} | {_format(document['statistics'][key])} | {_format(published.get(key))} |"
        for key, text in STATISTICS.items()
    ]
    splits = [
        f"| {split} | {item['images']:,} | {item['images_with_phrases']:,} | {item['narratives']:,} | {item['phrases']:,} |"
        for split, item in document["splits"].items()
    ]
    skipped = [
        f"| {item['unit']} | {item['reason']} | {item['count']:,} | {item['narratives']:,} | {item['phrases']:,} "
        f"| {'<br>'.join(example.replace('|', '/') for example in item['examples'])} |"
        for item in document["skipped"]
    ]
    notes = [f"* {text}: {count:,}" for text, count in document["notes"].items()]
    missing = [] if published else [f"The column *paper* is empty because `{PUBLISHED}` is missing.", ""]
    parts = [
        f"# Data report (source: {document['source']})",
        "",
        "*paper*: published values of section 4.1 of the GS paper (COCO + Panoptic Narrative Grounding), not measured here.",
        "",
        *missing,
        "| statistic | here | paper |",
        "|---|---:|---:|",
        *rows,
        "",
        "| split | images | images with phrases | narratives | phrases |",
        "|---|---:|---:|---:|---:|",
        *splits,
        "",
        "## Skipped",
        "",
    ]
    if skipped:
        head = "| unit | reason | count | narratives skipped | grounded phrases skipped | examples |"
        parts += [head, "|---|---|---:|---:|---:|---|", *skipped]
    else:
        parts += ["None."]
    parts += ["", "## Notes", "", *(notes or ["None."]), ""]
    return "\n".join(parts)


def _format(value: float | None) -> str:
    if value is None:
        return "—"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"
