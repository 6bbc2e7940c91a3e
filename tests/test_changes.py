"""The changes in the table of CONTRIBUTING.md: their number of places, and that each works.

Every test makes a change as a newcomer would: it edits a copy of the product, or replaces a
function. It checks the number of places, and that the change works in training, prediction and
export. A scenario is a function without arguments that runs in a process of its own, in the folder
of the copy: there, `import fcos` imports the changed file. This file must not import the product.
"""

import contextlib
import functools
import importlib.util
import io
import json
import math
import multiprocessing
import os
import shutil
import socket
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PHOTO = "data/shapes/val2017/000001000001.jpg"
needs_onnx = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnx", "onnxscript"))),
    reason="needs onnx and onnxscript",
)
needs_timm = pytest.mark.skipif(not importlib.util.find_spec("timm"), reason="needs timm")


# ---- copies of the product, and processes --------------------------------------------------------


@pytest.fixture(scope="module")
def processes():
    """Return a server that has imported the large packages; every scenario is a fork of it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision", "matplotlib", "hotcoco"])
    return context


@pytest.fixture(scope="module")
def product(processes, tmp_path_factory):
    """Return a folder with the three files, the kernels, and 8 + 4 pictures of shapes."""
    folder = tmp_path_factory.mktemp("product")
    for name in ("fcos.py", "evaluate.py", "train.py"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "kernels", folder / "kernels")
    run_apart(processes, folder, draw_data)
    return folder


@pytest.fixture
def change(processes, product, tmp_path):
    """Return a function that makes edits, [(file, text, replacement)], and runs a scenario."""

    def run(scenario, edits=(), world_size=1):
        copy = shutil.copytree(product, tmp_path / "copy")
        for file, text, replacement in edits:
            content = (copy / file).read_text()
            assert content.count(text) == 1, f"{file}: {content.count(text)} places say {text!r}"
            (copy / file).write_text(content.replace(text, replacement))
        run_apart(processes, copy, scenario, world_size)

    return run


def run_apart(processes, folder, scenario, world_size=1):
    """Run a scenario in processes of its own, one for each rank. Fails with their tracebacks."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    started = []
    for rank in range(world_size):
        env = {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port, "LOCAL_RANK": rank}
        env |= {"MASTER_ADDR": "localhost", "TORCHELASTIC_RUN_ID": "test"}
        receiver, sender = processes.Pipe(duplex=False)
        arguments = folder, scenario, env if world_size > 1 else {}, sender
        process = processes.Process(target=work, args=arguments)
        process.start()
        sender.close()
        started.append((process, receiver))
    errors = []
    for process, receiver in started:
        try:
            errors.append(receiver.recv())
        except EOFError:
            errors.append("the process died")
        process.join()
    if any(errors):
        pytest.fail("\n".join(filter(None, errors)), pytrace=False)


def work(folder, scenario, env, sender):
    """Run a scenario in a folder, and send its traceback or None."""
    os.environ.update({name: str(value) for name, value in env.items()})
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    multiprocessing.set_start_method(
        "fork", force=True
    )  # dataloader workers see replaced functions
    torch.set_num_threads(1)
    try:
        scenario()
        sender.send(None)
    except BaseException:
        sender.send(traceback.format_exc())


def draw_data():
    import train

    train.make_shapes("data/shapes", train=8, val=4)


def run_train(*flags, out="run"):
    """Train four steps, with an evaluation after two and four. Returns the rows of the losses."""
    import train

    argv = f"shapes --out {out} --iters 4 --batch-size 4 --min-size 64 --max-size 96 --device cpu"
    argv += " --workers 0 --eval-every 2 --checkpoint-every 2"
    train.main(train.parse_args([*argv.split(), *flags]))
    rows = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def run_train_in_two_parts(*flags):
    """`run_train`, stopped after its checkpoint of step 2 and resumed."""
    import train

    update = train.update

    def stop(step, *rest):
        if step == 2:
            raise KeyboardInterrupt
        update(step, *rest)

    train.update = stop
    with pytest.raises(KeyboardInterrupt):
        run_train(*flags)
    train.update = update
    return run_train(*flags)


