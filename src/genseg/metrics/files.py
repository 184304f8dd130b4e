"""Score one file of predictions and write the scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from genseg.artifacts.phrases import read_phrases
from genseg.artifacts.predictions import read_predictions
from genseg.artifacts.scores import read_summary, write_scores
from genseg.metrics.scoring import score_run


def score_file(phrases: str | Path, predictions: str | Path, out: str | Path, protocol: str, **options: Any) -> dict[str, Any]:
    """Score a predictions file; write the summary to `out` (.json) and the per-phrase table next to it (.parquet).

    `options` are further arguments of `scoring.score_run`. Returns the summary as written.

    Raises:
        UserError: a table is missing or broken, or the two do not match.
    """
    origins = str(phrases), str(predictions)
    per_phrase, summary = score_run(read_phrases(phrases), read_predictions(predictions), protocol, origins=origins, **options)
    write_scores(per_phrase, summary, out)
    return read_summary(out)


def score_notes(summary: dict[str, Any]) -> list[str]:
    """Return one line for each kind of unexpected row that a summary counts."""
    notes = {
        "missing": "phrases without a prediction, counted as IoU 0",
        "other_split": f"predictions for splits other than {summary['split']}, not scored",
        "plural_by_flag": f"phrases without segment_ids, plural by the table's flag instead of {summary['protocol']}'s rule",
    }
    return [f"{text}: {summary['counts'][key]}" for key, text in notes.items() if summary["counts"][key]]
