"""The runs of a study: which predictions there are, on which phrases, at which operating point."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment

from genseg.artifacts.seeds import derive_seed
from genseg.artifacts.subsets import grid_phrases, val_phrases
from genseg.errors import UserError
from genseg.params import Cell, Params, Rule

BACKGROUND = "background"
"""Tag of the class phrase that is scored but never sampled: mIoU's background rule makes it."""
_CELL = re.compile(
    r"size=(?P<size>\d{4})/steps=(?P<steps>\d{4})/cfg=(?P<guidance>\d{2}\.\d{2})"
    r"(,rule=(?P<rule>[a-z]+))?(,guided=(?P<low>\d\.\d{3})-(?P<high>\d\.\d{3}))?(,samples=(?P<ensemble>\d{2}))?"
)


def cell_path(cell: Cell) -> str:
    """Path of a grid cell: fixed width, so that names sort and parse back (`parse_cell`). What differs from the plain sampler
    (rule, guidance interval, ensemble) follows in the last part, so that no cell's folder lies in another's.

    Raises:
        UserError: the guidance has more than two decimals, or the interval more than three, and would not survive the trip.
    """
    path = f"size={cell.size:04d}/steps={cell.steps:04d}/cfg={cell.guidance:05.2f}"
    if cell.rule != "ddim":
        path += f",rule={cell.rule}"
    if cell.guidance_interval is not None:
        path += ",guided={:.3f}-{:.3f}".format(*cell.guidance_interval)
    if cell.ensemble > 1:
        path += f",samples={cell.ensemble:02d}"
    parsed = parse_cell(path)
    if parsed.guidance != cell.guidance:
        raise UserError(f"guidance {cell.guidance} in sample has more than two decimals; grid cells are named by two")
    if parsed != cell:
        raise UserError(f"guidance_interval {cell.guidance_interval} in sample has more than three decimals")
    return path


def parse_cell(path: str) -> Cell:
    """Inverse of `cell_path`."""
    match = _CELL.fullmatch(path)
    if match is None:
        raise UserError(f"{path}: not the path of a grid cell (size=0128/steps=0050/cfg=07.50)")
    found = match.groupdict()
    interval = (float(found["low"]), float(found["high"])) if found["low"] else None
    return Cell.of({**found, "guidance_interval": interval})


@dataclass(frozen=True)
class Run:
    """One set of predictions.

    role: main, control, grid, val, readout or class_phrases. method: gs, discriminative or colour_threshold.
    phrases: which rows: test, grid, val, permutable or class_phrases. size and what follows: None where not applicable.
    """

    name: str
    role: str
    method: str
    phrases: str
    size: int | None = None
    steps: int | None = None
    guidance: float | None = None
    rule: Rule | None = None
    guidance_interval: tuple[float, float] | None = None
    ensemble: int | None = None
    readout: str = "bilinear"

    @property
    def evaluations(self) -> int | None:
        """U-Net passes per mask."""
        if self.method == "discriminative":
            return 1
        return self.cell.evaluations if self.cell else None

    @property
    def cell(self) -> Cell | None:
        """Where it samples; None where nothing is sampled."""
        return None if self.steps is None else Cell.of(asdict(self))

    def entry(self) -> dict[str, Any]:
        """As it stands in the manifest of the predictions."""
        return {**asdict(self), "evaluations": self.evaluations}


def study_runs(params: Params) -> list[Run]:
    """The runs that `sample.runs` asks for, in the order of the manifest."""
    main, readout = params.sample.main, params.sample.readout
    point: dict[str, Any] = {**main.model_dump(), "readout": readout}
    control: dict[str, Any] = {"size": main.size, "readout": readout}
    runs = [
        Run("main", "main", "gs", "test", **point),
        Run("text_permuted", "control", "gs", "permutable", **point),
        Run("class_phrases", "class_phrases", "gs", "class_phrases", **point),
        Run("discriminative", "control", "discriminative", "test", **control),
        Run("discriminative_class_phrases", "class_phrases", "discriminative", "class_phrases", **control),
        Run("colour_threshold", "control", "colour_threshold", "test"),
    ]
    cells = {"grid": params.sample.grid_cells(), "val": params.sample.operating_points()}
    for part, members in cells.items():
        for cell in members:
            runs.append(Run(f"{part}/{cell_path(cell)}", part, "gs", part, **cell.model_dump(), readout=readout))
    for other in params.other_readouts():
        runs.append(Run(f"readouts/{other}", "readout", "gs", "grid", **params.sample.base.model_dump(), readout=other))
    parts = {"main": "main", "control": "controls", "class_phrases": "controls", "readout": "grid"}
    return [run for run in runs if parts.get(run.role, run.role) in params.sample.runs]


def base_run(params: Params) -> Run:
    """The grid run of the base cell."""
    return next(run for run in study_runs(params) if run.name == f"grid/{cell_path(params.sample.base)}")


def run_rows(params: Params, run: Run, phrases: pd.DataFrame, class_phrases: pd.DataFrame) -> pd.DataFrame:
    """Rows of a run, ordered by key, with the column `text`: the phrase that the model is given."""
    if run.phrases == "class_phrases":
        rows = class_phrases[class_phrases["split"] == "test"]
        rows = rows[[tags is None or BACKGROUND not in tags for tags in rows["tags"]]]
    elif run.phrases == "grid":
        rows = grid_phrases(params, phrases)
    elif run.phrases == "val":
        rows = val_phrases(params, phrases)
    else:
        rows = phrases[phrases["split"] == "test"]
    if run.phrases == "permutable":
        return permute_texts(rows, params.seed)
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
