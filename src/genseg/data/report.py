"""The report of data assembly: skipped items with reasons, and statistics of the data and of the GS paper."""

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
    """Counts of all skips with the same unit and reason, and up to three examples."""

    count: int = 0
    narratives: int = 0
    phrases: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, skip: Skip) -> None:
        self.count += 1
        self.narratives += skip.narratives
        self.phrases += skip.phrases
        if len(self.examples) < 3:
            self.examples.append(skip.message)


def skip_line(unit: str, reason: str, summary: SkipSummary) -> str:
    """Return a line for stderr, such as `data: skipped 2 phrases: empty mask, e.g. FILE: row 3 ...`."""
    details = f" ({summary.narratives} narratives, {summary.phrases} phrases)" if unit == "image" else ""
    plural = "" if summary.count == 1 else "s"
    return f"data: skipped {summary.count} {unit}{plural}{details}: {reason}, e.g. {summary.examples[0]}"


def compute_statistics(phrases: pd.DataFrame, counts: dict[str, Counter[str]]) -> dict[str, Any]:
    """Return the statistics of a phrase table that section 4.1 of the GS paper gives, by key of `STATISTICS`.

    `counts` are the numbers of `images`, `narratives`, `ungrounded` phrases and `segments` by split. Undefined values are None.
    """
    total = sum(counts.values(), Counter())
    nouns = len(phrases) + total["ungrounded"]
    segments = phrases[["image_id", "segment_ids"]].explode("segment_ids").dropna()
    values = {
        "narratives_train": counts["train"]["narratives"] + counts["val"]["narratives"],
        "narratives_test": counts["test"]["narratives"],
        "images": total["images"],
        "noun_phrases": nouns,
        "grounded_phrases": len(phrases),
        "ungrounded_phrases": total["ungrounded"],
        "masks": total["segments"],
        "distinct_segments": len(segments.drop_duplicates()),
        "phrases_per_caption": nouns / total["narratives"] if total["narratives"] else None,
        "grounded_per_caption": len(phrases) / total["narratives"] if total["narratives"] else None,
        "things": int(phrases["is_thing"].sum()),
        "stuff": int((~phrases["is_thing"]).sum()),
        "plurals": int(phrases["is_plural"].sum()),
        "singulars": int((~phrases["is_plural"]).sum()),
    }
    return values | {f"images_{split}": counts[split]["images"] for split in SPLITS}


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
        counts: as in `compute_statistics`.
        skipped: summaries by (unit, reason).
        notes: further counts by description; zeros are omitted.
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
        "version": 1,
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
    lines = [
        f"# Data report (source: {document['source']})",
        "",
        "*paper*: published values of section 4.1 of the GS paper (COCO + Panoptic Narrative Grounding), not measured here.",
        "",
    ]
    if not published:
        lines += [f"The column *paper* is empty because `{PUBLISHED}` is missing.", ""]
    lines += ["| statistic | here | paper |", "|---|---:|---:|"]
    for key, text in STATISTICS.items():
        lines.append(f"| {text} | {_format(document['statistics'][key])} | {_format(published.get(key))} |")
    lines += ["", "| split | images | images with phrases | narratives | phrases |", "|---|---:|---:|---:|---:|"]
    for split, item in document["splits"].items():
        images = f"{item['images']:,} | {item['images_with_phrases']:,}"
        lines.append(f"| {split} | {images} | {item['narratives']:,} | {item['phrases']:,} |")
    lines += ["", "## Skipped", ""]
    if document["skipped"]:
        lines.append("| unit | reason | count | narratives skipped | grounded phrases skipped | examples |")
        lines.append("|---|---|---:|---:|---:|---|")
    else:
        lines.append("None.")
    for item in document["skipped"]:
        counts = f"{item['count']:,} | {item['narratives']:,} | {item['phrases']:,}"
        examples = "<br>".join(example.replace("|", "/") for example in item["examples"])
        lines.append(f"| {item['unit']} | {item['reason']} | {counts} | {examples} |")
    lines += ["", "## Notes", ""]
    lines += [f"* {text}: {count:,}" for text, count in document["notes"].items()] or ["None."]
    return "\n".join([*lines, ""])


def _format(value: float | None) -> str:
    if value is None:
        return "—"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"
