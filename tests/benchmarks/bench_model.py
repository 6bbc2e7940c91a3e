"""Inference and training, beside torchvision's FCOS on the same weights in the same run.

    python tests/benchmarks/bench_model.py [FOLDER] [--only infer train ...] [--size 800 1333]

Writes FOLDER/model.json, or model_cpu.json without a GPU. All sides get the same images, weights,
batch and threads, and frozen BatchNorms. Inference goes from pixels on the device (ours uint8,
torchvision's floats in 0..1) to the detections, training from boxes to the step of SGD. Weights are
random; the bias of the classes leaves some thousands of candidates. No time is asserted.
"""

import argparse
import contextlib
import copy
import functools
import tempfile
import time

import record
import torch
import torchvision
from record import CUDA, DEVICE, device
from torchvision.models.detection import FCOS as TorchvisionFCOS
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import fcos
import train

onnxruntime = openvino = None  # measured where they are installed, with onnxscript
with contextlib.suppress(ImportError):
    import onnxscript  # noqa: F401
    import openvino
with contextlib.suppress(ImportError):
    import onnxruntime
    import onnxscript  # noqa: F401

ROW = "fcos_torchvision_R_50_FPN"


@functools.cache
def torchvision_weights():
    """torchvision's fcos_resnet50_fpn with the frozen norms that its trained weights have."""
    torch.manual_seed(0)
    body = torchvision.models.resnet50(norm_layer=FrozenBatchNorm2d)
    extra = LastLevelP6P7(256, 256)
    body = _resnet_fpn_extractor(body, 3, returned_layers=[2, 3, 4], extra_blocks=extra)
    model = TorchvisionFCOS(body, 91)
    for block in body.body.modules():
        if isinstance(block, torchvision.models.resnet.Bottleneck):
            block.bn3.weight.fill_(0.25)  # or 16 residual sums would blow the features up
    torch.nn.init.constant_(model.head.classification_head.cls_logits.bias, -3.5)
    return model


def torchvision_model(channels_last=False):
    model = copy.deepcopy(torchvision_weights()).to(DEVICE)
    return model.to(memory_format=torch.channels_last) if channels_last else model


def our_model(row=ROW):
    """The same weights; of another row, random ones."""
    torch.manual_seed(0)
    model = fcos.build(row, 91)
    if row == ROW:
        fcos.load_weights(model, torchvision_weights().state_dict())
    else:
        torch.nn.init.constant_(model.head.cls.bias, -3.5)
    return model.to(DEVICE)


# ---- inference ---------------------------------------------------------------------------------


class Inference:
    """One batch, and everything that can detect in it: `sides` is {name: make}, see
    Record.compare."""

    def __init__(self, batch, hw, backend="inductor"):
        self.backend = backend
        torch.manual_seed(0)
        small = torch.rand(batch, 3, hw[0] // 16, hw[1] // 16)  # smooth, as photographs are
        images = torch.nn.functional.interpolate(small, hw, mode="bicubic").clamp(0, 1) * 255
        self.images, self.hw = images.to(torch.uint8), hw
        self.floats = [image.to(DEVICE) / 255 for image in self.images]
        padded, sizes = fcos.pad_batch(list(self.images))
        self.padded, self.sizes = padded.to(DEVICE), sizes.to(DEVICE)
        self.reference = None  # torchvision's detections in the first image
        self.open = contextlib.ExitStack()

    def torchvision(self, channels_last=False, bf16=False):
        model = torchvision_model(channels_last).eval()
        model.transform.min_size, model.transform.max_size = (min(self.hw),), max(self.hw)

        @torch.inference_mode()
        def run():
            with torch.autocast(DEVICE.type, torch.bfloat16, bf16):
                return model(self.floats)

        if self.reference is None:
            found = {name: x.cpu() for name, x in run()[0].items()}
            area = (found["boxes"][:, 2:] > found["boxes"][:, :2]).all(1)  # we keep no empty ones
            self.reference = {name: x[area] for name, x in found.items()}
        return run

    def ours(self, bf16=False, compiled=False, graph=False):
        model = our_model().eval()
        if compiled:
            model.compile(dynamic=False, backend=self.backend)
        with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16, bf16):
            self.open.enter_context(fcos.inference(model))  # as in predict, for all its images

        @torch.no_grad()
        def run():
            with torch.autocast(DEVICE.type, torch.bfloat16, bf16):
                outputs = model(self.padded, self.sizes)
            return model.decode(outputs, self.sizes)

        boxes, scores, labels = (x[0].cpu() for x in run())
        agrees = agreement(boxes, scores, labels, self.reference)
        if graph:
            run, _ = device.capture(run)
        return run, agrees

    def exported(self, engine, precision="f32"):
        """The ONNX file, suppression included, under "onnxruntime" or "openvino"."""
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/model.onnx"
            fcos.export_onnx(our_model().eval(), path, *self.padded.shape[2:])
            inputs = {"images": self.padded.numpy(), "sizes": self.sizes.numpy()}
            if engine == "onnxruntime":
                options = onnxruntime.SessionOptions()
                options.intra_op_num_threads = torch.get_num_threads()
                session = onnxruntime.InferenceSession(path, options)
                run = functools.partial(session.run, None, inputs)
            else:
                settings = {
                    "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                    "INFERENCE_PRECISION_HINT": precision,
                }
                model = openvino.compile_model(path, "CPU", settings)

                def run():
                    return list(model(inputs).values())

        boxes, scores, labels = (torch.from_numpy(x[0].copy()) for x in run())
        return run, agreement(boxes, scores, labels, self.reference)

    def sides(self):
        on_both = {
            "torchvision": self.torchvision,
            "torchvision, channels_last": lambda: self.torchvision(channels_last=True),
            "torchvision, channels_last, bf16": lambda: self.torchvision(True, True),
            "ours": self.ours,
            "ours, bf16": lambda: self.ours(bf16=True),
        }
        on_cuda = {
            "ours, CUDA graph": lambda: self.ours(graph=True),
            "ours, bf16, CUDA graph": lambda: self.ours(bf16=True, graph=True),
        }
        on_cpu = {}
        if onnxruntime:
            on_cpu["ours, ONNX Runtime"] = lambda: self.exported("onnxruntime")
        if openvino:
            on_cpu["ours, OpenVINO"] = lambda: self.exported("openvino")
            on_cpu["ours, OpenVINO, bf16"] = lambda: self.exported("openvino", "bf16")
        return on_both | (on_cuda if CUDA else on_cpu)

    def compiled_sides(self):
        compiled = {
            "torchvision": self.torchvision,
            "ours, compiled": lambda: self.ours(compiled=True),
            "ours, bf16, compiled": lambda: self.ours(bf16=True, compiled=True),
        }
        if CUDA:
            del compiled["ours, compiled"]  # minutes that say less
            compiled["ours, bf16, compiled, CUDA graph"] = lambda: self.ours(True, True, True)
        return compiled


