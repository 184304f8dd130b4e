"""One table, four forms: CSV with everything, and LaTeX, Markdown and HTML of the columns a reader wants to see."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from genseg.artifacts.files import atomic_path, write_text

DASH = "—"
Kind = Literal["text", "points", "count", "number", "flag", "signed", "interval"]


@dataclass(frozen=True)
class Column:
    """A column as printed. `interval` reads `<key>_low` and `<key>_high` of the frame, every other kind `key`."""

    key: str
    head: str
    kind: Kind = "points"
    over: str = ""
    """Heading spanning this and the neighbouring columns of the same one."""


@dataclass(frozen=True)
class Table:
    name: str
    caption: str
    frame: pd.DataFrame
    """Every column, in full precision: the CSV. `scores` names the file each row was read from."""
    columns: list[Column]
    group_by: str = ""
    """Column of the frame whose change starts a group of rows; empty: one group."""
    groups: dict[str, str] = field(default_factory=dict)
    """Headings of groups by the value of `group_by`; a group that is not named here has a rule and no heading."""
    notes: list[str] = field(default_factory=list)
    printed: pd.Series | None = None
    """Which rows stand in print, bool; None: all. The CSV has every row."""
    small: bool = False
    """Print it in LaTeX in the smaller of two sizes, so that it fits a 345 pt page."""


# --------------------------------------------------------------------------------------------- cells, as plain text
def cell(row: pd.Series, column: Column) -> str:
    """Printed text of one cell; a missing value is an em dash."""
    if column.kind == "interval":
        low, high = row[f"{column.key}_low"], row[f"{column.key}_high"]
        return DASH if _absent(low) or _absent(high) else f"[{_points(low)}, {_points(high)}]"
    value = row[column.key]
    if _absent(value):
        return DASH
    if column.kind == "points":
        return _points(value)
    if column.kind == "signed":
        return _points(value) if round(value, 1) <= 0 else f"+{_points(value)}"
    if column.kind == "count":
        return f"{int(value):d}"
    if column.kind == "number":
        return str(value)
    if column.kind == "flag":
        return "✓" if value else "×"
    return str(value)


def _absent(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def _points(value: float) -> str:
    text = f"{value:.1f}"
    return "0.0" if text == "-0.0" else text.replace("-", "−")


def _groups(table: Table) -> Iterator[tuple[str, list[list[str]], list[str]]]:
    """(heading or "", rows of printed cells, scores files), in the frame's order."""
    frame = table.frame if table.printed is None else table.frame[table.printed]
    rows = [row for _, row in frame.iterrows()]
    for value, members in groupby(rows, lambda row: row[table.group_by] if table.group_by else ""):
        group = list(members)
        yield (
            table.groups.get(value, ""),
            [[cell(row, column) for column in table.columns] for row in group],
            [str(row["scores"]) for row in group],
        )


def _spans(table: Table) -> list[tuple[str, int]]:
    return [(over, len(list(members))) for over, members in groupby(column.over for column in table.columns)]


# ------------------------------------------------------------------------------------------------------------ LaTeX
_TEX = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "|": "$|$",
    "—": "---",
    "–": "--",
    "−": "$-$",
    "×": r"$\times$",
    "✓": r"$\surd$",
    "±": r"$\pm$",
    "≥": r"$\geq$",
    "≤": r"$\leq$",
    "Δ": r"$\Delta$",
    "²": r"$^2$",
    "“": "``",
    "”": "''",
}


def escape_tex(text: str) -> str:
    """Plain text as LaTeX that needs no package."""
    replaced = text.replace('"', "''")
    return "".join(_TEX.get(character, character) for character in " ".join(replaced.split()))


def to_tex(table: Table) -> str:
    """A `table*` environment (as wide as the page in two-column papers) that needs only booktabs."""
    layout = "".join(
        "l" if column.kind == "text" else "c" if column.kind in ("flag", "interval") else "r" for column in table.columns
    )
    lines = [
        f"% {table.name}: written by genseg; every number stands in full precision in {table.name}.csv",
        r"\begin{table*}[t]",
        r"\centering",
        rf"\caption{{{escape_tex(table.caption)}}}",
        rf"\label{{tab:{table.name}}}",
        r"\scriptsize" if table.small else r"\footnotesize",
        rf"\setlength{{\tabcolsep}}{{{1.8 if table.small else 2.5}pt}}",
        rf"\begin{{tabular}}{{@{{}}{layout}@{{}}}}",
        r"\toprule",
        *_tex_head(table),
        r"\midrule",
    ]
    for index, (heading, rows, scores) in enumerate(_groups(table)):
        if index:
            lines.append(r"\midrule")
        if heading:
            lines.append(rf"\multicolumn{{{len(table.columns)}}}{{@{{}}l}}{{\emph{{{escape_tex(heading)}}}}} \\")
        for row, origin in zip(rows, scores, strict=True):
            lines.append(" & ".join(map(_tex_cell, row)) + rf" \\ % {origin}")
    lines += [r"\bottomrule", r"\end{tabular}"]
    if table.notes:
        lines += [r"\par\smallskip", r"\begin{minipage}{\linewidth}\scriptsize"]
        lines += [
            escape_tex(note) + (r" \par" if index < len(table.notes) - 1 else "") for index, note in enumerate(table.notes)
        ]
        lines += [r"\end{minipage}"]
    return "\n".join([*lines, r"\end{table*}", ""])


