"""Recipes, flags and settings of train.py, and one line for every mistake in them."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_runs import (
    assert_same_run,
    command_line,
    copy_data,
    error_line,
    load_checkpoint,
    read_files,
    run,
    run_killed_at,
)

import evaluate
import fcos
import train
from fcos import UserError


def resolve(line=""):
    return train.resolve(train.parse_args(line.split()))


def find_data(line=""):
    return train.find_data(train.parse_args(line.split()))


# ---- recipes -----------------------------------------------------------------------------------


def test_every_recipe_names_a_row_of_models():
    assert {recipe["model"] for recipe in train.RECIPES.values()} <= fcos.MODELS.keys()


def test_a_recipe_with_a_missing_or_unknown_setting_is_an_error():
    with pytest.raises(TypeError, match="'iter'"):
        train.recipe("shapes", "none", **train.X1 | {"iter": 7})
    without_lr = {name: value for name, value in train.X1.items() if name != "lr"}
    with pytest.raises(TypeError, match="'lr'"):
        train.recipe("shapes", "none", **without_lr)


@pytest.mark.parametrize("decays", [[60_000, 80_000], [0.67, 0.89]])
def test_decays_that_are_no_eighteenths_are_refused(decays, monkeypatch):
    """Other projects count them in steps, or as shares of a run."""
    monkeypatch.setitem(train.RECIPES["shapes"], "decays", decays)
    with pytest.raises(fcos.UserError, match="decays .* expected eighteenths"):
        train.resolve(train.parse_args(["shapes"]))


def test_a_row_and_a_recipe_of_any_name_train_load_and_resume(shapes, tmp_path, monkeypatch):
    """Two lines in two tables are enough."""
    row = fcos.MODELS["shapes"] | dict(levels=(3, 4, 5), ranges=(64, 128))
    monkeypatch.setitem(fcos.MODELS, "mine", row)
    recipe = train.RECIPES["shapes"] | dict(
        model="mine", data=str(shapes), iters=4, batch_size=4, min_size=[64], max_size=96
    )
    monkeypatch.setitem(train.RECIPES, "overnight", recipe)
    monkeypatch.chdir(tmp_path)
    argv = ["overnight", "--checkpoint-every", "2", "--workers", "0", "--device", "cpu"]
    run([*argv, "--out", "whole"])
    run_killed_at(3, argv)
    run(argv)
    assert_same_run("runs/overnight", "whole")
    monkeypatch.delitem(fcos.MODELS, "mine")
    model = fcos.load("runs/overnight/model.pt")
    assert (model.name, model.strides) == ("mine", (8, 16, 32))
    evaluate.main(evaluate.parse_args(["whole/model.pt", "--data", str(shapes), "--workers", "0"]))


# ---- flags -------------------------------------------------------------------------------------


def test_flags_override_the_recipe():
    assert resolve()["recipe"] == "fcos_imprv_R_50_FPN_1x"
    line = "--iters 7 --min-size 5 6 --max-size 9 --weights w.pkl --seed 3 --ema 0.5"
    found = resolve(f"{line} --precision bf16")
    expected = dict(iters=7, min_size=[5, 6], max_size=9, weights="w.pkl", seed=3, ema=0.5)
    expected |= dict(precision="bf16", model="fcos_imprv_R_50_FPN", warmup=0, lr=0.01)
    assert {key: found[key] for key in expected} == expected


def test_the_learning_rate_follows_the_batch_size_unless_it_is_given():
    assert resolve("--batch-size 4")["lr"] == pytest.approx(0.0025)
    assert resolve("--batch-size 4 --lr 0.3")["lr"] == 0.3


@pytest.mark.parametrize("iters, warmup", [(4999, 499), (5000, 500), (90_000, 500)])
def test_the_warm_up_is_at_most_a_tenth_of_the_run(iters, warmup):
    assert resolve(f"--iters {iters}")["warmup"] == warmup


def test_set_changes_keywords_of_the_model_but_not_the_tables():
    before = json.dumps([train.RECIPES, fcos.MODELS])
    keywords = resolve()["keywords"]
    line = "--min-size 1 --set radius=0 levels=[3,4,5] ranges=[64,128] --set norm=bn"
    changes = dict(radius=0, levels=(3, 4, 5), ranges=(64, 128), norm="bn", test_size=(1, 1333))
    assert resolve(line)["keywords"] == keywords | changes
    assert json.dumps([train.RECIPES, fcos.MODELS]) == before


def test_keywords_from_the_command_line_are_stored_with_the_run(shapes, tmp_path, capsys):
    argv = command_line(shapes, tmp_path, "--iters", 2, "--checkpoint-every", 1)
    changes = ["radius=0", "quality=iou", "levels=[3,4,5,6]", "ranges=[32,64,128]"]
    changed = [*argv, "--set", *changes]
    run_killed_at(1, changed)
    keywords = dict(radius=0, quality="iou", levels=(3, 4, 5, 6), ranges=(32, 64, 128))
    row = fcos.MODELS["shapes"] | dict(test_size=(64, 96))
    stored = load_checkpoint(tmp_path)
    assert stored["model"]["keywords"] == fcos.resolve(row | keywords)
    assert stored["settings"]["keywords"] == stored["model"]["keywords"]
    assert "quality iou there, centerness here" in error_line(capsys, argv)
    assert "radius 0 there, 2 here" in error_line(capsys, [*changed, "radius=2"])
    run(changed)
    model = fcos.load(tmp_path / "model.pt")
    assert model.radius == 0
    assert model.strides == (8, 16, 32, 64)
    assert model.loss["quality"] == "iou"


def add_flag(monkeypatch, group):
    """Add the flag --mixup to a group of train.py's flags."""
    make_parser = train.make_parser

    def make_parser_with_flag():
        parser = make_parser()
        groups = {known.title: known for known in parser._action_groups}
        (groups.get(group) or parser.add_argument_group(group)).add_argument("--mixup")
        return parser

    monkeypatch.setattr(train, "make_parser", make_parser_with_flag)


