"""Render tables as CSV with every column, and as LaTeX, Markdown and HTML with the printed columns; format numbers for text."""

import html
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from genseg.artifacts.files import atomic_path, write_text

DASH = "—"  # printed in place of a missing value


@dataclass(frozen=True)
class Column:
    """A printed column. `interval` reads `<key>_low` and `<key>_high` of the frame, every other kind reads `key`; `spread`
    also reads the standard deviation `<key>_sd`."""

    key: str
    head: str
    kind: Literal["text", "points", "count", "number", "flag", "signed", "interval", "spread"] = "points"
    over: str = ""
    """Heading above this column and adjacent columns with the same value; empty: none."""
    best: bool = False
    """Whether the highest value of several printed rows is in bold; equal printed values all are."""

    @property
    def alignment(self) -> str:
        return {"text": "left", "flag": "center", "interval": "center"}.get(self.kind, "right")


@dataclass(frozen=True)
class Table:
    name: str
    caption: str
    frame: pd.DataFrame
    """All columns in full precision, as written to the CSV. `scores` names the file that a row was read from."""
    columns: list[Column]
    notes: list[str] = field(default_factory=list)
    group_by: str = ""
    """Column of the frame that groups consecutive rows; empty: one group."""
    groups: dict[str, str] = field(default_factory=dict)
    """Group headings by value of `group_by`; a group without an entry has a rule above it and no heading."""
    printed: pd.Series | None = None
    """Boolean mask of the printed rows; None: all. The CSV has every row."""
    small: bool = False
    """Use the smaller of two LaTeX font sizes, so that the table fits a 345 pt page."""


def write_table(table: Table, folder: Path) -> list[Path]:
    """Write `<name>.csv`, `.tex` and `.md`, and return their paths."""
    paths = [folder / f"{table.name}.{suffix}" for suffix in ("csv", "tex", "md")]
    with atomic_path(paths[0]) as temporary:
        table.frame.to_csv(temporary, index=False, lineterminator="\n", encoding="utf-8")
    write_text(paths[1], to_tex(table))
    write_text(paths[2], to_markdown(table))
    return paths


# ----------------------------------------------------------------------------------------------- numbers, nouns and cells
def plural(count: int, noun: str) -> str:
    """Return the count and its noun: "1 step", "2 steps". The plural is formed with an s."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def sentence(text: str) -> str:
    """Capitalize the first letter and add a full stop; an empty text stays empty."""
    return f"{text[0].upper()}{text[1:]}." if text else ""


def to_points(fraction: float | None) -> float | None:
    """Convert a fraction to points (percent); null stays null."""
    return None if fraction is None else 100 * fraction


def points_text(points: float, signed: bool = False) -> str:
    """Return points with one decimal. Zero has no sign; positive points have one if `signed` is set."""
    text = f"{points:+.1f}" if signed else f"{points:.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def interval_text(bounds: list[float] | None) -> str:
    """Return an interval of fractions in points, "[40.0, 60.0]", or a dash."""
    return DASH if bounds is None else f"[{points_text(100 * bounds[0])}, {points_text(100 * bounds[1])}]"


def difference_text(comparison: dict[str, Any]) -> str:
    """Return a difference of fractions in points with its interval, if it has one, "+1.2 [0.3, 2.1]", or a dash."""
    if comparison["difference"] is None:
        return DASH
    text = points_text(100 * comparison["difference"], signed=True)
    if comparison["ci_low"] is None:
        return text
    return f"{text} {interval_text([comparison['ci_low'], comparison['ci_high']])}"


def cell(row: pd.Series, column: Column) -> str:
    """Return the printed text of one cell; a missing value is an em dash."""
    keys = [f"{column.key}_low", f"{column.key}_high"] if column.kind == "interval" else [column.key]
    values = [row[key] for key in keys]
    if any(pd.isna(value) for value in values):
        return DASH
    if column.kind == "interval":
        return f"[{', '.join(map(points_text, values))}]"
    if column.kind == "spread":
        spread = row[f"{column.key}_sd"]
        return points_text(values[0]) + ("" if pd.isna(spread) else f" ± {points_text(spread)}")
    if column.kind in ("points", "signed"):
        return points_text(values[0], signed=column.kind == "signed")
    if column.kind == "count":
        return f"{int(values[0]):d}"
    if column.kind == "flag":
        return "✓" if values[0] else "×"
    return str(values[0])


class Bold(str):
    """The printed text of a cell in bold."""


def _cells(row: pd.Series, columns: list[Column], best: dict[str, float]) -> list[str]:
    """Return the printed texts of a row; `best` has the value of each column, as printed, that is in bold."""
    texts = (cell(row, column) for column in columns)
    is_best = (
        column.key in best and pd.notna(row[column.key]) and round(row[column.key], 1) == best[column.key] for column in columns
    )
    return [Bold(text) if bold else text for text, bold in zip(texts, is_best, strict=True)]


def _groups(table: Table) -> Iterator[tuple[str, list[tuple[list[str], str]]]]:
    """Yield for every group, in the frame's order, its heading (or "") and the printed cells and scores file of its rows."""
    frame = table.frame if table.printed is None else table.frame[table.printed]
    rows = [row for _, row in frame.iterrows()]
    compared = [column.key for column in table.columns if column.best and frame[column.key].notna().sum() > 1]
    best = {key: round(float(frame[key].max()), 1) for key in compared}
    for value, group in groupby(rows, lambda row: row[table.group_by] if table.group_by else ""):
        printed = [(_cells(row, table.columns, best), str(row["scores"])) for row in group]
        yield table.groups.get(value, ""), printed


