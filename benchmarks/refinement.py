"""Refining masks against making them by the paper's 50 steps with guidance."""

from __future__ import annotations

from typing import Any

from benchmarks.harness import Effort, Row, Study, interleaved, versus
from genseg.artifacts.parquet import KEY
from genseg.artifacts.predictions import read_predictions
from genseg.baselines.registry import find_baseline
from genseg.data.images import load_image
from genseg.diffusion.pipeline import load_pipeline
from genseg.models.device import DTYPES, choose_device
from genseg.models.text_to_image import TextToImage
from genseg.refine.g4seg import passes, refine_predictions
from genseg.refine.layout import test_images
from genseg.training.prepare import chosen_backbone


def refinement(study: Study, effort: Effort) -> list[Row]:
    """All masks of a few of the refined images of test, seconds per image: G4Seg refines those of the study's GS, against GS
    makes them anew by the base cell. Each with the study's params, networks loaded, from the picture's file to native masks."""
    params = study.params
    sample, refine = params.sample, params.refine
    device = choose_device(params.device)
    source, revision, _ = chosen_backbone(params, refine)
    model = TextToImage(source, revision, device, DTYPES[refine.precision])
    pipeline = load_pipeline(params.results_dir / "model", DTYPES[sample.precision]).to(device)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.register_to_config(image_size=sample.base.size)

    chosen = test_images(params, study.phrases)[: effort(effort.images, 1)]
    rows = study.phrases[(study.phrases["split"] == "test") & study.phrases["image_id"].isin(chosen)].sort_values(KEY)
    coarse = read_predictions(find_baseline(params, "gs").predictions(params))
    coarse = coarse.merge(rows[KEY], on=KEY)
    parts = [part for _, part in rows.groupby("image_id")]
    files, texts = [part["file_name"].iloc[0] for part in parts], [part["phrase"].tolist() for part in parts]

    def refined() -> None:
        refine_predictions(rows, coarse, model, refine, params.seed)

    def generated(steps: int = sample.base.steps) -> None:
        pictures: list[Any] = [load_image(file) for file in files]
        pipeline(pictures, texts, steps, sample.base.guidance, threshold=sample.threshold, batch_size=sample.batch)

    refine_predictions(rows, coarse.head(1), model, refine, params.seed), generated(1)  # warm-up
    seconds = interleaved({"refined": refined, "generated": generated}, effort(3, 1))
    evaluations, each = sample.base.evaluations, passes(refine)
    case = f"G4Seg, {each} passes a mask, against GS, {evaluations} evaluations a mask"
    facts = {"images": len(files), "masks": len(rows), "evaluations": evaluations, "passes": each}
    return [versus(case, seconds["refined"], seconds["generated"], len(files), 1.0, **facts)]
