"""The four kernels on a GPU: values, streams, graphs, devices, views, autocast, no waiting.

FCOS_KERNELS=cupy is set, so that a fallback to PyTorch is an error. tests/gpu.sh runs this file.
"""

import cuda_shim
import pytest
import torch
from device import (
    DEVICE,
    STAND_IN,
    capture,
    late_stream,
    needs_gpu,
    only_cuda,
    peak_bytes,
    tensors,
    waiting_is_an_error,
)
from kernel_inputs import candidates, location_grid, logits_and_labels, ltrb_pairs, random_boxes

from kernels import assign as assign_file
from kernels import focal_loss as focal_file
from kernels import iou_loss as iou_file
from kernels import nms as nms_file
from kernels.assign import assign, assign_ref
from kernels.focal_loss import sigmoid_focal_loss, sigmoid_focal_loss_ref
from kernels.iou_loss import KINDS, iou, iou_loss, iou_loss_ref
from kernels.nms import batched_nms, batched_nms_ref

pytestmark = needs_gpu
SIZES = (1, 33) if STAND_IN else (1, 33, 257, 5000)
MANY = 300 if STAND_IN else 75_000
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _force_the_kernels(monkeypatch):
    monkeypatch.setenv("FCOS_KERNELS", "cupy")
    if STAND_IN:
        for file in (assign_file, focal_file, iou_file, nms_file):
            cuda_shim.install(monkeypatch, file)
    torch.manual_seed(0)


def value_and_grad(loss, leaf, *args):
    leaf = leaf.detach().requires_grad_()
    value = loss(leaf, *args)
    return value.detach(), torch.autograd.grad(3 * value, leaf)[0]


def alone(function, *args):
    return (function(*args),)


def operators(device=DEVICE):
    """Return {name: (function, reference, arguments)}, a small call of each kernel."""
    pred, target, weight = (x.to(device) for x in ltrb_pairs(300))
    logits, labels = (x.to(device) for x in logits_and_labels(300, 80))
    points = location_grid(100, 140).to(device)
    boxes = [random_boxes(n, 100, 140).to(device) for n in (5, 0, 300)]
    found = tuple(x.to(device) for x in candidates(2, 300, 3))
    return {
        "iou": (value_and_grad, (iou_loss, iou_loss_ref), (pred, target, weight)),
        "focal": (value_and_grad, (sigmoid_focal_loss, sigmoid_focal_loss_ref), (logits, labels)),
        "assign": (alone, (assign, assign_ref), (points, boxes, 1.5)),
        "nms": (alone, (batched_nms, batched_nms_ref), (*found, 0.5, 50)),
    }


NAMES = ("iou", "focal", "assign", "nms")


def close(results, expected):
    for mine, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", SIZES)
def test_iou_loss_values(kind, n):
    args = *(x.to(DEVICE) for x in ltrb_pairs(n)), kind
    results = value_and_grad(iou_loss, *args)
    close(results, value_and_grad(iou_loss_ref, *args))
    assert (results[1][args[2] == 0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("classes", [1, 3, 80, 91])
def test_focal_loss_values(dtype, n, classes):
    logits, labels = (x.to(DEVICE) for x in logits_and_labels(n, classes, dtype))
    value, grad = value_and_grad(sigmoid_focal_loss, logits, labels)
    expected, expected_grad = value_and_grad(sigmoid_focal_loss_ref, logits.double(), labels)
    assert value.dtype == torch.float32 and grad.dtype == dtype
    torch.testing.assert_close(value, expected.float(), rtol=1e-5, atol=1e-6)
    rtol = 2e-5 + torch.finfo(dtype).eps / 2
    torch.testing.assert_close(grad.double(), expected_grad, rtol=rtol, atol=2e-7)


@pytest.mark.parametrize("radius", [0, 1.5])
def test_assign_values(radius):
    points = location_grid(*(96, 128) if STAND_IN else (800, 1088)).to(DEVICE)
    for counts in ((0,), (1, 0, 5), (255, 256, 257), (300 if STAND_IN else 3000,)):
        boxes = [random_boxes(n, 800, 1088).to(DEVICE) for n in counts]
        assert torch.equal(assign(points, boxes, radius), assign_ref(points, boxes, radius))


@pytest.mark.parametrize("n", [0, *SIZES, MANY])
def test_nms_values(n):
    args = *(x.to(DEVICE) for x in candidates(3, n, 80)), 0.6, 100
    assert torch.equal(batched_nms(*args), batched_nms_ref(*args))
    boxes, scores, labels = (x.to(DEVICE) for x in candidates(3, n, 2, levels=6))
    scores[:, ::3], scores[:, 1::5] = torch.nan, -torch.inf
    args = boxes, scores, labels, 0.3, 100
    assert torch.equal(batched_nms(*args), batched_nms_ref(*args))


@pytest.mark.parametrize("name", NAMES)
def test_side_stream(name):
    """The input is still being written when the call is made, so the stream must order them."""
    run, (function, reference), args = operators()[name]
    expected = run(reference, *args)
    run(function, *args)  # compiled
    tensor = args[0]
    late = tensor.clone()
    tensor.zero_()
    with late_stream():
        tensor.copy_(late)
        results = run(function, *args)
    close(results, expected)


@pytest.mark.parametrize("name", NAMES)
def test_graph_replays_with_changed_inputs(name):
    run, (function, reference), args = operators()[name]
    replay, results = capture(lambda: run(function, *args))
    torch.manual_seed(1)
    _, _, others = operators()[name]
    for old, new in zip(tensors(args), tensors(others), strict=True):
        old.copy_(new)
    replay()
    close(results, run(reference, *others))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", NAMES)
def test_second_device(name):
    run, (function, reference), args = operators("cuda:1")[name]
    assert torch.cuda.current_device() == 0
    results = run(function, *args)
    assert results[0].device.index == 1 and torch.cuda.current_device() == 0
    close(results, run(reference, *args))


@pytest.mark.parametrize("name", NAMES)
def test_no_call_waits_for_the_gpu(name):
    run, (function, _), args = operators()[name]
    run(function, *args)  # compiled
    with waiting_is_an_error():
        run(function, *args)


@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_program_calls_them(name):
    run, (function, reference), args = operators()[name]
    compiled = torch.compile(lambda *x: function(*x) * 1, backend="eager")
    close(run(compiled, *args), run(reference, *args))


def test_what_no_kernel_computes_runs_as_pytorch(monkeypatch):
    """FCOS_KERNELS=cupy forces only kernels that exist."""
    monkeypatch.setitem(KINDS, "squared", lambda pred, target: (1 - iou(pred, target)) ** 2)
    args = *(x.to(DEVICE) for x in ltrb_pairs(300)), "squared"
    with pytest.warns(UserWarning, match="no kernel computes 'squared'"):
        results = value_and_grad(iou_loss, *args)
    close(results, value_and_grad(iou_loss_ref, *args))
    logits, labels = (x.to(DEVICE) for x in logits_and_labels(300, 80, torch.float64))
    value, grad = value_and_grad(sigmoid_focal_loss, logits, labels)
    assert value.dtype == grad.dtype == torch.float64


@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_every_time(name):
    run, (function, _), args = operators()[name]
    first = run(function, *args)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, run(function, *args), strict=True))


