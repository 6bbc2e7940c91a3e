"""The benchmarks' records, and the README's table of them."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

import fcos

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a module of tests/benchmarks, where they find each other by name."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "tests/benchmarks"), *sys.path])
    monkeypatch.setenv("FCOS_TEST_DEVICE", "cpu")
    monkeypatch.setenv("FCOS_KERNELS", "torch")
    for name in ("device", "record", "readme_table"):  # what they read at their import has changed
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module


def test_the_table_of_the_readme_is_what_was_measured(benchmark):
    text = (ROOT / "README.md").read_text()
    assert text == benchmark("readme_table").replaced(text), (
        "run python tests/benchmarks/readme_table.py"
    )


def test_torchvisions_side_trains_and_detects_with_our_backbone_and_pyramid(benchmark):
    accuracy = benchmark("accuracy")
    model = fcos.build("small", 3)
    strides = model.strides
    model = accuracy.Torchvision.of(model)
    images, sizes = torch.zeros(2, 3, 64, 96, dtype=torch.uint8), torch.tensor([[64, 96]] * 2)
    truths = [
        {"boxes": torch.tensor([[8.0, 8, 20, 30]]), "labels": torch.tensor([2])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    outputs = model.train()(images, sizes)
    assert outputs["levels"] == [rows * w for rows, w in fcos.level_sizes((64, 96), strides)]
    losses = model.loss_of(outputs, model.targets((64, 96), truths), None)
    assert all(loss.isfinite() for loss in losses.values()) and len(losses) == 3
    with torch.no_grad():
        model.head.head.classification_head.cls_logits.bias.fill_(3)
        found = model.decode(model(images, sizes), sizes)
    assert found["boxes"].shape[:2] == found["scores"].shape == found["labels"].shape
    assert found["scores"].max() > 0.2


def test_a_row_is_on_disk_as_it_comes_and_an_error_costs_no_other_row(benchmark, tmp_path):
    path = tmp_path / "results" / "some.json"
    log = benchmark("record").Record(path)
    seen = []

    def look():
        seen.append([row["side"] for row in json.loads(path.read_text())["results"]])

    def broken():
        raise RuntimeError("no such road")

    sides = {"torchvision": lambda: look, "broken": broken, "ours": lambda: (look, {"note": 1})}
    log.compare("nothing", sides, rounds=3)
    assert seen[0] == ["torchvision"] and len(seen) == 8
    theirs, failed, ours = json.loads(path.read_text())["results"]
    assert log.failed and "no such road" in failed["error"] and "median" not in failed
    assert theirs["rounds"] == ours["rounds"] == 3 and ours["note"] == 1
    assert ours["low"] <= ours["median"] <= ours["high"] and ours["of_torchvision"] > 0