def run_evaluate(*flags):
    import evaluate

    evaluate.main(
        evaluate.parse_args(["run/model.pt", "--device", "cpu", "--workers", "0", *flags])
    )


def found_in_results(*flags):
    """Score the data set with evaluate.py. Returns the detections of --save-json."""
    run_evaluate("--data", "data/shapes", "--save-json", "results.json", *flags)
    return json.loads(Path("results.json").read_text())


def found_in_drawing(*flags):
    """Draw a photo with evaluate.py. Returns the detections of detections.json."""
    run_evaluate("--images", PHOTO, "--out", "drawn", "--score-threshold", "0", *flags)
    return json.loads(Path("drawn/detections.json").read_text())[0]["detections"]


def save_model(**keywords):
    """Save a model as run/model.pt that finds many boxes, some of which overlap."""
    import evaluate
    import fcos

    torch.manual_seed(0)
    model = fcos.build("shapes", 6, test_size=(64, 96), **keywords).eval()
    torch.nn.init.normal_(model.head.cls.weight, std=0.4)
    torch.nn.init.constant_(model.head.cls.bias, -1.0)
    torch.nn.init.constant_(model.head.box.bias, 1.5)
    dataset = evaluate.CocoDataset(*evaluate.coco_paths("data/shapes", "val2017"))
    model.classes, model.category_ids = dataset.classes, dataset.category_ids
    Path("run").mkdir()
    fcos.save(model, "run/model.pt")
    return model, dataset


# ---- losses --------------------------------------------------------------------------------------

FURTHER_LOSS = [
    (
        "fcos.py",
        '"ctr": ctr / num_positives}',
        '"ctr": ctr / num_positives, "l1": (predicted - wanted).abs().sum() / num_positives}',
    )
]
MEAN_LOSS = [
    (
        "fcos.py",
        '"ctr": ctr / num_positives}',
        '"ctr": ctr / num_positives, "l1": (predicted - wanted).abs().mean()}',
    )
]
KIND_OF_IOU_LOSS = [
    (
        "kernels/iou_loss.py",
        "KINDS = {\n",
        'KINDS = {\n    "squared_iou": lambda pred, target: 1 - iou(pred, target) ** 2,\n',
    )
]


def test_a_further_loss_is_one_place(change):
    change(further_loss, FURTHER_LOSS)


def further_loss():
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        rows = run_train()
    assert "warning: loss" not in printed.getvalue()
    assert len(rows) == 4
    for row in rows:
        assert row["l1"] > 0
        assert row["loss"] == pytest.approx(row["cls"] + row["box"] + row["ctr"] + row["l1"])


def test_a_loss_that_depends_on_the_micro_batches_is_warned_of(change):
    change(mean_loss, MEAN_LOSS)


def mean_loss():
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run_train()
    assert "warning: loss l1 depends on how a step is split" in printed.getvalue()


def test_a_kind_of_iou_loss_is_one_place(change):
    change(kind_of_iou_loss, KIND_OF_IOU_LOSS)


def kind_of_iou_loss():
    import fcos

    rows = run_train("--set", "box_loss=squared_iou")
    assert all(row["box"] > 0 for row in rows)
    assert fcos.load("run/model.pt").loss["box_loss"] == "squared_iou"
    with pytest.raises(fcos.UserError, match="expected one of squared_iou, iou"):
        fcos.build("shapes", box_loss="circle_iou")


# ---- outputs of the head, and columns of the annotations -----------------------------------------

