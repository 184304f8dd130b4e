"""The study's tables, from its scores and the published rows. AR, ceilings and differences are in points (percent)."""

from __future__ import annotations

from genseg.params import Params
from genseg.report.render import Table
from genseg.report.scores import StudyScores
from genseg.report.tables.ablations import evaluations, readouts, table3, table4, table5
from genseg.report.tables.controls import breakdown, ceilings, comparisons, controls, miou
from genseg.report.tables.main import table2
from genseg.report.tables.refinement import refinement_tables

OPTIONAL_TABLES = ("miou", "refinement_controls", "refinement_sensitivity")
"""Tables that some studies do not have."""


def build_tables(params: Params, scores: StudyScores) -> list[Table]:
    """Build every table of the study in reading order; `miou` exists only where class phrases were scored.

    Raises:
        UserError: a comparison was not scored, or a published table is missing or broken.
    """
    tables = [
        table2(params, scores),
        controls(params, scores),
        table3(params, scores),
        table4(params, scores),
        table5(params, scores),
        evaluations(params, scores),
        readouts(params, scores),
        ceilings(params, scores),
        breakdown(params, scores),
    ]
    if scores.main.summary.get("miou"):
        tables.append(miou(params, scores))
    return [*tables, comparisons(params, scores), *refinement_tables(params, scores)]
