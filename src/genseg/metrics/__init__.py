"""Predictions -> scores: per-phrase IoU under named protocols, average recall, mIoU, boundary IoU, ceilings, intervals.

`scoring.score_run` scores one set of predictions, and `study.score_study` all runs of a study. Neither needs images or torch.
"""
