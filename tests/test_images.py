"""Images: reading them from every source, resizing, padding and normalizing."""

import io
import json
import re
import struct

import numpy as np
import pytest
import torch
from conftest import assert_refused, detector, picture, shared_lists
from golden.synth_image import image as synth_image
from PIL import Image, ImageOps
from recorded import GOLDEN, assert_same_detections, official_model, read_golden

import fcos
from fcos import UserError

# ---- resizing, padding, normalizing ------------------------------------------------------------


def test_resized_sizes_match_the_official_code(shared):
    golden = json.loads((shared / "golden/transforms.json").read_text())
    for setting, sizes in golden["resize"].items():
        min_size, max_size = map(int, setting.split("_"))
        found = [list(fcos.resized_hw(h, w, min_size, max_size)) for w, h in golden["pairs_wh"]]
        assert found == sizes, setting
    for batch in golden["padded_batches"]:
        assert list(fcos.padded_hw(batch["image_sizes_hw"])) == batch["padded_hw"]


@pytest.mark.parametrize(
    "wh, hw",
    [
        ((640, 480), (800, 1066)),
        ((640, 427), (800, 1199)),
        ((640, 360), (750, 1333)),
        ((480, 640), (1066, 800)),
        ((500, 375), (800, 1066)),
        ((800, 800), (800, 800)),
        ((10_000, 1), (1, 1333)),
        ((1, 5000), (1333, 1)),
        ((4, 550), (1333, 10)),
        ((2, 1500), (1333, 2)),
    ],
)
def test_resized_size_truncates_the_long_side(wh, hw):
    assert fcos.resized_hw(wh[1], wh[0], 800, 1333) == hw


@pytest.mark.parametrize("hw", [(320, 479), (61, 97), (500, 300), (1, 1), (240, 321)])
def test_resize_is_within_a_grey_level_of_pillow(hw):
    image = picture(240, 320)
    pillow = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(hw[::-1], Image.BILINEAR)
    expected = torch.from_numpy(np.array(pillow)).permute(2, 0, 1).float()
    difference = (fcos.resize(image, hw).float() - expected).abs()
    assert difference.max() <= 1
    assert difference.mean() <= 1e-4 * expected.mean()


def test_pad_batch_keeps_images_at_the_top_left():
    images = [picture(50, 70), picture(64, 33)]
    batch, sizes = fcos.pad_batch(images)
    assert batch.shape == (2, 3, 64, 96)
    assert batch.dtype == torch.uint8
    assert sizes.tolist() == [[50, 70], [64, 33]]
    assert batch[0, :, :50, :70].equal(images[0])
    assert batch.long().sum() == sum(image.long().sum() for image in images)


