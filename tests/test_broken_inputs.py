"""Whatever is broken ends in one clear line, in a quarantine record, or does no harm at all.

Every broken input is made here, from sound ones and from fixed seeds.
"""

import copy
import gzip
import io
import json
import os
import shutil
import struct
import zlib
from pathlib import Path

import helpers
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from pipeline import comparison, dataset, inspection, preprocess, storage
from pipeline.command import InputError
from pipeline.dataset import load_manifest
from pipeline.options import PreprocessConfig
from pipeline.records import image_ids, read_records
from pipeline.sources import decoding, open_sources
from pipeline.transforms import validate

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
SOUND = helpers.make_images(40, 20)
SOUND_IDX = {
    f"{stem}-{name}": helpers.idx_bytes(array)
    for stem, part in (("train", "train"), ("t10k", "test"))
    for name, array in zip(("images-idx3-ubyte", "labels-idx1-ubyte"), SOUND[part], strict=True)
}


def flipped(data, at, bit=0):
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def one_line(error):
    """What the command would print is one line that says something."""
    text = " ".join(str(error).split())
    assert len(text) > 20
    assert "Traceback" not in text


def idx_header(*shape, magic=None):
    return (magic or bytes((0, 0, 8, len(shape)))) + struct.pack(f">{len(shape)}I", *shape)


# IDX files, plain and gzipped


