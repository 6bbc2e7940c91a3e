"""Model and trainer on a GPU against the CPU: steps, NCCL, SyncBN, torch.compile, CUDA graphs, DCN.

FCOS_KERNELS=cupy is set, so that a fallback to PyTorch is an error. device.py replaces the GPU by
the CPU to try the tests without one.
"""

import contextlib
import json

import pytest
import torch
import torch.distributed as dist
from device import (
    DEVICE,
    STAND_IN,
    exact_float32,
    needs_gpu,
    only_cuda,
    waiting_is_an_error,
)

import evaluate
import fcos
import train

pytestmark = needs_gpu
HW = (96, 128) if STAND_IN else (256, 320)
TINY = dict(stem=16, channels=64)
MODELS = {  # models with groups, deformable convolutions, other norms and other losses
    "shapes": dict(TINY),
    "fcos_imprv_R_50_FPN": dict(channels=64),
    "fcos_R_50_FPN": dict(channels=64),
    "fcos_imprv_iou_R_50_FPN": dict(channels=64),
    "fcos_imprv_dcnv2_R_50_FPN": dict(channels=64),
    "fcos_imprv_X_101_32x8d_FPN": dict(channels=64, blocks=(1, 1, 1, 1)),
    "fcos_bn_MNV2_FPN": dict(channels=64),
}
# Rounding may switch a ReLU, or move a deformable tap to another pixel, and the gradient jumps. The
# jump is larger if BatchNorms see few pixels. On a CPU, gradients in float32 differ from float64 by
# up to 0.016 (shapes), 0.04 (dcnv2) and 0.03 (MobileNet); the losses agree to 1e-5.
TOLERANCE = {"fcos_imprv_dcnv2_R_50_FPN": 0.15, "fcos_bn_MNV2_FPN": 0.2}


@pytest.fixture(autouse=True)
def _force_the_kernels(monkeypatch):
    monkeypatch.setenv("FCOS_KERNELS", "cupy")
    torch.manual_seed(0)
    torch._dynamo.reset()
    if STAND_IN:  # Inductor takes minutes on two busy cores
        monkeypatch.setattr(train.Graphs, "backend", "eager")
        compile = torch.nn.Module.compile
        monkeypatch.setattr(
            torch.nn.Module,
            "compile",
            lambda self, **more: compile(self, **{"backend": "eager"} | more),
        )


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Draw only wide pictures: they have one padded size, and each size takes torch.compile a
    minute."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    train.make_shapes(root, train=48, val=16)
    for split in ("train2017", "val2017"):
        path, _ = evaluate.coco_paths(root, split)
        content = json.loads(path.read_text())
        content["images"] = [row for row in content["images"] if row["width"] > row["height"]]
        ids = {row["id"] for row in content["images"]}
        content["annotations"] = [row for row in content["annotations"] if row["image_id"] in ids]
        assert len(ids) >= 4
        path.write_text(json.dumps(content))
    return root


def make(name="shapes", **overrides):
    """Build a model; its deformable convolutions get random offsets."""
    torch.manual_seed(0)
    model = fcos.build(name, 5, **MODELS[name] | overrides)
    for module in model.modules():
        if isinstance(module, fcos.DeformConv):
            torch.nn.init.normal_(module.offset.weight, std=0.01)
    return model.train()


def batch(images=2):
    """Return pixels, sizes and truths on the CPU; one image has no box."""
    h, w = HW
    pixels = torch.randint(256, (images, 3, h, w), dtype=torch.uint8)
    sizes = torch.tensor([[h, w]] + [[h - 9, w - 30]] * (images - 1))
    corner = torch.rand(images, 6, 2) * torch.tensor([w, h]) * 0.6
    boxes = torch.cat([corner, corner + 8 + torch.rand(images, 6, 2) * h / 3], 2)
    labels = torch.randint(5, (images, 6))
    truths = [{"boxes": box, "labels": label} for box, label in zip(boxes, labels)]
    truths[-1] = {name: column[:0] for name, column in truths[-1].items()}
    return pixels, sizes, truths


