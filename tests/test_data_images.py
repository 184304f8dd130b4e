"""Images of every mode are read as RGB; errors of unreadable files name the file and the remedy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genseg.data.images import check_image, load_image
from genseg.errors import UserError

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5


@pytest.mark.parametrize(
    ("mode", "name"),
    [*((mode, "a.png") for mode in ("RGB", "L", "LA", "RGBA", "P", "I;16")), ("CMYK", "a.tif")],
)
def test_image_of_every_mode_is_read_as_rgb(tmp_path: Path, mode: str, name: str) -> None:
    image = Image.fromarray(GREY)
    if mode == "I;16":
        image = Image.fromarray(GREY.astype(np.uint16) * 257)
    elif mode == "P":
        image = image.convert("P")  # from grey, so that the palette is exact
    else:
        image = image.convert("RGB").convert(mode)
    assert image.mode == mode
    image.save(tmp_path / name)
    assert check_image(tmp_path / name) == (6, 8)
    loaded = load_image(tmp_path / name)
    assert (loaded.mode, loaded.size) == ("RGB", (8, 6))
    assert np.abs(np.asarray(loaded).astype(int) - GREY[..., None]).max() <= 1


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_jpeg_of_every_mode_is_read_as_rgb(tmp_path: Path, mode: str) -> None:
    Image.new("RGB", (64, 48), (200, 200, 200)).convert(mode).save(tmp_path / "a.jpg")
    assert check_image(tmp_path / "a.jpg") == (48, 64)
    pixels = np.asarray(load_image(tmp_path / "a.jpg")).astype(int)
    assert np.abs(pixels - 200).max() <= 3


def test_transparent_palette_colours_are_kept(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1), 0)
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "a.png", transparency=b"\x00\xff")
    assert np.asarray(load_image(tmp_path / "a.png"))[0, 0].tolist() == [10, 20, 30]


def test_exif_orientation_is_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").size == (8, 4)


@pytest.mark.parametrize("content", [None, b"", b"<html>not found</html>", "truncated"])
@pytest.mark.parametrize("read", [load_image, check_image])
def test_unreadable_file_is_reported(tmp_path: Path, content: bytes | str | None, read: object) -> None:
    path = tmp_path / "photo.jpg"
    if content == "truncated":
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[:3000])
    elif content is not None:
        path.write_bytes(content)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="fetch it") as caught:
        read(path)  # type: ignore[operator]
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
