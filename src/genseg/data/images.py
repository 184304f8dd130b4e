"""Pictures of any mode as RGB, and one clear line for those that cannot be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from genseg.errors import UserError


class BadImage(UserError):
    """A picture file that cannot be used; `reason` is the same for all files with the same trouble."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def open_picture(path: str | Path, what: str = "image", smallest: bool = False) -> tuple[Image.Image, tuple[int, int]]:
    """Decode a picture file in its own mode.

    Args:
        what: what to call it in an error.
        smallest: decode a JPEG at an eighth of its size, which still reads all of the file but is several times faster.

    Returns:
        The picture and its full (height, width).

    Raises:
        BadImage: the file is missing, truncated or no picture.
    """
    try:
        with Image.open(path) as picture:
            size = (picture.height, picture.width)
            if smallest:
                picture.draft(None, (1, 1))
            picture.load()
            return picture, size
    except FileNotFoundError:
        raise BadImage(f"missing {what}", f"{path}: no such {what}; fetch it, then run the phase data again") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        detail = " ".join(str(error).replace(str(path), "the file").split())
        raise BadImage(f"unreadable {what}", f"{path}: unreadable {what} ({detail}); fetch it again") from None


def to_rgb(picture: Image.Image) -> Image.Image:
    """RGB from any mode: grey is repeated, a palette looked up, CMYK converted, alpha dropped, 16-bit grey scaled to 8."""
    if picture.mode.startswith("I"):
        values = np.asarray(picture).astype(np.float64)
        picture = Image.fromarray(np.rint(np.clip(values / 257, 0, 255)).astype(np.uint8))
    if "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return picture.convert("RGB")


def load_image(path: str | Path) -> Image.Image:
    """Read an image file of any mode as 8-bit RGB at its native size.

    The orientation tag of EXIF is *not* applied: COCO's masks were drawn on the stored pixels.

    Raises:
        BadImage: (a UserError) the file is missing or corrupt; the message names it and the remedy.
    """
    return to_rgb(open_picture(path)[0])


def check_image(path: str | Path) -> tuple[int, int]:
    """(height, width) of an image file after reading all of it. Raises BadImage as `load_image` does."""
    picture, size = open_picture(path, smallest=True)
    to_rgb(picture)
    return size