@pytest.mark.parametrize("group", ["a new group", "what is trained, instead of the recipe's"])
def test_a_new_flag_is_stored_with_the_run(monkeypatch, group):
    """There is no list of flags that could forget it."""
    add_flag(monkeypatch, group)
    assert resolve("--mixup 3")["mixup"] == "3"
    assert resolve()["mixup"] is None


def test_flags_that_say_how_a_run_runs_are_not_stored(monkeypatch):
    add_flag(monkeypatch, train.HOW_IT_RUNS)
    flags = {"mixup", "out", "workers", "accumulate", "eval_every", "device", "fresh"}
    assert not resolve("--mixup 3").keys() & flags


# ---- data --------------------------------------------------------------------------------------


def test_the_data_is_that_of_the_recipe_or_of_a_flag():
    annotations, _ = find_data()["train"]
    assert annotations == Path("data/coco/annotations/instances_train2017.json")
    assert find_data("shapes")["val"][1] == Path("data/shapes/val2017")
    assert find_data("shapes --data here")["val"][1] == Path("here/val2017")


def test_four_flags_name_data_of_any_layout():
    line = "--train-images ti --train-annotations ta --val-images vi --val-annotations va"
    assert find_data(line) == {"train": ("ta", "ti"), "val": ("va", "vi")}
    with pytest.raises(UserError, match="all of --train-images, --train-annotations"):
        find_data("--train-images there")


# ---- mistakes ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wrong(tmp_path_factory, shapes):
    """Return a folder of data sets and weights with one mistake each."""
    folder = tmp_path_factory.mktemp("wrong")
    for name in ("no_json", "no_val", "no_images", "one_missing"):
        shutil.copytree(shapes, folder / name)
    (folder / "no_json" / "annotations" / "instances_train2017.json").unlink()
    (folder / "one_missing" / "val2017" / "000001000002.jpg").unlink()
    shutil.rmtree(folder / "no_val" / "val2017")
    shutil.rmtree(folder / "no_images" / "train2017")
    letters = [dict(id=id, name=name) for id, name in zip(train.SHAPES, "abcdef")]
    for name, split, change in [
        ("not_coco", "train", dict(images=None)),
        ("no_boxes", "train", dict(annotations=[])),
        ("other_classes", "val", dict(categories=letters)),
    ]:
        copy_data(
            shapes, folder / name, split, lambda content, change=change: content.update(change)
        )
    (folder / "junk.pkl").write_bytes(b"junk")
    torch.save({"settings": SimpleNamespace(lr=1)}, folder / "namespace.pt")
    return folder