# The logarithm of width / height of the object.
FURTHER_OUTPUT = [
    (
        "fcos.py",
        "        self.ctr = nn.Conv2d(channels, 1, 3, padding=1)\n",
        "        self.ctr = nn.Conv2d(channels, 1, 3, padding=1)\n"
        "        self.aspect = nn.Conv2d(channels, 1, 3, padding=1)\n",
    ),
    (
        "fcos.py",
        '            "cls": self.cls(cls_features),\n',
        '            "cls": self.cls(cls_features),\n'
        '            "aspect": self.aspect(box_features).squeeze(1).float(),\n',
    ),
    (
        "fcos.py",
        "    cls = sigmoid_focal_loss(",
        "    left, top, right, bottom = (targets['ltrb'].where(positive[..., None], 1)).unbind(2)\n"
        "    aspect = (outputs['aspect'] - ((left + right) / (top + bottom)).log()).abs()\n"
        "    aspect = (aspect * positive).sum()\n"
        "    cls = sigmoid_focal_loss(",
    ),
    (
        "fcos.py",
        '"ctr": ctr / num_positives}',
        '"ctr": ctr / num_positives, "aspect": aspect / num_positives}',
    ),
]


def test_a_further_output_is_four_places(change):
    change(further_output, FURTHER_OUTPUT)
    assert len(FURTHER_OUTPUT) == 4


def further_output():
    import fcos

    assert all(row["aspect"] > 0 for row in run_train("--set", "candidate_threshold=0.001"))
    model = fcos.load("run/model.pt")
    image = fcos.read_image(PHOTO)
    found = model.predict(image)[0]
    assert found["aspect"].shape == found["scores"].shape != (0,)
    with torch.no_grad():
        images, sizes = fcos.pad_batch(
            [fcos.resize(image, fcos.resized_hw(*image.shape[1:], 64, 96))]
        )
        outputs = model(images, sizes)
        detections = model.decode(outputs, sizes)
    assert set(detections["aspect"].flatten().tolist()) <= {
        0.0,
        *outputs["aspect"].flatten().tolist(),
    }
    assert [box["aspect"] for box in found_in_drawing()] == found["aspect"].tolist()
    results = found_in_results()
    first = [box for box in results if box["image_id"] == results[0]["image_id"]]
    assert [box["aspect"] for box in first] == pytest.approx(found["aspect"].tolist())

    found = model.predict(image, tile=64)[0]
    assert found["aspect"].shape == found["scores"].shape != (0,)

    # Its mirror image is not known, until someone says it.
    with pytest.raises(fcos.UserError, match="output aspect: expected a rule in fcos.UNMIRROR"):
        model.predict(image, tta=True)
    with pytest.raises(fcos.UserError, match="aspect"):
        found_in_results("--tta")
    fcos.UNMIRROR["aspect"] = lambda aspect, right: aspect
    found = model.predict(image, tta=True)[0]
    assert found["aspect"].shape == found["scores"].shape != (0,)


@pytest.mark.parametrize("forgotten", range(4))
def test_a_place_of_a_further_output_that_is_forgotten_is_an_error(change, forgotten):
    edits = FURTHER_OUTPUT[:forgotten] + FURTHER_OUTPUT[forgotten + 1 :]
    change(forgotten_place, edits)


def forgotten_place():
    with pytest.raises((AttributeError, KeyError, NameError, ValueError), match="aspect"):
        run_train()
    assert not Path("run/last.pt").exists()


# The angle of an object: two places for its column, and the four of the output that predicts it.
FURTHER_COLUMN = [
    (
        "evaluate.py",
        "    iscrowd: bool | float | None = None\n",
        "    iscrowd: bool | float | None = None\n    angle: float\n",
    ),
    (
        "train.py",
        "COLUMNS = {\n",
        'COLUMNS = {\n    "angle": dict(mirror=lambda a, *_: -a, crop=lambda a, *_: a),\n',
    ),
    (
        "fcos.py",
        "        self.ctr = nn.Conv2d(channels, 1, 3, padding=1)\n",
        "        self.ctr = nn.Conv2d(channels, 1, 3, padding=1)\n"
        "        self.angle = nn.Conv2d(channels, 1, 3, padding=1)\n",
    ),
    (
        "fcos.py",
        '            "cls": self.cls(cls_features),\n',
        '            "cls": self.cls(cls_features),\n'
        '            "angle": self.angle(box_features).squeeze(1).float(),\n',
    ),
    (
        "fcos.py",
        "    cls = sigmoid_focal_loss(",
        "    angle = ((outputs['angle'] - targets['angle']).abs() * positive).sum()\n"
        "    cls = sigmoid_focal_loss(",
    ),
    (
        "fcos.py",
        '"ctr": ctr / num_positives}',
        '"ctr": ctr / num_positives, "angle": angle / num_positives}',
    ),
]


