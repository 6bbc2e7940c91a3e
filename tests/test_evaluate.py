"""Prediction over a data set, in one process and two, and the command line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from coco_files import CATEGORIES, box, edit, first_row, run_evaluate, run_script, write_coco
from conftest import coco_model

import evaluate
import fcos
from fcos import UserError

ROOT = Path(__file__).resolve().parents[1]


# ---- prediction ----------------------------------------------------------------------------------


class PixelModel(torch.nn.Module):
    """Stands for FCOS: its scores and boxes are the mean pixel and the size of each image."""

    test_size = (64, 96)
    convention = fcos.CONVENTION
    pixel_mean = torch.zeros(1)
    predict = fcos.FCOS.predict
    rescale = fcos.FCOS.rescale

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.shapes = []  # of the batches

    def forward(self, images, sizes):
        assert not self.training
        assert images.dtype == torch.uint8
        self.shapes.append(tuple(images.shape))
        return images

    def decode(self, images, sizes):
        boxes = []
        scores = []
        for image, (h, w) in zip(images, sizes.tolist()):
            assert image[:, h:].sum() == 0
            assert image[:, :, w:].sum() == 0
            scores.append([image[:, :h, :w].double().mean().item() / 256])
            boxes.append([[w / 4, h / 4, w, h]])
        labels = torch.ones(len(images), 1).long()
        return {"boxes": torch.tensor(boxes), "scores": torch.tensor(scores), "labels": labels}


@pytest.mark.parametrize("batch_size, workers", [(1, 0), (4, 0), (4, 2)])
def test_every_image_is_predicted_once_in_its_original_pixels(mixed_coco, batch_size, workers):
    dataset = evaluate.CocoDataset(*mixed_coco)
    model = PixelModel().train()
    results = evaluate.predict(model, dataset, batch_size, workers)
    assert model.training
    assert [result["image_id"] for result in results] == list(range(7))
    assert {result["category_id"] for result in results} == {7}  # the id of label 1
    for result, (h, w) in zip(results, dataset.hw.tolist()):
        assert result["bbox"] == pytest.approx([w / 4, h / 4, w * 3 / 4, h * 3 / 4], rel=1e-6)
    assert results == evaluate.predict(PixelModel(), dataset, 1, 0)
    assert all(shape[0] <= batch_size for shape in model.shapes)
    json.dumps(results)  # plain Python values only


def test_images_are_resized_to_the_test_size_of_the_model(mixed_coco):
    dataset = evaluate.CocoDataset(*mixed_coco)
    for test_size, expected in (
        ((64, 96), {(64, 64), (64, 96), (96, 64)}),
        ((32, 40), {(32, 32), (32, 64), (64, 32)}),
    ):
        model = PixelModel()
        model.test_size = test_size
        evaluate.predict(model, dataset, 8, 0)
        assert {shape[2:] for shape in model.shapes} == expected


@pytest.mark.parametrize("tta", [False, True])
@pytest.mark.parametrize("inclusive", [False, True])
def test_a_data_set_is_predicted_as_its_images_are(mixed_coco, inclusive, tta):
    """In both, the pixel that inclusive boxes lack is one of the original image."""
    dataset = evaluate.CocoDataset(*mixed_coco)
    model = coco_model()
    model.test_size = (32, 48)
    model.set_convention(inclusive=inclusive)
    results = evaluate.predict(model, dataset, 1, 0, tta=tta)
    found = model.predict([dataset.path(i) for i in range(len(dataset))], tta=tta)
    boxes = torch.tensor([result["bbox"] for result in results])
    boxes[:, 2:] += boxes[:, :2]
    torch.testing.assert_close(boxes, torch.cat([one["boxes"] for one in found]))
    scores = torch.tensor([result["score"] for result in results])
    torch.testing.assert_close(scores, torch.cat([one["scores"] for one in found]))


@pytest.mark.parametrize("tta", [False, True])
def test_saved_results_score_as_the_prediction_did(tmp_path, mixed_coco, model_file, capsys, tta):
    annotations, folder = mixed_coco
    saved = tmp_path / "results.json"
    data = ("--annotations", annotations, "--image-dir", folder, "--workers", 0)
    flags = ("--save-json", saved, "--per-class", "--device", "cpu", *["--tta"] * tta)
    run_evaluate(model_file, *data, *flags)
    printed = capsys.readouterr().out
    run_evaluate("--results", saved, "--annotations", annotations, "--per-class")
    assert capsys.readouterr().out == printed
    names = [line.split()[0] for line in printed.splitlines()]
    of_classes = [
        f"{metric}/{name}"
        for name in ("three", "seven", "ninety")
        for metric in ("AP", "F1", "threshold")
    ]
    assert names == [*evaluate.METRICS, "F1", "threshold", *of_classes]

    rows = json.loads(saved.read_text())
    dataset = evaluate.CocoDataset(annotations, folder)
    assert rows == evaluate.predict(fcos.load(model_file), dataset, 1, 0, tta=tta)
    assert rows[0].keys() == {"image_id", "category_id", "bbox", "score"}
    assert {row["category_id"] for row in rows} <= {3, 7, 90}


def test_pycocotools_reads_saved_results(tmp_path, mixed_coco, model_file, capsys):
    from pycocotools.coco import COCO

    annotations, folder = mixed_coco
    saved = tmp_path / "results.json"
    data = ("--annotations", annotations, "--image-dir", folder, "--workers", 0)
    run_evaluate(model_file, *data, "--save-json", saved, "--device", "cpu")
    found = COCO(str(annotations)).loadRes(str(saved))
    assert len(found.anns) == len(json.loads(saved.read_text())) > 20


# ---- several processes -------------------------------------------------------------------------


TWO_PROCESSES = """
import argparse, json, sys
import torch
import evaluate

