"""Saving trained networks as a pipeline that loads with `GSPipeline.from_pretrained`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from genseg.artifacts.files import atomic_directory
from genseg.diffusion.pipeline import GSPipeline
from genseg.diffusion.schedule import Scheduler, make_scheduler
from genseg.models.backbone import load_text_encoders, load_vae
from genseg.params import Params, Train
from genseg.training.networks import Networks
from genseg.training.stages import Kind

FOLDERS: dict[str, str] = {"gs": "model", "discriminative": "control"}
"""Folder of each kind of model below `results/<study>`."""


def make_training_scheduler(train: Train, betas: dict[str, Any]) -> Scheduler:
    """Return the noise schedule of training and of the saved pipeline.

    The pipeline clips its estimates of x_0 to the range of the labels where they are masks, except for noise prediction
    (see the default operating points in `save_pipeline`).
    """
    is_clipped = train.label == "mask" and train.prediction != "noise"
    return make_scheduler(betas, train.prediction, train.zero_terminal_snr, clip=train.label_scale if is_clipped else None)


def save_pipeline(
    folder: Path, params: Params, kind: Kind, networks: Networks, scheduler: Scheduler, backbone: dict[str, Any]
) -> None:
    """Write the pipeline to `folder`: the trained U-Net and adapter, and the backbone's VAE and text encoders.

    Args:
        backbone: manifest of the phase `backbone`.
    """
    source, revision = backbone["pipeline"], backbone["revision"]
    encoders = load_text_encoders(source, revision)
    prediction = params.train.prediction if kind == "gs" else "logits"
    is_distilled = any(stage.objective == "distill" for stage in params.train.stages)
    pipeline = GSPipeline(
        vae=load_vae(source, revision),
        text_encoder=encoders.models[0],
        text_encoder_2=encoders.models[1],
        tokenizer=encoders.tokenizers[0],
        tokenizer_2=encoders.tokenizers[1],
        unet=networks.unet.eval(),
        adapter=networks.adapter.eval(),
        scheduler=scheduler,
        prediction=prediction,
        label_scale=params.train.label_scale,
        image_size=params.train.size,
        label="mask" if prediction == "logits" else params.train.label,
        # Noise prediction takes the paper's operating point. With v and x_0, the first step already gives a usable estimate,
        # and guidance improves it little. Distilled networks have learned the guided output.
        steps=50 if prediction == "noise" else 1,
        guidance=7.5 if prediction == "noise" and not is_distilled else 1.0,
    )
    with atomic_directory(folder) as temporary:
        pipeline.save_pretrained(temporary)
