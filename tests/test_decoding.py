import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pipeline.sources import decoding


def encoded(array, form="PNG", **options):
    """An array or a Pillow image as the content of a file."""
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def grey(seed=0, size=(28, 28)):
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


GOOD = encoded(grey())


# Images that can be used


def as_mode(mode):
    return Image.fromarray(grey(5)).convert(mode)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P"])
def test_grey_in_other_modes(mode):
    image = as_mode(mode)
    found = decoding.decode(encoded(image), resize=False)
    assert (found.shape, found.dtype) == ((784,), np.uint8)
    np.testing.assert_array_equal(found.reshape(28, 28), grey(5))


def test_black_and_white():
    array = grey(6) > 127
    found = decoding.decode(encoded(Image.fromarray(array)), resize=False)
    np.testing.assert_array_equal(found.reshape(28, 28), array * 255)


def test_resizing():
    large = np.zeros((56, 84), np.uint8)
    large[:, 42:] = 200
    data = encoded(large)
    with pytest.raises(decoding.BadImageError, match="wrong size"):
        decoding.decode(data, resize=False)
    found = decoding.decode(data, resize=True).reshape(28, 28)
    assert (found[:, :11] == 0).all() and (found[:, 17:] == 200).all()
    for size in ((1, 1), (8, 8), (28, 29), (300, 5)):
        plain = decoding.decode(encoded(np.full(size, 90, np.uint8)), resize=True)
        assert plain.shape == (784,) and (plain == 90).all()
    assert decoding.decode(GOOD, resize=True).tobytes() == grey().tobytes()


# What is to be done with the stored pixels so that they are seen upright: EXIF 2.32, tag 0x0112.
UPRIGHT = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: np.transpose,
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).T,
    8: np.rot90,
}


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
@pytest.mark.parametrize("orientation", [*UPRIGHT, 0, 9])
def test_photographs_are_turned_upright(orientation, form):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(grey(8), form, exif=exif)
    stored = np.asarray(Image.open(io.BytesIO(data)))
    expected = UPRIGHT.get(orientation, UPRIGHT[1])(stored)
    found = decoding.decode(data, resize=False).reshape(28, 28)
    np.testing.assert_array_equal(found, expected)


def test_a_photograph_is_turned_before_it_is_resized():
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.zeros((84, 56), np.uint8)
    stored[:42] = 200  # the upper half, which is seen on the right
    found = decoding.decode(encoded(stored, exif=exif), resize=True).reshape(28, 28)
    assert (found[:, 17:] == 200).all() and (found[:, :11] == 0).all()


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
@pytest.mark.parametrize("block", [b"junk" * 9, b"MM", b"II*\0"], ids=["junk", "short", "cut"])
def test_broken_exif(block, form):
    data = encoded(grey(8), form, exif=b"Exif\0\0" + block)
    with pytest.raises(decoding.BadImageError) as caught:
        decoding.decode(data, resize=False)
    assert (caught.value.reason, caught.value.data) == ("EXIF cannot be read", data)


# Images that cannot


def png(width, height, data=None, depth=8):
    """A PNG file whose header claims any size."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    body = zlib.compress(bytes(100) if data is None else data)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (chunk(b"IHDR", header), chunk(b"IDAT", body), chunk(b"IEND", b""))
    )


def coloured():
    array = np.repeat(grey(7)[..., None], 3, axis=2)
    array[3, 4, 1] ^= 1  # one pixel, by one level
    return array


def transparent():
    image = Image.fromarray(grey(7)).convert("LA")
    image.putpixel((0, 0), (9, 254))
    return image


def flipped(at):
    data = bytearray(GOOD)
    data[at] ^= 0x10
    return bytes(data)


BAD = {
    "wrong size": (encoded(grey(1, (28, 27))), "wrong size"),
    "colour": (encoded(coloured()), "not 8-bit grey"),
    "transparent": (encoded(transparent()), "not 8-bit grey"),
    "16 bits": (encoded(np.full((28, 28), 300, np.uint16)), "not 8-bit grey"),
    "cmyk": (encoded(Image.new("CMYK", (28, 28)), "JPEG"), "not 8-bit grey"),
    "empty": (b"", "damaged"),
    "text": (b"not found", "damaged"),
    "gif": (encoded(grey(), "GIF"), "damaged"),
    "signature alone": (GOOD[:8], "damaged"),
    "half": (GOOD[: len(GOOD) // 2], "damaged"),
    "half a jpeg": (encoded(grey(), "JPEG")[:400], "damaged"),
    "no end": (GOOD[:-20], "damaged"),
    "a changed pixel": (flipped(len(GOOD) // 2), "damaged"),
    "a changed header": (flipped(17), "damaged"),
    "too little data": (png(28, 28), "damaged"),
    "large": (png(5000, 5000), "too large"),
    "huge": (png(40_000, 40_000), "too large"),
    "as large as can be": (png(2**31 - 1, 2**31 - 1), "too large"),
}


@pytest.mark.parametrize("resize", [False, True], ids=["as is", "resize"])
@pytest.mark.parametrize("name", [name for name in BAD if name != "wrong size"])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_image(name, resize):
    data, reason = BAD[name]
    with pytest.raises(decoding.BadImageError) as caught:
        decoding.decode(data, resize=resize)
    assert (caught.value.reason, caught.value.data) == (reason, data)


def test_every_flipped_byte_of_a_png_is_noticed_or_changes_nothing():
    noticed = 0
    for at in range(len(GOOD)):
        try:
            pixels = decoding.decode(flipped(at), resize=False)
        except decoding.BadImageError as error:
            noticed += error.reason in ("damaged", "too large", "wrong size", "not 8-bit grey")
        else:
            assert pixels.tobytes() == grey().tobytes()
            assert at >= len(GOOD) - 12  # the last chunk, which holds nothing
    assert noticed >= len(GOOD) - 12


def test_every_cut_of_a_png_is_noticed():
    for size in range(len(GOOD) - 12):
        with pytest.raises(decoding.BadImageError, match="damaged"):
            decoding.decode(GOOD[:size], resize=False)