def test_a_further_column_is_two_places_and_its_loss(change):
    change(further_column, FURTHER_COLUMN)


def further_column():
    """The angle of object number n is n / 100, and that of crowds, which are left out, 99."""
    import evaluate
    import fcos
    import train

    for split in "train2017", "val2017":
        annotations, _ = evaluate.coco_paths("data/shapes", split)
        coco = json.loads(annotations.read_text())
        boxes = coco["annotations"]
        coco["annotations"] = boxes[::-1] + [boxes[0] | dict(id=999, iscrowd=1, angle=99.0)]
        for box in boxes:
            box["angle"] = box["id"] / 100
        annotations.write_text(json.dumps(coco))
    dataset = evaluate.CocoDataset(*evaluate.coco_paths("data/shapes", "train2017"))
    by_place = {tuple(box["bbox"]): box["angle"] for box in coco_boxes("train2017")}
    settings = train.resolve(train.parse_args(["shapes", "--iters", "8", "--augment"]))
    settings |= dict(batch_size=4, min_size=[64], max_size=96)
    batches = train.TrainBatches(dataset, settings)
    for step in range(8):
        batch = batches[step]
        assert len(batch["angle"]) == len(batch["boxes"])
        assert batch["angle"].abs().max() < 1
    assert min(batches[step]["angle"].min() for step in range(8)) < 0  # mirrored ones
    sample = dataset.sample(0, tuple(dataset.hw[0].tolist()))
    for (x1, y1, x2, y2), angle in zip(sample["boxes"].tolist(), sample["angle"].tolist()):
        same = [
            a for place, a in by_place.items() if np.allclose(place, (x1, y1, x2 - x1, y2 - y1))
        ]
        assert same == [pytest.approx(angle)]

    # The target of a location is the angle of its box.
    model = fcos.build("shapes", 6)
    targets = model.targets((160, 160), [{k: v for k, v in sample.items() if k != "image"}])
    index = targets["index"][0]
    assert (index >= 0).any()
    assert torch.equal(targets["angle"][0][index >= 0], sample["angle"][index[index >= 0]])
    assert (targets["angle"][0][index < 0] == 0).all()

    rows = run_train("--augment", "--set", "candidate_threshold=0.001", "--accumulate", "2")
    assert all(row["angle"] > 0 for row in rows)
    assert all("angle" in box for box in found_in_drawing() + found_in_results())


def coco_boxes(split):
    import evaluate

    annotations, _ = evaluate.coco_paths("data/shapes", split)
    return [b for b in json.loads(annotations.read_text())["annotations"] if not b["iscrowd"]]


POINT = [
    (
        "evaluate.py",
        "    iscrowd: bool | float | None = None\n",
        "    iscrowd: bool | float | None = None\n    point: tuple[float, float]\n",
    ),
    (
        "train.py",
        "COLUMNS = {\n",
        'COLUMNS = {\n    "point": dict(\n'
        "        mirror=lambda p, width: torch.stack([width - p[:, 0], p[:, 1]], 1),\n"
        "        crop=lambda p, offset, scale: (p - offset[:2]) * scale[:2],\n    ),\n",
    ),
]


def test_a_column_in_pixels_is_resized_with_the_boxes(change):
    change(column_in_pixels, POINT)


