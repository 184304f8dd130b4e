"""Render a table as CSV with every column, and as LaTeX, Markdown and HTML with the printed columns."""

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
from genseg.report.text import DASH

Kind = Literal["text", "points", "count", "number", "flag", "signed", "interval"]


@dataclass(frozen=True)
class Column:
    """A printed column. `interval` reads `<key>_low` and `<key>_high` of the frame, every other kind reads `key`."""

    key: str
    head: str
    kind: Kind = "points"
    over: str = ""
    """Heading above this column and its neighbours with the same value."""


@dataclass(frozen=True)
class Table:
    name: str
    caption: str
    frame: pd.DataFrame
    """All columns in full precision, as written to the CSV. `scores` names the file each row was read from."""
    columns: list[Column]
    group_by: str = ""
    """Column of the frame that groups consecutive rows; empty: one group."""
    groups: dict[str, str] = field(default_factory=dict)
    """Group headings by value of `group_by`; a group without an entry has a rule above it and no heading."""
    notes: list[str] = field(default_factory=list)
    printed: pd.Series | None = None
    """Boolean mask of the printed rows; None: all. The CSV has every row."""
    small: bool = False
    """Use the smaller of two LaTeX font sizes, so that the table fits a 345 pt page."""


# ------------------------------------------------------------------------------------------------- cells, as plain text
def cell(row: pd.Series, column: Column) -> str:
    """Return the printed text of one cell; a missing value is an em dash."""
    if column.kind == "interval":
        low, high = row[f"{column.key}_low"], row[f"{column.key}_high"]
        return DASH if _is_missing(low) or _is_missing(high) else f"[{_points(low)}, {_points(high)}]"
    value = row[column.key]
    if _is_missing(value):
        return DASH
    if column.kind == "points":
        return _points(value)
    if column.kind == "signed":
        return _points(value) if round(value, 1) <= 0 else f"+{_points(value)}"
    if column.kind == "count":
        return f"{int(value):d}"
    if column.kind == "flag":
        return "✓" if value else "×"
    return str(value)


def _is_missing(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))


def _points(value: float) -> str:
    text = f"{value:.1f}"
    return "0.0" if text == "-0.0" else text.replace("-", "−")


def _groups(table: Table) -> Iterator[tuple[str, list[list[str]], list[str]]]:
    """Yield (heading or "", rows of printed cells, scores file of each row) for every group, in the frame's order."""
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
    """Return (heading above, number of columns) for every run of columns with the same heading above."""
    return [(over, len(list(members))) for over, members in groupby(column.over for column in table.columns)]


# ---------------------------------------------------------------------------------------------------------------- LaTeX
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
_TEX_ALIGNMENT = {"text": "l", "flag": "c", "interval": "c"}


def escape_tex(text: str) -> str:
    """Escape plain text for LaTeX; the result needs no package."""
    replaced = text.replace('"', "''")
    return "".join(_TEX.get(character, character) for character in " ".join(replaced.split()))


