"""From an image file to 784 grey levels, or to the reason why not."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from pipeline import reading
from pipeline.dataset import NUM_PIXELS
from pipeline.storage import Place

MAX_FILE_BYTES = 1 << 26
READ_SIZE = 1 << 20
# https://www.w3.org/TR/png-3: values of a pixel by colour type, and by interlace method the
# passes (left, top, step across, step down) in which the pixels stand.
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
PNG_PALETTE = 3
PNG_PASSES = (
    ((0, 0, 1, 1),),
    (
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    ),
)
MAX_IMAGE_PIXELS = 1 << 24


class BadImageError(Exception):
    """A file that is no image this job can use: a short reason, and what was read of it."""

    def __init__(self, reason: str, data: bytes) -> None:
        super().__init__(reason)
        self.reason = reason
        self.data = data


def read_file(path: Place) -> bytes:
    """Reads an image file, however large it says it is no more than `MAX_FILE_BYTES`."""
    try:
        data = reading.read_start(path, MAX_FILE_BYTES + 1)
    except reading.NotAFileError:
        raise BadImageError("not a file", b"") from None
    except OSError as error:
        raise BadImageError(f"cannot be read: {error.strerror}", b"") from None
    if len(data) > MAX_FILE_BYTES:
        raise BadImageError("too large", data)
    return data


def decode(data: bytes, *, resize: bool) -> np.ndarray:
    """Decodes a grey image, turned as its EXIF block says (photographs have one); uint8 [784].

    Colours are accepted where they are all grey, and transparency where nothing is transparent.

    Args:
        data: the content of a PNG or JPEG file.
        resize: whether an image of another size is resized (with anti-aliasing) or refused.

    Raises:
        BadImageError: not an image, damaged, not grey, or of another size; or its EXIF block
            cannot be read, so that it may lie on its side.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            width, height = image.size
            if width * height > MAX_IMAGE_PIXELS:
                raise BadImageError("too large", data)
            if (width, height) != (28, 28) and not resize:
                raise BadImageError("wrong size", data)
            if image.format == "PNG":  # checks what loading it would not: every checksum
                Image.open(io.BytesIO(data), formats=("PNG",)).verify()
                if not _is_whole_png(data):
                    raise BadImageError("damaged", data)
            grey = _grey(_upright(image, data), data)
    except BadImageError:
        raise
    except Image.DecompressionBombError:
        raise BadImageError("too large", data) from None
    except Exception:  # Pillow's decoders fail in ways of their own on damaged files
        raise BadImageError("damaged", data) from None
    if grey.size != (28, 28):
        grey = grey.resize((28, 28), Image.Resampling.BICUBIC)
    return np.asarray(grey, np.uint8).reshape(NUM_PIXELS)


def _is_whole_png(data: bytes) -> bool:
    """Checks what Pillow lets pass: rows that are missing at the end, and a missing palette."""
    chunks = list(_png_chunks(data))
    header = next(body for kind, body in chunks if kind == b"IHDR")
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    bits = depth * PNG_CHANNELS[colour]
    expected = 0
    for left, top, across, down in PNG_PASSES[interlaced]:
        columns, rows = -(-(width - left) // across), -(-(height - top) // down)
        expected += rows * (1 + -(-columns * bits // 8)) if columns > 0 else 0
    found, reader = 0, zlib.decompressobj()
    for kind, piece in chunks:
        while kind == b"IDAT" and piece and found < expected:
            found += len(reader.decompress(piece, READ_SIZE))
            piece = reader.unconsumed_tail
    return found >= expected and (colour != PNG_PALETTE or any(k == b"PLTE" for k, _ in chunks))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yields (kind, content) of the chunks of a PNG file."""
    at = 8
    while at + 8 <= len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        yield kind, data[at + 8 : at + 8 + size]
        at += 12 + size


def _upright(image: Any, data: bytes) -> Any:
    """Turns an image in place, without a copy of one that is upright already."""
    from PIL import Image, ImageOps

    image.load()  # what is damaged here is the image itself
    try:
        # Pillow has looked into that of a JPEG file before, and would pass over its faults.
        Image.Exif().load(image.info.get("exif", b""))
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # readers of EXIF fail in as many ways as decoders
        raise BadImageError("EXIF cannot be read", data) from None
    return image


def _grey(image: Any, data: bytes) -> Any:
    if image.mode in ("L", "1"):
        return image.convert("L")
    if image.mode not in ("LA", "P", "PA", "RGB", "RGBA"):
        raise BadImageError("not 8-bit grey", data)
    red, green, blue, alpha = image.convert("RGBA").split()
    if not red.tobytes() == green.tobytes() == blue.tobytes() or alpha.getextrema()[0] < 255:
        raise BadImageError("not 8-bit grey", data)
    return red
