"""One core from a JPEG file to a resized, flipped, padded batch, beside torchvision's references.

    python tests/benchmarks/bench_loader.py [FOLDER] [--images DIR]

Writes FOLDER/loader.json: images per second of both, then the time of each stage of both. Without
--images the pictures are drawn, of 640x480 pixels, as smooth as photographs are: these decide on
the time that decoding takes.
"""

import argparse
import contextlib
import tempfile
from pathlib import Path

import numpy as np
import record
import torch
import torchvision.transforms.functional as V
from PIL import Image
from torchvision.models.detection.transform import GeneralizedRCNNTransform

import fcos

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@contextlib.contextmanager
def pictures(folder, count):
    if folder:
        files = [p for p in sorted(Path(folder).iterdir()) if p.suffix.lower() in (".jpg", ".jpeg")]
        yield files[:count]
        return
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.jpg" for i in range(count)]
        for path in files:
            noise = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((640, 480), Image.BICUBIC).save(path, quality=92)
        yield files


def ours_whole(path):
    image = fcos.read_image(path)
    image = fcos.resize(image, fcos.resized_hw(*image.shape[1:], 800, 1333)).flip(2)
    return fcos.pad_batch([image])


def theirs_whole(path, transform):
    """references/detection: PIL, flip, float; the model itself normalises, resizes and pads."""
    image = Image.open(path).convert("RGB").transpose(Image.FLIP_LEFT_RIGHT)
    return transform([V.convert_image_dtype(V.pil_to_tensor(image))])


def stages(files, transform):
    """{stage: make} of both pipelines; what a stage needs is made before it is timed."""
    images = [fcos.read_image(path) for path in files]
    sizes = [fcos.resized_hw(*image.shape[1:], 800, 1333) for image in images]
    resized = [fcos.resize(image, size) for image, size in zip(images, sizes)]
    opened = [Image.open(path).convert("RGB") for path in files]
    floats = [image / 255 for image in images]
    large = [transform.resize(image)[0] for image in floats]

    def loop(function, *lists):
        return lambda: lambda: [function(*each) for each in zip(*lists)]

    return {
        "ours: decode": loop(fcos.read_image, files),
        "ours: resize, uint8": loop(fcos.resize, images, sizes),
        "ours: flip": loop(lambda image: image.flip(2), resized),
        "ours: pad": loop(lambda image: fcos.pad_batch([image]), resized),
        "torchvision: decode": loop(lambda path: Image.open(path).convert("RGB"), files),
        "torchvision: flip": loop(lambda im: im.transpose(Image.FLIP_LEFT_RIGHT), opened),
        "torchvision: to float": loop(
            lambda im: V.convert_image_dtype(V.pil_to_tensor(im)), opened
        ),
        "torchvision: normalise": loop(transform.normalize, floats),
        "torchvision: resize, float": loop(transform.resize, floats),
        "torchvision: pad": loop(lambda image: transform.batch_images([image]), large),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--images", metavar="DIR", help="photographs instead")
    parser.add_argument("--count", type=int, default=32)
    args = record.arguments(parser)
    torch.set_num_threads(1)
    count, rounds = (2, 1) if args.small else (args.count, 7)
    log = record.Record(
        args.folder and f"{args.folder}/loader.json",
        pictures=args.images and Path(args.images).name,
    )
    transform = GeneralizedRCNNTransform(800, 1333, MEAN, STD)
    with pictures(args.images, count) as files:
        sides = {
            "torchvision": lambda: lambda: [theirs_whole(path, transform) for path in files],
            "ours": lambda: lambda: [ours_whole(path) for path in files],
        }
        log.compare(
            "JPEG file to a padded batch, one core",
            sides,
            rounds,
            unit="images/s",
            per_call=len(files),
        )
        made = stages(files, transform)
        rows = log.compare("a stage, one core", made, rounds, base=None)
        for row in rows.values():
            row["ms_an_image"] = row["median"] / len(files)
        log.write()
    return log.failed


if __name__ == "__main__":
    raise SystemExit(main())