settings = json.loads(sys.argv[1])
reads = []
read_json = evaluate.read_json


def read_and_count(*args):
    reads.append(args)
    return read_json(*args)


def main(args):
    for argv in settings["calls"]:
        evaluate.main(evaluate.parse_args(argv))
    rank, _, _ = evaluate.start_process("cpu")
    evaluate.read_json = read_and_count
    dataset = evaluate.load_dataset(settings["annotations"], settings["folder"])
    report = {
        "reads": len(reads),
        "boxes": dataset.boxes.tolist(),
        "areas": dataset.annotations.areas.tolist(),
        "image_ids": dataset.image_ids.tolist(),
        "sample": sorted(dataset.sample(1, (9, 9))),
    }
    with open(f"{settings['out']}/{rank}.json", "w") as file:
        json.dump(report, file)
    torch.distributed.barrier()  # torchrun ends all processes when the first one fails
    evaluate.load_dataset(settings["wrong"], settings["folder"])


evaluate.run(main, argparse.Namespace())
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, mixed_coco, model_file):
    """Run evaluate.py in two processes under torchrun, and load two data sets there.

    Returns the folder of what was written, the completed process, and the command lines.
    """
    out = tmp_path_factory.mktemp("two")
    one_image = write_coco(out / "one", {5: (40, 30)}, [box(1, 5, [1, 1, 9, 9])])
    boxes = write_coco(out / "boxes", {1: (20, 20), 2: (20, 20)}, [box(1, 1, [1, 1, 5, 5])])
    wrong = out / "wrong.json"
    shutil.copy(boxes[0], wrong)
    edit(wrong, annotations=first_row(bbox=[1, 2]))
    calls = [
        f"{model_file} --device cpu --workers 0 --annotations {annotations} --image-dir {folder} "
        f"--batch-size {batch_size} --save-json {out}/{name}.json".split()
        for name, (annotations, folder), batch_size in (
            ("batches-1", mixed_coco, 1),
            ("batches-4", mixed_coco, 4),
            ("one-image", one_image, 1),
        )
    ]
    settings = dict(calls=calls, annotations=boxes[0], folder=boxes[1], wrong=wrong, out=out)
    (out / "script.py").write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [out / "script.py", json.dumps(settings, default=str)]
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    return out, done, calls


def test_two_processes_predict_what_one_does(two_processes, tmp_path):
    out, done, calls = two_processes
    assert done.stdout.count("AP50") == len(calls)  # only rank 0 prints
    for argv in calls:
        *flags, saved = argv
        run_evaluate(*flags, tmp_path / "alone.json")
        alone = json.loads((tmp_path / "alone.json").read_text())
        assert json.loads(Path(saved).read_text()) == alone
        assert len(alone) > 20