def to_tex(table: Table) -> str:
    """Return a `table*` environment (as wide as the page in two-column papers) that needs only booktabs."""
    # 1. Caption and head.
    layout = "".join(_TEX_ALIGNMENT.get(column.kind, "r") for column in table.columns)
    lines = [
        f"% {table.name}: written by genseg; {table.name}.csv has every number in full precision",
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

    # 2. Rows, group by group; a comment names the scores file of each row.
    for index, (heading, rows, origins) in enumerate(_groups(table)):
        if index:
            lines.append(r"\midrule")
        if heading:
            lines.append(rf"\multicolumn{{{len(table.columns)}}}{{@{{}}l}}{{\emph{{{escape_tex(heading)}}}}} \\")
        for row, origin in zip(rows, origins, strict=True):
            lines.append(" & ".join(map(_tex_cell, row)) + rf" \\ % {origin}")
    lines += [r"\bottomrule", r"\end{tabular}"]

    # 3. Notes, one paragraph each.
    if table.notes:
        lines += [r"\par\smallskip", r"\begin{minipage}{\linewidth}\scriptsize"]
        lines += [rf"{escape_tex(note)} \par" for note in table.notes[:-1]]
        lines += [escape_tex(table.notes[-1]), r"\end{minipage}"]
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
    """Escape a cell and protect a leading bracket, which LaTeX would read after `\\\\` as an optional argument."""
    escaped = escape_tex(text)
    return f"{{}}{escaped}" if escaped.startswith("[") else escaped


# ------------------------------------------------------------------------------------------------------------- Markdown
_MARKDOWN_ALIGNMENT = {"text": ":--", "flag": ":-:", "interval": ":-:"}


def escape_markdown(text: str) -> str:
    """Escape plain text for Markdown, on one line."""
    joined = " ".join(text.split())
    return "".join(f"\\{character}" if character in "\\`*_|<>~$" else character for character in joined)


def to_markdown(table: Table) -> str:
    """Return the caption, a pipe table, the notes, and a comment that names the scores files."""
    lines = [
        f"**{escape_markdown(table.caption)}**",
        "",
        "| " + " | ".join(escape_markdown(column.head) for column in table.columns) + " |",
        "|" + "|".join(_MARKDOWN_ALIGNMENT.get(column.kind, "--:") for column in table.columns) + "|",
    ]
    all_origins: list[str] = []
    for heading, rows, origins in _groups(table):
        if heading:
            lines.append(f"| **{escape_markdown(heading)}** " + "| " * (len(table.columns) - 1) + "|")
        lines += ["| " + " | ".join(map(escape_markdown, row)) + " |" for row in rows]
        all_origins += origins
    for note in table.notes:
        lines += ["", escape_markdown(note)]
    return "\n".join([*lines, "", f"<!-- numbers from: {', '.join(dict.fromkeys(all_origins))} -->", ""])


# ----------------------------------------------------------------------------------------------------------------- HTML
_CSS_CLASS = {"text": "text", "flag": "mid", "interval": "mid"}


def to_html(table: Table) -> str:
    """Return a `figure` with the caption, the table and its notes; each row has its scores file as a tooltip."""
    # 1. Caption and head.
    classes = [_CSS_CLASS.get(column.kind, "num") for column in table.columns]
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
    heads = zip(classes, (column.head for column in table.columns), strict=True)
    lines.append("<tr>" + "".join(f'<th class="{css}">{html.escape(head)}</th>' for css, head in heads) + "</tr>")
    lines.append("</thead>")

    # 2. Rows, one `tbody` per group.
    for heading, rows, origins in _groups(table):
        lines.append("<tbody>")
        if heading:
            lines.append(f'<tr class="group"><th colspan="{len(table.columns)}">{html.escape(heading)}</th></tr>')
        for row, origin in zip(rows, origins, strict=True):
            cells = "".join(f'<td class="{css}">{html.escape(text)}</td>' for css, text in zip(classes, row, strict=True))
            lines.append(f'<tr title="{html.escape(origin)}">{cells}</tr>')
        lines.append("</tbody>")
    lines.append("</table></div>")

    # 3. Notes, and links to the other forms.
    lines += [f'<p class="note">{html.escape(note)}</p>' for note in table.notes]
    links = " · ".join(f'<a href="{table.name}.{suffix}">{suffix}</a>' for suffix in ("csv", "tex", "md"))
    return "\n".join([*lines, f'<p class="files">{links}</p>', "</figure>"])


# ---------------------------------------------------------------------------------------------------------------- files
def write_table(table: Table, folder: Path) -> list[Path]:
    """Write `<name>.csv`, `.tex` and `.md`, and return their paths."""
    paths = [folder / f"{table.name}.{suffix}" for suffix in ("csv", "tex", "md")]
    with atomic_path(paths[0]) as temporary:
        table.frame.to_csv(temporary, index=False, lineterminator="\n", encoding="utf-8")
    write_text(paths[1], to_tex(table))
    write_text(paths[2], to_markdown(table))
    return paths
