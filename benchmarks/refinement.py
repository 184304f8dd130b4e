"""Refining masks against making them by the paper's 50 steps with guidance."""

from __future__ import annotations

from functools import partial

import pandas as pd

from benchmarks.harness import Effort, Row, Study, interleaved, versus
from genseg.artifacts.parquet import KEY
from genseg.artifacts.predictions import read_predictions
from genseg.baselines.registry import find_baseline, study_baselines
from genseg.data.images import load_image
from genseg.diffusion.pipeline import load_pipeline
from genseg.models.device import DTYPES, choose_device
from genseg.models.text_to_image import TextToImage
from genseg.refine.g4seg import passes, refine_predictions
from genseg.training.prepare import chosen_backbone


def refinement(study: Study, effort: Effort) -> list[Row]:
    """All masks of a few images of test, seconds per image: G4Seg refines those of the study's GS, against GS
    makes them anew by the base cell. Each with the study's params, networks loaded, from the picture's file to native masks."""
    params = study.params
    sample, refine = params.sample, params.refine
    device = choose_device(params.device)
    source, revision, _ = chosen_backbone(params, refine)
    model = TextToImage(source, revision, device, DTYPES[refine.precision])
    pipeline = load_pipeline(params.results_dir / "model", DTYPES[sample.precision]).to(device)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.register_to_config(image_size=sample.base.size)

    rows = study.phrases[study.phrases["split"] == "test"].sort_values(KEY)
    chosen = sorted(rows["image_id"].unique())[: effort(effort.images, 1)]
    rows = rows[rows["image_id"].isin(chosen)]
    coarse = read_predictions(find_baseline(params, "gs", study_baselines(params)).predictions(params))

    def refined(part: pd.DataFrame) -> None:
        refine_predictions(part, coarse.merge(part[KEY], on=KEY), model, refine, params.seed)

    def generated(part: pd.DataFrame, steps: int = sample.base.steps) -> None:
        image, texts = load_image(part["file_name"].iloc[0]), part["phrase"].tolist()
        pipeline(image, texts, steps, sample.base.guidance, threshold=sample.threshold, batch_size=sample.batch)

    refined(rows.head(1))  # warm-up
    generated(rows.head(1), 1)
    seconds: dict[str, list[float]] = {"refined": [], "generated": []}
    for _, part in rows.groupby("image_id"):  # alternately image by image, so that both meet the machine as it is
        calls = {"refined": partial(refined, part), "generated": partial(generated, part)}
        for name, found in interleaved(calls, effort(3, 1)).items():
            seconds[name] += found
    evaluations, each = sample.base.evaluations, passes(refine)
    case = f"G4Seg, {each} passes a mask, against GS, {evaluations} evaluations a mask"
    facts = {"device": device.type, "images": len(chosen), "masks": len(rows), "evaluations": evaluations, "passes": each}
    return [versus(case, seconds["refined"], seconds["generated"], 1, 1.0, **facts)]
