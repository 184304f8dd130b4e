"""Time saved by stored latents: encoding once or for every phrase, and a training step with or without stored latents."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from benchmarks.harness import Effort, Row, Study, interleaved, versus
from genseg.artifacts.latents import LatentStore
from genseg.artifacts.manifest import read_manifest
from genseg.data.images import load_image
from genseg.diffusion.objectives import make_scheduler
from genseg.latents import Texts, image_store, text_store
from genseg.models.backbone import load_text_encoders, load_vae
from genseg.models.device import DTYPES
from genseg.models.text import TextEmbedding, encode_phrases
from genseg.models.vae import encode_images, image_tensor
from genseg.training.data import MicroBatch, PhraseData, draw_timesteps
from genseg.training.losses import DiffusionLoss
from genseg.training.networks import build_networks, make_optimizer


class Encoder:
    """The backbone's VAE and text encoders."""

    def __init__(self, study: Study) -> None:
        backbone = read_manifest(study.params.results_dir / "backbone" / "manifest.json")
        self.source, self.revision = backbone["pipeline"], backbone["revision"]
        self.betas, self.size = backbone["betas"], study.params.train.size
        self.vae = load_vae(self.source, self.revision)
        self.texts = load_text_encoders(self.source, self.revision)

    def images(self, files: list[str]) -> torch.Tensor:
        """Return the latents [B, 4, h, w] of image files."""
        return encode_images(self.vae, torch.stack([image_tensor(load_image(file), self.size) for file in files]))

    def phrase(self, text: str) -> TextEmbedding:
        return encode_phrases(self.texts, [text])[0]


def precompute(study: Study, effort: Effort) -> list[Row]:
    """Latents and embeddings for the phrases of some training images, seconds per phrase: each image and each text once, in
    batches (ours), compared with encoding both again for every phrase (reference)."""
    encoder = Encoder(study)
    rows = study.phrases[study.phrases["split"] == "train"]
    rows = rows[rows["image_id"].isin(rows["image_id"].unique()[: effort(16, 3)])]
    files, texts, batch = rows["file_name"], rows["phrase"], study.params.latents.batch

    def encode_images_once() -> None:
        unique = files.unique().tolist()
        for start in range(0, len(unique), batch):
            encoder.images(unique[start : start + batch])

    calls = {
        "images": encode_images_once,
        "images per phrase": lambda: [encoder.images([file]) for file in files],
        "texts": lambda: encode_phrases(encoder.texts, sorted(set(texts))),
        "texts per phrase": lambda: [encoder.phrase(text) for text in texts],
    }
    encoder.images(files.tolist()[:1])  # warm-up
    encoder.phrase(texts.iloc[0])
    seconds = interleaved(calls, effort(3, 1))
    comparisons = []
    for name, column in (("images", files), ("texts", texts)):
        case = f"{name} of {len(rows)} phrases"
        comparisons.append(versus(case, seconds[name], seconds[f"{name} per phrase"], len(rows), unique=column.nunique()))
    return comparisons


class EncodedOnTheFly(PhraseData):
    """Training rows whose images and texts are encoded when their batch is assembled."""

    encoder: Encoder

    def batch(self, indices: list[int], mirrored: list[bool]) -> Any:
        rows = self.rows.iloc[indices]
        files = zip(rows["image_id"], rows["file_name"], strict=True)
        self.images = {image_id: {"latent": self.encoder.images([file])[0]} for image_id, file in files}  # type: ignore[assignment]
        self.texts = {text: self.encoder.phrase(text) for text in rows["phrase"]}  # type: ignore[assignment]
        return super().batch(indices, mirrored)


def training(study: Study, effort: Effort) -> list[Row]:
    """One optimiser step, seconds per sample: with stored latents (ours), compared with encoding images and phrases in the step
    (reference). `data_share` is the time to assemble a batch over that of our step; `genseg train` does this in a thread."""
    # 1. Open the data and build the networks.
    params, encoder = study.params, Encoder(study)
    train = params.train
    texts = Texts(text_store(params), torch.device("cpu"))
    latents = LatentStore(image_store(params, train.size))
    rows = study.phrases[study.phrases["split"] == "train"]
    vae = encoder.vae if train.label == "vae" else None
    stored = PhraseData(rows, latents, texts, vae)
    encoded = EncodedOnTheFly(rows, latents, texts, vae)
    encoded.encoder = encoder
    networks = build_networks(params, encoder.source, encoder.revision, texts[""], stored.label_shape[0])
    optimizer = make_optimizer(networks, train.optimizer)
    alphas_bar = make_scheduler(encoder.betas, train.prediction_type, train.zero_terminal_snr).alphas_cumprod
    loss = DiffusionLoss(train, alphas_bar, vae)
    generator = torch.Generator().manual_seed(0)
    indices = list(range(0, len(rows), max(1, len(rows) // train.micro_batch)))[: train.micro_batch]
    mirrored = [False] * len(indices)

    # 2. Define a step.
    def step(data: PhraseData) -> None:
        batch = data.batch(indices, mirrored)
        noise = torch.randn((len(indices), *stored.label_shape), generator=generator)
        t = draw_timesteps(len(indices), len(alphas_bar), train.terminal_timestep_prob, generator)
        drop = torch.rand(len(indices), generator=generator) < train.cond_drop_prob
        with torch.autocast("cpu", DTYPES[train.precision], enabled=train.precision != "fp32"):
            mean_loss = loss(networks, MicroBatch(batch, noise, t, drop)).mean()
        optimizer.zero_grad(set_to_none=True)
        mean_loss.backward()
        optimizer.step()

    # 3. Warm up and measure.
    for data in (stored, encoded):
        step(data)
    calls = {
        "stored": lambda: step(stored),
        "encoded": lambda: step(encoded),
        "data": lambda: stored.batch(indices, mirrored),
    }
    seconds = interleaved(calls, effort(3, 1))
    share = statistics.median(seconds["data"]) / statistics.median(seconds["stored"])
    case = f"{len(indices)} samples, {train.precision}"
    return [versus(case, seconds["stored"], seconds["encoded"], len(indices), data_share=share)]
