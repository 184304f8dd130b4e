"""Tables and figures: what a paper prints, made from scores and published numbers alone."""

from genseg.report.study import StudyScores, read_study
from genseg.report.tables import build_tables

__all__ = ["StudyScores", "build_tables", "read_study"]
