"""Throughput of training, inference and loading, beside torchvision's FCOS in the same run.

    python tests/benchmarks/bench_model.py [FOLDER] [--only train infer load]

Writes FOLDER/model.json, or model_cpu.json without a GPU. Both sides get the same images, batch,
precision and frozen BatchNorms; every pair of figures is measured in turn, A B A B, and the median
is kept. Nothing here is a test: no time is asserted.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torchvision.models.detection import FCOS as TorchvisionFCOS
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

sys.path.insert(0, str(Path(__file__).parents[2]))
import fcos
import train

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


def torchvision_model():
    """torchvision's fcos_resnet50_fpn as its weights are trained: frozen BN, stem and layer1."""
    body = torchvision.models.resnet50(norm_layer=FrozenBatchNorm2d)
    extra = LastLevelP6P7(256, 256)
    body = _resnet_fpn_extractor(body, 3, returned_layers=[2, 3, 4], extra_blocks=extra)
    model = TorchvisionFCOS(body, 91)
    torch.nn.init.constant_(model.head.classification_head.cls_logits.bias, -3.5)  # some candidates
    return model.to(DEVICE)


def our_model(train_bias=-3.5):
    model = fcos.build("fcos_imprv_R_50_FPN")
    torch.nn.init.constant_(model.head.cls.bias, train_bias)
    return model.to(DEVICE)


def wait():
    if CUDA:
        torch.cuda.synchronize()


def alternate(sides, repeats, inner):
    """Median seconds of one call of each side, measured in turn; `inner` calls a measurement."""
    times = {name: [] for name in sides}
    for run in sides.values():
        for _ in range(3 if CUDA else 1):
            run()
    for _ in range(repeats):
        for name, run in sides.items():
            wait()
            start = time.perf_counter()
            for _ in range(inner):
                run()
            wait()
            times[name].append((time.perf_counter() - start) / inner)
    return {name: statistics.median(values) for name, values in times.items()}


def random_targets(images, hw):
    """Seven boxes an image, COCO's mean."""
    corner = torch.rand(images, 7, 2) * torch.tensor([hw[1], hw[0]]) * 0.7
    size = 16 + torch.rand(images, 7, 2) ** 2 * torch.tensor([hw[1], hw[0]]) * 0.28
    boxes = torch.cat([corner, corner + size], 2).to(DEVICE)
    labels = torch.randint(80, (images, 7), device=DEVICE)
    return list(boxes), list(labels)


def bench_train(batch=16, hw=(800, 1333)):
    """Images per second of whole steps: targets, forward, loss, backward, SGD."""
    if not CUDA:
        batch, hw = 1, (256, 384)
    images = torch.randint(256, (batch, 3, *hw), dtype=torch.uint8)
    boxes, labels = random_targets(batch, hw)
    ours, theirs = our_model(-4.6).train(), torchvision_model().train()
    compiled = our_model(-4.6).train()
    compiled.compile()
    padded, sizes = fcos.pad_batch(list(images))
    padded, sizes = padded.to(DEVICE), sizes.to(DEVICE)
    floats = [image.to(DEVICE) / 255 for image in images]

    def our_step(model):
        optimizer = torch.optim.SGD(train.parameter_groups(model), 1e-6, momentum=0.9)

        def step():
            targets = model.targets(padded.shape[2:], boxes, labels)
            with torch.autocast(DEVICE.type, torch.bfloat16):
                outputs = model(padded, sizes)
            losses = fcos.fcos_loss(outputs, targets, fcos.loss_normalizers(targets), **model.loss)
            sum(losses.values()).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    optimizer = torch.optim.SGD(
        [p for p in theirs.parameters() if p.requires_grad], 1e-6, momentum=0.9
    )

    def their_step():
        targets = [{"boxes": b, "labels": k} for b, k in zip(boxes, labels)]
        with torch.autocast(DEVICE.type, torch.bfloat16):
            losses = theirs(floats, targets)
        sum(losses.values()).backward()
        optimizer.step()
        optimizer.zero_grad()

    sides = {"ours": our_step(ours), "torchvision": their_step}
    if CUDA:
        sides["ours, compiled"] = our_step(compiled)
    seconds = alternate(sides, 5, 5 if CUDA else 1)
    return {
        "what": f"training R-50, batch {batch}, {hw[0]}x{hw[1]}, bf16 autocast, targets included",
        "unit": "images per second",
        **{name: batch / value for name, value in seconds.items()},
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30 if CUDA else None,
    }