def agreement(boxes, scores, labels, reference):
    """How many of torchvision's detections are found again with the same label, within 0.5 px and
    1e-3 of the score, and how far off the boxes of those are, at most and in the median."""
    if reference is None or not len(reference["labels"]):
        return {}
    distance = (boxes[None] - reference["boxes"][:, None]).abs().amax(2)
    distance[labels[None] != reference["labels"][:, None]] = torch.inf
    nearest, row = distance.min(1)
    found = (nearest < 0.5) & ((scores[row] - reference["scores"]).abs() < 1e-3)
    return {
        "same_detections": found.float().mean().item(),
        "of": len(found),
        "box_px_median": nearest.median().item(),
        "box_px_max": nearest[found].max().item() if found.any() else None,
    }


def bench_infer(log, args, compiled=False):
    for batch in args.batch:
        for hw in args.size:
            case = Inference(batch, hw, args.backend)
            what = f"inference R-50, batch {batch}, {hw[0]}x{hw[1]}"
            log.compare(
                what,
                case.compiled_sides() if compiled else case.sides(),
                rounds=args.rounds,
                calls=max(2, 10 // batch) if CUDA else 1,
            )
            del case
            empty()


# ---- training ----------------------------------------------------------------------------------


class Training:
    """One batch of uint8 images with seven boxes each, COCO's mean, and steps on it."""

    def __init__(self, batch, hw, backend="inductor"):
        self.backend = backend
        torch.manual_seed(0)
        images = torch.randint(256, (batch, 3, *hw), dtype=torch.uint8)
        edge = torch.tensor([hw[1], hw[0]])
        corner = torch.rand(batch, 7, 2) * edge * 0.7
        size = 16 + torch.rand(batch, 7, 2) ** 2 * edge * 0.28
        self.boxes = list(torch.cat([corner, corner + size], 2).to(DEVICE))
        self.labels = list(torch.randint(80, (batch, 7), device=DEVICE))
        padded, sizes = fcos.pad_batch(list(images))
        self.padded, self.sizes = padded.to(DEVICE), sizes.to(DEVICE)
        self.floats = [image.to(DEVICE) / 255 for image in images]
        self.hw = hw

    def torchvision(self, channels_last=False):
        model = torchvision_model(channels_last).train()
        model.transform.min_size, model.transform.max_size = (min(self.hw),), max(self.hw)
        learned = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(learned, 1e-6, momentum=0.9)

        def step():
            targets = [{"boxes": b, "labels": k} for b, k in zip(self.boxes, self.labels)]
            with torch.autocast(DEVICE.type, torch.bfloat16):
                losses = model(self.floats, targets)
            sum(losses.values()).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def ours(self, compiled=False, row=ROW, tf32=None):
        model = our_model(row).train()
        optimizer = torch.optim.SGD(train.parameter_groups(model), 1e-6, momentum=0.9)
        if compiled:
            model.compile(dynamic=False, backend=self.backend)

        def step():
            if tf32 is not None:
                torch.backends.cuda.matmul.allow_tf32 = tf32
            targets = model.targets(self.padded.shape[2:], self.boxes, self.labels)
            with torch.autocast(DEVICE.type, torch.bfloat16):
                outputs = model(self.padded, self.sizes)
            losses = fcos.fcos_loss(outputs, targets, fcos.loss_normalizers(targets), **model.loss)
            sum(losses.values()).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def tuned(self):
        """With cudnn.benchmark, which tries the algorithms at the first call of a shape."""
        step = self.ours()

        def run():
            torch.backends.cudnn.benchmark = True
            step()
            torch.backends.cudnn.benchmark = False

        return run

    def sides(self):
        return {
            "torchvision": self.torchvision,
            "torchvision, channels_last": lambda: self.torchvision(channels_last=True),
            "ours": self.ours,
        } | ({"ours, cudnn.benchmark": self.tuned} if CUDA else {})

    def compiled_sides(self):
        return {
            "torchvision": self.torchvision,
            "ours, compiled": lambda: self.ours(compiled=True),
        }

    def dcn_sides(self):
        row = "fcos_imprv_dcnv2_R_50_FPN"
        return {
            "float32": lambda: self.ours(row=row, tf32=False),
            "TF32": lambda: self.ours(row=row, tf32=True),
        }


def bench_train(log, args, which="sides"):
    batch, hw = args.train_batch, args.size[-1]
    case = Training(batch, hw, args.backend)
    model = "dcnv2 R-50" if which == "dcn_sides" else "R-50"
    log.compare(
        f"training {model}, batch {batch}, {hw[0]}x{hw[1]}, bf16 autocast",
        getattr(case, which)(),
        rounds=min(5, args.rounds),
        calls=2 if CUDA else 1,
        unit="images/s",
        per_call=batch,
        base="float32" if which == "dcn_sides" else "torchvision",
    )
    torch.backends.cuda.matmul.allow_tf32 = False
    empty()


def bench_profile(log, args):
    """The kernels of three training steps that take the most time on the device."""
    from torch.profiler import ProfilerActivity, profile

    batch, hw = args.train_batch, args.size[-1]
    step = Training(batch, hw).ours()
    step()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if CUDA else [])
    start = time.perf_counter()
    with profile(activities=activities) as result:
        for _ in range(3):
            step()
        device.synchronize()
    wall, name = time.perf_counter() - start, "device" if CUDA else "cpu"
    events = [
        (getattr(event, f"self_{name}_time_total") / 3000, event.count // 3, event.key)
        for event in result.key_averages()
        if not CUDA or event.device_type == torch.autograd.DeviceType.CUDA
    ]
    total = sum(event[0] for event in events)
    row = log.add(
        what=f"profile of a training step, batch {batch}, {hw[0]}x{hw[1]}, bf16",
        side="ours",
        wall_ms=1000 * wall / 3,
        kernels_ms=total,
    )
    row["kernels"] = [
        f"{ms:.3f} ms, {100 * ms / total:.1f} %, {count} calls: {key[:120]}"
        for ms, count, key in sorted(events, reverse=True)[:25]
    ]
    log.show(row)
    empty()


def empty():
    if CUDA:
        torch.cuda.empty_cache()


PARTS = {  # in the order of what is worth most if the time runs out
    "infer": bench_infer,
    "train": bench_train,
    "profile": bench_profile,
    "dcn": functools.partial(bench_train, which="dcn_sides"),
    "compiled train": functools.partial(bench_train, which="compiled_sides"),
    "compiled infer": functools.partial(bench_infer, compiled=True),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--size", nargs=2, type=int, action="append", metavar=("H", "W"))
    parser.add_argument("--batch", nargs="+", type=int, help="of inference")
    parser.add_argument("--train-batch", type=int)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="of the CPU")
    args = record.arguments(parser)
    args.backend = "eager" if args.small else "inductor"  # of torch.compile
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.small:
        args.size, args.batch, args.train_batch, args.rounds = [[96, 128]], [1], 1, 1
    elif CUDA:
        args.size, args.batch = args.size or [[800, 1333]], args.batch or [1, 16]
        args.train_batch = args.train_batch or 16
    else:
        args.size, args.batch = args.size or [[480, 640], [800, 1333]], args.batch or [1]
        args.train_batch = args.train_batch or 1
    name = "model.json" if CUDA else "model_cpu.json"
    log = record.Record(args.folder and f"{args.folder}/{name}")
    for part in args.only:
        row = {"what": part, "side": None}
        with log.attempt(row):
            PARTS[part](log, args)
        if "error" in row:
            log.add(**row)
    return log.failed


if __name__ == "__main__":
    raise SystemExit(main())