def put(values, device, dtype=None):
    """Move a batch to a device, with boxes of another precision."""
    pixels, sizes, truths = values
    truths = [
        {"boxes": truth["boxes"].to(device, dtype), "labels": truth["labels"].to(device)}
        for truth in truths
    ]
    return pixels.to(device), sizes.to(device), truths


def step(model, values, autocast=False):
    """Return the losses, and the gradients by the names of the parameters."""
    pixels, sizes, truths = values
    targets = model.targets(pixels.shape[2:], truths)
    targets["ltrb"] = targets["ltrb"].to(model.pixel_mean.dtype)
    with torch.autocast(pixels.device.type, torch.bfloat16, autocast):
        outputs = model(pixels, sizes)
    losses = fcos.fcos_loss(outputs, targets, fcos.loss_normalizers(targets), **model.loss)
    model.zero_grad()
    sum(losses.values()).backward()
    return losses, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_close_steps(one, other, of_loss, of_gradient):
    """Compare losses, and every gradient relative to its norm."""
    for name, loss in one[0].items():
        assert loss.item() == pytest.approx(other[0][name].item(), rel=of_loss), name
    largest = max(grad.norm().item() for grad in other[1].values())
    for name, grad in one[1].items():
        expected = other[1][name].to(grad)
        assert grad.isfinite().all(), name
        difference = (grad - expected).norm().item()
        relative = difference / (expected.norm().item() + 1e-3 * largest)
        assert relative <= of_gradient, name


@pytest.mark.parametrize("name", MODELS)
def test_a_step_equals_the_cpus(name):
    """Compare losses and gradients in float32 with those of the CPU in float64."""
    model, values = make(name), batch()
    reference = step(make(name).double(), values)
    with exact_float32():
        here = step(model.to(DEVICE), put(values, DEVICE))
    assert_close_steps(here, reference, 1e-4, TOLERANCE.get(name, 0.05))


@pytest.mark.parametrize("name", ["fcos_imprv_R_50_FPN", "fcos_imprv_dcnv2_R_50_FPN"])
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_a_fast_step_is_near_the_exact_one(name, precision):
    """TF32 rounds to 10 bits and bf16 to 7. Deformable convolutions multiply matrices with cuBLAS:
    `allow_tf32` of matmul applies to them, and under autocast they compute in float32."""
    model, values = make(name).to(DEVICE), put(batch(), DEVICE)
    with exact_float32():
        exact = step(model, values)
        exact = exact[0], {key: grad.clone() for key, grad in exact[1].items()}
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        fast = step(model, values, autocast=precision == "bf16")
    for key, loss in fast[0].items():
        assert loss.item() == pytest.approx(exact[0][key].item(), rel=0.02), key
    last = ("head.cls.", "head.box.", "head.ctr.")  # the others: see TOLERANCE
    one, other = (
        torch.cat([g.float().flatten() for key, g in grads[1].items() if key.startswith(last)])
        for grads in (fast, exact)
    )
    assert torch.cosine_similarity(one, other, dim=0) > (0.999 if precision == "tf32" else 0.97)
    assert all(grad.isfinite().all() for grad in fast[1].values())


def test_a_step_and_a_detection_wait_for_nothing():
    model, values = make("fcos_imprv_dcnv2_R_50_FPN").to(DEVICE), put(batch(), DEVICE)
    step(model, values)
    with torch.no_grad():
        model.decode(model(*values[:2]), values[1])
        with waiting_is_an_error():
            model.decode(model(*values[:2]), values[1])
    with waiting_is_an_error():
        step(model, values)


@pytest.mark.parametrize("name", ["shapes", "fcos_imprv_R_50_FPN"])
def test_a_compiled_step_equals_the_eager_one(name):
    model, values = make(name).to(DEVICE), put(batch(), DEVICE)
    with exact_float32():
        eager = step(model, values)
        eager = eager[0], {key: grad.clone() for key, grad in eager[1].items()}
        model.compile()
        compiled = step(model, values)
    assert_close_steps(compiled, eager, 1e-3, 2e-3)


# ---- detection ---------------------------------------------------------------------------------