def test_normalize_follows_the_convention_of_the_weights():
    model = fcos.build("shapes")
    model.set_convention(bgr=False, mean=(10.0, 20.0, 30.0), std=(1.0, 2.0, 4.0))
    images = torch.tensor([50, 60, 70], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    pixels = model.normalize(images, torch.tensor([[3, 2]]))
    assert pixels[0, :, 2, 1].tolist() == [40, 20, 10]
    assert pixels.abs().sum() == 70 * 6  # the padding is 0 after the mean was subtracted


def test_normalized_pixels_match_the_official_code():
    expected = read_golden(GOLDEN / "model_fcos_imprv_R_50_FPN_1x")[0]
    images, sizes = fcos.pad_batch([picture(240, 320)])
    pixels = official_model("fcos_imprv_R_50_FPN").normalize(images, sizes)[0]
    assert pixels.shape == (3, 256, 320)
    assert pixels[:, 240:].eq(0).all()
    probes = [pixels[:, y, x].tolist() for y, x in expected["image"]["probe_yx"]]
    np.testing.assert_allclose(probes, expected["input_tensor"]["probe_values_bgr"], atol=1e-4)
    sums = pixels.double().abs().sum((1, 2))
    np.testing.assert_allclose(sums, expected["input_tensor"]["channel_abssums_f64"], rtol=1e-6)


def test_transformed_photos_match_the_official_code(shared):
    normalize = fcos.build("shapes").normalize
    for sample in json.loads((shared / "golden/transforms.json").read_text())["dataset_samples"]:
        folder = shared / f"data/coco2017_tiny/{sample['split']}2017"
        image = fcos.read_image(folder / f"{sample['image_id']:012d}.jpg")
        hw = fcos.resized_hw(*image.shape[1:], 800, 1333)
        assert list(hw) == sample["resized_hw"]
        image = fcos.resize(image, hw)
        if sample["hflip"]:
            image = image.flip(2)
        pixels = normalize(image[None], [hw])[0].double()
        tolerance = 1e-4 * sample["tensor_abssum_f64"]
        assert pixels.sum() == pytest.approx(sample["tensor_sum_f64"], abs=tolerance)
        assert pixels.abs().sum() == pytest.approx(sample["tensor_abssum_f64"], abs=tolerance)
        left = pixels[:, :, : hw[1] // 2].sum()
        assert left == pytest.approx(sample["tensor_left_half_sum_f64"], abs=tolerance)


# ---- modes of image files ----------------------------------------------------------------------


def images_of_every_mode():
    """Return one picture in the modes in which files store images."""
    rgb = Image.fromarray(synth_image(1, 40, 60))
    grey = np.asarray(rgb.convert("L"))
    modes = ("RGB", "L", "1", "LA", "RGBA", "P", "CMYK", "YCbCr")
    return {mode: rgb.convert(mode) for mode in modes} | {
        "I;16": Image.fromarray(grey.astype(np.uint16) * 257),
        "I": Image.fromarray(grey.astype(np.int32) * 257),
    }


@pytest.mark.parametrize("mode", images_of_every_mode())
def test_images_of_every_mode_become_rgb(mode, tmp_path):
    image = images_of_every_mode()[mode]
    expected = images_of_every_mode()["RGB"]
    if mode in ("L", "1", "LA", "I;16", "I"):
        expected = expected.convert("L").convert("RGB")
    expected = torch.from_numpy(np.array(expected)).permute(2, 0, 1).float()
    pixels = fcos.read_image(image)
    assert pixels.shape == (3, 40, 60)
    assert pixels.dtype == torch.uint8
    difference = pixels.float() - expected
    assert difference.mean().abs() < 2
    if mode not in ("1", "P"):  # these two are dithered
        assert difference.abs().mean() < 2

    suffix = {"CMYK": "jpg", "YCbCr": "jpg", "I": "tif"}.get(mode, "png")
    options = dict(quality=98, subsampling=0) if suffix == "jpg" else {}
    image.save(tmp_path / f"image.{suffix}", **options)
    difference = fcos.read_image(tmp_path / f"image.{suffix}").float() - pixels.float()
    assert difference.abs().mean() < 3


def test_16_bit_grey_keeps_its_range():
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    assert fcos.read_image(Image.fromarray(ramp))[0].flatten().tolist() == list(range(256))


# ---- EXIF orientation --------------------------------------------------------------------------


def jpeg(orientation=None, **tags):
    """Return a JPEG of 40x20 pixels, red at the top, with an EXIF block.

    tags: t282=(kind, count, value) adds tag 282.
    """
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:10, :, 0] = 255
    entries = {} if orientation is None else {0x0112: (3, 1, struct.pack("<HH", orientation, 0))}
    entries |= {int(tag[1:]): value for tag, value in tags.items()}
    block = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries))
    for tag, (kind, count, value) in sorted(entries.items()):
        block += struct.pack("<HHI", tag, kind, count) + value
    return jpeg_bytes(pixels, exif=block + b"\0\0\0\0", quality=95)


def jpeg_bytes(pixels, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **options)
    return file.getvalue()


@pytest.mark.parametrize("orientation", [None, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 65535])
def test_exif_turns_images_as_pillow_does(orientation):
    image = Image.open(io.BytesIO(jpeg(orientation)))
    expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    found = fcos.read_image(jpeg(orientation)).permute(1, 2, 0).numpy()
    assert np.array_equal(found, expected)


DAMAGED_TAGS = {  # what cameras and editors wrote beside a valid orientation
    "none": {},
    "resolution as text": {"t282": (2, 4, b"72\0\0")},
    "resolution beyond the end": {"t282": (5, 1, struct.pack("<I", 10**6))},
    "a kind that does not exist": {"t305": (99, 1, b"\0\0\0\0")},
    "description beyond the end": {"t270": (2, 99, struct.pack("<I", 10**6))},
    "another block beyond the end": {"t34665": (4, 1, struct.pack("<I", 10**6))},
    "another block as text": {"t34665": (2, 4, b"abc\0")},
    "four billion values": {"t306": (2, 2**32 - 1, b"abcd")},
}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")
@pytest.mark.parametrize("tags", DAMAGED_TAGS.values(), ids=DAMAGED_TAGS)
def test_only_the_orientation_is_read_from_exif(tags, tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(6, **tags))
    image = fcos.read_image(tmp_path / "a.jpg")
    assert image.shape == (3, 40, 20)
    assert (image[0, :, 15:] > 200).all()  # red is at the right
    assert (image[0, :, :5] < 50).all()
    assert fcos.read_image(tmp_path / "a.jpg", (20, 40)).shape == (3, 20, 40)


def test_a_transparent_palette_is_read_without_a_warning(tmp_path, recwarn):
    Image.new("P", (60, 40)).save(tmp_path / "a.png", transparency=bytes(256))
    assert fcos.read_image(tmp_path / "a.png").shape == (3, 40, 60)
    assert not recwarn.list


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"Exif\0\0junk", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0"])
def test_damaged_exif_is_ignored(exif, tmp_path):
    (tmp_path / "odd.jpg").write_bytes(jpeg_bytes(synth_image(1, 40, 60), exif=exif))
    assert fcos.read_image(tmp_path / "odd.jpg").shape == (3, 40, 60)


