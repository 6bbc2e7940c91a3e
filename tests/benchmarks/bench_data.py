"""Reading annotations and scoring, beside the version of 2026-11-27 and pycocotools.

    python tests/benchmarks/bench_data.py [FOLDER] [--only reading scoring]

Writes FOLDER/data.json. Annotations and results are generated: COCO's numbers of images, boxes and
polygons, and parts of them. Every measurement is a process of its own; the sides take turns.

median, low, high: CPU seconds of all threads. peak_mib: the most private memory while it works,
beyond what the imports take; pages of a file that is mapped are not private. kept_mib: what is left
afterwards. exponent: the slope of the CPU seconds over all sizes, on logarithmic axes. The old
version comes from this repository's history. `same` tells whether all arrays are equal to the old
version's to the last bit, or all twelve metrics to those of pycocotools.
"""

import argparse
import io
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import record

OLD = "01bf83e"  # the version of 2026-11-27
IMAGES, BOXES = 118_287, 860_001  # of COCO's train2017
PARTS = 0.1, 0.25, 1
SCENES = (1000, 80, False), (5000, 80, False), (1000, 1203, True)  # images, classes, per class

# Each reads its arguments from sys.argv, and prints a line of JSON: CPU seconds, kept memory, and
# what is compared between the sides.
COMMON = """
import gc, hashlib, json, resource, sys, time
def private_mib():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
def measured(work):
    before = private_mib()
    print("ready", before, flush=True)
    start = time.process_time()
    made = work()
    seconds = time.process_time() - start
    gc.collect()
    return made, {"seconds": seconds, "kept_mib": private_mib() - before}
"""
READ = """
import numpy as np
sys.path.insert(0, root)
import evaluate
data, told = measured(lambda: evaluate.CocoDataset(f"{folder}/truth.json", f"{folder}/images"))
names = "image_ids hw boxes labels offsets trainable".split()
digest = hashlib.sha256()
for name in names:
    array = getattr(data, name)
    digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
digest.update(repr((data.classes, data.category_ids)).encode())
print(json.dumps(told | {"found": digest.hexdigest()}))
"""
SCORE = """
sys.path.insert(0, root)
import evaluate, hotcoco
results = json.load(open(f"{folder}/found.json"))
metrics, told = measured(lambda: evaluate.score(results, f"{folder}/truth.json", per_class))
print(json.dumps(told | {"found": [metrics[name].hex() for name in evaluate.METRICS]}))
"""
PEER = """
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
import contextlib, io
results = json.load(open(f"{folder}/found.json"))
def work():
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(f"{folder}/truth.json")
        scorer = COCOeval(truth, truth.loadRes(results), "bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    return scorer.stats
metrics, told = measured(work)
print(json.dumps(told | {"found": [float(value).hex() for value in metrics]}))
"""


def write_annotations(folder, images, boxes):
    """Write a JSON as large as COCO's, with polygons and all fields, and empty image files."""
    rng = np.random.default_rng(0)
    Path(folder, "images").mkdir()
    url = "http://images.cocodataset.org/train2017/"
    entries = []
    for i in range(1, images + 1):
        name = f"{i:012d}.jpg"
        Path(folder, "images", name).touch()
        entry = {"license": 3, "file_name": name, "coco_url": url + name, "height": 480}
        entries.append(entry | {"width": 640, "date_captured": "2013-11-14 11:18:45", "id": i})
    categories = [{"supercategory": "x", "id": k, "name": f"class {k}"} for k in range(1, 81)]
    with open(f"{folder}/truth.json", "w") as file:
        file.write('{"info": {"year": 2017}, "images": ' + json.dumps(entries))
        file.write(', "categories": ' + json.dumps(categories) + ', "annotations": [')
        for k in range(boxes):
            w, h = rng.uniform(3, 200, 2)
            x, y = rng.uniform(0, (640 - w, 480 - h))
            polygon = (rng.random((24, 2)) * (w, h) + (x, y)).round(2)
            entry = {
                "segmentation": [polygon.ravel().tolist()],
                "area": round(w * h * 0.6, 4),
                "iscrowd": int(rng.random() < 0.01),
                "image_id": int(rng.integers(1, images + 1)),
                "bbox": [round(side, 2) for side in (x, y, w, h)],
                "category_id": int(rng.integers(1, 81)),
                "id": k + 1,
            }
            file.write(", " * (k > 0) + json.dumps(entry))
        file.write("]}")


