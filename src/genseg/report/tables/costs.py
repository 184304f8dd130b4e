"""Table of the measured time of sampling, as in section 4.5 of the GS paper. It differs between equal runs."""

from typing import Any

import pandas as pd

from genseg.artifacts.files import read_json
from genseg.diffusion.guidance import count_evaluations
from genseg.params import Params
from genseg.report.render import Column, Table
from genseg.report.tables import parts
from genseg.report.tables.ablations import PUBLISHED_BASE
from genseg.sampling.runs import Run, sample_times_path, study_runs

PUBLISHED = {"device": "A100", "batch": 16, "masks": 16, "seconds": 50.0}
"""Section 4.5 of the paper: one pass with a batch of 16 takes 50 seconds. Its operating point is that of section 4.2."""


def sampling_costs(params: Params) -> Table:
    """Compare measured seconds per mask, by device and operating point, with the paper's."""
    # 1. Add up the times of all runs that have the same method, device, batch, size and number of evaluations.
    measured = pd.DataFrame([row for run in study_runs(params) for row in _rows(params, run)])
    if len(measured):
        keys = ["method", "device", "batch", "size", "evaluations"]
        measured = measured.groupby(keys, as_index=False).agg(masks=("masks", "sum"), seconds=("seconds", "sum"))
        measured = measured.sort_values(["device", "method", "size", "evaluations"], ascending=[True, False, False, True])
    facts = {"method": "GS", "size": PUBLISHED_BASE.size, "evaluations": count_evaluations(PUBLISHED_BASE), **PUBLISHED}
    frame = pd.concat([pd.DataFrame([facts | {"source": "published"}]), measured.assign(source="measured")], ignore_index=True)

    # 2. Compute seconds per mask, milliseconds per evaluation, to three significant digits.
    per_mask = frame["seconds"] / frame["masks"]
    per_evaluation = 1000 * per_mask / frame["evaluations"]
    values = {"seconds_per_mask": per_mask, "seconds_per_16": 16 * per_mask, "ms_per_evaluation": per_evaluation}
    for name, numbers in values.items():
        frame[name] = [float(f"{number:.3g}") for number in numbers]
    frame["scores"] = str(params.work_dir / "times" / "sample")

    caption = (
        "Time of sampling: published (GS paper, section 4.5), and GS and the discriminative control measured here on "
        f"{parts.describe_study(params)}."
    )
    columns = [
        Column("method", "Method", "text"),
        Column("device", "Device", "text"),
        Column("size", "Size", "count"),
        Column("batch", "Batch", "count"),
        Column("evaluations", "Eval.", "count"),
        Column("masks", "Masks", "count"),
        Column("seconds_per_mask", "one mask", "number", over="Seconds"),
        Column("seconds_per_16", "16 masks", "number", over="Seconds"),
        Column("ms_per_evaluation", "ms per eval.", "number"),
    ]
    notes = [
        "Published: 50 seconds for a batch of 16 on one A100; size and evaluations are those of its section 4.2 (50 steps with "
        "guidance). The networks, sizes and devices differ, so published and measured rows are not comparable.",
        "Measured: wall time from the image latent to the written mask, without loading the network and without encoding image "
        f"and text, while other jobs may share the device. Masks from an earlier run keep the time of that run. "
        f"{parts.EVALUATION_NOTE}",
    ]
    groups = {"published": "Published", "measured": "Measured here"}
    return Table("sampling_costs", caption, frame, columns, notes, group_by="source", groups=groups)


def _rows(params: Params, run: Run) -> list[dict[str, Any]]:
    """Return the recorded times of the shards of a run; none for a run without a network, and for read-outs of stored maps."""
    if run.point is None:
        return []
    shards = params.resources.sample.shards
    paths = [sample_times_path(params, run.name, shard, shards) for shard in range(shards)]
    facts = {"method": "GS" if run.method == "gs" else "Discriminative", "size": run.point.size, "evaluations": run.evaluations}
    return [facts | read_json(path) for path in paths if path.exists()]
