"""The records of the benchmarks, and the tables of tests/benchmarks/README.md."""

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
    """Return a function that imports a module of tests/benchmarks by name."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "tests/benchmarks"), *sys.path])
    monkeypatch.setenv("FCOS_TEST_DEVICE", "cpu")
    monkeypatch.setenv("FCOS_KERNELS", "torch")
    for name in ("device", "record", "readme_table"):  # read the environment again
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module


def test_the_tables_of_the_readme_are_what_was_measured(benchmark):
    tables = benchmark("readme_table")
    text = tables.README.read_text()
    assert {name for _, name, _ in tables.BLOCK.findall(text)} == tables.BLOCKS.keys()
    assert text == tables.replaced(text), "run python tests/benchmarks/readme_table.py"


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


def test_a_part_measured_again_replaces_its_rows(benchmark, tmp_path):
    record = benchmark("record")
    path = tmp_path / "train.json"
    for parts in (["eager", "graph"], ["graph"]):
        log = record.Record(path, parts)
        for part in parts:
            log.common = {"part": part}
            log.add(side=f"{part} of {parts}")
    rows = json.loads(path.read_text())["results"]
    assert [row["side"] for row in rows] == ["eager of ['eager', 'graph']", "graph of ['graph']"]
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"date": "2020-01-01"}))
    assert record.Record(path, ["graph"]).content["results"] == []  # rows of another day


def test_a_ratio_compares_equal_settings(benchmark, tmp_path, monkeypatch):
    tables = benchmark("readme_table")
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    sides = {
        "torchvision": 40.0,
        "torchvision, channels_last, bf16": 20.0,
        "ours, bf16": 10.0,
        "ours, bf16, CUDA graph": 5.0,
    }
    rows = [
        {"what": "inference", "side": side, "unit": "ms", "median": ms, "low": ms, "high": ms}
        for side, ms in sides.items()
    ]
    record = {"gpu": "NVIDIA X", "results": rows}
    (tmp_path / "model.json").write_text(json.dumps(record))
    lines = list(tables.speed_rows("model"))
    assert lines == [
        "| inference: bf16 | X | 10 (10 to 10) ms | 20 (20 to 20) ms | 0.5 |  |",
        "| inference: bf16, CUDA graph | X | 5 (5 to 5) ms | - | - |  |",
    ]


def test_group_norm_in_the_layout_of_convolutions_is_group_norm(benchmark):
    """Compare with float64: some versions of Inductor silently computed a wrong GroupNorm."""
    norm = benchmark("bench_train").ChannelsLastGroupNorm(32, 64).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(2, 64, 5, 7, dtype=torch.float64).mul_(3).add_(40).requires_grad_()
    x_last = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    upstream = torch.randn(x.shape, dtype=torch.float64)
    found = norm(x_last)
    expected = torch.nn.functional.group_norm(x, 32, norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)
    (one,) = torch.autograd.grad(found, x_last, upstream)
    (other,) = torch.autograd.grad(expected, x, upstream)
    torch.testing.assert_close(one, other)
