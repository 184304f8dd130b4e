"""Time of refining masks compared with sampling them with the paper's 50 guided steps."""

from __future__ import annotations

from functools import partial

import pandas as pd

from benchmarks.harness import Effort, Row, Study, interleaved, versus
from genseg.artifacts.parquet import KEY
from genseg.artifacts.predictions import read_predictions
from genseg.baselines.registry import find_baseline, study_baselines
from genseg.data.images import load_image
from genseg.diffusion.guidance import count_evaluations
from genseg.diffusion.pipeline import load_pipeline
from genseg.models.device import DTYPES, choose_device
from genseg.models.source import chosen_backbone
from genseg.models.text_to_image import TextToImage
from genseg.refine.g4seg import refine_predictions
from genseg.refine.layout import forward_passes


def refinement(study: Study, effort: Effort) -> list[Row]:
    """All masks of a few test images, seconds per image: G4Seg refines the masks of GS (ours), or GS samples them at the base
    point (reference). Both use the study's params and loaded networks, read the image file, and return masks at native size."""
    # 1. Load the networks.
    params = study.params
    sample, refine, base = params.sample, params.refine, params.sample.base
    device = choose_device(params.device)
    source, revision, _ = chosen_backbone(params, refine)
    model = TextToImage(source, revision, device, DTYPES[refine.precision])
    pipeline = load_pipeline(params.model_dir("gs"), DTYPES[sample.precision]).to(device)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.register_to_config(default_processing_resolution=base.size)

    # 2. Choose the images.
    rows = study.phrases[study.phrases["split"] == "test"].sort_values(KEY)
    images = sorted(rows["image_id"].unique())[: effort(effort.images, 1)]
    rows = rows[rows["image_id"].isin(images)]
    coarse = read_predictions(find_baseline(params, "gs", study_baselines(params)).paths(params)[False])

    def refine_image(part: pd.DataFrame) -> None:
        refine_predictions(part, coarse.merge(part[KEY], on=KEY), model, refine, params.seed)

    def sample_image(part: pd.DataFrame, steps: int = base.num_inference_steps) -> None:
        image, texts = load_image(part["file_name"].iloc[0]), part["phrase"].tolist()
        pipeline(image, texts, steps, base.guidance_scale, threshold=sample.threshold, batch_size=sample.batch)

    # 3. Warm up and measure. Refinement and sampling alternate for each image.
    refine_image(rows.head(1))
    sample_image(rows.head(1), 1)
    seconds: dict[str, list[float]] = {"refined": [], "sampled": []}
    for _, part in rows.groupby("image_id"):
        calls = {"refined": partial(refine_image, part), "sampled": partial(sample_image, part)}
        for name, times in interleaved(calls, effort(3, 1)).items():
            seconds[name] += times
    evaluations, passes = count_evaluations(base), forward_passes(refine)
    case = f"G4Seg with {passes} passes per mask vs. GS with {evaluations} evaluations per mask"
    facts = {"device": device.type, "images": len(images), "masks": len(rows), "evaluations": evaluations, "passes": passes}
    return [versus(case, seconds["refined"], seconds["sampled"], 1, 1.0, **facts)]