def bench_infer(batch, hw=(800, 1333)):
    """Milliseconds from a uint8 batch on the device to detections, post-processing included."""
    if not CUDA:
        hw = (480, 640)
    images = torch.randint(256, (batch, 3, *hw), dtype=torch.uint8)
    ours, theirs = our_model().eval(), torchvision_model().eval()
    theirs.transform.min_size, theirs.transform.max_size = (min(hw),), max(hw)
    padded, sizes = fcos.pad_batch(list(images))
    padded, sizes = padded.to(DEVICE), sizes.to(DEVICE)
    floats = [image.to(DEVICE) / 255 for image in images]

    @torch.inference_mode()
    def our_run(model=ours):
        return model.decode(model(padded, sizes), sizes)

    @torch.inference_mode()
    def our_bf16_run():
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return our_run()

    @torch.inference_mode()
    def their_run():
        return theirs(floats)

    sides = {"ours": our_run, "torchvision": their_run}
    if CUDA:
        graph = torch.cuda.CUDAGraph()  # fixed shapes and no synchronisation: the whole of it fits
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                our_bf16_run()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            our_bf16_run()
        sides["ours, bf16"], sides["ours, bf16, CUDA graph"] = our_bf16_run, graph.replay
    seconds = alternate(sides, 7, 10 if CUDA else 1)
    return {
        "what": f"inference R-50, batch {batch}, {hw[0]}x{hw[1]}, fp32 where nothing is said",
        "unit": "ms",
        **{name: 1000 * value for name, value in seconds.items()},
    }


def bench_load(count=32):
    """Images per second of one core from JPEG file to a resized, flipped, padded batch."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        paths = []
        for i in range(count):  # photographs are smooth: enlarged noise compresses like them
            noise = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            paths.append(f"{folder}/{i}.jpg")
            Image.fromarray(noise).resize((640, 480), Image.BICUBIC).save(paths[-1], quality=92)
        transform = torchvision_model().transform.cpu()

        def ours():
            for path in paths:
                image = fcos.read_image(path)
                image = fcos.resize(image, fcos.resized_hw(*image.shape[1:], 800, 1333)).flip(2)
                fcos.pad_batch([image])

        def theirs():  # references/detection: PIL, hflip, to float; resize and pad in the model
            for path in paths:
                image = Image.open(path).convert("RGB").transpose(Image.FLIP_LEFT_RIGHT)
                image = torchvision.transforms.functional.pil_to_tensor(image)
                transform([torchvision.transforms.functional.convert_image_dtype(image)])

        seconds = alternate({"ours": ours, "torchvision": theirs}, 3, 1)
    return {
        "what": "JPEG 640x480 to a padded batch of 800x1066, one core",
        "unit": "images per second",
        **{name: count / value for name, value in seconds.items()},
    }


def machine():
    """What the figures were measured on."""
    gpu = driver = None
    if CUDA:
        gpu = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return {
        "date": time.strftime("%Y-%m-%d"), "gpu": gpu, "driver": driver, "cpu": platform.machine(),
        "threads": torch.get_num_threads(), "python": platform.python_version(),
        "torch": torch.__version__, "torchvision": torchvision.__version__,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--only", nargs="+", default=["train", "infer", "load"])
    args = parser.parse_args()
    parts = {"train": [(bench_train, 16)], "infer": [(bench_infer, 1)], "load": [(bench_load, 32)]}
    if CUDA:
        parts["infer"].append((bench_infer, 16))
    record = {**machine(), "results": []}
    for run, size in (part for name in args.only for part in parts[name]):
        try:
            row = run(size)
        except Exception as error:  # one failing part must not lose the others
            row = {"what": run.__name__, "error": repr(error)}
        record["results"].append(row)
        print(json.dumps(row, indent=1))
        if CUDA:
            torch.cuda.empty_cache()
    if args.folder:
        name = "model.json" if CUDA else "model_cpu.json"
        with fcos.atomic_write(Path(args.folder) / name, "w") as file:
            json.dump(record, file, indent=1)
