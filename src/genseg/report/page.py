"""The study on one HTML page: its tables, figures and provenance."""

import html
from pathlib import Path

import pandas as pd

from genseg.artifacts.manifest import read_manifest
from genseg.diffusion.guidance import count_evaluations
from genseg.params import Params, digest
from genseg.phases import GS_PHASES, PHASES
from genseg.report.render import DASH, Column, Table, plural, sentence, to_html, to_points
from genseg.report.scores import RefinementScores, StudyScores
from genseg.report.tables.parts import comparability_note, describe_phrases, describe_study

_STYLE = """
:root { --ink: #1c1f23; --soft: #626a73; --line: #d9dde2; --tint: #f5f7f9; --accent: #0b6e4f; }
body { margin: 0; color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 2.5rem 1.5rem 5rem; }
h2 { font-size: 1.15rem; margin: 3rem 0 .5rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
.lead { color: var(--soft); max-width: 46rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .7rem; margin: 1.6rem 0; }
.cards div { background: var(--tint); border-radius: 6px; padding: .8rem 1rem; }
.cards dt, .cards small { color: var(--soft); font-size: .8rem; font-weight: 400; }
.cards dd { margin: 0; font-size: 1.55rem; font-weight: 600; }
.cards small { display: block; }
a { color: var(--accent); text-decoration: none; }
figure { margin: 1.8rem 0 2.4rem; }
figcaption { font-weight: 600; margin-bottom: .5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; border: solid var(--ink); border-width: 2px 0; font-size: .88rem; }
th, td { padding: .22rem .6rem; white-space: nowrap; font-variant-numeric: tabular-nums; }
.left { text-align: left; }
.center { text-align: center; }
.right { text-align: right; }
th.over { font-weight: 400; color: var(--soft); border-bottom: 1px solid var(--line); }
tbody { border-top: 1px solid var(--ink); }
tr.group th { text-align: left; font-weight: 400; font-style: italic; color: var(--soft); }
tbody tr:not(.group):hover { background: var(--tint); }
.note, .files { margin: .4rem 0 0; font-size: .8rem; color: var(--soft); max-width: 52rem; }
.picture img { width: 100%; max-width: 56rem; height: auto; }
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
    """Return phase -> manifest for every phase except `preflight` and `tables`; `train` has one entry per model."""
    paths = {}
    for phase, declared in PHASES.items():
        if phase in ("preflight", "tables") or (phase in GS_PHASES and not params.sample.runs):
            continue
        for manifest in declared.manifests:
            path = Path(manifest.format(study=params.study))
            paths[phase if len(declared.manifests) == 1 else f"{phase} {path.parent.name}"] = path
    return paths


def build_page(params: Params, scores: RefinementScores, tables: dict[str, list[Table]], figures: dict[str, str]) -> str:
    """Return the HTML of the page. Raises UserError if a phase's manifest is missing.

    Args:
        tables: heading of a section -> its tables.
        figures: file name of a PNG in `../figures/` -> its caption.
    """
    subject, cards, lead = "G4Seg refinement", [], f"Measured on {describe_study(params)}."
    if isinstance(scores, StudyScores):
        subject, cards = "GS label diffusion", [_cards(scores)]
        lead = f"Measured on {describe_phrases(params, scores.main)}. {comparability_note(params)}"
    anchors = [
        *(["figures"] if figures else []),
        *(table.name for section in tables.values() for table in section),
        "provenance",
    ]
    links = " · ".join(f'<a href="#{name}">{name}</a>' for name in anchors)
    body = [f'<p class="lead">{html.escape(lead)}</p>', *cards, f"<nav>{links}</nav>"]

    if figures:
        body.append('<h2 id="figures">Figures</h2>')
    for name, caption in figures.items():
        text = html.escape(caption)
        image = f'<img src="../figures/{name}" alt="{text}">'
        body.append(f'<figure class="picture"><figcaption>{text}</figcaption>{image}</figure>')
    for heading, section in tables.items():
        body.append(f"<h2>{heading}</h2>")
        body += [to_html(table, [f"{table.name}.{suffix}" for suffix in ("csv", "tex", "md")]) for table in section]
    body += ["<h2>Provenance</h2>", to_html(_provenance(params), ["manifest.json"])]
    title = html.escape(f"{subject}: study {params.study}")
    return _PAGE.format(title=title, style=_STYLE, body="\n".join(body))


def _cards(scores: StudyScores) -> str:
    """Show the main numbers. The AR of things is shown with the right text and, next to it, with permuted text."""
    main, permuted, discriminative = scores.main, scores.text_permuted, scores.discriminative
    interval = main.summary["interval"]["overall"]
    interval_detail = f"95 % interval {100 * interval[0]:.1f} to {100 * interval[1]:.1f}" if interval else ""
    values = [
        ("GS, overall AR", main, "overall", interval_detail),
        ("GS, AR of things", main, "things", f"{plural(main.phrases, 'phrase')} in all"),
        ("Text permuted, things", permuted, "things", f"{plural(permuted.phrases, 'phrase')} in all"),
        ("Discriminative", discriminative, "overall", "overall AR, one forward pass"),
        ("Colour threshold", scores.colour_threshold, "overall", "overall AR"),
    ]
    points = [(name, to_points(run.summary["ar"][split]), detail) for name, run, split, detail in values]
    cards = [(name, DASH if ar is None else f"{ar:.1f}", detail) for name, ar, detail in points]
    assert main.point is not None
    cards.append(("Evaluations per mask", str(count_evaluations(main.point)), str(main.point)))
    items = [f"<div><dt>{name}</dt><dd>{value}<small>{html.escape(detail)}</small></dd></div>" for name, value, detail in cards]
    return f'<dl class="cards">{"".join(items)}</dl>'


def _provenance(params: Params) -> Table:
    """Show device, params digest, code hash and manifest of every phase."""
    rows = []
    for phase, path in manifest_paths(params).items():
        manifest = read_manifest(path)
        values = {"phase": phase, "device": manifest["device"], "params": digest(manifest["params"]), "code": manifest["code"]}
        rows.append(values | {"scores": str(path)})
    heads = {"phase": "Phase", "device": "Device", "params": "Params digest", "code": "Code", "scores": "Manifest"}
    columns = [Column(key, head, "text") for key, head in heads.items()]
    caption = f"{sentence(describe_study(params))} Seed {params.seed}."
    note = "Every table row names its scores file, in the CSV and as a tooltip; manifest.json lists the inputs of this page."
    return Table("provenance", caption, pd.DataFrame(rows), columns, [note])