def column_in_pixels():
    """Every point is a quarter of the way from the left to the right, and a third down."""
    import evaluate
    import train

    annotations, images = evaluate.coco_paths("data/shapes", "train2017")
    coco = json.loads(annotations.read_text())
    for box in coco["annotations"]:
        x, y, w, h = box["bbox"]
        box["point"] = [x + w / 4, y + h / 3]
    annotations.write_text(json.dumps(coco))
    settings = train.resolve(train.parse_args(["shapes", "--iters", "8"]))
    settings |= dict(batch_size=4, min_size=[64], max_size=96)
    batches = train.TrainBatches(evaluate.CocoDataset(annotations, images), settings)
    for batch in [batches.smallest(), *map(batches.__getitem__, range(8))]:
        x1, y1, x2, y2 = batch["boxes"].T
        x, y = ((batch["point"] - batch["boxes"][:, :2]) / torch.stack([x2 - x1, y2 - y1], 1)).T
        torch.testing.assert_close(y, torch.full_like(y, 1 / 3), atol=1e-4, rtol=0)
        torch.testing.assert_close((x - 0.5).abs(), torch.full_like(x, 0.25), atol=1e-4, rtol=0)


@pytest.mark.parametrize("forgotten", range(6))
def test_a_place_of_a_further_column_that_is_forgotten_is_an_error(change, forgotten):
    change(forgotten_column, FURTHER_COLUMN[:forgotten] + FURTHER_COLUMN[forgotten + 1 :])


def forgotten_column():
    import fcos

    for split in "train2017", "val2017":
        annotations = Path(f"data/shapes/annotations/instances_{split}.json")
        coco = json.loads(annotations.read_text())
        for box in coco["annotations"]:
            box["angle"] = 0.5
        annotations.write_text(json.dumps(coco))
    with pytest.raises(
        (fcos.UserError, AttributeError, KeyError, NameError, ValueError), match="angle"
    ):
        run_train()
    assert not Path("run/model.pt").exists()


# ---- assignment and suppression ------------------------------------------------------------------


def test_another_assignment_is_one_function(change):
    change(another_assignment)


def another_assignment():
    """A location is assigned to the box whose center is nearest, if it lies inside."""
    import fcos

    def targets(model, hw, truths):
        points = model.points(hw, truths[0]["boxes"].device)
        index = torch.full((len(truths), len(points)), -1)
        for row, truth in zip(index, truths):
            x1, y1, x2, y2 = truth["boxes"].T
            x, y = points[:, 0, None], points[:, 1, None]
            inside = (x > x1) & (x < x2) & (y > y1) & (y < y2)
            distance = ((x - (x1 + x2) / 2) ** 2 + (y - (y1 + y2) / 2) ** 2).where(inside, math.inf)
            if len(x1):
                nearest = distance.min(1)
                row[:] = nearest.indices.where(nearest.values < math.inf, -1)
        seen.append((index >= 0).sum().item())
        return fcos.encode(points, truths, index)

    seen = []
    fcos.FCOS.targets = targets
    rows = run_train("--accumulate", "2")
    assert sum(seen) > 0 and all(math.isfinite(row["loss"]) for row in rows)


def soft_suppress(model, boxes, scores, labels):
    """Soft-NMS (arXiv 1704.04503) with the Gaussian decay."""
    area = (boxes[..., 2:] - boxes[..., :2]).prod(2)
    left = scores
    keep, kept_scores = [], []
    for _ in range(model.max_detections):
        score, best = left.max(1, keepdim=True)
        keep.append(best.where(score > 0.02, -1))
        kept_scores.append(score.where(score > 0.02, -math.inf))
        box = boxes.gather(1, best[..., None].expand(-1, -1, 4))
        corner = torch.maximum(box[..., :2], boxes[..., :2])
        other_corner = torch.minimum(box[..., 2:], boxes[..., 2:])
        intersection = (other_corner - corner).clamp(min=0).prod(2)
        overlap = intersection / (area + area.gather(1, best) - intersection + 1e-9)
        decay = (-(overlap**2) / 0.5).exp().where(labels == labels.gather(1, best), 1)
        left = (left * decay).scatter(1, best, -math.inf)
    return torch.cat(keep, 1), torch.cat(kept_scores, 1)


def test_another_suppression_is_one_function_for_all_predictions(change):
    change(another_suppression)