def _tex_head(table: Table) -> list[str]:
    lines = []
    if any(column.over for column in table.columns):
        heads, rules, first = [], [], 1
        for over, width in _spans(table):
            heads.append(rf"\multicolumn{{{width}}}{{c}}{{{escape_tex(over)}}}" if over else " &" * (width - 1))
            if over:
                rules.append(rf"\cmidrule(lr){{{first}-{first + width - 1}}}")
            first += width
        lines += [" & ".join(heads) + r" \\", " ".join(rules)]
    return [*lines, " & ".join(_tex_cell(column.head) for column in table.columns) + r" \\"]


def _tex_cell(text: str) -> str:
    """A cell may not begin with a bracket: after `\\\\` LaTeX would take it as an optional argument."""
    escaped = escape_tex(text)
    return f"{{}}{escaped}" if escaped.startswith("[") else escaped


# --------------------------------------------------------------------------------------------------------- Markdown
def escape_markdown(text: str) -> str:
    joined = " ".join(text.split())
    return "".join(f"\\{character}" if character in "\\`*_|<>~$" else character for character in joined)


def to_markdown(table: Table) -> str:
    width = len(table.columns)
    lines = [
        f"**{escape_markdown(table.caption)}**",
        "",
        "| " + " | ".join(escape_markdown(column.head) for column in table.columns) + " |",
        "|"
        + "|".join(
            ":--" if column.kind == "text" else ":-:" if column.kind in ("flag", "interval") else "--:"
            for column in table.columns
        )
        + "|",
    ]
    origins: list[str] = []
    for heading, rows, scores in _groups(table):
        if heading:
            lines.append(f"| **{escape_markdown(heading)}** " + "| " * (width - 1) + "|")
        lines += ["| " + " | ".join(map(escape_markdown, row)) + " |" for row in rows]
        origins += scores
    for note in table.notes:
        lines += ["", escape_markdown(note)]
    return "\n".join([*lines, "", f"<!-- numbers from: {', '.join(dict.fromkeys(origins))} -->", ""])


# ------------------------------------------------------------------------------------------------------------- HTML
def to_html(table: Table) -> str:
    """A `figure` with the caption, the table and its notes; rows carry the scores file as a tooltip."""
    css = {"text": "text", "flag": "mid", "interval": "mid"}
    kinds = [css.get(column.kind, "num") for column in table.columns]
    lines = [
        f'<figure id="{table.name}">',
        f"<figcaption>{html.escape(table.caption)}</figcaption>",
        '<div class="scroll"><table>',
        "<thead>",
    ]
    if any(column.over for column in table.columns):
        spans = "".join(
            f'<th colspan="{width}" class="over">{html.escape(over)}</th>' if over else f'<td colspan="{width}"></td>'
            for over, width in _spans(table)
        )
        lines.append(f"<tr>{spans}</tr>")
    lines.append(
        "<tr>"
        + "".join(
            f'<th class="{kind}">{html.escape(column.head)}</th>' for kind, column in zip(kinds, table.columns, strict=True)
        )
        + "</tr>"
    )
    lines.append("</thead>")
    for heading, rows, scores in _groups(table):
        lines.append("<tbody>")
        if heading:
            lines.append(f'<tr class="group"><th colspan="{len(table.columns)}">{html.escape(heading)}</th></tr>')
        for row, origin in zip(rows, scores, strict=True):
            cells = "".join(f'<td class="{kind}">{html.escape(text)}</td>' for kind, text in zip(kinds, row, strict=True))
            lines.append(f'<tr title="{html.escape(origin)}">{cells}</tr>')
        lines.append("</tbody>")
    lines.append("</table></div>")
    lines += [f'<p class="note">{html.escape(note)}</p>' for note in table.notes]
    links = " · ".join(f'<a href="{table.name}.{kind}">{kind}</a>' for kind in ("csv", "tex", "md"))
    return "\n".join([*lines, f'<p class="files">{links}</p>', "</figure>"])


def write_table(table: Table, folder: Path) -> list[Path]:
    """Write `<name>.csv`, `.tex` and `.md`; returns the paths."""
    paths = [folder / f"{table.name}.{kind}" for kind in ("csv", "tex", "md")]
    with atomic_path(paths[0]) as temporary:
        table.frame.to_csv(temporary, index=False, lineterminator="\n", encoding="utf-8")
    write_text(paths[1], to_tex(table))
    write_text(paths[2], to_markdown(table))
    return paths
