"""Tables, figures and page of a study without runs (`sample.runs: []`), which only refines baselines."""

from genseg.artifacts.files import write_text
from genseg.artifacts.manifest import is_current, write_manifest
from genseg.artifacts.phrases import read_phrases
from genseg.artifacts.reuse import prune
from genseg.params import Params
from genseg.report.figures.gain import draw_gain
from genseg.report.figures.refined import draw_refined, load_refined
from genseg.report.page import build_page, manifest_paths
from genseg.report.render import write_table
from genseg.report.scores import read_refinement_scores
from genseg.report.tables.refinement import costs_dir, refinement_costs, refinement_tables


def write_refinement_report(params: Params) -> None:
    """Write `results/<study>/tables` and `results/<study>/figures`, and the table of costs in `work/<study>/tables`.

    Both figures show masks of phrases, and are left out if only class masks were imported. Raises UserError if an input is
    missing or broken.
    """
    results, dpi = params.results_dir, params.tables.dpi
    folder, figures = results / "tables", results / "figures"
    scores = read_refinement_scores(params)
    write_table(refinement_costs(params, scores), costs_dir(params))
    inputs = [*manifest_paths(params).values(), scores.folder / "refinement.json", params.data_dir / "phrases.parquet"]
    inputs += sorted((results / "refined/discrepancy").glob("*"))
    if is_current(folder / "manifest.json", "tables", params, inputs):
        return
    (folder / "manifest.json").unlink(missing_ok=True)
    tables = refinement_tables(params, scores)
    outputs = [path for table in tables for path in write_table(table, folder)]
    captions = {}
    if refined := load_refined(results / "refined", read_phrases(params.data_dir / "phrases.parquet")):
        captions["refined.png"] = draw_refined(refined, figures / "refined.png", dpi)
    if scores.refinement["gain"]:
        captions["gain.png"] = draw_gain(scores.refinement, figures / "gain.png", dpi)
    write_text(folder / "index.html", build_page(params, scores, {"Refinement": tables}, captions))
    outputs += [folder / "index.html", *(figures / name for name in captions)]
    for place in (folder, figures):
        prune(place, outputs, "tables")
    write_manifest(folder / "manifest.json", "tables", params, inputs, sorted(outputs))
    print(f"{len(tables)} tables and {len(captions)} figures: open {folder / 'index.html'}")