def another_suppression():
    import evaluate
    import fcos
    import train

    model, dataset = save_model(max_detections=20)
    hard = model.predict(PHOTO)[0]["scores"]
    hard_views = model.predict(PHOTO, tta=True)[0]["scores"]
    hard_tiles = model.predict(PHOTO, tile=64)[0]["scores"]

    fcos.FCOS.suppress = soft_suppress
    soft = model.predict(PHOTO)[0]
    views = model.predict(PHOTO, tta=True)[0]
    assert not torch.equal(soft["scores"], hard)
    assert not torch.equal(views["scores"], hard_views)
    assert not torch.equal(model.predict(PHOTO, tile=64)[0]["scores"], hard_tiles)
    # A tile as large as the image: the scores must not decay on the tile and again in the end.
    one_tile = model.predict(PHOTO, tile=4096)[0]["scores"]
    assert one_tile.tolist() == pytest.approx(soft["scores"].tolist(), rel=1e-5)

    # It decays final scores: those that are not changed are the scores of predict.
    candidates = {}

    def note(model, boxes, scores, labels):
        candidates["scores"] = scores
        return soft_suppress(model, boxes, scores, labels)

    fcos.FCOS.suppress = note
    assert torch.equal(model.predict(PHOTO)[0]["scores"], soft["scores"])
    assert soft["scores"][0] == candidates["scores"].max() == hard[0]
    fcos.FCOS.suppress = soft_suppress

    assert [box["score"] for box in found_in_drawing()] == soft["scores"].tolist()
    first = dataset.image_ids[0]
    for flags, found in ((), soft), (("--tta",), views):
        rows = [row for row in found_in_results(*flags) if row["image_id"] == first]
        assert [row["score"] for row in rows] == pytest.approx(found["scores"].tolist(), rel=1e-5)

    # The trainer's validation.
    metrics = []
    score = evaluate.score

    def keep(results, *rest):
        metrics.append([row["score"] for row in results])
        return score(results, *rest)

    evaluate.score = keep
    files = SimpleNamespace(active=True, has_model=lambda: False)
    files.log = files.best = lambda *_, **__: True
    train.validate(0, model, {}, dataset, None, files, 0)
    rows = found_in_results()
    assert metrics[0] == pytest.approx([row["score"] for row in rows])


@needs_onnx
def test_onnx_gets_a_further_output_and_another_suppression(change):
    change(exported_changes, FURTHER_OUTPUT)


def exported_changes():
    """Check the arguments of torch.onnx.export; test_export.py exports for real."""
    import fcos

    model, _ = save_model()
    fcos.FCOS.suppress = soft_suppress
    expected = model.predict(PHOTO)[0]
    given = {}

    def export(deployed, _, output_names, **__):
        image = fcos.read_image(PHOTO)
        size = fcos.resized_hw(*image.shape[1:], 64, 96)
        found = deployed(*fcos.pad_batch([fcos.resize(image, size)]))
        given.update(zip(output_names, found.values(), strict=True))
        raise KeyboardInterrupt

    torch.onnx.export = export
    with pytest.raises(KeyboardInterrupt):
        run_evaluate("--export", "model.onnx", "--min-size", "64", "--max-size", "96")
    assert given.keys() == {"boxes", "scores", "labels", "aspect"}
    for name in "scores", "aspect":
        torch.testing.assert_close(given[name][0, : len(expected[name])], expected[name])


# ---- levels and backbones ------------------------------------------------------------------------


def test_other_levels_are_keywords(change):
    change(other_levels)


def other_levels():
    import fcos

    with pytest.raises(fcos.UserError, match="levels.*expected ranges with them"):
        run_train("--set", "levels=2,3,4,5,6")
    run_train("--set", "levels=2,3,4,5,6", "ranges=16,32,64,128")
    model = fcos.load("run/model.pt")
    assert model.strides == (4, 8, 16, 32, 64)
    points = model.points((64, 96))
    assert len(points) == 16 * 24 + 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2
    bounds = {(stride, low, high) for _, _, stride, low, high in points.tolist()}
    ends = [-1.0, 16.0, 32.0, 64.0, 128.0, math.inf]
    assert bounds == set(zip(map(float, model.strides), ends, ends[1:]))
    assert found_in_results() is not None