MISTAKES = {  # the flags after "shapes --data DATA", unless they name a recipe, and the message
    "unknown recipe": ("fcos_R_51 --data {data}", "fcos_R_50_FPN_1x"),
    "no COCO": ("fcos_R_50_FPN_1x --data {wrong}/coco --weights none", "--train-images"),
    "no such data": ("shapes --data {wrong}/nowhere", "nowhere"),
    "no annotations": ("shapes --data {wrong}/no_json", "instances_train2017.json"),
    "no images": ("shapes --data {wrong}/no_images", "train2017"),
    "no validation images": ("shapes --data {wrong}/no_val", "val2017"),
    "an image missing": ("shapes --data {wrong}/one_missing", "000001000002.jpg"),
    "not COCO": ("shapes --data {wrong}/not_coco", "images: "),
    "no boxes": ("shapes --data {wrong}/no_boxes", "image with a box to train on"),
    "other classes": ("shapes --data {wrong}/other_classes", "'a'"),
    "one path of four": ("shapes --train-images {data}", "--val-annotations"),
    "no ImageNet weights": ("fcos_R_50_FPN_1x --data {data}", "R-50.pkl"),
    "no such weights": ("--weights none.pkl", "none.pkl"),
    "junk as weights": ("--weights {wrong}/junk.pkl", "junk.pkl"),
    "a program as weights": ("--weights {wrong}/namespace.pt", "SimpleNamespace"),
    "unknown keyword": ("--set radiu=1", "'radiu': expected one of backbone,"),
    "keyword of another backbone": ("--set backbone=mobilenet block=basic", "'block'"),
    "keyword without a value": ("--set radius", "KEYWORD=VALUE"),
    "keyword of no choice": (
        "--set radius=0 quality=best",
        "quality 'best': expected one of centerness, iou",
    ),
    "keyword of another kind": ("--set channels=wide", "channels 'wide'"),
    "keyword that is no number": ("--set channels=True", "channels True"),
    "keyword below 0": ("--set radius=-1", "radius -1"),
    "stage that does not exist": ("--set dcn=(9,)", "dcn (9,)"),
    "keywords that do not fit": ("--set groups=3", "groups"),
    "short side over the long": ("--min-size 500", "max_size 96"),
    "learning rate of 0": ("--lr 0", "--lr"),
    "learning rate that is no number": ("--lr nan", "--lr"),
    "average of 1": ("--ema 1", "--ema"),
    "batch of less than an image": ("--batch-size 2 --accumulate 4", "--batch-size"),
    "batch of 0": ("--batch-size 0", "--batch-size"),
    "batch of a hundred million": ("--batch-size 100000000", "--batch-size"),
    "a thousand workers": ("--workers 1000", "--workers"),
    "patience without evaluations": ("--patience 2", "--patience needs --eval-every"),
    "no such GPU": ("--device cuda", "--device cpu"),
    "negative seed": ("--seed -1", "--seed"),
    "negative workers": ("--workers -1", "--workers"),
    "unknown flag": ("--batchsize 4", "--batchsize"),
    "abbreviated flag": ("--batch 4", "--batch"),
}


@pytest.mark.parametrize("flags, text", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_and_changes_no_file(
    wrong, shapes, finished, tmp_path, monkeypatch, capsys, flags, text
):
    if "--device cuda" in flags and torch.cuda.is_available():
        pytest.skip("has a GPU")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    if flags.startswith("--"):
        flags = f"shapes --data {shapes} {flags}"
    recipe, *flags = flags.format(data=shapes, wrong=wrong).split()
    small = "--device cpu --iters 1 --min-size 64 --max-size 96"
    argv = [recipe, *small.split(), *flags]
    out = tmp_path / "new"
    assert text in error_line(capsys, [*argv, "--out", str(out)])
    assert not out.exists()

    before = read_files(finished.out)
    assert text in error_line(capsys, [*argv, "--out", str(finished.out), "--fresh"])
    assert read_files(finished.out) == before
