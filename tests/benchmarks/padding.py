"""Count the pixels and the padded sizes of training steps, over the image sizes of real data sets.

    python tests/benchmarks/padding.py ../shared/data [FOLDER]

Prints a table and writes FOLDER/padding.json. A step pads all of its images to one size, a
multiple of 32 or, with --compile, of 128: torch.compile needs a graph for each padded size. Steps
are planned by train.TrainBatches itself; no pixel is read. The data sets are coco2017_tiny (100
images of COCO 2017), bccd and hituav below the first argument.
"""

import argparse
import json
import types
from collections import Counter
from pathlib import Path

import numpy as np
import record

import fcos
import train

STEPS = 5000
MULTIPLES = 32, 128
COCO = ["instances_train2017", "instances_val2017"]
CASES = {  # name: folder, annotation files, and the settings that decide the sizes
    "COCO, 800": ("coco2017_tiny", COCO, dict(min_size=[800], max_size=1333, batch_size=16)),
    "COCO, 640 to 800": (
        "coco2017_tiny",
        COCO,
        dict(min_size=list(range(640, 801)), max_size=1333, batch_size=16),
    ),
    "BCCD, 240": ("bccd", ["train"], dict(min_size=[240], max_size=400, batch_size=4)),
    "BCCD, 128 to 304": (
        "bccd",
        ["train"],
        dict(min_size=list(range(128, 305, 16)), max_size=400, batch_size=4),
    ),
    "HIT-UAV, 384": ("hituav", ["train"], dict(min_size=[384], max_size=480, batch_size=4)),
}


def image_sizes(folder, names):
    """Return what TrainBatches needs of a data set: sizes, and which images have boxes."""
    hw, trainable = [], []
    for name in names:
        content = json.loads((folder / "annotations" / f"{name}.json").read_text())
        labeled = {box["image_id"] for box in content["annotations"]}
        hw += [(image["height"], image["width"]) for image in content["images"]]
        trainable += [image["id"] in labeled for image in content["images"]]
    return types.SimpleNamespace(hw=np.array(hw), trainable=np.array(trainable), classes=[])


def count_pixels(dataset, sizes):
    """Return a row for each multiple: pixels computed and padded sizes of STEPS steps."""
    settings = sizes | dict(iters=STEPS, seed=0, augment=False, negatives=False)
    rows = []
    for multiple in MULTIPLES:
        batches = train.TrainBatches(dataset, settings | {"multiple": multiple})
        plans = [batches.plan(step) for step in range(STEPS)]
        padded = Counter(plan.padded_hw for plan in plans)
        computed = sum(h * w * n for (h, w), n in padded.items()) * sizes["batch_size"]
        held = sum(h * w for plan in plans for h, w in plan.sizes)
        rows.append(
            {
                "multiple": multiple,
                "images": len(dataset.hw),
                "pixels_per_image": computed / STEPS / sizes["batch_size"],
                "share_of_images": held / computed,
                "padded_sizes": len(padded),
                "sizes": [[h, w, n / STEPS] for (h, w), n in padded.most_common()],
            }
        )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("data", type=Path, help="holds coco2017_tiny/, bccd/ and hituav/")
    args = record.arguments(parser)
    results = []
    for what, (folder, names, sizes) in CASES.items():
        rows = count_pixels(image_sizes(args.data / folder, names), sizes)
        for row in rows:
            row["more_pixels"] = row["pixels_per_image"] / rows[0]["pixels_per_image"] - 1
            results.append({"what": what, "batch": sizes["batch_size"]} | row)
            print(
                f"{what}, multiple {row['multiple']}: {row['padded_sizes']} padded sizes, "
                f"{row['share_of_images']:.1%} of the pixels are of images, "
                f"{row['more_pixels']:+.1%} pixels; "
                + ", ".join(f"{h}x{w} {share:.1%}" for h, w, share in row["sizes"][:6])
            )
    if args.folder:
        with fcos.atomic_write(Path(args.folder) / "padding.json", "w") as file:
            json.dump({"steps": STEPS, "results": results}, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
