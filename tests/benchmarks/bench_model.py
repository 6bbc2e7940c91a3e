"""Time inference beside torchvision's FCOS on the same weights in the same run.

    python tests/benchmarks/bench_model.py [FOLDER] [--only eager compiled] [--size 800 1333]

Writes FOLDER/model.json, or model_cpu.json without a GPU. All sides get the same images, weights,
batch and threads, and frozen BatchNorms, from pixels on the device (ours uint8, torchvision's
floats in 0..1) to the detections. Weights are random; the bias of the classes leaves some thousands
of candidates. No time is asserted. bench_train.py times training.
"""

import argparse
import contextlib
import copy
import functools
import tempfile

import quantize
import record
import torch
import torchvision
from record import CUDA, DEVICE, device
from torchvision.models.detection import FCOS as TorchvisionFCOS
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import fcos

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

    def torchvision(self, channels_last=False, bf16=False, compiled=False):
        model = torchvision_model(channels_last).eval()
        if compiled:  # what follows the head has shapes that depend on values
            model.backbone.compile(dynamic=False, backend=self.backend)
            model.head.compile(dynamic=False, backend=self.backend)
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

        found = run()
        boxes, scores, labels = (found[name][0].cpu() for name in ("boxes", "scores", "labels"))
        agrees = agreement(boxes, scores, labels, self.reference)
        if graph:
            run, _ = device.capture(run)
        return run, agrees

    def exported(self, engine, precision="f32"):
        """The ONNX file, suppression included, under "onnxruntime" or "openvino".

        precision "int8" quantizes it with NNCF. Weights are random, so that the time counts and
        not the agreement; tests/benchmarks/quantize.py measures the AP of trained models.
        """
        inputs = {"images": self.padded.numpy(), "sizes": self.sizes.numpy()}
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/model.onnx"
            fcos.export_onnx(our_model(), path, *self.padded.shape[2:])
            if engine == "onnxruntime":
                detect = quantize.onnxruntime_run(path)
            elif precision == "int8":
                detect = quantize.openvino_run(quantize.quantize_openvino(path, [inputs]))
            else:
                model = openvino.Core().read_model(path)
                detect = quantize.openvino_run(model, precision)
            found = detect(inputs)
        found = [torch.from_numpy(found[name][0].copy()) for name in ("boxes", "scores", "labels")]
        return functools.partial(detect, inputs), agreement(*found, self.reference)

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
        if openvino and quantize.nncf:
            on_cpu["ours, OpenVINO, int8"] = lambda: self.exported("openvino", "int8")
        return on_both | (on_cuda if CUDA else on_cpu)

    def compiled_sides(self):
        compiled = {
            "torchvision": self.torchvision,
            "torchvision, channels_last, bf16, compiled": lambda: self.torchvision(
                channels_last=True, bf16=True, compiled=True
            ),
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


def empty():
    if CUDA:
        torch.cuda.empty_cache()


def bench_decode(log, args):
    """From the outputs of the head to detections, suppression included."""
    hw = args.size[-1]
    for K in (80, 1203):
        torch.manual_seed(0)
        model = fcos.build(ROW, K).to(DEVICE)
        padded = fcos.padded_hw([hw])
        points = model.points(padded, DEVICE)
        levels = [rows * columns for rows, columns in fcos.level_sizes(padded)]
        outputs = {
            "cls": 1.5 * torch.randn(1, len(points), K, device=DEVICE) - 5,
            "ltrb": points[:, 2, None] * (0.5 + 3 * torch.rand(1, len(points), 4, device=DEVICE)),
            "ctr": torch.randn(1, len(points), device=DEVICE),
            "points": points,
            "levels": levels,
        }
        log.compare(
            f"decoding of {K} classes, batch 1, {hw[0]}x{hw[1]}",
            {
                "torchvision": functools.partial(torchvision_decode, outputs, hw),
                "ours": functools.partial(our_decode, model, outputs, hw),
            },
            rounds=args.rounds,
        )


def our_decode(model, outputs, hw):
    """Return decoding as a function, without gradients."""
    return torch.no_grad()(functools.partial(model.decode, outputs, [hw]))


def torchvision_decode(outputs, hw):
    """Return torchvision's postprocessing of the same outputs as a function."""
    model = torchvision_weights()
    stride = outputs["points"][:, 2:3]
    center = outputs["points"][:, :2]
    anchors = torch.cat([center - stride / 2, center + stride / 2], 1)
    head = {
        "cls_logits": outputs["cls"],
        "bbox_regression": outputs["ltrb"] / stride,
        "bbox_ctrness": outputs["ctr"][..., None],
    }
    head = {name: list(values.split(outputs["levels"], 1)) for name, values in head.items()}
    anchors = [list(anchors.split(outputs["levels"]))]
    return torch.no_grad()(functools.partial(model.postprocess_detections, head, anchors, [hw]))


PARTS = {  # in the order of what is worth most if the time runs out
    "eager": bench_infer,
    "decode": bench_decode,
    "compiled": functools.partial(bench_infer, compiled=True),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--size", nargs=2, type=int, action="append", metavar=("H", "W"))
    parser.add_argument("--batch", nargs="+", type=int)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="of the CPU")
    args = record.arguments(parser)
    args.backend = "eager" if args.small else "inductor"  # of torch.compile
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.small:
        args.size, args.batch, args.rounds = [[96, 128]], [1], 1
    elif CUDA:
        args.size, args.batch = args.size or [[800, 1333]], args.batch or [1, 16]
    else:
        args.size, args.batch = args.size or [[480, 640], [800, 1333]], args.batch or [1]
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