def broken_idx():
    """Yields (what is wrong, {file: content, or None to leave it out})."""
    pixels, labels = SOUND_IDX[IMAGES], SOUND_IDX[LABELS]
    for name in SOUND_IDX:
        yield f"no {name}", {name: None}
        yield f"empty {name}", {name: b""}
    for size in (1, 3, 4, 7, 15, 16, 17, 799, 800, 16000, len(pixels) - 1):
        yield f"images cut to {size}", {IMAGES: pixels[:size]}
    for size in (1, 4, 7, 8, 9, 20, len(labels) - 1):
        yield f"labels cut to {size}", {LABELS: labels[:size]}
    for extra in (1, 784, 5000):
        yield f"images {extra} too long", {IMAGES: pixels + bytes(extra)}
        yield f"labels {extra} too long", {LABELS: labels + bytes(extra)}
    for at in range(16):
        yield f"images header byte {at}", {IMAGES: flipped(pixels, at, at % 8)}
    for at in range(8):
        yield f"labels header byte {at}", {LABELS: flipped(labels, at, at % 8)}
    for kind in (0x09, 0x0B, 0x0C, 0x0D, 0x0E, 0xFF):
        yield f"type {kind}", {IMAGES: flipped(pixels[:2] + bytes([kind ^ 1]) + pixels[3:], 2)}
    body = pixels[16:]
    for shape in (
        (40, 784),
        (40, 27, 28),
        (40, 28, 29),
        (40, 1, 784),
        (0, 28, 28),
        (1, 40, 28, 28),
    ):
        yield f"images of shape {shape}", {IMAGES: idx_header(*shape) + body}
    for count in (0, 39, 41, 65536, 2**31, 2**32 - 1):
        yield f"images claim {count}", {IMAGES: idx_header(count, 28, 28) + body}
        yield f"labels claim {count}", {LABELS: idx_header(count) + labels[8:]}
    yield "a whole row less", {IMAGES: idx_header(39, 28, 28) + body[:-784]}
    yield "a label less", {LABELS: idx_header(39) + labels[8:-1]}
    yield "a side of 2**32", {IMAGES: idx_header(40, 2**32 - 1, 2**32 - 1) + body}
    yield "text", {IMAGES: b"<html>404 not found</html>\n"}
    yield "labels as images", {IMAGES: labels}
    yield "images as labels", {LABELS: pixels}
    yield (
        "all labels 0",
        {
            name: idx_header(n) + bytes(n)
            for name, n in ((LABELS, 40), ("t10k-labels-idx1-ubyte", 20))
        },
    )
    random = np.random.default_rng(3)
    for name, content in ((IMAGES, pixels), (LABELS, labels)):
        packed = gzip.compress(content, mtime=0)
        out = {name: None}
        for size in (0, 1, 2, 5, 10, 11, len(packed) // 2, len(packed) - 9, len(packed) - 1):
            yield f"{name}.gz cut to {size}", out | {f"{name}.gz": packed[:size]}
        for at in sorted({*range(10), *random.integers(10, len(packed), 20).tolist()}):
            bit = int(random.integers(8))
            yield f"{name}.gz byte {at} bit {bit}", out | {f"{name}.gz": flipped(packed, at, bit)}
        for at in (-8, -5, -4, -1):
            yield (
                f"{name}.gz trailer byte {at}",
                out | {f"{name}.gz": flipped(packed, len(packed) + at)},
            )
        for rest in (b"x", b"\x1f\x8b", bytes(8), b"garbage" * 9, packed):
            yield f"{name}.gz and {rest[:9]!r}", out | {f"{name}.gz": packed + rest}
        yield f"{name}.gz not packed", out | {f"{name}.gz": content}
        yield f"{name}.gz packed twice", out | {f"{name}.gz": gzip.compress(packed)}
        yield f"{name} packed", {name: packed}


BROKEN_IDX = list(broken_idx())


def rows_of(source):
    """All rows of a source, after validation: {part: (pixels, labels)}, and what was set aside."""
    found = {"train": [], "test": []}
    set_aside = []
    for block in source.blocks():
        for rows in source.read(block):
            kept, bad = validate(rows, len(source.class_names))
            found[rows.part].append(kept)
            set_aside += bad
    return {
        part: tuple(
            np.concatenate([getattr(rows, name) for rows in many]) for name in ("pixels", "labels")
        )
        for part, many in found.items()
    }, set_aside


@pytest.mark.parametrize("files", [f for _, f in BROKEN_IDX], ids=[n for n, _ in BROKEN_IDX])
def test_broken_idx(files, tmp_path):
    for name, content in (SOUND_IDX | files).items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
    try:
        rows, set_aside = rows_of(open_sources([f"idx:{tmp_path}"]))
    except InputError as error:
        one_line(error)
        return
    assert not set_aside  # the harm was none: gzip's header has a time, and may have zeros after it
    for part, (pixels, labels) in SOUND.items():
        np.testing.assert_array_equal(rows[part][0], pixels.reshape(-1, 784))
        np.testing.assert_array_equal(rows[part][1], labels)


@pytest.mark.parametrize("num_classes", (2, 5, 9))
def test_labels_out_of_range(num_classes, tmp_path):
    source = open_sources([f"idx:{helpers.write_idx(tmp_path, SOUND)}"], num_classes=num_classes)
    rows, set_aside = rows_of(source)
    for part, (_, labels) in SOUND.items():
        assert (rows[part][1] == labels[labels < num_classes]).all()
    beyond = sum(int((labels >= num_classes).sum()) for _, labels in SOUND.values())
    assert len(set_aside) == beyond
    assert {row.reason for row in set_aside} == {"label out of range"}


# Image files: all of them in one tree, so that one run meets them all


def png(pixels, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", **options)
    return file.getvalue()


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def chunks(data):
    """Yields (where, kind, whole length) of the chunks of a PNG file."""
    at = 8
    while at < len(data):
        size = 12 + struct.unpack(">I", data[at : at + 4])[0]
        yield at, data[at + 4 : at + 8], size
        at += size


def png_of(width, height, raw, depth=8, colour=0, extra=b"", interlaced=0):
    """A PNG file whose header need not tell the truth about its data."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    packed = raw if isinstance(raw, bytes) else zlib.compress(raw[0])
    end = chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + end


def broken_images(pixels):
    """Yields (file name, content) made of one sound image; each name says what is wrong."""
    text = PngImagePlugin.PngInfo()
    text.add_text("Title", "a digit")
    sound = png(pixels, pnginfo=text)
    for size in sorted({*range(0, 60, 3), *range(60, len(sound), 23), len(sound) - 1}):
        yield f"cut-to-{size}.png", sound[:size]
    random = np.random.default_rng(5)
    for start, kind, size in chunks(sound):
        for at in sorted({0, 3, 4, 7, *random.integers(8, size, 8).tolist(), size - 1}):
            bit = int(random.integers(8))
            name = f"{kind.decode()}-{at}-{bit}.png"
            yield name, flipped(sound, start + at, bit)
        yield f"no-{kind.decode()}.png", sound[:start] + sound[start + size :]
        yield f"twice-{kind.decode()}.png", sound[: start + size] + sound[start:]
    for at in range(8):
        yield f"signature-{at}.png", flipped(sound, at, at)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    for width, height in ((27, 28), (28, 27), (29, 28), (1, 1), (280, 280), (784, 1)):
        yield f"{width}x{height}.png", png(np.resize(pixels, (height, width)))
    for width, height in (
        (0, 28),
        (28, 0),
        (60_000, 60_000),
        (2**31 - 1, 2**31 - 1),
        (2**32 - 1, 1),
    ):
        yield f"claims-{width}x{height}.png", png_of(width, height, [rows])
    yield "too-few-rows.png", png_of(28, 28, [rows[:-29]])
    yield "no-rows.png", png_of(28, 28, [b""])
    yield "not-packed.png", png_of(28, 28, rows)
    yield "other-passes.png", png_of(28, 28, [rows], interlaced=1)
    yield "bad-filter.png", png_of(28, 28, [b"\x09" * 29 * 28])
    for depth, colour in ((3, 0), (255, 0), (8, 1), (8, 7), (8, 255), (16, 3)):
        yield f"depth-{depth}-colour-{colour}.png", png_of(28, 28, [rows], depth, colour)
    yield "16-bit.png", png(pixels.astype(np.uint16) * 257)
    colours = np.stack([pixels, pixels, 255 - pixels], axis=2)
    yield "colours.png", png(colours)
    yield "see-through.png", png(np.stack([pixels, pixels // 2], axis=2))
    yield "palette-missing.png", png_of(28, 28, [rows], 8, 3)
    yield "bad-text.png", png_of(28, 28, [rows], extra=chunk(b"zTXt", b"k\0\0" + b"junk"))
    for name, content in {
        "nothing.png": b"",
        "one-byte.png": b"\x89",
        "text.png": b"this is no image\n",
        "html.png": b"<!doctype html><title>404</title>",
        "zeros.png": bytes(5000),
        "noise.png": random.bytes(5000),
        "zip.png": b"PK\x03\x04" + bytes(100),
        "script.png": b"#!/bin/sh\nexit 1\n",
        "bomb.svg.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    }.items():
        yield name, content
    for kind, suffix in (("GIF", "gif"), ("BMP", "bmp"), ("TIFF", "tiff"), ("PPM", "ppm")):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind)
        yield f"{suffix}.png", file.getvalue()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    photo = file.getvalue()
    for size in (2, 3, 20, 100, len(photo) // 2, len(photo) - 40):
        yield f"cut-to-{size}.jpg", photo[:size]
    for at in range(0, 160, 16):
        yield f"byte-{at}.jpg", flipped(photo, at, at % 8)


def interlaced(pixels):
    """A PNG file whose rows stand in the format's seven passes; Pillow writes none of these."""
    raw = b""
    for left, top, across, down in decoding.PNG_PASSES[1]:
        part = pixels[top::down, left::across]
        raw += b"".join(b"\0" + row.tobytes() for row in part if row.size)
    return png_of(pixels.shape[1], pixels.shape[0], [raw], interlaced=1)


def packed(pixels, bits):
    """A PNG file with several pixels in a byte."""
    rows = np.pad(pixels >> (8 - bits), ((0, 0), (0, 4))).reshape(28, -1, 8 // bits)
    shifts = np.arange(8 - bits, -1, -bits, np.uint8)
    whole = (rows << shifts).sum(axis=2, dtype=np.uint8)[:, : -(-28 * bits // 8)]
    raw = b"".join(b"\0" + row.tobytes() for row in whole)
    return png_of(28, 28, [raw], bits)


SOME = SOUND["train"][0][0]
FORMS = {
    "grey": png(SOME),
    "interlaced": interlaced(SOME),
    "interlaced, 3x2": interlaced(SOME[:2, :3]),
    "interlaced, 1x9": interlaced(SOME[:9, :1]),
    "interlaced, 57x31": interlaced(np.resize(SOME, (31, 57))),
    **{
        mode: png(np.asarray(Image.fromarray(SOME).convert(mode))) for mode in ("LA", "RGB", "RGBA")
    },
    **{f"{bits} bits": packed(SOME, bits) for bits in (1, 2, 4)},
}


@pytest.mark.parametrize("form", FORMS)
def test_sound_images_of_every_form(form):
    data = FORMS[form]
    with Image.open(io.BytesIO(data)) as image:
        grey = image.convert("L")
    expected = grey if grey.size == (28, 28) else grey.resize((28, 28), Image.Resampling.BICUBIC)
    found = decoding.decode(data, resize=True)
    np.testing.assert_array_equal(found, np.asarray(expected).ravel())


@pytest.mark.parametrize("form", FORMS)
def test_images_without_their_last_row(form):
    data = FORMS[form]
    packed = b"".join(body for kind, body in decoding._png_chunks(data) if kind == b"IDAT")
    raw = zlib.decompress(packed)[:-1]
    at = data.index(b"IDAT") - 4
    cut = data[:at] + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    with pytest.raises(decoding.BadImageError, match="damaged"):
        decoding.decode(cut, resize=True)


@pytest.fixture(scope="module")
def broken_tree(tmp_path_factory):
    """A tree of broken images among sound ones; the folder, and the names of the broken ones."""
    root = tmp_path_factory.mktemp("broken") / "tree"
    for part, size in (("train", 40), ("test", 20)):
        pixels, labels = SOUND[part]
        for index in range(size):
            folder = root / part / str(labels[index])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"sound-{index}.png").write_bytes(png(pixels[index]))
    folder = root / "train" / "3"
    broken = dict(broken_images(SOUND["train"][0][0] // 2 + 5))
    for name, content in broken.items():
        (folder / name).write_bytes(content)
    (folder / "folder.png").mkdir()
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "nowhere.png").symlink_to("/no/such/file.png")
    (folder / "endless.png").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe.png")
    with (folder / "huge.png").open("wb") as file:
        file.truncate(1 << 40)  # of holes: it takes no space
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe.png")).write_bytes(b"no image")
    odd = ["a b.png", "new\nline.png", "été.png", "..png", "\\x.png", "-rf.png", "n" * 250 + ".png"]
    for name in odd:
        (folder / name).write_bytes(b"no image")
    others = ["folder", "loop", "nowhere", "endless", "pipe", "huge"]
    names = {*broken, *(f"{name}.png" for name in others), *odd, r"\xff\xfe.png"} - {"..png"}
    return root, names


def config_of(root, output, **options):
    options = {"max_quarantined": 1.0, "num_shards": 2} | options
    return PreprocessConfig(sources=(f"images:{root}",), output_dir=output, **options)


def test_broken_images(broken_tree, tmp_path):
    root, names = broken_tree
    assert len(names) > 150
    assert preprocess.execute(config_of(root, tmp_path / "out")) == 0
    assert inspection.verify(tmp_path / "out") == []
    manifest = load_manifest(tmp_path / "out")
    lines = (tmp_path / "out" / "quarantine" / "records.jsonl").read_text().splitlines()
    set_aside = {Path(line["origin"]).name: line for line in map(json.loads, lines)}
    assert len(set_aside) == len(lines) == manifest.quarantined["count"]
    assert set_aside.keys() <= names
    for line in set_aside.values():
        assert line["origin"].startswith("train/3/")
        assert line["part"] == "train"
        assert line["reason"]
        assert len(line["id"]) == 32
    # Of the others, PNG files were harmed only after their pixels; in photographs it may not show.
    unharmed = names - set_aside.keys()
    photographs = [name for name in unharmed if name.endswith(".jpg")]
    decoded = [
        decoding.decode((root / "train" / "3" / name).read_bytes(), resize=False)
        for name in photographs
    ]
    original = SOUND["train"][0][:1].reshape(1, 784) // 2 + 5
    expected = [
        *image_ids(np.concatenate([part[0].reshape(-1, 784) for part in SOUND.values()])),
        *image_ids(np.repeat(original, len(unharmed) - len(photographs), axis=0)),
        *image_ids(np.stack(decoded)),
    ]
    records = [
        record.id[:32]
        for split in manifest.splits.values()
        for shard in split.shards
        for record in read_records(tmp_path / "out", shard)
    ]
    assert sorted(records) == sorted(expected)
    assert len(photographs) < len(unharmed)
    assert not [name for name in unharmed if name.startswith("cut-to-1")]


def test_too_many_broken_images_publish_nothing(broken_tree, tmp_path):
    root, _ = broken_tree
    with pytest.raises(InputError, match="cannot be used") as caught:
        preprocess.execute(config_of(root, tmp_path / "out", max_quarantined=0.1))
    one_line(caught.value)
    assert list(tmp_path.iterdir()) == []


# Trees


def plant(root, *names):
    for index, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(SOUND["train"][0][index]))


def nothing(root):
    pass


def a_file(root):
    root.rmdir()
    root.write_bytes(b"no folder")


def parts_are_files(root):
    (root / "train").write_bytes(b"")
    (root / "test").write_bytes(b"")


def empty_parts(root):
    (root / "train").mkdir()
    (root / "test").mkdir()


def empty_classes(root):
    for part in ("train", "test"):
        for name in "ab":
            (root / part / name).mkdir(parents=True)


def one_class(root):
    plant(root, "train/a/1.png", "test/a/2.png")


def no_test(root):
    plant(root, "train/a/1.png", "train/b/2.png")


def no_train(root):
    plant(root, "test/a/1.png", "test/b/2.png")


def too_many_classes(root):
    for index in range(257):
        (root / "train" / str(index)).mkdir(parents=True)


def images_without_folders(root):
    plant(root, "train/1.png", "test/2.png")


def loop_of_links(root):
    plant(root, "train/a/1.png", "train/b/2.png", "test/a/3.png")
    (root / "train" / "c").symlink_to("d")
    (root / "train" / "d").symlink_to("c")


def part_is_a_loop(root):
    plant(root, "test/a/1.png", "test/b/2.png")
    (root / "train").symlink_to("train")


def name_that_is_no_text(root):
    plant(root, "train/a/1.png", "train/b/2.png", "test/a/3.png")
    Path(os.fsdecode(os.fsencode(root) + b"/train/\xff")).mkdir()


def only_broken(root):
    plant(root, "train/a/1.png", "train/b/2.png", "test/a/3.png")
    for path in root.rglob("*.png"):
        path.write_bytes(b"no image")


@pytest.mark.parametrize(
    "make",
    (
        nothing,
        a_file,
        parts_are_files,
        empty_parts,
        empty_classes,
        one_class,
        no_test,
        no_train,
        too_many_classes,
        images_without_folders,
        part_is_a_loop,
        name_that_is_no_text,
        only_broken,
    ),
    ids=lambda make: make.__name__,
)
def test_broken_trees(make, tmp_path):
    (tmp_path / "root").mkdir()
    make(tmp_path / "root")
    with pytest.raises(InputError) as caught:
        preprocess.execute(config_of(tmp_path / "root", tmp_path / "place" / "out"))
    one_line(caught.value)
    assert not list((tmp_path / "place").glob("*"))


def test_odd_names_of_classes(tmp_path):
    names = [
        "a b",
        "..c",
        "...",
        "d\u200de",
        "été",
        "日本",
        "-x",
        "*",
        "%s{0}",
        '"',
        "\\",
        "l" * 255,
    ]
    for index, name in enumerate(names):
        plant(tmp_path / "root", f"train/{name}/{index}.png")
        path = tmp_path / "root" / "test" / name / "other.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(png(SOUND["test"][0][index]))
    # Folders that lead back up are followed once, and hold no images of their own.
    (tmp_path / "root" / "train" / "up").symlink_to("..")
    (tmp_path / "root" / "train" / ".hidden").mkdir()
    assert preprocess.execute(config_of(tmp_path / "root", tmp_path / "out")) == 0
    assert sorted(load_manifest(tmp_path / "out").class_names) == sorted(
        name for name in [*names, "up"] if not name.startswith(".")
    )
    assert inspection.verify(tmp_path / "out") == []
    comparison.describe(tmp_path / "out")


def test_loop_of_links_to_folders(tmp_path):
    loop_of_links(tmp_path)
    try:
        rows_of(open_sources([f"images:{tmp_path}"]))
    except InputError as error:
        one_line(error)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unreadable to root")
@pytest.mark.parametrize("name", ("", "train", "train/a", "train/a/0.png"))
def test_unreadable(name, tmp_path):
    plant(tmp_path / "root", "train/a/0.png", "train/b/1.png", "test/a/2.png")
    path = tmp_path / "root" / name
    path.chmod(0)
    try:
        with pytest.raises(InputError) as caught:
            preprocess.execute(config_of(tmp_path / "root", tmp_path / "out", max_quarantined=0.0))
    finally:
        path.chmod(0o755)
    one_line(caught.value)


# Manifests


def paths(value, prefix=()):
    """Yields the way to every value of a JSON document, of lists only to the first and last."""
    if prefix:
        yield prefix
    items = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list) and value:
        items = {0: value[0], len(value) - 1: value[-1]}.items()
    for key, inner in items:
        yield from paths(inner, (*prefix, key))


def replaced(document, path, value):
    document = copy.deepcopy(document)
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    if value is REMOVED:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return document


REMOVED = object()
WRONG = (
    None,
    -1,
    0,
    1.5,
    10**30,
    float("nan"),
    True,
    "",
    "x",
    "\ud800",
    [],
    [[]],
    {},
    {"a": 1},
    REMOVED,
)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    helpers.write_idx(folder / "idx", SOUND)
    config = PreprocessConfig(
        sources=(f"idx:{folder / 'idx'}",),
        output_dir=folder / "out",
        num_shards=2,
        compression="gzip",
    )
    assert preprocess.execute(config) == 0
    return config


@pytest.fixture
def of_small(small, tmp_path):
    """A folder with the files of a sound dataset, in which to write another manifest."""
    for path in small.output_dir.iterdir():
        if path.name != "manifest.json":
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


def uses(directory):
    """Does what is done with a dataset; returns what is wrong with it."""
    problems = inspection.verify(directory)
    comparison.describe(directory)
    comparison.diff(directory, directory)
    return problems


@pytest.mark.parametrize("wrong", WRONG, ids=lambda value: repr(value)[:12])
def test_broken_manifests(wrong, small, of_small):
    sound = json.loads((small.output_dir / "manifest.json").read_text())
    refused = 0
    for path in paths(sound):
        (of_small / "manifest.json").write_text(json.dumps(replaced(sound, path, wrong)))
        try:
            uses(of_small)
        except InputError as error:
            one_line(error)
            refused += 1
        except Exception as error:
            error.add_note(f"{path} is {wrong!r}")
            raise
    assert refused > 20


SHARD = "train-00000-of-00002.tfrecord.gz"


@pytest.mark.parametrize(
    "name",
    (
        f"../{SHARD}",
        f"../../{SHARD}",
        "../../../../etc/passwd",
        "/etc/passwd",
        f"/{SHARD}",
        f"./{SHARD}",
        f"quarantine/../{SHARD}",
        "quarantine/records.jsonl",
        "quarantine",
        "..",
        ".",
        "manifest.json",
        "metrics.json",
        ".lock",
        f"..\\{SHARD}",
        f"{SHARD}\0",
        f"{SHARD}\n",
        f"{SHARD}/",
        f"file:///{SHARD}",
        f"gs://bucket/{SHARD}",
        "C:\\x",
        "~",
        "*",
        "-rf",
        "train-00000-of-00002.tfrecord",
        "train-00009-of-00002.tfrecord.gz",
        "test-00000-of-00002.tfrecord.gz",
        "n" * 300,
        "n" * 100_000,
        "\ud800",
    ),
    ids=lambda name: repr(name)[:30],
)
def test_file_names_in_a_manifest(name, small, of_small):
    sound = json.loads((small.output_dir / "manifest.json").read_text())
    # Consistent but for the name.
    shards = [shard for split in sound["splits"].values() for shard in split["shards"]]
    shards[0]["file"] = name
    sound["dataset_id"] = dataset.dataset_id(
        [dataset.Shard(**shard) for shard in shards], sound["class_names"]
    )
    (of_small / "manifest.json").write_text(json.dumps(sound))
    with pytest.raises(InputError) as caught:
        uses(of_small)
    one_line(caught.value)


def broken_texts():
    yield from (b"", b" ", b"null", b"0", b"[]", b"{}", b'"x"', b"{", b"[" * 100_000, b"\xff\xfe")
    yield from (
        b'{"format_version": %s}' % version for version in (b"1", b"0", b"2", b"1e999", b"9" * 5000)
    )
    yield from (b'{"format_version": 1, "splits": {}}', b"\0" * 100, b"manifest", b"<html></html>")


@pytest.mark.parametrize("content", list(broken_texts()), ids=lambda content: repr(content)[:30])
def test_texts_that_are_no_manifest(content, of_small):
    (of_small / "manifest.json").write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_manifest(of_small)
    one_line(caught.value)


def test_truncated_manifests(small, of_small):
    content = (small.output_dir / "manifest.json").read_bytes()
    for size in range(0, len(content) - 2, 61):
        (of_small / "manifest.json").write_bytes(content[:size])
        with pytest.raises(InputError):
            load_manifest(of_small)


@pytest.mark.parametrize("wrong", (b"", b"{}", b"[]", b'{"format_version": 2}', b"\xff"))
def test_a_run_refuses_a_folder_with_a_broken_manifest(wrong, small, of_small):
    (of_small / "manifest.json").write_bytes(wrong)
    before = sorted(of_small.iterdir())
    config = PreprocessConfig(
        sources=small.sources, output_dir=of_small, num_shards=2, compression="gzip"
    )
    with pytest.raises(InputError) as caught:
        preprocess.execute(config)
    one_line(caught.value)
    assert sorted(of_small.iterdir()) == before


def broken_shards(content):
    """Yields what is wrong, and the content of the shard; None is a folder in its place."""
    yield "a folder", None
    yield "appended", content + b"\0"
    yield "doubled", content + content
    yield "bomb", gzip.compress(bytes(1 << 26), compresslevel=1)
    for size in range(0, len(content), 997):
        yield f"cut to {size}", content[:size]
    for at in range(10, len(content), 997):
        yield f"byte {at}", flipped(content, at)


def test_broken_shards(small, tmp_path):
    directory = tmp_path / "dataset"
    shutil.copytree(small.output_dir, directory)
    for what, content in broken_shards((directory / SHARD).read_bytes()):
        storage.remove(directory / SHARD)
        if content is None:
            (directory / SHARD).mkdir()
        else:
            (directory / SHARD).write_bytes(content)
        assert any(SHARD in problem for problem in inspection.verify(directory)), what
        with pytest.raises(InputError):
            comparison.describe(directory)


# What claims to be huge


HUGE = r"""
import re, sys
from pathlib import Path
from pipeline import dataset
from pipeline.command import InputError
from pipeline.sources import decoding, open_sources
from PIL import Image

def peak():
    # Of this program alone, whereas getrusage also counts the one it was forked from.
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) // 1024

decoding.decode(Path(sys.argv[1], "sound.png").read_bytes(), resize=True)
before = peak()
for folder in sorted(Path(sys.argv[1], "idx").iterdir()):
    try:
        print(folder.name, open_sources([f"idx:{folder}"]).part_sizes)
    except InputError as error:
        print(folder.name, "refused:", error)
for path in sorted(Path(sys.argv[1], "png").iterdir()):
    try:
        decoding.decode(decoding.read_file(path), resize=True)
        print(path.name, "read")
    except decoding.BadImageError as error:
        print(path.name, "refused:", error.reason)
print(peak() - before)
"""


def test_memory_stays_bounded(tmp_path):
    sound = SOUND["train"][0][0]
    rows = b"".join(b"\0" + row.tobytes() for row in sound)
    (tmp_path / "sound.png").write_bytes(png(sound))
    bomb = gzip.compress(bytes(1 << 28), compresslevel=1)
    for name, files in {
        "claims": {IMAGES: idx_header(2**32 - 1, 28, 28) + bytes(784)},
        "claims both": {
            IMAGES: idx_header(2**32 - 1, 28, 28) + bytes(784),
            LABELS: idx_header(2**32 - 1) + bytes(1),
        },
        "sides": {IMAGES: idx_header(1, 2**32 - 1, 2**32 - 1) + bytes(784)},
        "packed": {IMAGES: None, f"{IMAGES}.gz": bomb},
        "packed labels": {LABELS: None, f"{LABELS}.gz": bomb},
        "packed and honest": {
            LABELS: None,
            f"{LABELS}.gz": gzip.compress(idx_header(1 << 28) + bytes(1 << 28), compresslevel=1),
        },
    }.items():
        folder = tmp_path / "idx" / name
        folder.mkdir(parents=True)
        for file, content in (SOUND_IDX | files).items():
            if content is not None:
                (folder / file).write_bytes(content)
    folder = tmp_path / "idx" / "holes"  # really as long as it says: it is read by the block
    folder.mkdir()
    for file, content in SOUND_IDX.items():
        (folder / file).write_bytes(content)
    for file, header, size in (
        (IMAGES, idx_header(1 << 27, 28, 28), 784 << 27),
        (LABELS, idx_header(1 << 27), 1 << 27),
    ):
        with (folder / file).open("wb") as opened:
            opened.write(header)
            opened.truncate(len(header) + size)
    (tmp_path / "png").mkdir()
    packed = zlib.compress(bytes(1 << 28), 1)
    for name, content in {
        "claims": png_of(60_000, 60_000, [rows]),
        "more than it needs": png_of(28, 28, packed),
        "text": png_of(28, 28, [rows], extra=chunk(b"zTXt", b"k\0\0" + packed)),
        "profile": png_of(28, 28, [rows], extra=chunk(b"iCCP", b"k\0\0" + packed)),
        "letters": png_of(28, 28, [rows], extra=chunk(b"iTXt", b"k\0\1\0\0\0" + packed)),
    }.items():
        (tmp_path / "png" / name).write_bytes(content)
    done = helpers.run_python("-c", HUGE, tmp_path)
    assert done.returncode == 0, done.stderr
    *lines, megabytes = done.stdout.splitlines()
    assert int(megabytes) < 64, done.stdout
    told = dict(line.split(" refused: ") for line in lines if " refused: " in line)
    assert {"claims", "claims both", "sides", "packed", "packed labels"} < told.keys(), lines


# The command itself: one line, and its exit code


@pytest.mark.parametrize(
    "files",
    (
        {IMAGES: SOUND_IDX[IMAGES][:1000]},
        {IMAGES: idx_header(2**32 - 1, 28, 28)},
        {LABELS: None, f"{LABELS}.gz": b"\x1f\x8b" + bytes(50)},
    ),
    ids=("cut short", "claims", "not packed"),
)
def test_one_line_and_exit_code_2(files, tmp_path):
    (tmp_path / "idx").mkdir()
    (tmp_path / "place").mkdir()
    for name, content in (SOUND_IDX | files).items():
        if content is not None:
            (tmp_path / "idx" / name).write_bytes(content)
    done = helpers.run_cli(
        "pipeline.preprocess",
        f"--source=idx:{tmp_path / 'idx'}",
        f"--output_dir={tmp_path / 'place' / 'out'}",
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert str(tmp_path / "idx") in done.stderr
    assert list((tmp_path / "place").iterdir()) == []
