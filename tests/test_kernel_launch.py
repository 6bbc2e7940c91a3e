"""The choice between kernel and reference, the launcher, torch.compile, and errors of arguments."""

import contextlib
import functools
import os
import pathlib
import re
import subprocess
import sys
import types
import warnings

import cuda_shim
import numpy as np
import pytest
import torch
from kernel_inputs import FILES

from kernels import nms as nms_file
from kernels.assign import assign
from kernels.focal_loss import sigmoid_focal_loss, sigmoid_focal_loss_ref
from kernels.iou_loss import iou_loss, iou_loss_ref
from kernels.nms import batched_nms

pytestmark = pytest.mark.usefixtures("seeded")


# ---- dispatch


@pytest.fixture
def without_cupy(monkeypatch):
    """Let `import cupy` fail, and forget earlier attempts."""
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.delenv("FCOS_KERNELS", raising=False)
    for file in FILES.values():
        file._load.__wrapped__.cache_clear()
    yield
    for file in FILES.values():
        file._load.__wrapped__.cache_clear()


ON_GPU = types.SimpleNamespace(is_cuda=True, device=types.SimpleNamespace(index=0))
ON_CPU = types.SimpleNamespace(is_cuda=False)


@pytest.mark.parametrize("file", FILES.values(), ids=FILES)
def test_dispatch_falls_back_with_one_warning(file, without_cupy, monkeypatch):
    with pytest.warns(UserWarning, match="cupy") as caught:
        assert not file._use_kernel(ON_GPU)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not file._use_kernel(ON_GPU)
        assert not file._use_kernel(ON_CPU)
        monkeypatch.setenv("FCOS_KERNELS", "torch")
        assert not file._use_kernel(ON_GPU)
        monkeypatch.setenv("FCOS_KERNELS", "cupy")
        assert not file._use_kernel(ON_CPU)
        with pytest.raises(ImportError, match=r"pip install cupy-cuda\d+x"):
            file._use_kernel(ON_GPU)
    monkeypatch.setenv("FCOS_KERNELS", "triton")
    with pytest.raises(ValueError, match="triton.*cupy or torch"):
        file._use_kernel(ON_CPU)


@pytest.mark.parametrize("file", FILES.values(), ids=FILES)
def test_a_failure_during_a_capture_is_not_kept(file, without_cupy, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for _ in range(2):
        with pytest.raises(ImportError, match="before the capture"):
            file._use_kernel(ON_GPU)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    module = types.SimpleNamespace(get_function=lambda name: name)
    cupy = types.SimpleNamespace(RawModule=lambda code, options: module)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    assert file._use_kernel(ON_GPU)
    assert list(file._load(0, "")) == list(file.KERNELS)


CALLS = {  # x: (5, 4) with a gradient, labels: (5,)
    "iou_loss": lambda x, labels: iou_loss(x, x.detach().flip(0), x[:, 0].detach()),
    "focal_loss": sigmoid_focal_loss,
    "assign": lambda x, labels: assign(torch.cat((x, 64 * x[:, :1]), dim=1), [x, x[:2]], 0),
    "nms": lambda x, labels: batched_nms(x[None], x[None, :, 0], labels[None], 0.5, 3),
}


@pytest.mark.parametrize("kernel", [False, True], ids=["reference", "kernel"])
@pytest.mark.parametrize("name", CALLS)
def test_torch_compile_gives_the_same_results(name, kernel, monkeypatch):
    """It traces the references except for NMS, whose loop on the CPU ends early. It breaks the
    graph at the launch of a kernel."""
    if kernel:
        cuda_shim.install(monkeypatch, FILES[name])
    torch._dynamo.reset()
    whole = not kernel and name != "nms"
    x = torch.rand(5, 4).cumsum(1).requires_grad_()
    labels = torch.tensor([-1, 0, 3, 1, 2])
    results = []
    for run in (CALLS[name], torch.compile(CALLS[name], backend="eager", fullgraph=whole)):
        result = 2 * run(1 * x, labels)
        grad = torch.autograd.grad(result, x) if result.requires_grad else ()
        results.append((result.detach(), *grad))
    assert len(results[0]) == (2 if "loss" in name else 1)
    torch.testing.assert_close(*results)


def test_the_launcher_follows_pytorch(monkeypatch):
    """Replace CuPy by an object that records the stream, the grid and the pointers of a launch."""
    log = []

    class Within:
        def __init__(self, *what):
            self.what = what

        def __enter__(self):
            log.append(self.what)

        def __exit__(self, *_):
            log.append("left")

    now = types.SimpleNamespace(cuda_stream=1234)
    stream = types.SimpleNamespace(
        from_external=lambda stream: Within("stream", stream.cuda_stream)
    )
    cuda = types.SimpleNamespace(Stream=stream)
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=cuda))
    monkeypatch.setattr(torch.cuda, "device", lambda device: Within("device", device))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: now)
    kernels = {"nms": lambda *args: log.append(args)}
    monkeypatch.setattr(nms_file, "_load", lambda device, choice: kernels)
    tensor = torch.zeros(4)
    number = np.int32(7)
    nms_file._launch("nms", (3,), 64, tensor, number)
    assert log == [
        ("device", tensor.device),
        ("stream", 1234),
        ((3,), (64,), (tensor.data_ptr(), number)),
        "left",
        "left",
    ]


