"""Model card: what a model is, its data, training, limits and licence. The text is in `card.md`."""

from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import ModelCard, ModelCardData

from genseg.params import Params
from genseg.training.stages import Kind

NOT_SCORED = "The model has not been scored."
_LICENCES = {
    None: "apache-2.0",
    "data/backbone": "apache-2.0",
    "diffusers/stable-diffusion-xl-1.0-inpainting-0.1": "openrail++",
}
"""Licences of known backbones, which trained weights inherit. None is a backbone with random weights."""


def make_card(
    params: Params, kind: Kind, phrases: pd.DataFrame, backbone: dict[str, Any], pipeline: dict[str, Any], **facts: int
) -> ModelCard:
    """Return the card of a trained model, without scores.

    Args:
        phrases: phrase table.
        backbone: manifest of the backbone.
        pipeline: config of the pipeline, as in `model_index.json`.
        facts: `parameters` of the trained networks, and training `steps`.
    """
    init = backbone["params"]["backbone"]["init"]
    licence = _LICENCES.get(init, "other")
    known = f"The weights derive from the backbone and have its licence, {licence}."
    rows = {split: phrases[phrases["split"] == split] for split in ("train", "val")}
    method = "GS: a diffusion model of the label map" if kind == "gs" else "The discriminative control of GS: one forward pass"
    data = ModelCardData(
        license=licence,
        license_name=None if licence != "other" else "license-of-the-backbone",
        library_name="diffusers",
        pipeline_tag="image-segmentation",
        language="en",
        base_model=init if init and not Path(init).exists() else None,
        tags=["genseg", "referring-segmentation", "label-diffusion"],
    )
    return ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("card.md")),
        title="Generative segmentation by label diffusion" if kind == "gs" else "Discriminative control of GS",
        summary=f"{method}, conditioned on an image and a phrase. It segments what the phrase names.",
        resolution=pipeline["default_processing_resolution"],
        steps=pipeline["default_denoising_steps"],
        guidance=pipeline["default_guidance_scale"],
        images=f"{rows['train']['image_id'].nunique():,}",
        phrases=f"{len(rows['train']):,}",
        val_phrases=f"{len(rows['val']):,}",
        source=params.data.source,
        backbone=f"`{init}`" + (f" at {backbone['revision']}" if backbone["revision"] else "") if init else "of random weights",
        parameters=f"{facts['parameters']:,}",
        updates=f"{facts['steps']:,}",
        batch=params.train.batch,
        lr=f"{params.train.optimizer.lr:g}",
        scores=NOT_SCORED,
        licence=known if licence != "other" else f"The weights derive from the backbone `{init}`; its licence applies.",
    )
