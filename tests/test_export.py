"""The exported model: one graph for any number of images of any size."""

import json
import logging

import pytest
import torch
from conftest import assert_refused, detector

import fcos


class SmallBackbone(torch.nn.Module):
    """One convolution with a frozen norm: exporting a layer takes time."""

    strides = (8,)
    channels = (8,)

    def __init__(self):
        super().__init__()
        self.layer = fcos.ConvNorm(3, 8, 7, 8, norm="frozen")

    def forward(self, images):
        return [self.layer(images / 50).tanh()]


def one_class_model():
    """Build a model of one class and level that has fewer candidates than detections."""
    keywords = dict(candidate_threshold=0.1, topk=50, max_detections=300)
    model = fcos.FCOS(1, backbone=SmallBackbone(), channels=32, levels=(3,), ranges=(), **keywords)
    torch.nn.init.constant_(model.head.cls.bias, -1)
    torch.nn.init.constant_(model.head.box.bias, 2)
    return model


def two_level_model():
    """Build a small ResNet model with torchvision's scores and points."""
    model = detector(norm="frozen", topk=60, levels=(3, 4), ranges=(64,))
    model.set_convention(score="torchvision", grid="corner")
    model.classes = ["a", "b", "c"]
    model.category_ids = [1, 2, 4]
    return model


def noise(B, h, w):
    """Return B images and their sizes; the second is padded below, the third at the right."""
    images = torch.randint(256, (B, 3, h, w), dtype=torch.uint8)
    return images, torch.tensor([[h, w], [h - 16, w], [h, w - 28]][:B])


def assert_covered(found, expected, pixels=0.05, score=1e-3):
    """Check that all of `found` is in `expected`, except for the last: it may be exchanged."""
    for one, other in zip(fcos.as_list(found, 0.0), fcos.as_list(expected, 0.0), strict=True):
        assert abs(len(one["scores"]) - len(other["scores"])) <= 1
        full = len(other["scores"]) == len(found["scores"][0])
        last = other["scores"].min() if full else 0.0
        for d in (one["scores"] > last + score).nonzero()[:, 0].tolist():
            same = (other["boxes"] - one["boxes"][d]).abs().amax(1) < pixels
            same &= (other["scores"] - one["scores"][d]).abs() < score
            same &= other["labels"] == one["labels"][d]
            assert same.any(), (one["boxes"][d], one["scores"][d], one["labels"][d])
            for name in one.keys() - {"boxes", "scores", "labels"}:
                assert ((other[name][same] - one[name][d]).abs() < pixels).any()


def test_the_deployed_model_is_one_graph_for_any_number_of_images():
    model = fcos.Deployed(two_level_model())
    B = torch.export.Dim("B", min=1)
    program = torch.export.export(model, noise(2, 96, 128), dynamic_shapes=({0: B}, {0: B}))
    for count in (1, 3):
        inputs = noise(count, 96, 128)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(*inputs), model(*inputs))


def with_angle(monkeypatch):
    """Add an output "angle" to the head."""
    predict_level = fcos.Head.predict_level

    def predict_level_and_angle(head, *args):
        maps = predict_level(head, *args)
        return maps | {"angle": 2 * maps["ctr"]}

    monkeypatch.setattr(fcos.Head, "predict_level", predict_level_and_angle)


def export(model, path, monkeypatch):
    """Export a model to ONNX and start a session."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    # pytest would keep a line of torch's trace for every symbolic size, which takes minutes
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "handlers", [])
    fcos.export_onnx(model, path, 96, 128)
    return onnxruntime.InferenceSession(path)


@pytest.mark.parametrize("case", ["further output", "one class"])
def test_an_onnx_file_finds_what_the_model_finds_at_every_size(case, tmp_path, monkeypatch):
    if case == "further output":
        with_angle(monkeypatch)
        model = two_level_model()
    else:
        model = one_class_model()
    path = tmp_path / "model.onnx"
    model.train()
    model.backbone.eval()
    session = export(model, path, monkeypatch)
    assert model.training
    assert model.head.training
    assert not model.backbone.training
    model.eval()

    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["classes"]) == model.classes
    assert json.loads(metadata["category_ids"]) == model.category_ids
    assert json.loads(metadata["test_size"]) == list(model.test_size)
    names = [output.name for output in session.get_outputs()]
    further = ["angle"] if case == "further output" else []
    assert names == ["boxes", "scores", "labels", *further]

    import onnx

    graph = onnx.load(path).graph
    constants = {tensor.name for tensor in graph.initializer}
    weights = [node.input[1] for node in graph.node if node.op_type == "Conv"]
    assert weights
    assert constants.issuperset(weights)  # quantizers need folded norms

    total = 0
    for h, w, count in ((96, 128, 3), (32, 32, 1), (160, 64, 2), (320, 96, 1)):
        images, sizes = noise(count, h, w)
        results = session.run(None, {"images": images.numpy(), "sizes": sizes.numpy()})
        found = dict(zip(names, map(torch.from_numpy, results)))
        with torch.no_grad():
            expected = fcos.Deployed(model)(images, sizes)
        for name, values in expected.items():
            assert found[name].dtype == values.dtype
            assert found[name].shape == values.shape
        assert_covered(found, expected)
        assert_covered(expected, found)
        total += int((found["labels"] >= 0).sum())
    assert total > 100


def test_sizes_that_are_no_multiple_of_32_are_refused(tmp_path):
    pytest.importorskip("onnxscript")
    model = fcos.build("shapes", 2)
    call = lambda: fcos.export_onnx(model, tmp_path / "model.onnx", 100, 128)  # noqa: E731
    assert_refused(call, "100", "multiples of 32")