def detector(name="fcos_imprv_R_50_FPN"):
    model = make(name).to(DEVICE).eval()
    torch.nn.init.constant_(model.head.cls.bias, -2.0)  # so that there are some candidates
    return model


@pytest.mark.parametrize("name", ["fcos_imprv_R_50_FPN", "fcos_imprv_dcnv2_R_50_FPN"])
def test_raw_outputs_and_detections_equal_the_cpus(name):
    pixels, sizes, _ = batch()
    model = detector(name)
    with torch.no_grad(), exact_float32():
        here = model(pixels.to(DEVICE), sizes.to(DEVICE))
        found = model.decode(here, sizes.to(DEVICE))
        model.cpu()
        there = model(pixels, sizes)
        same = {
            key: value.cpu() if isinstance(value, torch.Tensor) else value
            for key, value in here.items()
        }
        expected = model.decode(same, sizes)  # the same numbers, so that near ties do not matter
    for key in ("cls", "ctr"):
        torch.testing.assert_close(here[key].cpu(), there[key], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(here["ltrb"].cpu(), there["ltrb"], rtol=1e-3, atol=0.05)
    assert (expected["labels"] >= 0).sum() > 20
    same = found["labels"].cpu() == expected["labels"]  # a last bit may turn two about
    assert same.float().mean() > 0.99
    torch.testing.assert_close(found["scores"].cpu(), expected["scores"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_replayed_detections_equal_the_eager_ones(bf16, monkeypatch):
    """One CUDA graph for each of three shapes computes boxes from uint8 pixels. It is replayed with
    other pixels than it was captured with."""
    if STAND_IN:
        monkeypatch.setattr(fcos, "replay", lambda function: function)
    model, (high, wide) = detector(), HW
    images = torch.randint(256, (9, 3, high, wide), dtype=torch.uint8)
    images = [*images[:4], *images[4:6, :, :, : wide // 2], *images[6:]]
    with torch.autocast(DEVICE.type, torch.bfloat16, bf16):
        eager = model.predict(images, min_size=high, max_size=wide, batch_size=2)
        replayed = model.predict(images, min_size=high, max_size=wide, batch_size=2, graph=True)
    assert sum(len(found["scores"]) for found in eager) > 100
    for one, other in zip(replayed, eager, strict=True):
        torch.testing.assert_close(one["scores"], other["scores"], rtol=1e-4, atol=1e-4)
        same = one["labels"] == other["labels"]  # a last bit may turn two about
        assert same.float().mean() > 0.95
        torch.testing.assert_close(one["boxes"][same], other["boxes"][same], rtol=1e-3, atol=0.05)


def test_predict_runs_on_the_device():
    model = detector("shapes")
    images = list(batch()[0])
    found = model.predict(images, min_size=96, max_size=128)
    assert len(found) == 2 and all(x.device.type == "cpu" for f in found for x in f.values())
    assert sum(len(f["scores"]) for f in found) > 20


def test_views_are_merged_on_the_device_as_on_the_cpu():
    model = detector("shapes")
    model.test_size, images = (96, 128), list(batch()[0])
    here = model.predict(images, tta=True)
    for found, expected in zip(here, model.cpu().predict(images, tta=True), strict=True):
        assert len(found["scores"]) == len(expected["scores"]) > 20
        same = found["labels"] == expected["labels"]  # a last bit may turn two about
        assert same.float().mean() > 0.9
        torch.testing.assert_close(found["scores"], expected["scores"], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(found["boxes"][same], expected["boxes"][same], rtol=0, atol=0.1)


# ---- the trainer -------------------------------------------------------------------------------


class Several(int):
    """The number 1, but greater than 1: one process runs the code for several."""

    def __gt__(self, other):
        return True


@contextlib.contextmanager
def world_of_one(monkeypatch, folder, backend):
    """Start torch.distributed with one process that runs the code for several."""
    dist.init_process_group(
        backend, init_method=f"file://{folder}/rendezvous", rank=0, world_size=1
    )
    size = dist.get_world_size
    try:
        with monkeypatch.context() as patch:
            patch.setattr(evaluate, "rank_and_world_size", lambda: (0, Several(1)))
            patch.setattr(dist, "get_world_size", lambda *group: Several(size(*group)))
            yield
    finally:
        dist.destroy_process_group()


def run(data, out, *more, recipe="shapes"):
    """Train 3 steps. Return the rows of log.jsonl with losses, and the weights."""
    argv = [
        recipe,
        "--data",
        data,
        "--out",
        out,
        "--iters",
        3,
        "--batch-size",
        4,
        "--min-size",
        96,
        "--max-size",
        128,
        "--workers",
        2,
        "--device",
        DEVICE.type,
        "--weights",
        "none",
        *more,
    ]
    train.main(train.parse_args(list(map(str, argv))))
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    state = torch.load(out / "last.pt", weights_only=True)["model"]["model"]
    return [row for row in rows if "loss" in row], state


@pytest.fixture
def no_scores(monkeypatch):
    """Replace the scorer: a machine with a GPU may have neither hotcoco nor pycocotools."""
    monkeypatch.setattr(evaluate, "score", lambda results, *rest: {"AP": float(len(results) > 0)})


BACKEND = "gloo" if STAND_IN else "cpu:gloo,cuda:nccl"
SMALL = ("--set", "stem=16", "channels=64")


def test_one_process_under_nccl_trains_as_without(shapes, tmp_path, monkeypatch, no_scores):
    """DDP, sums of normalizers, flags, checkpoints and gathering really run, over one process."""
    with exact_float32():
        alone, weights = run(shapes, tmp_path / "alone", *SMALL)
        with world_of_one(monkeypatch, tmp_path, BACKEND):
            ranked, others = run(shapes, tmp_path / "ranked", *SMALL, "--accumulate", 2)
    for row, other in zip(alone, ranked, strict=True):
        for name in ("loss", "cls", "box", "ctr", "lr"):
            assert row[name] == pytest.approx(other[name], rel=1e-3), name
    for name, value in weights.items():
        torch.testing.assert_close(value, others[name], rtol=1e-3, atol=1e-4)


def test_synchronised_batchnorms(shapes, tmp_path, monkeypatch, no_scores):
    """A SyncBN recipe under NCCL. With one process its statistics are those of BatchNorm."""
    recipe = "fcos_syncbn_bs32_MNV2_FPN_1x"
    with exact_float32():
        plain, _ = run(shapes, tmp_path / "plain", "--set", "channels=64", recipe=recipe)
        with world_of_one(monkeypatch, tmp_path, BACKEND):
            synced, state = run(shapes, tmp_path / "synced", "--set", "channels=64", recipe=recipe)
    for row, other in zip(plain, synced, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-3)
    assert all(value.isfinite().all() for value in state.values())


@only_cuda
def test_synchronised_batchnorms_wait_for_the_gpu_three_times_a_layer(tmp_path, monkeypatch):
    """PyTorch's SyncBatchNorm waits, because it drops the counts of empty ranks by a mask. If this
    test fails, SyncBN recipes have become faster, and the README may say so."""
    layer = torch.nn.SyncBatchNorm(8).to(DEVICE)
    x = torch.randn(2, 8, 4, 4, device=DEVICE)
    with world_of_one(monkeypatch, tmp_path, BACKEND):
        layer(x)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with pytest.warns(UserWarning, match="synchronizing") as caught:
                layer(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sum("synchronizing" in str(warning.message) for warning in caught) <= 3


@pytest.mark.parametrize(
    "more",
    [("--precision", "bf16"), ("--compile",), ("--ema", 0.9)],
    ids=["bf16", "compile", "ema"],
)
def test_a_short_run(shapes, tmp_path, no_scores, more):
    """Run the whole trainer with an evaluation, and load its model."""
    rows, _ = run(shapes, tmp_path / "run", *SMALL, *more, "--eval-every", 2)
    assert len(rows) == 3 and all(row["loss"] < 20 for row in rows)
    assert (tmp_path / "run" / "model.pt").exists()
    model = fcos.load(tmp_path / "run" / "model.pt").to(DEVICE)
    assert len(model.predict(torch.zeros(3, 64, 80, dtype=torch.uint8))) == 1