def write_scene(folder, images, detections, classes):
    """Write annotations and results: COCO's mean of 7.3 boxes an image, a hundredth of them crowds.

    Two thirds of the detections are boxes that were moved, the rest are anywhere.
    """
    rng = np.random.default_rng(0)
    truth, found = [], []
    for i in range(images):
        n = rng.poisson(7.3)
        size = 8 + rng.random((n, 2)) ** 2 * (400, 300)
        boxes = np.concatenate([rng.random((n, 2)) * ((640, 480) - size), size], 1)
        labels = rng.integers(1, classes + 1, n)
        for box, label, chance in zip(boxes.round(2).tolist(), labels.tolist(), rng.random(n)):
            area = box[2] * box[3] * 0.6
            entry = {"id": len(truth) + 1, "image_id": i, "category_id": label, "bbox": box}
            truth.append(entry | {"area": area, "iscrowd": int(chance < 0.01)})
        moved = rng.integers(max(n, 1), size=detections * 2 // 3 if n else 0)
        near = boxes[moved] + rng.normal(size=(len(moved), 4)) * 0.15 * size[moved].repeat(2, 1)
        near[:, 2:] = near[:, 2:].clip(min=1)
        sides = 8 + rng.random((detections - len(moved), 2)) ** 2 * 300
        far = np.concatenate([rng.random((len(sides), 2)) * (640, 480) * 0.8, sides], 1)
        labels = np.concatenate([labels[moved], rng.integers(1, classes + 1, len(far))])
        scores = rng.random(detections).round(3)  # some tie
        boxes = np.concatenate([near, far]).round(2)
        for box, label, value in zip(boxes.tolist(), labels.tolist(), scores.tolist()):
            found.append({"image_id": i, "category_id": label, "bbox": box, "score": value})
    entries = [
        {"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in range(images)
    ]
    categories = [{"id": k, "name": f"class {k}"} for k in range(1, classes + 1)]
    content = {"images": entries, "annotations": truth, "categories": categories}
    Path(folder, "truth.json").write_text(json.dumps(content))
    Path(folder, "found.json").write_text(json.dumps(found))


def private_mib(process):
    """Return the private memory of a process in MiB, or 0 if it has ended."""
    try:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return 0


def run(code, **names):
    """Run code in a process of its own, and watch its memory; return what it printed."""
    assignments = "".join(f"{name} = {value!r}\n" for name, value in names.items())
    command = [sys.executable, "-c", COMMON + assignments + code]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        ready = process.stdout.readline().split()
        peak = 0
        while process.poll() is None:
            peak = max(peak, private_mib(process))
            time.sleep(0.01)
        errors.seek(0)
        if process.returncode or ready[:1] != ["ready"]:
            raise RuntimeError(errors.read()[-400:])
    return json.loads(process.stdout.read()) | {"peak_mib": peak - float(ready[1])}


def measure(log, what, size, rounds, sides):
    """Measure sides in turn and write a row for each. sides: {name: (code, names)}."""
    rows = {name: log.add(what=what, side=name, unit="CPU s", size=size) for name in sides}
    runs = {name: [] for name in sides}
    for _ in range(rounds):
        for name, (code, names) in sides.items():
            if "error" in rows[name]:
                continue
            with log.attempt(rows[name]):
                runs[name].append(run(code, **names))
                log.summarise(rows[name], [told["seconds"] for told in runs[name]])
                for key in ("peak_mib", "kept_mib"):
                    rows[name][key] = statistics.median(told[key] for told in runs[name])
                log.write()
    ours = rows["ours"]
    for name, row in rows.items():
        if name == "ours" or not runs[name] or not runs["ours"]:
            continue
        ours[f"of_{name}"] = ours["median"] / row["median"]
        ours[f"peak_of_{name}"] = ours["peak_mib"] / row["peak_mib"]
        ours[f"same_as_{name}"] = runs["ours"][0]["found"] == runs[name][0]["found"]
    for row in rows.values():
        if "error" not in row:
            log.show(row)
    return rows


def add_exponents(log, tables):
    """Write into the largest rows how CPU seconds grow with the size."""
    for side, last in tables[-1].items():
        rows = [table[side] for table in tables if "median" in table.get(side, {})]
        if len(rows) > 1:
            sizes, seconds = np.log([(row["size"], row["median"]) for row in rows]).T
            last["exponent"] = float(np.polyfit(sizes, seconds, 1)[0])
            log.show(last)


def reading(log, roots, small, rounds):
    """Read annotations of several sizes: ours, and the old version."""
    tables = []
    for part in (0.001,) if small else PARTS:
        images, boxes = round(IMAGES * part), round(BOXES * part)
        with tempfile.TemporaryDirectory() as folder:
            write_annotations(folder, images, boxes)
            sides = {name: (READ, {"root": root, "folder": folder}) for name, root in roots.items()}
            what = f"reading {images:,} images, {boxes:,} boxes with polygons"
            tables.append(measure(log, what, boxes, rounds, sides))
    add_exponents(log, tables)


def scoring(log, roots, small, rounds):
    """Score results: ours, the old version, and pycocotools, which has no figures of classes."""
    tables = []
    for images, classes, per_class in SCENES[:1] if small else SCENES:
        images = 20 if small else images
        with tempfile.TemporaryDirectory() as folder:
            write_scene(folder, images, 100, classes)
            names = {"folder": folder, "per_class": per_class}
            sides = {name: (SCORE, names | {"root": root}) for name, root in roots.items()}
            what = f"scoring {images:,} images x 100 detections, {classes:,} classes"
            if per_class:
                what += ", per class"
            else:
                sides["pycocotools"] = (PEER, names)
            rows = measure(log, what, images, rounds, sides)
            tables += [] if per_class else [rows]
    add_exponents(log, tables)


def main():
    parts = {"reading": reading, "scoring": scoring}
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=list(parts), choices=parts)
    args = record.arguments(parser)
    log = record.Record(args.folder and f"{args.folder}/data.json", parts=args.only)
    with tempfile.TemporaryDirectory() as old:
        command = ["git", "-C", str(record.ROOT), "archive", "--format=tar", OLD]
        archive = subprocess.run(command, capture_output=True, check=True).stdout
        tarfile.open(fileobj=io.BytesIO(archive)).extractall(old, filter="data")
        roots = {"ours": str(record.ROOT), "2026-11-27": old}
        for part in args.only:
            log.common = {"part": part}
            parts[part](log, roots, args.small, 1 if args.small else args.rounds)
    return log.failed


if __name__ == "__main__":
    raise SystemExit(main())
