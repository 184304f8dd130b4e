"""The runs of a study: which predictions there are, on which phrases, at which operating point."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment

from genseg.artifacts.seeds import derive_seed
from genseg.errors import UserError
from genseg.latents import grid_phrases
from genseg.params import Cell, Params

BACKGROUND = "background"
"""Tag of the class phrase that is scored but never sampled: mIoU's background rule makes it."""
_CELL = re.compile(r"size=(\d{4})/steps=(\d{4})/cfg=(\d{2}\.\d{2})")


def cell_path(cell: Cell) -> str:
    """Path of a grid cell: fixed width, so that names sort and parse back (`parse_cell`).

    Raises:
        UserError: the guidance has more than two decimals and would not survive the trip.
    """
    path = f"size={cell.size:04d}/steps={cell.steps:04d}/cfg={cell.guidance:05.2f}"
    if parse_cell(path) != cell:
        raise UserError(f"sample.grid.guidance: {cell.guidance} has more than two decimals; grid cells are named by two")
    return path


def parse_cell(path: str) -> Cell:
    """Inverse of `cell_path`."""
    match = _CELL.fullmatch(path)
    if match is None:
        raise UserError(f"{path}: not the path of a grid cell (size=0128/steps=0050/cfg=07.50)")
    return Cell(size=int(match[1]), steps=int(match[2]), guidance=float(match[3]))


@dataclass(frozen=True)
class Run:
    """One set of predictions.

    role: main, control, grid, readout or class_phrases. method: gs, discriminative or colour_threshold.
    phrases: which rows: test, grid, permutable or class_phrases. size, steps, guidance: None where not applicable.
    """

    name: str
    role: str
    method: str
    phrases: str
    size: int | None = None
    steps: int | None = None
    guidance: float | None = None
    readout: str = "bilinear"

    @property
    def evaluations(self) -> int | None:
        """U-Net passes per mask."""
        if self.method == "discriminative":
            return 1
        if self.steps is None or self.guidance is None:
            return None
        return Cell(size=self.size or 1, steps=self.steps, guidance=self.guidance).evaluations

    def entry(self) -> dict[str, Any]:
        """As it stands in the manifest of the predictions."""
        return {**asdict(self), "evaluations": self.evaluations}


def study_runs(study: Params) -> list[Run]:
    """All runs, in the order of the manifest."""
    main, readout = study.sample.main, study.sample.readout
    point: dict[str, Any] = {"size": main.size, "steps": main.steps, "guidance": main.guidance, "readout": readout}
    control: dict[str, Any] = {"size": main.size, "readout": readout}
    runs = [
        Run("main", "main", "gs", "test", **point),
        Run("text_permuted", "control", "gs", "permutable", **point),
        Run("class_phrases", "class_phrases", "gs", "class_phrases", **point),
        Run("discriminative", "control", "discriminative", "test", **control),
        Run("discriminative_class_phrases", "class_phrases", "discriminative", "class_phrases", **control),
        Run("colour_threshold", "control", "colour_threshold", "test"),
    ]
    for cell in study.sample.cells():
        runs.append(Run(f"grid/{cell_path(cell)}", "grid", "gs", "grid", cell.size, cell.steps, cell.guidance, readout))
    base = study.sample.base
    for other in ("bilinear", "nearest", "vae"):
        if other != readout:
            runs.append(Run(f"readouts/{other}", "readout", "gs", "grid", base.size, base.steps, base.guidance, other))
    return runs


def base_run(study: Params) -> Run:
    """The grid run of the base cell."""
    return next(run for run in study_runs(study) if run.name == f"grid/{cell_path(study.sample.base)}")


def run_rows(study: Params, run: Run, phrases: pd.DataFrame, class_phrases: pd.DataFrame) -> pd.DataFrame:
    """Rows of a run, ordered by key, with the column `text`: the phrase that the model is given."""
    if run.phrases == "class_phrases":
        rows = class_phrases[class_phrases["split"] == "test"]
        rows = rows[[tags is None or BACKGROUND not in tags for tags in rows["tags"]]]
    elif run.phrases == "grid":
        rows = grid_phrases(study, phrases)
    else:
        rows = phrases[phrases["split"] == "test"]
    if run.phrases == "permutable":
        return permute_texts(rows, study.seed)
    return rows.assign(text=rows["phrase"])


def permute_texts(rows: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Give each phrase of an image the text of another one whose ground truth differs.

    Within each image a derangement: a random assignment in which no row gets a text of its own ground truth. Rows that
    cannot take part (all of an image with one ground truth) are left out.
    """
    kept = []
    for image_id, group in rows.groupby("image_id", sort=True):
        masks = group["mask"].to_numpy()
        forbidden = masks[:, None] == masks[None, :]
        rng = np.random.default_rng(derive_seed(seed, "permute", image_id))
        cost = rng.random(forbidden.shape) + 1000.0 * forbidden
        row_index, text_index = linear_sum_assignment(cost)
        allowed = ~forbidden[row_index, text_index]
        texts = group["phrase"].to_numpy()[text_index[allowed]]
        kept.append(group.iloc[row_index[allowed]].assign(text=texts))
    return pd.concat(kept) if kept else rows.assign(text=rows["phrase"]).iloc[:0]
