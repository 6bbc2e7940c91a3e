"""Scoring: evaluate.score with hotcoco beside pycocotools, on generated annotations.

    python tests/benchmarks/bench_scoring.py [FOLDER]

Writes FOLDER/scoring.json. Every side is a process of its own, which tells its time and its peak of
memory; the two score the same lists in turn, and their twelve numbers must be the same to the last
bit. `library_s` is the time inside hotcoco or pycocotools, `score_s` that of evaluate.score, which
also reads and checks the files.
"""

import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import record

CASES = (1000, 36), (1000, 100), (5000, 36), (5000, 100)


def write_case(folder, images, detections):
    """COCO's mean of 7.3 boxes an image of 80 classes, a hundredth of them crowds; two thirds of
    the detections are boxes that were moved, some of another class, the rest are anywhere."""
    rng = np.random.default_rng(0)
    entries = [dict(id=i, file_name=f"{i}.jpg", width=640, height=480) for i in range(images)]
    truth, found = [], []
    for i in range(images):
        n = rng.poisson(7.3)
        size = 8 + rng.random((n, 2)) ** 2 * (400, 300)
        boxes = np.concatenate([rng.random((n, 2)) * ((640, 480) - size), size], 1)
        labels = rng.integers(1, 81, n)
        crowd = rng.random(n) < 0.01
        truth += [
            dict(
                id=len(truth) + k + 1,
                image_id=i,
                category_id=label,
                bbox=box,
                iscrowd=flag,
                area=box[2] * box[3] * 0.6,
            )
            for k, (box, label, flag) in enumerate(
                zip(boxes.round(2).tolist(), labels.tolist(), crowd.astype(int).tolist())
            )
        ]
        moved = rng.integers(max(n, 1), size=detections * 2 // 3 if n else 0)
        near = boxes[moved] + rng.normal(size=(len(moved), 4)) * 0.15 * size[moved].repeat(2, 1)
        free = 8 + rng.random((detections - len(moved), 2)) ** 2 * 300
        far = np.concatenate([rng.random((len(free), 2)) * (640, 480) * 0.8, free], 1)
        near[:, 2:] = near[:, 2:].clip(min=1)
        classes = np.concatenate([labels[moved], rng.integers(1, 81, len(far))])
        scores = rng.random(detections).round(3)  # some tie
        found += [
            dict(image_id=i, category_id=label, bbox=box, score=value)
            for box, label, value in zip(
                np.concatenate([near, far]).round(2).tolist(), classes.tolist(), scores.tolist()
            )
        ]
    categories = [dict(id=k, name=f"class {k}") for k in range(1, 81)]
    content = dict(images=entries, annotations=truth, categories=categories)
    Path(folder, "truth.json").write_text(json.dumps(content))
    Path(folder, "found.json").write_text(json.dumps(found))


def child(library, folder):
    """Score once in this process; prints a line of JSON."""
    if library == "pycocotools":
        sys.modules["hotcoco"] = None  # an import of it fails, and evaluate.score falls back
    import evaluate

    module = __import__("hotcoco" if library == "hotcoco" else "pycocotools.cocoeval")
    scorer = (module if library == "hotcoco" else module.cocoeval).COCOeval
    spent = {}

    def watched(name):
        method = getattr(scorer, name)

        def run(self):
            start = time.perf_counter()
            method(self)
            spent[name] = time.perf_counter() - start

        return run

    try:
        for name in ("evaluate", "accumulate"):
            setattr(scorer, name, watched(name))
    except TypeError:  # a compiled class keeps its methods
        pass
    results = json.loads(Path(folder, "found.json").read_text())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    metrics = evaluate.score(results, f"{folder}/truth.json")
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        json.dumps(
            {
                "score_s": seconds,
                "library_s": sum(spent.values()) or None,
                "peak_mib": (peak - before) / 1024,
                "metrics": [value.hex() for value in metrics.values()],
            }
        )
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=3)
    args = record.arguments(parser)
    if args.child:
        return child(*args.child)
    sides = [name for name in ("hotcoco", "pycocotools") if importlib.util.find_spec(name)]
    if not sides:
        print("neither hotcoco nor pycocotools is installed")
        return False
    log = record.Record(args.folder and f"{args.folder}/scoring.json")
    for images, detections in ((20, 36),) if args.small else CASES:
        with tempfile.TemporaryDirectory() as folder:
            write_case(folder, images, detections)
            what = f"scoring {images} images x {detections} detections, 80 classes"
            rows = {side: log.add(what=what, side=side, unit="s") for side in sides}
            runs = {side: [] for side in rows}
            for _ in range(1 if args.small else args.rounds):
                for side, row in rows.items():
                    if "error" in row:
                        continue
                    with log.attempt(row):
                        command = [sys.executable, __file__, "--child", side, folder]
                        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
                        if done.returncode:
                            raise RuntimeError(done.stderr[-400:])
                        runs[side].append(json.loads(done.stdout.splitlines()[-1]))
                        log.summarise(row, [run["score_s"] for run in runs[side]])
                        for key in ("library_s", "peak_mib"):
                            values = [run[key] for run in runs[side]]
                            row[key] = statistics.median(values) if None not in values else None
                        log.write()
            if len(rows) == 2 and all(runs.values()):
                ours, theirs = (runs[side][0]["metrics"] for side in rows)
                rows["hotcoco"]["same_bits"] = ours == theirs
                rows["hotcoco"]["of_pycocotools"] = (
                    rows["hotcoco"]["median"] / rows["pycocotools"]["median"]
                )
            for row in rows.values():
                if "error" not in row:
                    log.show(row)
    return log.failed


if __name__ == "__main__":
    raise SystemExit(main())
