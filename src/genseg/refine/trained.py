"""The trained-refiner control: a small convolutional network that maps (image, coarse mask) to a better mask, without text.

It learns from ground truth of the training split made inexact in known ways (`corrupt`), with BCE + Dice. Against it stands
the question whether a training-free refiner with a large generator is worth its cost.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy import ndimage
from torch import Tensor, nn

from genseg.artifacts.files import atomic_directory, read_json, write_json
from genseg.artifacts.masks import Mask, encode
from genseg.artifacts.parquet import KEY
from genseg.artifacts.phrases import row_mask
from genseg.artifacts.resample import area_reduce, bilinear
from genseg.artifacts.seeds import derive_seed
from genseg.data.images import load_image
from genseg.errors import UserError
from genseg.refine.crf import images_of

Corruption = Literal["none", "dilate", "erode", "box", "shift", "noise"]
CORRUPTIONS: tuple[Corruption, ...] = get_args(Corruption)
VERSION = 1
_PATCH = 2
_MULTIPLE = 16
_PRIOR = 2.0
"""Logit that the coarse mask has before training, so that the untrained network leaves it as it is."""


def corrupt(mask: Mask, kind: Corruption, rng: np.random.Generator) -> Mask:
    """An inexact version of a mask [H, W]; an empty mask stays empty, another one never becomes so.

    `dilate` and `erode` by up to half of the radius of the disc of its area, or 0.6 of its greatest inner distance; `box`: its
    bounding box; `shift` by up to 0.3 of the box's sides, what leaves the picture is lost; `noise`: its outline moved by
    a smooth random field.
    """
    if kind == "none" or not mask.any():
        return mask.copy()
    radius = math.sqrt(mask.sum() / math.pi)
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if kind == "dilate":
        result = ndimage.distance_transform_edt(~mask) <= 1 + rng.uniform(0.1, 0.5) * radius
    elif kind == "erode":
        inside = ndimage.distance_transform_edt(mask)
        result = inside > rng.uniform(0.1, 0.6) * inside.max()
    elif kind == "box":
        result = np.zeros_like(mask)
        result[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
    elif kind == "shift":
        sides = np.array([np.ptp(rows) + 1, np.ptp(columns) + 1])
        result = ndimage.shift(mask.astype(np.uint8), np.rint(rng.uniform(-0.3, 0.3, 2) * sides), order=0) > 0
    else:
        signed = ndimage.distance_transform_edt(mask) - ndimage.distance_transform_edt(~mask)
        field = ndimage.gaussian_filter(rng.normal(size=mask.shape), max(1.0, 0.3 * radius), truncate=2.0)
        result = signed + 0.4 * radius * field / field.std() > 0
    return result if result.any() else mask.copy()


class RefinerNet(nn.Module):
    """A U-Net of four levels on patches of 2 x 2 pixels; about 0.23 M parameters."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 48, 64)) -> None:
        super().__init__()
        self.down = nn.ModuleList(map(_block, (4 * _PATCH**2, *widths[:-1]), widths))
        self.up = nn.ModuleList(_block(low + high, high) for high, low in itertools.pairwise(widths))
        self.leave = nn.Conv2d(widths[0], _PATCH**2, 1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)  # type: ignore[arg-type]

    def forward(self, image: Tensor, coarse: Tensor) -> Tensor:
        """Logits [B, 1, S, S] of image [B, 3, S, S] in [-1, 1] and coarse mask [B, 1, S, S] in [0, 1], 16 dividing S."""
        centred = 2 * coarse - 1
        levels = [nn.functional.pixel_unshuffle(torch.cat([image, centred], 1), _PATCH)]
        for number, block in enumerate(self.down):
            levels.append(block(nn.functional.max_pool2d(levels[-1], 2) if number else levels[-1]))
        hidden = levels.pop()
        for block in reversed(self.up):
            hidden = block(torch.cat([nn.functional.interpolate(hidden, scale_factor=2.0), levels.pop()], 1))
        return _PRIOR * centred + nn.functional.pixel_shuffle(self.leave(hidden), _PATCH)


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.SiLU()),
        *(nn.Conv2d(outputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.SiLU()),
    )


