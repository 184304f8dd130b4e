"""Reading of image files of any mode as RGB, with a one-line error for files that cannot be read."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from genseg.errors import UserError


class BadImage(UserError):
    """An image file that cannot be used; `reason` is the same for all files with the same problem."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def open_image(path: str | Path, kind: str = "image", reduced: bool = False) -> tuple[Image.Image, tuple[int, int]]:
    """Decode an image file in its own mode.

    Args:
        kind: name of the kind of file in messages.
        reduced: decode a JPEG at an eighth of its size. This still reads the whole file but is several times faster.

    Returns the image and its full (height, width). Raises BadImage if the file is missing, truncated or not an image.
    """
    try:
        with Image.open(path) as image:
            size = (image.height, image.width)
            if reduced:
                image.draft(None, (1, 1))
            image.load()
            return image, size
    except FileNotFoundError:
        raise BadImage(f"missing {kind}", f"{path}: no such {kind}; fetch it, then run `genseg data` again") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        detail = " ".join(str(error).replace(str(path), "the file").split())
        raise BadImage(f"unreadable {kind}", f"{path}: unreadable {kind} ({detail}); fetch it again") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to 8-bit RGB: grey is repeated, 16-bit grey is scaled, and alpha is dropped."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float64)
        image = Image.fromarray(np.rint(np.clip(values / 257, 0, 255)).astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def load_image(path: str | Path) -> Image.Image:
    """Read an image file of any mode as 8-bit RGB at its native size. Raises BadImage if it is missing or corrupt.

    The EXIF orientation is *not* applied, because COCO's masks refer to the stored pixels.
    """
    return to_rgb(open_image(path)[0])


def check_image(path: str | Path) -> tuple[int, int]:
    """Read an image file completely and return its (height, width). Raises BadImage as `load_image` does."""
    image, size = open_image(path, reduced=True)
    to_rgb(image)
    return size


def read_labels(image: str, mask: str, kind: str, read: Callable[[str], NDArray[np.integer]]) -> NDArray[np.integer]:
    """Check an image and return the values [H, W] of its mask file, which `read` decodes.

    Raises BadImage if a file cannot be used or the two differ in size; `kind` is the name of the mask in the reason.
    """
    height, width = check_image(image)
    labels = read(mask)
    if labels.shape != (height, width):
        sizes = f"{labels.shape[0]} x {labels.shape[1]} pixels, but its image {image} has {height} x {width}"
        raise BadImage(f"image and {kind} differ in size", f"{mask}: {sizes}")
    return labels
