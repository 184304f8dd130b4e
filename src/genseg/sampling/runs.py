"""Runs of a study. A run is one set of predictions: one method, one set of phrases and one operating point."""

import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment

from genseg.artifacts.manifest import times_path
from genseg.artifacts.phrases import grid_phrases, is_background, miou_phrases, val_phrases
from genseg.artifacts.seeds import derive_seed
from genseg.diffusion.guidance import count_evaluations
from genseg.errors import UserError
from genseg.params import Params
from genseg.params.base import Section
from genseg.params.sample import OperatingPoint, Readout

_POINT = re.compile(
    r"size=(?P<size>\d{4})/steps=(?P<num_inference_steps>\d{4})/cfg=(?P<guidance_scale>\d{2}\.\d{2})"
    r"(,rule=(?P<sampler>\w+))?(,guided=(?P<low>\d\.\d{3})-(?P<high>\d\.\d{3}))?(,samples=(?P<ensemble_size>\d{2})(?P<mirror>,mirrored)?)?"
)


def point_path(point: OperatingPoint) -> str:
    """Return the folder of an operating point. Numbers have a fixed width for sorting; `parse_point` is the inverse.

    Sampler, guidance interval and ensemble are appended to the last part if they are not the defaults, so no folder
    contains another. Raises UserError if guidance_scale has more than two decimals, or guidance_interval more than three.
    """
    path = f"size={point.size:04d}/steps={point.num_inference_steps:04d}/cfg={point.guidance_scale:05.2f}"
    if point.sampler != "ddim":
        path += f",rule={point.sampler}"
    if point.guidance_interval is not None:
        path += ",guided={:.3f}-{:.3f}".format(*point.guidance_interval)
    if point.ensemble_size > 1:
        path += f",samples={point.ensemble_size:02d}" + (",mirrored" if point.mirror else "")
    parsed = parse_point(path)
    if parsed.guidance_scale != point.guidance_scale:
        raise UserError(f"sample: guidance_scale {point.guidance_scale} must have at most two decimals, as in its folder name")
    if parsed != point:
        raise UserError(f"sample: guidance_interval {point.guidance_interval} must have at most three decimals")
    return path


def parse_point(path: str) -> OperatingPoint:
    """Return the operating point of a path made by `point_path`. Raises UserError for other paths."""
    match = _POINT.fullmatch(path)
    if match is None:
        raise UserError(f"{path}: not the path of an operating point (size=0128/steps=0050/cfg=07.50)")
    fields: dict[str, Any] = {name: value for name, value in match.groupdict().items() if value is not None}
    if "low" in fields:
        fields["guidance_interval"] = float(fields.pop("low")), float(fields.pop("high"))
    if "mirror" in fields:
        fields["mirror"] = True
    return OperatingPoint.model_validate(fields)


class Run(Section):
    """One set of predictions, as listed in the manifest of the predictions."""

    name: str
    """Folder below the predictions."""
    role: Literal["main", "control", "grid", "val", "readout", "class_phrases"]
    """Part of the study that uses it."""
    method: Literal["gs", "discriminative", "colour_threshold"]
    """Model or rule that predicts the masks."""
    phrases: Literal["test", "grid", "val", "permutable", "class_phrases"]
    """Set of phrases for which masks are predicted."""
    point: OperatingPoint | None = None
    """Operating point: unguided single steps for the discriminative control; None for a method without a network."""
    readout: Readout = "bilinear"
    """Conversion of soft maps to masks."""

    @property
    def evaluations(self) -> int | None:
        """Number of evaluations (U-Net passes for one phrase) per mask; None for a method without a network."""
        return None if self.point is None else count_evaluations(self.point)


def study_runs(params: Params) -> list[Run]:
    """Return the runs of the groups in `sample.runs`, in the order of the manifest; class phrases only if mIoU is scored."""
    main, readout = params.sample.main, params.sample.readout
    once = OperatingPoint(size=main.size, num_inference_steps=1, guidance_scale=1.0)
    gs: dict[str, Any] = {"method": "gs", "point": main, "readout": readout}
    discriminative: dict[str, Any] = {"method": "discriminative", "point": once, "readout": readout}
    mirrored = discriminative | {"point": once.model_copy(update={"ensemble_size": 2, "mirror": True})}
    runs = {
        "main": [
            Run(name="main", role="main", phrases="test", **gs),
            Run(name="class_phrases", role="class_phrases", phrases="class_phrases", **gs),
        ],
        "controls": [
            Run(name="text_permuted", role="control", phrases="permutable", **gs),
            Run(name="discriminative", role="control", phrases="test", **discriminative),
            Run(name="discriminative_class_phrases", role="class_phrases", phrases="class_phrases", **discriminative),
            Run(name="colour_threshold", role="control", method="colour_threshold", phrases="test"),
        ],
        "grid": [_point_run("grid", point, readout) for point in params.sample.test_subset_points()],
        "val": [_point_run("val", point, readout) for point in params.sample.val_points()],
        "readouts": [
            Run(name=f"readouts/{other}", role="readout", method="gs", phrases="grid", point=params.sample.base, readout=other)
            for other in params.other_readouts()
        ],
    }
    if params.sample.uses_mirror():
        runs["controls"].append(Run(name="discriminative_mirrored", role="control", phrases="test", **mirrored))
    groups = {"main": "main", "controls": "controls", "grid": "grid", "val": "val", "readouts": "grid"}
    chosen = [run for name, members in runs.items() if groups[name] in params.sample.runs for run in members]
    return [run for run in chosen if params.score.miou or run.role != "class_phrases"]


def _point_run(group: Literal["grid", "val"], point: OperatingPoint, readout: Readout) -> Run:
    return Run(name=f"{group}/{point_path(point)}", role=group, method="gs", phrases=group, point=point, readout=readout)


def predictions_path(params: Params, run: Run) -> Path:
    """Return the path of the gathered predictions of a run."""
    return params.results_dir / "predictions" / run.name / "predictions.parquet"


def sample_times_path(params: Params, name: str, shard: int, shards: int) -> Path:
    """Return the file of the measured seconds of one shard of the run `name`."""
    return times_path(params, f"sample/{name}/{shard}-of-{shards}")


def base_run(params: Params) -> Run:
    """Return the run of the base point on the test phrases of the grid."""
    return _point_run("grid", params.sample.base, params.sample.readout)


def run_rows(params: Params, run: Run, phrases: pd.DataFrame, class_phrases: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the phrase table that a run predicts. Column `text` is the phrase that conditions the model."""
    if run.phrases == "class_phrases":
        rows = miou_phrases(params, class_phrases)
        rows = rows[~is_background(rows)]
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
    """Give each phrase the text of another phrase of its image whose ground truth differs.

    Within each image, the texts are assigned at random such that no row gets a text with its own ground truth. Rows without
    such a text, for example in an image with a single ground truth, are omitted.
    """
    groups = []
    for image_id, group in rows.groupby("image_id", sort=True):
        masks = group["mask"].to_numpy()
        forbidden = masks[:, None] == masks[None, :]
        rng = np.random.default_rng(derive_seed(seed, "permute", image_id))
        cost = rng.random(forbidden.shape) + 1000.0 * forbidden
        row_index, text_index = linear_sum_assignment(cost)
        allowed = ~forbidden[row_index, text_index]
        texts = group["phrase"].to_numpy()[text_index[allowed]]
        groups.append(group.iloc[row_index[allowed]].assign(text=texts))
    return pd.concat(groups) if groups else rows.assign(text=rows["phrase"]).iloc[:0]