def test_one_process_reads_the_annotations_for_all(two_processes):
    out, done, _ = two_processes
    reports = [json.loads((out / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [report.pop("reads") for report in reports] == [1, 0]
    expected = {
        "boxes": [[1, 1, 6, 6]],
        "areas": [25],
        "image_ids": [1, 2],
        "sample": ["boxes", "image", "labels"],
    }
    assert reports == [expected, expected]


def test_an_error_of_the_reader_ends_all_processes(two_processes):
    _, done, _ = two_processes
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("script.py: ")]
    # torchrun may end the other process before it prints
    assert errors
    assert all("annotations[0].bbox" in line for line in errors), done.stderr


# ---- the classes of a model --------------------------------------------------------------------


def test_categories_must_be_the_classes_of_the_model(mixed_coco):
    dataset = evaluate.CocoDataset(*mixed_coco)
    evaluate.check_classes(coco_model(), dataset)
    evaluate.check_classes(coco_model(ids=(1, 2, 3)), dataset)  # ids may differ
    for classes, message in (
        (("three", "eight", "ninety"), "seven.*eight|eight.*seven"),
        (("three",), "None"),
        (("three", "seven", "ninety", "more"), "'more'"),
    ):
        model = coco_model(classes, range(len(classes)))
        with pytest.raises(UserError, match=message):
            evaluate.check_classes(model, dataset)


def test_without_class_names_as_many_categories_sorted_by_id_are_needed(tmp_path, mixed_coco):
    annotations, folder = mixed_coco
    model = coco_model()
    model.classes = None
    path = Path(shutil.copy(annotations, tmp_path))
    edit(path, categories=lambda rows: sorted(rows, key=lambda row: row["id"]))
    evaluate.check_classes(model, evaluate.CocoDataset(path, folder))
    dataset = evaluate.CocoDataset(annotations, folder)
    with pytest.raises(UserError, match="expected categories sorted by id"):
        evaluate.check_classes(model, dataset)
    model.num_classes = 4
    with pytest.raises(UserError, match="expected 4 classes, found 3"):
        evaluate.check_classes(model, dataset)


# ---- command line ------------------------------------------------------------------------------


MISTAKES = {  # the command line, and what the message names
    "nothing": ("", "model"),
    "no data": ("{model}", "--data"),
    "no such model": ("{tmp}/none.pt --data {tmp}", "none.pt"),
    "a model of junk": ("{tmp}/junk.pt --data {tmp}", "junk.pt"),
    "no such data": ("{model} --data {tmp}/nowhere", "nowhere"),
    "no such annotations": ("{model} --annotations {tmp}/none.json --image-dir {dir}", "none.json"),
    "no such images": ("{model} --annotations {json} --image-dir {tmp}/none", "none"),
    "annotations without images": ("{model} --annotations {json}", "--image-dir"),
    "no such picture": ("{model} --images {tmp}/none.jpg --out {tmp}/out", "none.jpg"),
    "a folder without pictures": ("{model} --images {tmp}/empty --out {tmp}/out", "empty"),
    "no out": ("{model} --images {dir}", "--out"),
    "out is a file": ("{model} --images {dir} --out {json}", "instances.json"),
    "results alone": ("--results {json}", "--annotations"),
    "no such results": ("--results {tmp}/none.json --annotations {json}", "none.json"),
    "results that are none": ("--results {json} --annotations {json}", "list"),
    "results against no COCO": (
        "--results {tmp}/list.json --annotations {tmp}/list.json",
        "list.json",
    ),
    "unknown model name": ("{tmp}/state.pt --model fcos_R_51 --data {tmp}", "fcos_R_51"),
    "another model's name": ("{model} --model fcos_R_50_FPN --data {tmp}", "fcos_R_50_FPN"),
    "a foreign file without name": ("{tmp}/state.pt --data {tmp}", "pass one of"),
    "other categories": (
        "{model} --annotations {tmp}/other/instances.json --image-dir {dir}",
        "eight",
    ),
    "a broken image, read here": (
        "{model} --annotations {tmp}/torn/instances.json --image-dir {tmp}/torn/images --workers 0",
        "1.png",
    ),
    "a broken image, read by a worker": (
        "{model} --annotations {tmp}/torn/instances.json --image-dir {tmp}/torn/images --workers 1",
        "1.png",
    ),
    "nowhere to save": ("{here} --workers 0 --save-json {tmp}/none/results.json", "results.json"),
    "an input to save over": ("{here} --workers 0 --save-json {json}", "input of this run"),
    "pictures to save": (
        "{model} --images {dir} --out {tmp}/o --save-json {tmp}/r.json",
        "needs --data",
    ),
    "out without pictures": ("{here} --out {tmp}/o", "--images"),
    "two things to do": ("{here} --images {dir} --out {tmp}/o", "choose one of"),
    "a threshold of NaN": ("{model} --images {dir} --out {tmp}/o --score-threshold nan", "nan"),
    "a pipe as model": ("{tmp}/pipe --data {tmp}", "pipe"),
    "a pipe as results": ("--results {tmp}/pipe --annotations {json}", "pipe"),
    "a pipe as a picture": ("{model} --images {tmp}/pipe --out {tmp}/o", "could not be read"),
    "annotations of no image": (
        "{model} --annotations {tmp}/alien.json --image-dir {dir}",
        "no annotation belongs to an image",
    ),
    "export into nowhere": ("{model} --export {tmp}/none/m.onnx", "m.onnx"),
    "a keyword of training": ("{model} --data {tmp} --set radius=0", "max_detections"),
    "tiles of nothing": ("{model} --export m.onnx --tile 64", "--tile needs"),
    "a tile that is too small": ("{model} --images {dir} --out {tmp}/o --tile 8", "--tile"),
    "no GPU": ("{model} --data {tmp} --device cuda", "--device cpu"),
    "unknown flag": ("{here} --min-siz 5", "--min-siz"),
    "no number": ("{here} --batch-size many", "--batch-size"),
    "batch of none": ("{here} --batch-size 0", "--batch-size"),
    "size of none": ("{here} --min-size 0", "--min-size"),
    "negative size": ("{here} --max-size -1", "--max-size"),
    "negative workers": ("{here} --workers -1", "--workers"),
    "no such device": ("{here} --device tpu", "--device"),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory, mixed_coco, model_file):
    """Return the files and folders that MISTAKES names."""
    annotations, images = mixed_coco
    tmp = tmp_path_factory.mktemp("mistakes")
    (tmp / "empty").mkdir()
    (tmp / "junk.pt").write_bytes(b"junk")
    (tmp / "list.json").write_text("[]")
    torch.save({"rpn.head.cls_logits.weight": torch.zeros(3, 1, 1, 1)}, tmp / "state.pt")
    os.mkfifo(tmp / "pipe")
    content = json.loads(annotations.read_text())
    for row in content["annotations"]:
        row["image_id"] = f"image {row['image_id']}"
    (tmp / "alien.json").write_text(json.dumps(content))
    write_coco(tmp / "other", {0: (64, 64)}, [], [CATEGORIES[0] | dict(name="eight")])
    _, torn = write_coco(tmp / "torn", {1: (64, 64)}, [])
    (torn / "1.png").write_bytes((torn / "1.png").read_bytes()[:300])
    here = f"{model_file} --annotations {annotations} --image-dir {images}"
    return dict(tmp=tmp, model=model_file, json=annotations, dir=images, here=here)


@pytest.mark.parametrize("line, named", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(places, monkeypatch, capsys, line, named):
    if "--device cuda" in line and torch.cuda.is_available():
        pytest.skip("has a GPU")
    if "--save-json" in line:  # refused before hours of work are lost
        monkeypatch.setattr(evaluate, "predict", lambda *_: pytest.fail("predicted"))
    argv = line.format(**places).split()
    if "--device" not in argv:
        argv += ["--device", "cpu"]
    code, lines = run_script(capsys, *argv)
    assert code == 2
    assert named in lines[-1]
    if named != "could not be read":  # images are named one by one, then counted
        assert len(lines) == 1


def test_a_folder_is_drawn(places, tmp_path):
    flags = ("--out", tmp_path, "--score-threshold", 0.4, "--device", "cpu")
    run_evaluate(places["model"], "--images", places["dir"], *flags)
    assert len(list(tmp_path.glob("*.jpg"))) == 7
    for row in json.loads((tmp_path / "detections.json").read_text()):
        scores = [found["score"] for found in row["detections"]]
        assert scores
        assert min(scores) >= 0.4
