"""Drawing: pictures of detections, and folders of them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from coco_files import run_evaluate, run_script
from conftest import coco_model
from PIL import Image

import evaluate
import fcos
from fcos import UserError

ROOT = Path(__file__).resolve().parents[1]


# ---- one picture ---------------------------------------------------------------------------------


BOX = [100.0, 100.0, 200.0, 300.0]


def grey_image(w=600, h=500):
    return Image.new("RGB", (w, h), (128, 128, 128))


def detections(*rows):
    """Return detections from rows (box, score, label)."""
    boxes, scores, labels = zip(*rows)
    return dict(boxes=torch.tensor(boxes), scores=torch.tensor(scores), labels=torch.tensor(labels))


def changed_sides(before, after, box, margin=3):
    """Return whether pixels near the left, right and lower side of a box differ."""
    different = (np.asarray(before) != np.asarray(after)).any(2)
    x1, y1, x2, y2 = (round(value) for value in box)
    sides = (
        different[y1 : y2 + 1, max(x1 - margin, 0) : x1 + margin],
        different[y1 : y2 + 1, x2 - margin : x2 + margin],
        different[y2 - margin : y2 + margin, x1 : x2 + 1],
    )
    return [side.any() for side in sides]


def test_boxes_above_the_threshold_are_outlined():
    image = grey_image()
    other = [350.0, 100.0, 500.0, 300.0]
    found = detections((BOX, 0.9, 0), (other, 0.3, 1))
    picture = evaluate.draw(image, found)
    assert picture.size == image.size
    assert all(changed_sides(image, picture, BOX))
    assert not any(changed_sides(image, picture, other))
    inside = np.asarray(picture)[120:280, 120:180]
    assert (inside == 128).all()
    both = evaluate.draw(image, found, score_threshold=0.2)
    assert all(changed_sides(image, both, other))
    assert image.getpixel((100, 150)) == (128, 128, 128)  # the argument is not changed


def test_class_names_are_written_and_classes_have_colours():
    pictures = [
        evaluate.draw(grey_image(), detections((BOX, 0.9, label)), classes).tobytes()
        for label, classes in [
            (0, None),
            (0, ["cat", "dog"]),
            (1, ["cat", "dog"]),
            (1, ["cat", "cat"]),
        ]
    ]
    assert len(set(pictures)) == 4


def test_the_label_of_the_best_detection_is_not_covered():
    wide = [100.0, 100.0, 400.0, 300.0]
    alone = evaluate.draw(grey_image(), detections((wide, 0.9, 0)), ["cat"])
    three = detections((wide, 0.9, 0), (wide, 0.8, 1), (wide, 0.7, 2))
    picture = evaluate.draw(grey_image(), three, ["cat", "dog", "cow"])
    label = (100, 86, 140, 98)
    assert picture.crop(label).tobytes() == alone.crop(label).tobytes()
    assert alone.crop(label).tobytes() != grey_image().crop(label).tobytes()


def visible_labels(box, count):
    """Draw a box `count` times; return the pixels of the colour of each label but the first.

    The outline of the best box covers the others: only their labels show their colours.
    """
    found = detections(*[(box, 0.9, 0)] * count)
    colors = ["#ff0000", "#00ff00", "#00ff01", "#00ff02"][:count]
    picture = evaluate.draw(grey_image(), found, ["one class"], colors=colors)
    pixels = np.asarray(picture)
    return [(pixels == [0, 255, k]).all(2).sum() for k in range(count - 1)]


@pytest.mark.parametrize("corner", [(100, 0), (100, 100), (560, 290), (0, 290)])
@pytest.mark.parametrize("side, count", [(12, 3), (200, 4)])
def test_labels_of_one_box_do_not_cover_each_other(corner, side, count):
    x, y = corner
    (whole_label,) = visible_labels([200.0, 200, 400, 400], 2)
    assert whole_label > 200
    labels = visible_labels([float(x), y, x + side, y + side], count)
    assert min(labels) > 0.9 * whole_label  # edges are rounded to pixels


@pytest.mark.parametrize("colour", [*evaluate.COLORS, "white", "black"])
def test_boxes_are_visible_on_every_background(colour):
    image = Image.new("RGB", (600, 500), colour)
    assert all(changed_sides(image, evaluate.draw(image, detections((BOX, 0.9, 0))), BOX))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_images_of_every_mode_can_be_drawn_on(mode):
    picture = evaluate.draw(Image.new(mode, (500, 480)), detections((BOX, 0.9, 0)))
    assert picture.mode == "RGB"
    assert picture.size == (500, 480)


def test_without_detections_the_picture_is_the_image():
    nothing = dict(boxes=torch.zeros(0, 4), scores=torch.zeros(0), labels=torch.zeros(0).long())
    assert evaluate.draw(grey_image(), nothing).tobytes() == grey_image().tobytes()


def test_small_images_are_enlarged_with_their_boxes():
    small = Image.new("RGB", (60, 40))
    picture = evaluate.draw(small, detections(([10.0, 5, 50, 35], 0.9, 0)))
    assert picture.size == (720, 480)
    assert all(changed_sides(small.resize(picture.size), picture, [120, 60, 600, 420], 8))


def test_an_image_of_two_rows_does_not_become_huge():
    picture = evaluate.draw(Image.new("RGB", (2000, 2)), detections(([1.0, 0, 3, 2], 0.9, 0)))
    assert picture.width * picture.height < 50e6


def test_boxes_at_the_border_and_without_size_can_be_drawn():
    rows = [([0.0, 0, 500, 500], 0.9, 0), ([499.5, 499.5, 500, 500], 0.8, 1), ([7.0] * 4, 0.7, 2)]
    classes = ["a name that is far too long " * 5, "b", "c"]
    evaluate.draw(grey_image(500, 500), detections(*rows), classes)


# ---- folders -------------------------------------------------------------------------------------


def photo(path, size=(50, 40), seed=100):
    """Write an image of noise, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def relative(paths, folder):
    return [Path(path).relative_to(folder).as_posix() for path in paths]


