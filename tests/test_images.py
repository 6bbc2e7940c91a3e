"""Images from every source, and what is no image."""

import io
import struct
import warnings

import numpy as np
import pytest
import torch
from conftest import (
    assert_refused,
    shared_lists,
)
from PIL import ImageOps

import fcos
from fcos import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


def jpeg(orientation=None, **tags):
    """A JPEG of 40x20 pixels, red at the top, with an EXIF block."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:10, :, 0] = 255
    entries = {} if orientation is None else {0x0112: (3, 1, struct.pack("<HH", orientation, 0))}
    entries |= {int(tag[1:]): value for tag, value in tags.items()}
    block = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries))
    for tag, (kind, count, value) in sorted(entries.items()):
        block += struct.pack("<HHI", tag, kind, count) + value
    file = io.BytesIO()
    fcos.Image.fromarray(pixels).save(file, "JPEG", exif=block + b"\0\0\0\0", quality=95)
    return file.getvalue()


EXIF = {  # blocks beside which orientation 6 is good: what cameras and editors wrote
    "plain": {},
    "resolution as text": {"t282": (2, 4, b"72\0\0")},
    "resolution beyond the end": {"t282": (5, 1, struct.pack("<I", 10**6))},
    "a kind that does not exist": {"t305": (99, 1, b"\0\0\0\0")},
    "description beyond the end": {"t270": (2, 99, struct.pack("<I", 10**6))},
    "another block beyond the end": {"t34665": (4, 1, struct.pack("<I", 10**6))},
    "another block as text": {"t34665": (2, 4, b"abc\0")},
    "four billion values": {"t306": (2, 2**32 - 1, b"abcd")},
}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")
@pytest.mark.parametrize("name", EXIF)
def test_only_the_orientation_is_read_of_exif(name, tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(6, **EXIF[name]))
    image = fcos.read_image(tmp_path / "a.jpg")
    assert image.shape == (3, 40, 20)
    assert (image[0, :, 15:] > 200).all() and (image[0, :, :5] < 50).all()  # red is at the right
    assert fcos.read_image(tmp_path / "a.jpg", (20, 40)).shape == (3, 20, 40)


def test_exif_turns_as_pillow_does():
    for orientation in (None, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 65535):
        image = fcos.Image.open(io.BytesIO(jpeg(orientation)))
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        found = fcos.read_image(jpeg(orientation)).permute(1, 2, 0).numpy()
        assert np.array_equal(found, expected), orientation


@pytest.mark.filterwarnings("error")
def test_images_come_from_every_source(tmp_path):
    content = jpeg()
    (tmp_path / "a.jpg").write_bytes(content)
    expected = fcos.read_image(tmp_path / "a.jpg")
    array = np.asarray(fcos.Image.open(io.BytesIO(content)))  # read-only
    model = fcos.build("shapes", 2)
    sources = {
        "text": lambda: str(tmp_path / "a.jpg"),
        "path": lambda: tmp_path / "a.jpg",
        "bytes": lambda: content,
        "bytearray": lambda: bytearray(content),
        "BytesIO": lambda: io.BytesIO(content),
        "file": lambda: open(tmp_path / "a.jpg", "rb"),  # noqa: SIM115
        "PIL": lambda: fcos.Image.open(io.BytesIO(content)),
        "read-only array": lambda: array,
        "mirrored array": lambda: array[:, ::-1][:, ::-1],
        "tensor": lambda: expected,
    }
    for name, source in sources.items():
        with warnings.catch_warnings(action="ignore", category=ResourceWarning):
            assert fcos.as_image(source()).equal(expected), name
            [found] = model.predict(source(), min_size=32, max_size=64)
            assert len(model.predict([source()] * 1, min_size=32, max_size=64)) == 1
            assert set(found) == {"boxes", "scores", "labels"}


NO_IMAGES = {
    "batch": (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), "(2, 3, 64, 64)"),
    "grey": (np.zeros((20, 30), np.uint8), "(20, 30)"),
    "transparent": (np.zeros((20, 30, 4), np.uint8), "(20, 30, 4)"),
    "channels first": (np.zeros((3, 20, 30), np.uint8), "(3, 20, 30)"),
    "floats": (np.zeros((20, 30, 3)), "float64"),
    "float tensor": (torch.zeros(3, 20, 30), "torch.float32"),
    "16 bits": (np.zeros((20, 30, 3), np.uint16), "uint16"),
    "empty": (np.zeros((0, 30, 3), np.uint8), "(0, 30, 3)"),
    "None": (None, "None"),
    "number": (7, "7"),
    "list of pixels": (np.zeros((100, 100, 3), np.uint8).tolist(), "[[[0, 0, 0], "),
    "dict": ({"image": torch.zeros(3, 2000, 2000)}, "Tensor torch.float32 (3, 2000, 2000)"),
    "nested": (shared_lists(), "[[[["),
    "no bytes": (b"", "b''"),
    "bytes of something else": (b"photo.jpg" * 10**6, "b'photo.jpg"),
    "text file": (io.StringIO("x"), "StringIO"),
}


@pytest.mark.parametrize("name", NO_IMAGES)
def test_what_is_no_image_is_described_as_it_was_passed(name):
    image, said = NO_IMAGES[name]
    model = fcos.build("shapes", 1)
    for call in (lambda: fcos.as_image(image), lambda: model.predict([image])):
        with pytest.raises(UserError) as error:
            call()
        assert said in str(error.value) and len(str(error.value)) <= 210, str(error.value)
    if not np.iterable(image) or isinstance(image, dict):
        assert_refused(lambda: model.predict(image), said)


@pytest.mark.parametrize("name", ["a\n0.999.jpg", "\x1b[31mred.jpg", "ü" * 100, "\u202egpj.jpg"])
def test_names_of_files_are_printable_in_messages(name, tmp_path):
    (tmp_path / name).write_bytes(b"no image")
    (tmp_path / f"{name[:80]}.pt").write_bytes(b"no checkpoint")
    for call in (
        lambda: fcos.read_image(tmp_path / name),
        lambda: fcos.load(tmp_path / f"{name[:80]}.pt"),
        lambda: fcos.save(fcos.build("shapes", 1), tmp_path / name / "model.pt"),
    ):
        with pytest.raises(UserError) as error:
            call()
        assert str(error.value).isprintable() and len(str(error.value)) < 500


def test_the_size_limit_of_pillow_comes_with_a_remedy(monkeypatch):
    monkeypatch.setattr(fcos.Image, "MAX_IMAGE_PIXELS", 100)
    assert_refused(lambda: fcos.read_image(jpeg()), "MAX_IMAGE_PIXELS", "split it")
