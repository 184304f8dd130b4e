"""The shares of stuff and of plurals among the scored phrases: implied by the published rows of Table 2, and counted here."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import pandas as pd

from genseg.metrics.ious import plural_flags
from genseg.params import Params
from genseg.report.render import Column, Table, plural, to_points
from genseg.report.tables import parts

ROUNDING = 0.05
"""Highest difference in points between a published AR, which has one decimal, and the AR before rounding."""

_GROUPS = {"stuff": "things", "plurals": "singulars"}  # group of phrases -> all other phrases
_DEFINITIONS = {"the phrase table's flag": "native", "at least two segments": "png-official"}  # of plural -> a protocol with it


def shares(params: Params, phrases: pd.DataFrame) -> Table:
    """Build the table of shares, in percent, from the published Table 2 and the phrase table of the study."""
    # 1. Solve the published rows, and count the test phrases under both definitions of plural.
    origin = {"source": "published", "scores": str(parts.published_path("table2"))}
    rows = [{**row, **_share_columns(row), "n": None} | origin for row in parts.read_published("table2")]
    notes = _agreement_notes(pd.DataFrame(rows))
    test = phrases[phrases["split"] == "test"]
    origin = {"source": "counted", "scores": str(params.data_dir / "phrases.parquet")}
    for definition, protocol in _DEFINITIONS.items():
        counts = {"stuff": ~test["is_thing"].to_numpy(bool), "plurals": plural_flags(protocol, test)[0]}
        counted = {f"{group}_share": 100 * members.mean() for group, members in counts.items()}
        rows.append({"method": f"Plural: {definition}", **counted, "n": len(test)} | origin)
    frame = parts.build_frame(rows, ["method", "ps_pretrain", "source"])

    # 2. Describe them.
    study = parts.describe_study(params)
    caption = f"Shares of stuff and of plurals (%): implied by the GS paper's Table 2, and counted on {study}."
    columns = [Column("method", "Row", "text"), Column("ps_pretrain", "P.S. Pretrain", "flag")]
    for group in _GROUPS:
        columns += [Column(f"{group}_share", "share", over=group), Column(f"{group}_share", "range", "interval", over=group)]
    arithmetic = (
        "AR is a mean over phrases: overall = share × stuff + (1 − share) × things, and the same equation holds for plurals "
        "and singulars. Range: all shares that are possible when every published number is rounded by up to "
        f"{ROUNDING:g} points."
    )
    scope = (
        "If these are the files of the PNG benchmark, the range of a published row contains the share under its definitions."
        if params.data.source == "png"
        else "They are shares of these data, and say nothing about the phrases of the published rows."
    )
    counted_note = f"Counted on {study}, test split, {plural(len(test), 'phrase')}. {scope}"
    groups = {"published": "Implied by the published rows, on PNG", "counted": f"Counted on {study}, n = {len(test)}"}
    return Table("shares", caption, frame, columns, [arithmetic, *notes, counted_note], group_by="source", groups=groups)


def implied_share(overall: float, part: float, rest: float) -> tuple[float, float, float] | None:
    """Solve overall = s * part + (1 - s) * rest for s, the share of the phrases that belong to the first group.

    The three AR are in points, rounded to one decimal. Returns s and the lowest and highest s before rounding, as fractions;
    None if rounding may hide the whole difference between `part` and `rest`, so that no share can be excluded.
    """
    if round(abs(part - rest), 6) <= 2 * ROUNDING:
        return None
    # s is monotonic in each of the three, so its extremes are at corners of the box of the AR before rounding.
    corners = product(*((value - ROUNDING, value + ROUNDING) for value in (overall, part, rest)))
    values = [(a - c) / (b - c) for a, b, c in corners]
    return (overall - rest) / (part - rest), min(values), max(values)


def largest_agreement(ranges: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the largest set of closed ranges (low, high) that have a point in common."""
    sets = [[index for index, (low, high) in enumerate(ranges) if low <= point <= high] for point, _ in ranges]
    return max(sets, key=len, default=[])


def _share_columns(row: dict[str, Any]) -> dict[str, float | None]:
    columns: dict[str, float | None] = {}
    for group, others in _GROUPS.items():
        share = implied_share(row["overall"], row[group], row[others]) or (None, None, None)
        for suffix, value in zip(("", "_low", "_high"), share, strict=True):
            columns[f"{group}_share{suffix}"] = to_points(value)
    return columns


def _agreement_notes(published: pd.DataFrame) -> list[str]:
    """Say for each group which share most published rows have in common, and show the arithmetic of all other rows."""
    notes: list[str] = []
    outliers: dict[str, None] = {}
    for group, others in _GROUPS.items():
        name = f"{group}_share"
        solved = published.dropna(subset=[name])
        agreeing = largest_agreement(list(zip(solved[f"{name}_low"], solved[f"{name}_high"], strict=True)))
        common = solved.iloc[agreeing]
        note = (
            f"{group.capitalize()}: {len(common)} of {plural(len(published), 'row')} have a share between "
            f"{common[f'{name}_low'].max():.1f} and {common[f'{name}_high'].min():.1f} in common"
        )
        details = [
            f"{row['method']}, ({row['overall']} − {row[others]}) / ({row[group]} − {row[others]}) = {row[name]:.1f} %"
            for _, row in solved.drop(common.index).iterrows()
        ]
        outliers |= dict.fromkeys(solved.drop(common.index)["method"])
        notes.append(f"{note}; not {'; '.join(details)}." if details else f"{note}.")
    if outliers:
        notes.append(
            f"The numbers of {' and '.join(outliers)} are not means over the same phrases and groups as those of the rows that "
            "agree: the phrases or a definition of a group differ. How plurals are defined has no effect on the share of stuff."
        )
    return notes
