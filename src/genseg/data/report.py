"""The report of an assembly: what was left out and why, and the data's statistics beside those of the GS paper."""

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
EXAMPLES = 3
PUBLISHED = Path("data/published/gs_section41.csv")
STATISTICS = {
    "narratives_train": "narratives, train + val (the paper says images)",
    "narratives_test": "narratives, test (the paper says images)",
    "images": "images",
    "images_train": "images, train",
    "images_val": "images, val",
    "images_test": "images, test",
    "noun_phrases": "noun phrases, grounded or not",
    "grounded_phrases": "grounded noun phrases",
    "ungrounded_phrases": "ungrounded noun phrases (counted, not evaluated)",
    "masks": "segments that grounded phrases name",
    "distinct_segments": "the same, each segment once",
    "phrases_per_caption": "noun phrases per caption",
    "grounded_per_caption": "grounded noun phrases per caption",
    "things": "phrases, things",
    "stuff": "phrases, stuff",
    "singulars": "phrases, singular",
    "plurals": "phrases, plural",
}


@dataclass
class Skipped:
    """All skips of one unit and reason."""

    count: int = 0
    narratives: int = 0
    phrases: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, skip: Skip) -> None:
        self.count += 1
        self.narratives += skip.narratives
        self.phrases += skip.phrases
        if len(self.examples) < EXAMPLES:
            self.examples.append(skip.where)


def line(unit: str, reason: str, skipped: Skipped) -> str:
    """One line for stderr, e.g. `skipped 2 phrases: empty mask, e.g. FILE: row 3 ...`."""
    lost = f" ({skipped.narratives} narratives, {skipped.phrases} phrases)" if unit == "image" else ""
    plural = "" if skipped.count == 1 else "s"
    return f"data: skipped {skipped.count} {unit}{plural}{lost}: {reason}, e.g. {skipped.examples[0]}"


def statistics(phrases: pd.DataFrame, counts: dict[str, Counter[str]]) -> dict[str, Any]:
    """The numbers of section 4.1 of the paper, of these data.

    Args:
        phrases: phrase table.
        counts: `images`, `narratives`, `ungrounded`, `segments` by split.
    """
    total = sum(counts.values(), Counter())
    grounded = len(phrases)
    nouns = grounded + total["ungrounded"]
    segments = phrases[["image_id", "segment_ids"]].explode("segment_ids").dropna()
    found: dict[str, Any] = {
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
    found |= {f"images_{split}": counts[split]["images"] for split in SPLITS}
    return {key: found[key] for key in STATISTICS}


def read_published(path: Path = PUBLISHED) -> dict[str, float]:
    """The paper's numbers by statistic; empty when the file is not here (the report then says so)."""
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    try:
        return {row["statistic"]: float(row["paper"]) for row in rows}
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: expected the columns statistic, paper and source, with numbers in paper") from None


def write_report(
    directory: Path,
    source: str,
    phrases: pd.DataFrame,
    counts: dict[str, Counter[str]],
    skipped: dict[tuple[str, str], Skipped],
    notes: Counter[str],
) -> dict[str, Any]:
    """Write report.json and report.md below `directory`; returns the statistics."""
    found, published = statistics(phrases, counts), read_published()
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
        "statistics": found,
        "paper": published,
        "splits": splits,
        "skipped": [{"unit": unit, "reason": reason, **vars(item)} for (unit, reason), item in sorted(skipped.items())],
        "notes": {text: count for text, count in sorted(notes.items()) if count},
    }
    write_json(directory / "report.json", document)
    write_text(directory / "report.md", _markdown(document))
    return found


def _markdown(document: dict[str, Any]) -> str:
    published = document["paper"]
    rows = [
        f"| {text} | {_number(document['statistics'][key])} | {_number(published.get(key))} |"
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
    missing = [] if published else [f"`{PUBLISHED}` is not here, so the column *paper* is empty.", ""]
    parts = [
        f"# Data report (source: {document['source']})",
        "",
        "*paper*: what section 4.1 of the GS paper says of COCO + Panoptic Narrative Grounding; not measured here.",
        "",
        *missing,
        "| statistic | here | paper |",
        "|---|---:|---:|",
        *rows,
        "",
        "| split | images | of them with phrases | narratives | phrases |",
        "|---|---:|---:|---:|---:|",
        *splits,
        "",
        "## Left out",
        "",
    ]
    if skipped:
        head = "| unit | reason | count | narratives lost with it | grounded phrases lost with it | examples |"
        parts += [head, "|---|---|---:|---:|---:|---|", *skipped]
    else:
        parts += ["Nothing."]
    parts += ["", "## Notes", "", *(notes or ["None."]), ""]
    return "\n".join(parts)


def _number(value: float | None) -> str:
    if value is None:
        return "—"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"
