"""Predictions -> scores: per-phrase IoU under named protocols, average recall, mIoU, boundary IoU, ceilings, intervals.

`scoring.score_run` scores one set of predictions and is pure, `files.score_file` scores files, and `study.score_study` scores
all runs of a study. Nothing here needs an image or torch.
"""