def test_a_folder_becomes_pictures_and_a_list_of_detections(tmp_path):
    for name in ("a/x.png", "b/x.jpg", "c.PNG", "d/x_2.png"):
        photo(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("not a picture")
    (tmp_path / "a" / "deeper").mkdir()
    out = tmp_path / "new" / "drawn"
    model = coco_model()
    sources = [tmp_path / name for name in ("a", "b/x.jpg", "d", "c.PNG")]
    assert evaluate.draw_folder(model, sources, out, 0.4) == []
    report = json.loads((out / "detections.json").read_text())
    files = relative([row["file"] for row in report], tmp_path)
    assert files == ["a/x.png", "b/x.jpg", "d/x_2.png", "c.PNG"]
    drawn = [row["drawn"] for row in report]
    assert drawn == ["x.jpg", "x_2.jpg", "x_2_2.jpg", "c.jpg"]  # two images are called x
    assert sorted(path.name for path in out.iterdir()) == sorted([*drawn, "detections.json"])
    assert all((row["height"], row["width"]) == (40, 50) for row in report)

    (expected,) = model.predict(tmp_path / "c.PNG", score_threshold=0.4)
    rows = report[-1]["detections"]
    assert len(rows) == len(expected["scores"]) > 0
    assert all(row["score"] >= 0.4 for row in rows)
    x1, y1, x2, y2 = expected["boxes"][0].tolist()
    label = expected["labels"][0]
    assert rows[0]["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1])
    assert rows[0]["class"] == model.classes[label]
    assert rows[0]["category_id"] == model.category_ids[label]


def test_folders_are_searched_and_patterns_expanded(tmp_path):
    for name in ("a/x.png", "a/b/c/y.JPG", "z.png"):
        photo(tmp_path / name)
    (tmp_path / "a" / "notes.txt").write_text("not a picture")
    found = evaluate.find_pictures([tmp_path / "a", f"{tmp_path}/*.png", f"{tmp_path}/**/y.*"])
    assert relative(found, tmp_path) == ["a/b/c/y.JPG", "a/x.png", "z.png", "a/b/c/y.JPG"]
    with pytest.raises(UserError, match="no such image"):
        evaluate.find_pictures([f"{tmp_path}/*.gif"])


def test_every_kind_of_image_in_a_folder_is_drawn_and_other_files_are_counted(tmp_path, capsys):
    names = ("a.jfif", "b.jpe", "c.ppm", "d.JPEG", "deep/e.webp", "f.gif", "g.tif")
    for name in names:
        photo(tmp_path / name)
    for name in ("notes.txt", "deep/labels.json", "drawing.svg"):
        (tmp_path / name).write_text("{}")
    assert sorted(relative(evaluate.find_pictures([tmp_path]), tmp_path)) == sorted(names)
    assert capsys.readouterr().err == "skipped 3 files that are not images\n"


def test_broken_images_are_named_and_fail_the_command(tmp_path, capsys):
    """The others are drawn, whatever files and classes are called."""
    model = coco_model()
    model.classes = ["a\nAP 0.999\x1b[2J", "long" * 10**5, "c"]
    fcos.save(model, tmp_path / "model.pt")
    source = tmp_path / "in"
    out = tmp_path / "out"
    for name in ("good.png", "n" * 249 + ".tiff", "\x1b[2J\nz.png"):
        photo(source / name)
    torn = photo(source / "torn.png").read_bytes()
    (source / "torn.png").write_bytes(torn[: len(torn) // 2])
    (source / "bad\x1b[31m.jpg").write_bytes(b"junk")
    photo(source / "too wide for a JPEG.png", (70_000, 1))
    flags = ("--images", source, "--out", out, "--workers", 0, "--device", "cpu")
    code, lines = run_script(capsys, tmp_path / "model.pt", *flags)
    assert code == 2
    assert all(line.isprintable() and len(line) < 600 for line in lines)
    for name in (r"bad\x1b[31m.jpg", "torn.png", "too wide for a JPEG.png"):
        assert len([line for line in lines if name in line and "left out" in line]) == 1
    assert "3 images" in lines[-2]
    assert "3 left out" in lines[-2]
    assert lines[-1].endswith(": 3")
    report = json.loads((out / "detections.json").read_text())
    drawn = {row["drawn"] for row in report}
    assert drawn == {"good.jpg", "n" * 249 + ".jpg", "\x1b[2J\nz.jpg"}


@pytest.mark.parametrize("workers", [0, 1])
def test_only_the_broken_images_are_left_out(tmp_path, capsys, workers):
    paths = [photo(tmp_path / f"in/{i % 3}/{i}.png", seed=i) for i in range(12)]
    broken = sorted(paths[::4])
    for path in broken:
        path.write_bytes(b"junk")
    out = tmp_path / "out"
    left_out = evaluate.draw_folder(coco_model(), [tmp_path / "in"], out, workers=workers)
    assert sorted(left_out) == broken
    assert re.search("9 images, [0-9]+ boxes drawn, 3 left out", capsys.readouterr().err)
    assert len(list(out.glob("*.jpg"))) == 9


# ---- what a drawing must not overwrite ---------------------------------------------------------


def test_the_views_of_a_tiled_picture_are_counted():
    model = coco_model()
    shown = []
    bar = SimpleNamespace(set_postfix_str=lambda text, refresh: shown.append(text))
    bar.update = lambda images: None
    picture = np.zeros((96, 128, 3), np.uint8)
    views = fcos.make_views((96, 128), model.test_size, tile=64)
    with evaluate.count_views(model, bar, {"tile": 64}):
        model.predict(picture, tile=64)
    assert shown[-1] == f"view {len(views)}"
    assert len(views) > 1


def test_a_drawing_does_not_follow_a_link(tmp_path):
    precious = photo(tmp_path / "precious.jpg")
    before = precious.read_bytes()
    out = tmp_path / "out"
    out.mkdir()
    (out / "x.jpg").symlink_to(precious)
    evaluate.draw_folder(coco_model(), [photo(tmp_path / "in" / "x.png")], out)
    assert precious.read_bytes() == before
    assert not (out / "x.jpg").is_symlink()


@pytest.mark.parametrize("through", ["itself", "a link"])
def test_source_images_are_never_replaced(tmp_path, through):
    source = photo(tmp_path / "in" / "x.jpg")
    before = source.read_bytes()
    out = source.parent
    if through == "a link":
        out = tmp_path / "link"
        out.symlink_to(source.parent)
    with pytest.raises(UserError, match="would replace"):
        evaluate.draw_folder(coco_model(), [source], out)
    assert list(source.parent.iterdir()) == [source]
    assert source.read_bytes() == before


DRAW = """
import sys, time
import evaluate

def hold(*args):
    print("drawing", flush=True)
    time.sleep(60)

def fail(*args):
    raise TypeError("a bug of mine")

model, images, out, behaviour = sys.argv[1:]
evaluate.draw = {"hold": hold, "fail": fail}[behaviour]
args = [model, "--images", images, "--out", out, "--workers", "1", "--device", "cpu"]
evaluate.run(evaluate.main, evaluate.parse_args(args))
"""


@pytest.fixture
def drawing(tmp_path, model_file):
    """Return the command of a process that draws three images by another function than `draw`."""
    for k in range(3):
        photo(tmp_path / "in" / f"{k}.png")
    (tmp_path / "script.py").write_text(DRAW)
    return [sys.executable, tmp_path / "script.py", model_file, tmp_path / "in", tmp_path / "out"]


ENVIRONMENT = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")


def test_one_process_draws_into_a_folder_and_a_killed_one_leaves_nothing(
    drawing, tmp_path, model_file, capsys
):
    source = tmp_path / "in"
    out = tmp_path / "out"
    flags = ("--images", source, "--out", out, "--workers", 0, "--device", "cpu")
    with subprocess.Popen([*drawing, "hold"], env=ENVIRONMENT, stdout=subprocess.PIPE) as first:
        first.stdout.readline()
        (out / ".fcos-0.tmp").touch()  # as if it were writing a picture
        code, lines = run_script(capsys, model_file, *flags)
        assert code == 2
        assert "out: another process writes there" in lines[-1]
        first.kill()
    run_evaluate(model_file, *flags)
    names = ["0.jpg", "1.jpg", "2.jpg", "detections.json"]
    assert sorted(path.name for path in out.iterdir()) == names


def test_after_a_bug_no_worker_keeps_the_process_alive(drawing):
    """A worker that lived would hold the pipes open, and the call would time out."""
    done = subprocess.run(
        [*drawing, "fail"], env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "a bug of mine" in done.stderr
