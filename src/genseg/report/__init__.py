"""Tables, figures and the page of a study, made from its scores and the published numbers."""

from genseg.report.scores import StudyScores, read_study_scores
from genseg.report.tables import build_tables

__all__ = ["StudyScores", "build_tables", "read_study_scores"]