def _spans(table: Table) -> list[tuple[str, int]]:
    """Return (heading above, number of columns) for every group of adjacent columns with the same heading above."""
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
    "−": "$-$",
    "×": r"$\times$",
    "±": r"$\pm$",
    "✓": r"$\surd$",
    "Δ": r"$\Delta$",
    "²": r"$^2$",
    "“": "``",
    "”": "''",
}


def escape_tex(text: str) -> str:
    """Escape plain text for LaTeX; the result needs no package."""
    replaced = text.replace('"', "''")
    return "".join(_TEX.get(character, character) for character in " ".join(replaced.split()))


def to_tex(table: Table) -> str:
    """Return a `table*` environment (as wide as the page in two-column papers) that needs only booktabs."""
    layout = "".join(column.alignment[0] for column in table.columns)
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
    for index, (heading, rows) in enumerate(_groups(table)):
        if index:
            lines.append(r"\midrule")
        if heading:
            lines.append(rf"\multicolumn{{{len(table.columns)}}}{{@{{}}l}}{{\emph{{{escape_tex(heading)}}}}} \\")
        # A comment names the scores file of each row.
        lines += [" & ".join(map(_tex_cell, cells)) + rf" \\ % {origin}" for cells, origin in rows]
    lines += [r"\bottomrule", r"\end{tabular}"]
    if table.notes:
        notes = " \\par\n".join(map(escape_tex, table.notes))
        lines += [r"\par\smallskip", r"\begin{minipage}{\linewidth}\scriptsize", notes, r"\end{minipage}"]
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
    if isinstance(text, Bold):
        return rf"\textbf{{{escaped}}}"
    return f"{{}}{escaped}" if escaped.startswith("[") else escaped


# ------------------------------------------------------------------------------------------------------------- Markdown
def escape_markdown(text: str) -> str:
    """Escape plain text for Markdown, on one line."""
    joined = " ".join(text.split())
    return "".join(f"\\{character}" if character in "\\`*_|<>~$" else character for character in joined)


def to_markdown(table: Table) -> str:
    """Return the caption, a pipe table, the notes, and a comment that names the scores files."""
    rules = {"left": ":--", "center": ":-:", "right": "--:"}
    lines = [
        f"**{escape_markdown(table.caption)}**",
        "",
        _markdown_row(_markdown_heads(table.columns)),
        "|" + "|".join(rules[column.alignment] for column in table.columns) + "|",
    ]
    origins: list[str] = []
    for heading, rows in _groups(table):
        if heading:
            lines.append(f"| **{escape_markdown(heading)}** " + "| " * (len(table.columns) - 1) + "|")
        lines += [_markdown_row(cells) for cells, _ in rows]
        origins += [origin for _, origin in rows]
    for note in table.notes:
        lines += ["", escape_markdown(note)]
    return "\n".join([*lines, "", f"<!-- numbers from: {', '.join(dict.fromkeys(origins))} -->", ""])


def _markdown_heads(columns: list[Column]) -> Iterator[str]:
    """Yield the heads of columns; Markdown has no row above them, so a head that occurs twice is preceded by the one above."""
    heads = [column.head for column in columns]
    return (f"{column.over} {column.head}".strip() if heads.count(column.head) > 1 else column.head for column in columns)


def _markdown_row(texts: Iterable[str]) -> str:
    cells = (f"**{escape_markdown(text)}**" if isinstance(text, Bold) else escape_markdown(text) for text in texts)
    return f"| {' | '.join(cells)} |"


# ----------------------------------------------------------------------------------------------------------------- HTML
def to_html(table: Table, files: Iterable[str]) -> str:
    """Return a `figure` with caption, table, notes and links to `files`. The tooltip of a row is its scores file."""
    lines = [f'<figure id="{table.name}">', f"<figcaption>{html.escape(table.caption)}</figcaption>"]
    lines += ['<div class="scroll"><table>', "<thead>"]
    if any(column.over for column in table.columns):
        spans = "".join(
            f'<th colspan="{width}" class="over">{html.escape(over)}</th>' if over else f'<td colspan="{width}"></td>'
            for over, width in _spans(table)
        )
        lines.append(f"<tr>{spans}</tr>")
    lines += [_html_row(table, "th", [column.head for column in table.columns]), "</thead>"]
    for heading, rows in _groups(table):
        lines.append("<tbody>")
        if heading:
            lines.append(f'<tr class="group"><th colspan="{len(table.columns)}">{html.escape(heading)}</th></tr>')
        lines += [_html_row(table, "td", cells, f' title="{html.escape(origin)}"') for cells, origin in rows]
        lines.append("</tbody>")
    lines.append("</table></div>")
    lines += [f'<p class="note">{html.escape(note)}</p>' for note in table.notes]
    links = " · ".join(f'<a href="{name}">{name}</a>' for name in files)
    return "\n".join([*lines, f'<p class="files">{links}</p>', "</figure>"])


def _html_row(table: Table, tag: str, texts: list[str], attributes: str = "") -> str:
    contents = (f"<b>{html.escape(text)}</b>" if isinstance(text, Bold) else html.escape(text) for text in texts)
    columns = zip(table.columns, contents, strict=True)
    cells = (f'<{tag} class="{column.alignment}">{content}</{tag}>' for column, content in columns)
    return f"<tr{attributes}>{''.join(cells)}</tr>"
