"""The trained-refiner control: a small convolutional network that maps (image, coarse mask) to a better mask, without text.

It is trained on ground-truth masks of the training split, corrupted by `corrupt`, with BCE + Dice. The control shows whether
a training-free refiner with a large generator is worth its cost.
"""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

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
from genseg.refine.inputs import iterate_images

CORRUPTIONS = ("none", "dilate", "erode", "box", "shift", "noise")
VERSION = 1
_PATCH = 2
_PRIOR = 2.0
"""Logit added in the coarse foreground and subtracted in the background, so that the untrained network returns the mask."""


def corrupt(mask: Mask, kind: str, rng: np.random.Generator) -> Mask:
    """Return an inexact version of a mask [H, W] bool. An empty mask stays empty; other masks never become empty.

    Args:
        kind: `none`: a copy. `dilate`: by 0.1 to 0.5 of the radius of a disc of the same area, plus one pixel. `erode`: by
            0.1 to 0.6 of the largest distance to the background. `box`: the bounding box. `shift`: by up to 0.3 of the
            bounding box's sides; pixels outside the image are lost. `noise`: the outline is moved by a smooth random field.
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
        """Return logits [B, 1, S, S] for image [B, 3, S, S] in [-1, 1] and coarse mask [B, 1, S, S] in [0, 1]; 16 divides S."""
        centred = 2 * coarse - 1
        skips = [nn.functional.pixel_unshuffle(torch.cat([image, centred], 1), _PATCH)]
        for number, block in enumerate(self.down):
            skips.append(block(nn.functional.max_pool2d(skips[-1], 2) if number else skips[-1]))
        hidden = skips.pop()
        for block in reversed(self.up):
            hidden = block(torch.cat([nn.functional.interpolate(hidden, scale_factor=2.0), skips.pop()], 1))
        return _PRIOR * centred + nn.functional.pixel_shuffle(self.leave(hidden), _PATCH)


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.GroupNorm(8, outputs),
        nn.SiLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.GroupNorm(8, outputs),
        nn.SiLU(),
    )


def train_refiner(
    phrases: pd.DataFrame, out: str | Path, *, size: int, steps: int, batch: int, lr: float, seed: int
) -> Iterator[float]:
    """Train on the training phrases, yield the loss of each step, and write the folder `out` after the last step.

    Images and masks are resized to `size`, a multiple of 16. Phrases, corruptions and flips of a step are derived from
    (seed, step), the initial weights from seed. The optimiser is AdamW with a one-cycle cosine schedule; `lr` is its peak.

    Raises UserError if there is no training phrase, `size` is not a multiple of 16, or an image cannot be read.
    """
    if size % 16:
        raise UserError(f"refine.trained.size: expected a multiple of 16, got {size}")
    train = phrases[phrases["split"] == "train"]
    if train.empty:
        raise UserError("phrase table: expected phrases of split train, got none; give a table with training images")
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
        settings = {"size": size, "steps": steps, "batch": batch, "lr": lr, "seed": seed, "corruptions": CORRUPTIONS}
        write_json(folder / "config.json", {"version": VERSION, **settings})


def _batch(train: pd.DataFrame, size: int, batch: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Sample images [B, 3, S, S] in [-1, 1], coarse masks and true masks, both [B, 1, S, S] in [0, 1].

    Masks are corrupted at native size and then reduced, as coarse masks are in `Refiner`.
    """
    samples = []
    for index in rng.integers(len(train), size=batch):
        row = train.iloc[index]
        truth = row_mask(row)
        coarse = corrupt(truth, CORRUPTIONS[rng.integers(len(CORRUPTIONS))], rng)
        maps = area_reduce(np.stack([coarse, truth]), size, size)
        sample = np.dstack([_resize(load_image(row["file_name"]), size), *maps]).astype(np.float32)  # (S, S, 5)
        samples.append(sample[:, ::-1] if rng.random() < 0.5 else sample)
    joined = np.stack(samples)
    return _tensor(joined[..., :3]) / 127.5 - 1, _tensor(joined[..., 3:4]), _tensor(joined[..., 4:])


def _resize(image: Image.Image, size: int) -> NDArray[np.uint8]:
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def _tensor(batch: NDArray[np.float32]) -> Tensor:
    """Return [B, H, W, C] as a tensor [B, C, H, W], with channels last in memory."""
    return torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def _loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Return BCE + Dice, averaged over the masks."""
    probability = logits.sigmoid()
    overlap = (probability * truth).sum((1, 2, 3))
    dice = 1 - (2 * overlap + 1) / (probability.sum((1, 2, 3)) + truth.sum((1, 2, 3)) + 1)
    return nn.functional.binary_cross_entropy_with_logits(logits, truth) + dice.mean()


class Refiner:
    """A trained refiner. Raises UserError if a file is missing, truncated, or for another network or version."""

    def __init__(self, folder: str | Path) -> None:
        config, weights = read_json(Path(folder) / "config.json"), Path(folder) / "refiner.safetensors"
        if not isinstance(config, dict) or config.get("version") != VERSION:
            raise UserError(f"{folder}/config.json: expected a refiner of version {VERSION}; train the refiner again")
        self.size: int = config["size"]
        self.net = RefinerNet().eval()
        try:
            self.net.load_state_dict(load_file(weights))
        except (OSError, SafetensorError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{weights}: cannot read the weights ({reason}); train the refiner again") from None

    @torch.inference_mode()
    def probability(self, image: NDArray[np.uint8], coarse: Mask) -> NDArray[np.float32]:
        """Return the foreground probabilities [K, H, W] for K coarse masks [K, H, W] of an image [H, W, 3], each by itself."""
        picture = _tensor(_resize(Image.fromarray(image), self.size)[None].astype(np.float32)) / 127.5 - 1
        small = torch.from_numpy(area_reduce(coarse, self.size, self.size))
        maps = [torch.sigmoid(self.net(picture, mask[None, None]))[0, 0].numpy() for mask in small]
        return bilinear(np.stack(maps), *image.shape[:2])

    def refine_predictions(
        self, phrases: pd.DataFrame, predictions: pd.DataFrame, side: int | None = None
    ) -> tuple[pd.DataFrame, NDArray[np.float32] | None]:
        """Return predictions with refined masks and unchanged scores, in key order, and soft maps [N, side, side] or None.

        An empty mask stays empty. Raises UserError as `iterate_images` does.
        """
        refined, soft = [], []
        for image, rows, coarse in iterate_images(phrases, predictions):
            present = coarse.any((1, 2), keepdims=True)
            probability = np.where(present, self.probability(image, coarse), 0)
            columns = rows[[*KEY, "score"]].itertuples(index=False)
            refined += [(*row, encode(mask)) for row, mask in zip(columns, probability > 0.5, strict=True)]
            if side is not None:
                soft += [area_reduce(foreground, side, side) for foreground in probability]
        frame = pd.DataFrame(refined, columns=[*KEY, "score", "mask"])
        return frame, np.stack(soft) if soft else None