@pytest.mark.parametrize("level", [2, 4])
def test_a_single_level_is_a_keyword(change, level):
    change(functools.partial(single_level, level))


def single_level(level):
    """The coarser features of the backbone reach it, and are trained."""
    import fcos

    run_train("--set", f"levels={level},", "candidate_threshold=0.001")
    model = fcos.load("run/model.pt")
    assert model.strides == (2**level,) and model.ranges == ()
    names = {name.split(".")[0] for name in model.fpn.state_dict()}
    assert names == {f"output{level}"} | {f"lateral{n}" for n in range(level, 6)}
    assert {row["image_id"] for row in found_in_results()} != set()


@needs_timm
def test_a_timm_model_is_a_flag(change):
    change(timm_model)


def timm_model():
    """With weights of timm, in torchvision's pixels, stopped and resumed."""
    import timm

    import fcos

    create = timm.create_model

    def create_model(arch, pretrained, **keywords):
        """Stands for a download."""
        body = create(arch, pretrained=False, **keywords)
        if pretrained:
            body.conv1[0].weight.data.fill_(0.125)
        return body

    timm.create_model = create_model
    flags = ["--set", "backbone=timm", "arch=resnet10t", "frozen_stages=1"]
    flags += ["--weights", "imagenet"]
    run_train(*flags, out="whole")
    model = fcos.load("whole/model.pt")
    assert model.convention == fcos.FCOS(3, fcos.Timm("resnet10t")).convention
    assert not model.convention["bgr"]
    assert model.backbone.body.conv1[0].weight.eq(0.125).all()

    run_train_in_two_parts(*flags)
    whole, resumed = (torch.load(f"{out}/last.pt")["model"]["model"] for out in ("whole", "run"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert found_in_results() is not None


# ---- sampling, optimization, logging -------------------------------------------------------------


def test_repeat_factor_sampling_is_one_function(change):
    change(repeat_factor_sampling)


def repeat_factor_sampling():
    """Images with a star are repeated nine times."""
    import evaluate
    import train

    aspect_groups = train.aspect_groups

    def repeated(dataset, settings):
        star = dataset.classes.index("star")
        groups = aspect_groups(dataset, settings)
        has_star = np.array([star in dataset.target(i)[1] for i in range(len(dataset))])
        return tuple(np.repeat(rows, np.where(has_star[rows], 9, 1)) for rows in groups)

    train.aspect_groups = repeated
    settings = train.resolve(train.parse_args(["shapes", "--iters", "400"]))
    dataset = evaluate.CocoDataset(*evaluate.coco_paths("data/shapes", "train2017"))
    batches = train.TrainBatches(dataset, settings)
    wide, upright = map(len, batches.groups)
    assert len(dataset) < wide + upright and min(wide, upright) > 0
    share = upright / (wide + upright)
    assert (batches.group_of_step == 1).mean() == pytest.approx(share, abs=0.1)
    drawn = np.bincount(np.ravel([batches.plan(step).indices for step in range(400)]), minlength=8)
    expected = np.bincount(np.concatenate(batches.groups), minlength=8) / (wide + upright)
    assert drawn / drawn.sum() == pytest.approx(expected, abs=0.03)
    assert len(run_train()) == 4


def test_a_mosaic_is_one_function(change):
    change(mosaic)


def mosaic():
    """A sample shows four images. A broken one is named, even if others were read before it."""
    import evaluate
    import fcos
    import train

    def read(batches, i, hw, step, slot):
        others = batches.rng("mosaic", step, slot).choice(len(batches.dataset), 3).tolist()
        h, w = hw[0] // 2, hw[1] // 2
        image = torch.zeros(3, *hw, dtype=torch.uint8)
        parts = [batches.dataset.sample(k, (h, w)) for k in (i, *others)]
        for n, part in enumerate(parts):
            y, x = n // 2 * h, n % 2 * w
            image[:, y : y + h, x : x + w] = part.pop("image")
            part["boxes"] = part["boxes"] + torch.tensor([x, y, x, y])
        return {"image": image} | {n: torch.cat([part[n] for part in parts]) for n in parts[0]}

    settings = train.resolve(train.parse_args(["shapes", "--iters", "9"]))
    settings |= dict(batch_size=4, min_size=[64], max_size=96)
    dataset = evaluate.CocoDataset(*evaluate.coco_paths("data/shapes", "train2017"))
    plain = train.TrainBatches(dataset, settings)
    plans = [str(plain.plan(step)) for step in range(9)]
    boxes = sum(plain[0]["counts"])

    train.TrainBatches.read = read
    batches = train.TrainBatches(dataset, settings)
    assert [str(batches.plan(step)) for step in range(9)] == plans
    assert sum(batches[0]["counts"]) > boxes

    one = run_train(out="one")
    other = run_train("--workers", "1", "--accumulate", "2", out="other")
    for row, same in zip(one, other, strict=True):
        assert row["loss"] == pytest.approx(same["loss"], rel=1e-4)

    broken = Path("data/shapes/train2017/000000000003.jpg")
    broken.write_bytes(b"no image")
    with pytest.raises(fcos.UserError, match=str(broken)):
        run_train(out="third")


LOGGER = [
    (
        "train.py",
        "    def log(self, step, **values):\n",
        "    def log(self, step, **values):\n"
        '        print(json.dumps(values | {"step": step}), file=open(self.out / "board", "a"))\n',
    )
]


def test_optimizer_schedule_teacher_and_logger_resume_on_two_ranks(change):
    change(own_optimization, LOGGER, world_size=2)


def own_optimization():
    """AdamW with a rate for each part of the network, a cosine, and a teacher."""
    import copy

    import train

    def make_optimizer(model, settings):
        rates = {"backbone": 1e-4, "fpn": 1e-3, "head": 2e-3}
        groups = [{"params": getattr(model, n).parameters(), "lr": lr} for n, lr in rates.items()]
        return torch.optim.AdamW(groups, weight_decay=0.05)

    class Teacher:
        def __init__(self, model):
            self.model, self.student = copy.deepcopy(model), model

        def update(self, step):
            for own, new in zip(self.model.parameters(), self.student.parameters(), strict=True):
                own.data.lerp_(new.data, 0.5 / (step + 1))

        def state_dict(self):
            return self.model.state_dict()

        def load_state_dict(self, state):
            self.model.load_state_dict(state)

    def lr_at(step, lr, iters, warmup, decays=None):
        return lr / 2 * (1 + math.cos(math.pi * step / iters))

    train.make_optimizer = make_optimizer
    train.make_companions = lambda model, settings: {"teacher": Teacher(model)}
    train.lr_at = lr_at
    rows = run_train(out="whole")
    resumed = run_train_in_two_parts()
    torch.distributed.destroy_process_group()
    if os.environ["RANK"] == "1":
        return
    assert [row["lr"] for row in rows] == pytest.approx([lr_at(k, 1e-4, 4, 0) for k in range(4)])
    assert [row["loss"] for row in rows] == [row["loss"] for row in resumed]
    one, other = (torch.load(f"{out}/last.pt") for out in ("whole", "run"))
    for name in "optimizer", "teacher", "model":
        leaves, others = (torch.utils._pytree.tree_leaves(x[name]) for x in (one, other))
        for x, y in zip(leaves, others, strict=True):
            assert torch.equal(x, y) if torch.is_tensor(x) else x == y
    board = read_board("whole")
    assert len(board) == 6  # one rank writes: four rows of losses, two of metrics
    assert board == read_board("run")

    # Without the second rank.
    for name in "RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID":
        del os.environ[name]
    alone = run_train(out="alone")
    assert [row["loss"] for row in alone] == pytest.approx([row["loss"] for row in rows], rel=1e-3)


def read_board(out):
    """Return what the logger wrote, {(step, names): values}; a repeated step replaces the first."""
    board = {}
    for line in Path(out, "board").read_text().splitlines():
        row = json.loads(line)
        row.pop("images_per_second", None)
        board[row["step"], *row] = row
    return board
