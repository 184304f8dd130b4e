"""The study on one HTML page: its tables, figures and provenance."""

from __future__ import annotations

import html
from pathlib import Path

from genseg.artifacts.manifest import read_manifest
from genseg.params import Params, digest
from genseg.report.render import Table, to_html
from genseg.report.scores import StudyScores
from genseg.report.tables.parts import comparability_note, describe_phrases, describe_study
from genseg.report.text import DASH, plural, sentence

_STYLE = """
:root { --ink: #1c1f23; --soft: #626a73; --line: #d9dde2; --tint: #f5f7f9; --accent: #0b6e4f; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff;
  font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 2.5rem 1.5rem 5rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 3rem 0 .5rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
.lead { color: var(--soft); margin: 0; max-width: 46rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .7rem; margin: 1.6rem 0 0; }
.cards div { background: var(--tint); border-radius: 6px; padding: .8rem 1rem; }
.cards dt { color: var(--soft); font-size: .82rem; }
.cards dd { margin: 0; font-size: 1.55rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.cards small { display: block; font-size: .78rem; font-weight: 400; color: var(--soft); }
nav { margin-top: 1.4rem; font-size: .88rem; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
figure { margin: 1.8rem 0 2.4rem; }
figcaption { font-weight: 600; margin-bottom: .5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums;
  border-top: 2px solid var(--ink); border-bottom: 2px solid var(--ink); }
th, td { padding: .22rem .6rem; text-align: right; white-space: nowrap; }
th.text, td.text { text-align: left; }
th.mid, td.mid { text-align: center; }
thead tr:last-child th { border-bottom: 1px solid var(--ink); font-weight: 600; }
th.over { text-align: center; font-weight: 400; color: var(--soft); border-bottom: 1px solid var(--line); }
tbody + tbody { border-top: 1px solid var(--ink); }
tr.group th { text-align: left; font-weight: 400; font-style: italic; color: var(--soft); white-space: normal; }
tbody tr:not(.group):hover { background: var(--tint); }
.note { margin: .4rem 0 0; font-size: .8rem; color: var(--soft); max-width: 52rem; }
.files { margin: .3rem 0 0; font-size: .8rem; }
.picture img { width: 100%; max-width: 56rem; height: auto; }
code { font: .92em ui-monospace, "DejaVu Sans Mono", monospace; }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{title}</h1>
{body}
</main>
</body>
</html>
"""


def manifest_paths(params: Params) -> dict[str, Path]:
    """Return phase -> manifest for every phase that the scores depend on, and for the scores."""
    results = params.results_dir
    return {
        "data": params.data_dir / "manifest.json",
        "backbone": results / "backbone" / "manifest.json",
        "latents": results / "latents" / "manifest.json",
        "train": results / "model" / "manifest.json",
        "control": results / "control" / "manifest.json",
        "baselines": results / "baselines" / "manifest.json",
        "sample": results / "predictions" / "manifest.json",
        "refine": results / "refined" / "manifest.json",
        "score": results / "scores" / "manifest.json",
    }


# ------------------------------------------------------------------------------------------------------------- the page
def build_page(params: Params, scores: StudyScores, tables: list[Table], figures: dict[str, str]) -> str:
    """Return the HTML of the page.

    Args:
        figures: file name of a PNG in `../figures/` -> its caption.

    Raises:
        UserError: a phase's manifest is missing.
    """
    # 1. Sort the tables into sections.
    by_name = {table.name: table for table in tables}
    sections = {
        "Results": ["table2", "controls"],
        "Refinement": ["refinement", "refinement_controls", "refinement_sensitivity"],
        "Sampling": ["evaluations", "table3", "table4", "table5", "readouts"],
        "Evaluation": ["ceilings", "breakdown", "miou", "comparisons"],
    }
    sections = {heading: [name for name in names if name in by_name] for heading, names in sections.items()}

    # 2. Write the lead, the main numbers, the links and the figures.
    lead = f"Measured on {describe_phrases(params, scores.main)}. {comparability_note(params)}"
    anchors = ["figures", *(name for names in sections.values() for name in names), "provenance"]
    body = [
        f'<p class="lead">{html.escape(lead)}</p>',
        _cards(scores),
        "<nav>" + " · ".join(f'<a href="#{name}">{name}</a>' for name in anchors) + "</nav>",
        '<h2 id="figures">Figures</h2>',
        *(_picture(name, caption) for name, caption in figures.items()),
    ]

    # 3. Write the tables and their provenance.
    for heading, names in sections.items():
        body += [f"<h2>{heading}</h2>", *(to_html(by_name[name]) for name in names)]
    body += ['<h2 id="provenance">Provenance</h2>', _provenance(params)]
    title = html.escape(f"GS label diffusion: study {params.study}")
    return _PAGE.format(title=title, style=_STYLE, body="\n".join(body))


# ------------------------------------------------------------------------------------------------------------ its parts
def _picture(name: str, caption: str) -> str:
    text = html.escape(caption)
    return f'<figure class="picture"><figcaption>{text}</figcaption><img src="../figures/{name}" alt="{text}"></figure>'


def _cards(scores: StudyScores) -> str:
    """Show the main numbers; AR of things with permuted text is next to AR of things with the right text."""
    main, permuted = scores.main, scores.text_permuted
    interval, entry = main.summary["interval"]["overall"], main.entry
    values = [
        (
            "GS, overall AR",
            main.summary["ar"]["overall"],
            f"95 % interval {100 * interval[0]:.1f} to {100 * interval[1]:.1f}" if interval else "",
        ),
        ("GS, AR of things", main.summary["ar"]["things"], f"{plural(main.phrases, 'phrase')} in all"),
        ("Text permuted, things", permuted.summary["ar"]["things"], f"{plural(permuted.phrases, 'phrase')} in all"),
        ("Discriminative", scores.discriminative.summary["ar"]["overall"], "overall AR, one forward pass"),
        ("Colour threshold", scores.colour_threshold.summary["ar"]["overall"], "overall AR"),
    ]
    cards = [(name, DASH if ar is None else f"{100 * ar:.1f}", detail) for name, ar, detail in values]
    sampling = f"{entry['size']} px, {plural(entry['steps'], 'step')}, guidance {entry['guidance']:g}"
    cards.append(("Evaluations per mask", str(entry["evaluations"]), sampling))
    items = [f"<div><dt>{name}</dt><dd>{value}<small>{html.escape(detail)}</small></dd></div>" for name, value, detail in cards]
    return f'<dl class="cards">{"".join(items)}</dl>'


def _provenance(params: Params) -> str:
    """Show device, params digest, code hash and manifest of every phase."""
    rows = []
    for phase, path in manifest_paths(params).items():
        manifest = read_manifest(path)
        codes = (digest(manifest["params"]), manifest["code"], str(path))
        cells = [phase, html.escape(manifest["device"]), *(f"<code>{html.escape(code)}</code>" for code in codes)]
        rows.append("<tr>" + "".join(f'<td class="text">{cell}</td>' for cell in cells) + "</tr>")
    heads = ("Phase", "Device", "Params digest", "Code", "Manifest")
    head = "".join(f'<th class="text">{name}</th>' for name in heads)
    return (
        f'<p class="lead">{html.escape(sentence(describe_study(params)))} Seed {params.seed}. Every table row names its scores '
        'file, in the CSV and as a tooltip; the inputs of this page are listed in <a href="manifest.json">manifest.json</a>.'
        "</p>\n"
        f'<figure><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></figure>"
    )