def train_refiner(
    phrases: pd.DataFrame, out: str | Path, *, size: int, steps: int, batch: int, lr: float, seed: int
) -> Iterator[float]:
    """Train on the phrases of split train and write `out` (`refiner.safetensors`, `config.json`); yields every step's loss.

    Every step's phrases, corruptions and mirrorings derive from (seed, step), the weights' start from seed. AdamW with a
    cosine schedule. The files are written when the iterator is exhausted.

    Raises:
        UserError: no training phrase with a mask, `size` no multiple of 16, or an image that cannot be read.
    """
    if size % _MULTIPLE:
        raise UserError(f"the trained refiner works at sizes that are multiples of {_MULTIPLE}, not {size}; choose another")
    train = phrases[phrases["split"] == "train"]
    if train.empty:
        raise UserError("the phrase table has no phrase of split train; the trained refiner needs some")
    torch.manual_seed(derive_seed(seed, "refiner", "weights"))
    net = RefinerNet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        image, coarse, truth = _batch(train, size, batch, np.random.default_rng(derive_seed(seed, "refiner", step)))
        loss = _loss(net(image, coarse), truth)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        yield loss.item()
    with atomic_directory(out) as folder:
        save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, folder / "refiner.safetensors")
        write_json(
            folder / "config.json",
            {
                "version": VERSION,
                "size": size,
                "steps": steps,
                "batch": batch,
                "lr": lr,
                "seed": seed,
                "corruptions": CORRUPTIONS,
            },
        )


def _batch(train: pd.DataFrame, size: int, batch: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    images, coarse, truth = [], [], []
    for index in rng.integers(len(train), size=batch):
        row = train.iloc[index]
        mask = area_reduce(row_mask(row), size, size) >= 0.5
        kind = CORRUPTIONS[rng.integers(len(CORRUPTIONS))]
        parts = [_resized(np.asarray(load_image(row["file_name"])), size), corrupt(mask, kind, rng)[..., None], mask[..., None]]
        joined = np.concatenate([part.astype(np.float32) for part in parts], -1)
        if rng.random() < 0.5:
            joined = joined[:, ::-1]
        images.append(joined[..., :3])
        coarse.append(joined[..., 3:4])
        truth.append(joined[..., 4:])
    return _tensor(np.stack(images)) / 127.5 - 1, _tensor(np.stack(coarse)), _tensor(np.stack(truth))


def _resized(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    if image.shape[:2] == (size, size):
        return image
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def _tensor(batch: NDArray[np.float32]) -> Tensor:
    """[B, H, W, C] -> [B, C, H, W], channels last in memory."""
    return torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def _loss(logits: Tensor, truth: Tensor) -> Tensor:
    """BCE + Dice, both per mask, averaged."""
    probability = logits.sigmoid()
    overlap = (probability * truth).sum((1, 2, 3))
    dice = 1 - (2 * overlap + 1) / (probability.sum((1, 2, 3)) + truth.sum((1, 2, 3)) + 1)
    return nn.functional.binary_cross_entropy_with_logits(logits, truth) + dice.mean()


class Refiner:
    """A trained refiner read from the folder that `train_refiner` wrote.

    Raises:
        UserError: a file is missing, truncated, of another network or of a newer version.
    """

    def __init__(self, folder: str | Path) -> None:
        config = read_json(Path(folder) / "config.json")
        if not isinstance(config, dict) or config.get("version") != VERSION:
            raise UserError(f"{folder}/config.json: not a refiner of version {VERSION}; train it again")
        self.size: int = config["size"]
        self.net = RefinerNet().eval()
        weights = Path(folder) / "refiner.safetensors"
        try:
            self.net.load_state_dict(load_file(weights))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise UserError(
                f"{weights}: cannot read the weights ({str(error).splitlines()[0]}); train the refiner again"
            ) from None

    @torch.inference_mode()
    def probability(self, image: NDArray[np.uint8], coarse: Mask) -> NDArray[np.float32]:
        """Foreground probability [K, H, W] of K coarse masks of one image [H, W, 3], each by itself."""
        picture = _tensor(_resized(image, self.size)[None].astype(np.float32)) / 127.5 - 1
        small = torch.from_numpy(area_reduce(coarse, self.size, self.size))
        maps = [torch.sigmoid(self.net(picture, mask[None, None]))[0, 0].numpy() for mask in small]
        return bilinear(np.stack(maps), *image.shape[:2])

    def refine_predictions(
        self, phrases: pd.DataFrame, predictions: pd.DataFrame, side: int | None = None
    ) -> tuple[pd.DataFrame, NDArray[np.float32] | None]:
        """Predictions with refined masks and unchanged scores in key order, an empty mask stays empty; with a `side` their
        probabilities, too, as soft maps [N, side, side].

        Raises:
            UserError: as `crf.images_of`.
        """
        found, soft = [], []
        for image, rows, coarse in images_of(phrases, predictions):
            there = coarse.any((1, 2), keepdims=True)
            probability = np.where(there, self.probability(image, coarse), 0)
            keys = rows[[*KEY, "score"]].itertuples(index=False)
            found += [(*row, encode(mask)) for row, mask in zip(keys, probability > 0.5, strict=True)]
            if side is not None:
                soft += [area_reduce(one, side, side) for one in probability]
        frame = pd.DataFrame(found, columns=[*KEY, "score", "mask"])
        return frame, np.stack(soft) if soft else None