def test_views():
    pred, target = torch.rand(4, 300, device=DEVICE).T, torch.rand(1201, device=DEVICE)[1:]
    weight = torch.rand(600, device=DEVICE)[::2]
    args = pred, target.view(300, 4), weight
    close(value_and_grad(iou_loss, *args), value_and_grad(iou_loss_ref, *args))
    logits = torch.randn(80, 300, device=DEVICE).T
    shifted = torch.randn(300 * 80 + 1, device=DEVICE, dtype=torch.bfloat16)[1:].view(300, 80)
    labels = torch.randint(-1, 80, (600,), device=DEVICE)[::2]
    for x in logits, shifted:
        value, grad = value_and_grad(sigmoid_focal_loss, x, labels)
        expected, expected_grad = value_and_grad(sigmoid_focal_loss_ref, x, labels)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
        rtol = max(1e-4, torch.finfo(x.dtype).eps)
        torch.testing.assert_close(grad, expected_grad, rtol=rtol, atol=1e-6)
    boxes, scores, labels = (x.to(DEVICE) for x in candidates(4, 300, 3))
    args = boxes[::2], scores[::2], labels[::2], 0.5, 50
    assert torch.equal(batched_nms(*args), batched_nms_ref(*args))


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_autocast(dtype):
    features = torch.randn(500, 64, device=DEVICE)
    head = torch.nn.Linear(64, 84, device=DEVICE)
    labels, weight = torch.randint(-1, 80, (500,), device=DEVICE), torch.rand(500, device=DEVICE)
    grads = []
    for focal, box in ((sigmoid_focal_loss, iou_loss), (sigmoid_focal_loss_ref, iou_loss_ref)):
        with torch.autocast(DEVICE.type, dtype):
            out = head(features)
            assert out.dtype == dtype
            loss = focal(out[:, :80], labels)
            loss = loss + box(out[:, 80:].exp(), features[:, :4].exp(), weight)
        assert loss.dtype == torch.float32
        grads.append(torch.autograd.grad(loss, head.weight)[0])
    torch.testing.assert_close(*grads, rtol=0.02, atol=0.02 * float(grads[1].abs().max()))


@only_cuda
def test_tensors_on_two_devices_are_refused():
    with pytest.raises(ValueError, match="move labels there"):
        sigmoid_focal_loss(torch.zeros(3, 4, device=DEVICE), torch.zeros(3, dtype=torch.int64))


def test_assign_memory_does_not_grow_with_boxes():
    points = location_grid(*(96, 128) if STAND_IN else (800, 1333)).to(DEVICE)
    peaks = []
    for n in (10, 20 if STAND_IN else 5000):
        boxes = [random_boxes(n, 800, 1333).to(DEVICE)]
        assign(points, boxes, 1.5)
        peaks.append(peak_bytes(lambda boxes=boxes: assign(points, boxes, 1.5)))
    assert peaks[1] - peaks[0] < 1 << 20  # a (P, G) matrix of bytes would be 112 MB


@only_cuda
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.mem_get_info()[0] < 24 << 30, reason="needs 24 GB"
)
def test_focal_loss_beyond_2_31_elements():
    rows = 2**31 // 80 + 1000
    logits = torch.zeros(rows, 80, device=DEVICE, dtype=torch.bfloat16)
    labels = torch.full((rows,), -1, device=DEVICE)
    logits[-1, 79], labels[-1] = 3, 79  # the last element alone is different
    value, grad = value_and_grad(sigmoid_focal_loss, logits, labels)
    expected = 0.75 * 0.25 * torch.log(torch.tensor(2.0)) * rows * 80
    torch.testing.assert_close(value.cpu(), expected, rtol=1e-4, atol=0)
    tail = value_and_grad(sigmoid_focal_loss_ref, logits[-2:].float(), labels[-2:])[1]
    torch.testing.assert_close(grad[-2:].float(), tail, rtol=1e-2, atol=1e-6)
