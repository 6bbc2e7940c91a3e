"""What tiles find that one look at a large image misses, and what they cost.

    python tests/benchmarks/bench_tiles.py MODEL.pt [FOLDER] --annotations A.json --image-dir DIR

Joins the images of a data set to mosaics of `--grid` x `--grid` images, and scores a model that was
trained on the single images in three ways: the mosaic shrunk to the size of a single image, the
mosaic at its full size, and the shrunk mosaic with tiles. Writes FOLDER/tiles.json.
"""

import argparse
import json
import pathlib
import tempfile
import time

import numpy as np
import record
import torch
from PIL import Image

import evaluate
import fcos


def make_mosaics(dataset, folder, grid, count):
    """Write `count` mosaics and their annotations into a folder; returns them as a data set."""
    h, w = dataset.hw.max(0).tolist()
    coco = {
        "images": [],
        "annotations": [],
        "categories": [
            {"id": id, "name": name} for id, name in zip(dataset.category_ids, dataset.classes)
        ],
    }
    for number in range(count):
        mosaic = np.zeros((grid * h, grid * w, 3), np.uint8)
        name = f"{number}.png"
        for cell in range(grid * grid):
            i = (number * grid * grid + cell) % len(dataset)
            y, x = cell // grid * h, cell % grid * w
            pixels = dataset.image(i).permute(1, 2, 0).numpy()
            mosaic[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
            boxes, labels = dataset.target(i)
            for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist()):
                coco["annotations"].append(
                    {
                        "id": len(coco["annotations"]) + 1,
                        "image_id": number,
                        "category_id": dataset.category_ids[label],
                        "bbox": [x1 + x, y1 + y, x2 - x1, y2 - y1],
                        "area": (x2 - x1) * (y2 - y1),
                        "iscrowd": 0,
                    }
                )
        Image.fromarray(mosaic).save(folder / name)
        size = {"height": grid * h, "width": grid * w}
        coco["images"].append({"id": number, "file_name": name} | size)
    (folder / "mosaics.json").write_text(json.dumps(coco))
    return evaluate.CocoDataset(folder / "mosaics.json", folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("model", help="a trained model.pt")
    parser.add_argument("--annotations", required=True)
    parser.add_argument("--image-dir", required=True)
    parser.add_argument("--grid", type=int, default=4)
    parser.add_argument("--count", type=int, default=10, help="mosaics (%(default)s)")
    parser.add_argument("--overlap", type=float, default=0.2)
    args = record.arguments(parser)
    model = fcos.load(args.model)
    single = evaluate.CocoDataset(args.annotations, args.image_dir)
    model.max_detections = 1000  # a mosaic holds more objects than the usual 100
    min_size, max_size = model.test_size
    log = record.Record(args.folder and f"{args.folder}/tiles.json")
    with tempfile.TemporaryDirectory() as folder:
        mosaics = make_mosaics(single, pathlib.Path(folder), args.grid, args.count)
        tile = int(single.hw.max(0).min())  # then tiles are enlarged as much as single images
        for side, dataset, scale, how in (
            ("shrunk to the size of one", mosaics, 1, {}),
            ("at full size", mosaics, args.grid, {}),
            ("shrunk, with tiles", mosaics, 1, dict(tile=tile, overlap=args.overlap)),
        ):
            model.test_size = min_size * scale, max_size * scale
            row = log.add(what=f"{args.grid} x {args.grid} mosaics, tiles of {tile}", side=side)
            with log.attempt(row):
                start, cpu_start = time.perf_counter(), time.process_time()
                results = evaluate.predict(model, dataset, workers=0, **how)
                row["s_per_image"] = (time.perf_counter() - start) / len(dataset)
                row["cpu_s_per_image"] = (time.process_time() - cpu_start) / len(dataset)
                metrics = evaluate.score(results, dataset.annotations)
                row |= {name: metrics[name] for name in ("AP", "AP50", "APs", "APm", "AR100")}
                row["threads"] = torch.get_num_threads()
            log.show(row)
    return log.failed


if __name__ == "__main__":
    raise SystemExit(main())