WIDE = {  # the arguments that a kernel reads or writes 16 bytes at a time
    "iou_loss": (0, 1, 3),
    "nms": (0,),
    "assign": (1,),
    "forward_fp32": (0,),
    "backward_fp32": (0, 3),
}


def test_arguments_that_are_read_16_bytes_at_a_time_are_aligned(on_shim, monkeypatch):
    def shifted(x):
        """Return a copy that does not start at a multiple of 16 bytes."""
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)

    def watched(launch, name, grid, threads, *args):
        assert not [place for place in WIDE[name] if args[place].data_ptr() % 16]
        ran.append(name)
        launch(name, grid, threads, *args)

    ran = []
    for file in FILES.values():
        monkeypatch.setattr(file, "_launch", functools.partial(watched, file._launch))
    pred = shifted(torch.rand(5, 4))
    target = shifted(torch.rand(5, 4))
    logits = shifted(torch.randn(5, 3))
    labels = torch.arange(-1, 4)
    boxes = shifted(torch.tensor([[0, 0, 9, 9], [1, 1, 9, 9], [20, 20, 30, 30.0]]))
    assert all(x.data_ptr() % 16 for x in (pred, target, logits, boxes))
    for loss, reference, leaf, other in (
        (iou_loss, iou_loss_ref, pred, (target, torch.ones(5))),
        (sigmoid_focal_loss, sigmoid_focal_loss_ref, logits, (labels,)),
    ):
        leaf.requires_grad_()
        found = loss(leaf, *other)
        expected = reference(leaf, *other)
        torch.testing.assert_close(found, expected)
        (grad,) = torch.autograd.grad(found, leaf)
        (expected_grad,) = torch.autograd.grad(expected, leaf)
        torch.testing.assert_close(grad, expected_grad)
    scores = torch.tensor([[0.9, 0.8, 0.7]])
    one_class = torch.zeros(1, 3, dtype=torch.int64)
    assert batched_nms(boxes[None], scores, one_class, 0.5, 3).tolist() == [[0, 2, -1]]
    points = torch.tensor([[5.0, 5, 8, -1, 64], [25, 25, 8, -1, 64]])
    assert assign(points, [boxes], 0).tolist() == [[1, 2]]
    assert set(ran) == set(WIDE)


def test_the_launcher_is_the_same_in_every_file():
    texts = [pathlib.Path(file.__file__).read_text() for file in FILES.values()]
    launcher = re.compile(r"# ---- launcher.*?(?=# ---- operator)", re.DOTALL)
    assert len({launcher.search(text)[0] for text in texts}) == 1


def test_kernel_files_import_nothing_of_this_repository():
    allowed = {"functools", "os", "warnings", "numpy", "torch", "torchvision", "cupy"}
    for file in FILES.values():
        text = pathlib.Path(file.__file__).read_text()
        imports = re.findall(r"^ *(?:import|from) +(\w+)", text, re.MULTILINE)
        assert set(imports) <= allowed, file.__name__


def test_the_cpu_path_imports_no_cupy_and_starts_no_cuda():
    code = """
import sys, torch
from kernels.assign import assign
from kernels.focal_loss import sigmoid_focal_loss
from kernels.iou_loss import iou_loss
from kernels.nms import batched_nms
x = torch.rand(3, 4)
label = torch.zeros(3, dtype=torch.int64)
iou_loss(x, x, x[:, 0]), sigmoid_focal_loss(x, label)
assign(torch.rand(3, 5), [x], 1.5)
batched_nms(x[None], x[None, :, 0], label[None], 0.6, 2)
assert "cupy" not in sys.modules and not torch.cuda.is_initialized()
"""
    root = pathlib.Path(__file__).parents[1]
    environment = {k: v for k, v in os.environ.items() if k != "FCOS_KERNELS"}
    subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, check=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, k: iou_loss(x, x, x[:, 0], "diou"), "'diou'; choose one of iou, lin"),
        (lambda x, k: iou_loss(x[:, :3], x, x[:, 0]), r"\(N, 4\).*found \(3, 3\)"),
        (lambda x, k: iou_loss(x, x, x), r"weight \(N,\), found .* and \(3, 4\)"),
        (lambda x, k: sigmoid_focal_loss(x[0], k), r"logits: .*\(4,\)"),
        (lambda x, k: sigmoid_focal_loss(x, k.int()), r"labels: .*\(3,\) torch.int32"),
        (lambda x, k: assign(x, [x], 1.5), r"points: .*\(3, 4\)"),
        (lambda x, k: assign(torch.rand(2, 5), [], 1.5), "boxes: .*none"),
        (lambda x, k: assign(torch.rand(2, 5), [x, x[0]], 1), r"boxes of image 1: .*\(4,\)"),
        (lambda x, k: assign(torch.rand(2, 5), [x], -1), "center_radius -1"),
        (lambda x, k: batched_nms(x, x[:, 0], k, 0.6, 9), r"\(B, N, 4\).*found \(3, 4\)"),
        (lambda x, k: batched_nms(x[None], x[None, :, 0], k[None], 6, 9), "iou_threshold 6"),
        (lambda x, k: batched_nms(x[None], x[None, :, 0], k[None], 0.6, 0), "max_detections 0"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.rand(3, 4), torch.zeros(3, dtype=torch.int64))