def test_exif_is_ignored_if_annotations_refer_to_the_stored_pixels(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.png"
    Image.fromarray(synth_image(1, 20, 40)).save(path, exif=exif)
    assert fcos.read_image(path).shape == (3, 40, 20)
    assert fcos.read_image(path, hw=(20, 40)).shape == (3, 20, 40)
    assert fcos.read_image(path, hw=(40, 20)).shape == (3, 40, 20)
    with pytest.raises(UserError, match="expected 50x50 pixels.*annotations, found 40x20"):
        fcos.read_image(path, hw=(50, 50))


# ---- sources -----------------------------------------------------------------------------------


def sources_of(path):
    """Return one image file in all the forms in which an image can be passed."""
    content = path.read_bytes()
    array = np.asarray(Image.open(io.BytesIO(content)))
    array.flags.writeable = False
    return {
        "text": str(path),
        "path": path,
        "bytes": content,
        "bytearray": bytearray(content),
        "BytesIO": io.BytesIO(content),
        "PIL": Image.open(io.BytesIO(content)),
        "read-only array": array,
        "array of negative strides": np.ascontiguousarray(array[:, ::-1])[:, ::-1],
        "tensor": torch.from_numpy(array.copy()).permute(2, 0, 1),
    }


@pytest.mark.filterwarnings("error")
def test_images_come_from_every_source(tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg_bytes(synth_image(1, 90, 120)))
    expected = fcos.read_image(path)
    model = detector()
    (first,) = model.predict(path, 64, 128)
    for name, source in sources_of(path).items():
        assert fcos.as_image(source).equal(expected), name
    for source in sources_of(path).values():
        (found,) = model.predict(source, 64, 128)
        assert set(found) == {"boxes", "scores", "labels"}
        assert_same_detections(found, first)
    with open(path, "rb") as file:
        sources = [*sources_of(path).values(), file]
        results = model.predict(sources, 64, 128)
    assert len(results) == len(sources)
    for found in results:
        assert_same_detections(found, first)
    assert model.predict([]) == []


NO_IMAGES = {  # what is passed, and how the message describes it
    "batch": (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), "(2, 3, 64, 64)"),
    "batch of one": (torch.zeros(1, 3, 20, 30, dtype=torch.uint8), "(1, 3, 20, 30)"),
    "grey": (np.zeros((20, 30), np.uint8), "(20, 30)"),
    "transparent": (np.zeros((20, 30, 4), np.uint8), "(20, 30, 4)"),
    "channels first": (np.zeros((3, 20, 30), np.uint8), "(3, 20, 30)"),
    "channels last": (torch.zeros(20, 30, 3, dtype=torch.uint8), "(20, 30, 3)"),
    "floats": (np.zeros((20, 30, 3)), "float64"),
    "float32": (np.zeros((20, 30, 3), np.float32), "float32"),
    "float tensor": (torch.zeros(3, 20, 30), "torch.float32"),
    "16 bits": (np.zeros((20, 30, 3), np.uint16), "uint16"),
    "booleans": (np.zeros((20, 30, 3), bool), "bool"),
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


@pytest.mark.parametrize("image, described", NO_IMAGES.values(), ids=NO_IMAGES)
def test_anything_else_is_described_as_it_was_passed(image, described):
    model = fcos.build("shapes", 1)
    for call in (fcos.as_image, lambda image: model.predict([image])):
        with pytest.raises(UserError) as error:
            call(image)
        message = str(error.value)
        assert described in message
        assert len(message) <= 210
        if not isinstance(image, bytes | io.StringIO):
            assert "expected a path, a PIL image, an RGB uint8 array" in message
    if not np.iterable(image) or isinstance(image, dict):
        assert_refused(lambda: model.predict(image), described)


# ---- files that cannot be read -----------------------------------------------------------------


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "not an image"),
        (b"this is text", "not an image"),
        (jpeg_bytes(synth_image(1, 40, 60))[:-300], "truncated"),
    ],
    ids=["empty", "text", "cut"],
)
def test_an_unreadable_image_is_named(content, reason, tmp_path):
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"broken\.jpg: cannot be read as an image.*{reason}"):
        fcos.read_image(path)


def test_a_missing_image_and_a_folder_are_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.jpg: .*No such file"):
        fcos.read_image(tmp_path / "nowhere.jpg")
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        fcos.read_image(tmp_path)


@pytest.mark.parametrize("name", ["a\n0.999.jpg", "\x1b[31mred.jpg", "ü" * 100, "\u202egpj.jpg"])
def test_file_names_are_printable_in_messages(name, tmp_path):
    (tmp_path / name).write_bytes(b"no image")
    (tmp_path / f"{name[:80]}.pt").write_bytes(b"no checkpoint")
    for call in (
        lambda: fcos.read_image(tmp_path / name),
        lambda: fcos.load(tmp_path / f"{name[:80]}.pt"),
        lambda: fcos.save(fcos.build("shapes", 1), tmp_path / name / "model.pt"),
    ):
        with pytest.raises(UserError) as error:
            call()
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 500


def test_the_size_limit_of_pillow_is_explained(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert_refused(lambda: fcos.read_image(jpeg()), "MAX_IMAGE_PIXELS", "split it")
