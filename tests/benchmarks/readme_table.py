"""Write the tables of tests/benchmarks/README.md from the files in tests/benchmarks/results.

    python tests/benchmarks/readme_table.py

Each table stands between two comments, the first of which names its function in BLOCKS.
tests/test_benchmarks.py checks that the README holds what this script would write. Goals are shown
beside the figures, reached or not.
"""

import json
import re
from pathlib import Path

import accuracy

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"
README = FOLDER / "README.md"
BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.S)
HEAD = ("what", "device", "ours", "peer", "ratio", "goal")

# The side of torchvision with the settings of a side of ours. A side that is not named here has no
# equal: torchvision cannot be captured in a CUDA graph, and runs in no other engine.
EQUAL = {
    "ours": "torchvision",
    "ours, bf16": "torchvision, channels_last, bf16",
    "ours, compiled": "torchvision, compiled",
    "ours, bf16, compiled": "torchvision, channels_last, bf16, compiled",
}
SPEED_GOALS = {  # (batch or "training", side): a time or rate on an H200
    ("batch 1,", "ours, bf16, compiled, CUDA graph"): "≤ 3.5 ms",
    ("batch 16,", "ours, bf16, compiled, CUDA graph"): "≤ 24 ms",
    ("training", "ours"): "≥ 200 images/s",
    ("training", "ours, compiled"): "≥ 300 images/s",
}
CPU_GOALS = {"ours": 0.6, "ours, bf16": 0.35, "ours, OpenVINO, int8": 0.25}  # of torchvision's fp32
KERNEL_GOALS = {  # of a peer's time; NMS and assignment at the largest of the usual sizes
    ("assignment", "vectorised PyTorch"): "≤ 0.1",
    ("NMS, 16 images x 5000", "torchvision"): "≤ 0.1",
    ("GIoU", "torchvision"): "≤ 0.2",
    ("focal", "torchvision"): "≤ 0.2",
    ("focal", "torch.compile of torchvision"): "≤ 0.83",
    ("focal", "torch.compile"): "≤ 0.83",
}
DATA_GOALS = {
    ("118,287 images", "2026-11-27"): "≤ 1/6, ≤ 1/3",
    ("5,000 images x 100", "pycocotools"): "≤ 1/40",
}
OBJECTS365_BOXES = 25_000_000

RECIPE_STEPS, RECIPE_BATCH = 90_000, 16  # fcos_imprv_R_50_FPN_1x
MEASURED_PIXELS = 800 * 1344  # of an image of 800x1333, padded
BANDWIDTH = {"H100": 3.35, "A100 80 GB": 2.0, "RTX 4090": 1.0}  # TB/s of the memory
H200_BANDWIDTH = 4.8


def read(name):
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def short(number):
    """Return a number with three significant digits."""
    return f"{number:.3g}" if abs(number) < 1000 else f"{number:,.0f}"


def cells(*texts):
    return "| " + " | ".join(texts) + " |"


def table(head, rows):
    return "\n".join([cells(*head), "|---" * len(head) + "|", *rows])


def good(rows):
    return [row for row in rows if row.get("median") and "error" not in row]


def spread(row):
    return f"{short(row['median'])} ({short(row['low'])} to {short(row['high'])}) {row['unit']}"


def device(record):
    if record["gpu"]:
        return record["gpu"].removeprefix("NVIDIA ")
    threads = "1 thread" if record["threads"] == 1 else f"{record['threads']} threads"
    return f"{record['cpu']}, {threads}"


def comparisons(record):
    """Split the rows of a record where a comparison ends: a side that appears again."""
    rounds = []
    for row in good(record["results"]):
        if (
            not rounds
            or row["what"] != rounds[-1][0]["what"]
            or any(row["side"] == other["side"] for other in rounds[-1])
        ):
            rounds.append([])
        rounds[-1].append(row)
    return rounds


def speed_goal(record, row):
    if record["gpu"]:
        found = [
            g
            for (w, side), g in SPEED_GOALS.items()
            if w in row["what"] + "," and side == row["side"]
        ]
        return found[0] if found else ""
    if row["side"] in CPU_GOALS:
        now = short(row["of_torchvision"])
        return f"≤ {CPU_GOALS[row['side']]} of torchvision in fp32: {now}"
    return ""


def speed_rows(*names):
    """Yield a row for each side of ours, beside torchvision's with equal settings."""
    for name in names:
        record = read(name)
        for rows in comparisons(record) if record else ():
            sides = {row["side"]: row for row in rows}
            for side, row in sides.items():
                if not side.startswith("ours") or "share" in row:
                    continue
                peer = sides.get(EQUAL.get(side))
                alone = "eager" if row["what"].startswith("training") else "fp32"
                label = alone if side == "ours" else side.removeprefix("ours, ")
                yield cells(
                    f"{row['what']}: {label}",
                    device(record),
                    spread(row),
                    spread(peer) if peer else "-",
                    short(row["median"] / peer["median"]) if peer else "-",
                    speed_goal(record, row),
                )


def inference():
    return table(HEAD, speed_rows("model", "model_cpu", "model_cpu_1_thread"))


def quantized():
    """Return AP and CPU time of a trained model in several engines and precisions."""
    record = read("quantize")
    lines = [
        cells(
            row["side"],
            f"{100 * row['AP']:.1f}",
            f"{row['cpu_ms']:.1f} ms",
            short(row["cpu_of_PyTorch"]),
        )
        for row in good(record["results"])
    ]
    return table(("engine", "AP", "CPU time of an image", "relative to PyTorch"), lines)


def tiles():
    """Return AP and CPU time of a model on large images, with and without tiles."""
    lines = [
        cells(
            row["side"],
            f"{100 * row['AP']:.1f}",
            f"{100 * row['AP50']:.1f}",
            f"{row['cpu_s_per_image']:.2f} s",
        )
        for row in read("tiles")["results"]
    ]
    return table(("images", "AP", "AP50", "CPU time of an image"), lines)


def training():
    return table(HEAD, speed_rows("train"))


def kernels():
    """Compare the GPU's work alone where both sides have it, and else the time of a call."""
    record = read("kernels")
    rows = [row for row in record["results"] if row.get("ms") and "error" not in row]
    lines = []
    for row in rows:
        peers = [peer for peer in rows if peer["what"] == row["what"] and peer is not row]
        for peer in peers if row["contender"] == "kernel" else ():
            clock = "device_ms" if peer.get("device_ms") else "ms"
            goals = [
                goal
                for (what, contender), goal in KERNEL_GOALS.items()
                if row["what"].startswith(what) and peer["contender"] == contender
            ]
            lines.append(
                cells(
                    f"{row['what']}, against {peer['contender']}",
                    device(record),
                    f"{short(row[clock])} ms",
                    f"{short(peer[clock])} ms",
                    short(row[clock] / peer[clock]),
                    *(goals or [""]),
                )
            )
    return table(HEAD, lines)


def data():
    """Compare the loader, reading annotations and scoring with their peers."""
    record = read("loader")
    sides = {row["side"]: row for row in good(record["results"])}
    ours, theirs = sides["ours"], sides["torchvision"]
    lines = [
        cells(
            f"{ours['what']} (torchvision's is float32 and normalized; ours stays uint8)",
            device(record),
            spread(ours),
            spread(theirs),
            short(ours["of_torchvision"]),
            "≥ 2",
        )
    ]
    record = read("data")
    rows = good(record["results"])
    for row in rows:
        for peer in (r for r in rows if r["what"] == row["what"] and f"of_{r['side']}" in row):
            side = peer["side"]
            same = "same bits" if row[f"same_as_{side}"] else "OTHER NUMBERS"
            goals = [
                goal
                for (what, other), goal in DATA_GOALS.items()
                if what in row["what"] and other == side
            ]
            lines.append(
                cells(
                    f"{row['what']}, against {'version ' if side[0] == '2' else ''}{side}, {same}",
                    device(record),
                    f"{short(row['median'])} CPU s, {short(row['peak_mib'])} MiB",
                    f"{short(peer['median'])} CPU s, {short(peer['peak_mib'])} MiB",
                    f"{short(row[f'of_{side}'])}, {short(row[f'peak_of_{side}'])}",
                    *(goals or [""]),
                )
            )
    return table(HEAD, lines)


def objects365():
    """Project reading to a data set of 25 million boxes, from COCO's size and the exponent."""
    rows = [row for row in good(read("data")["results"]) if row["what"].startswith("reading")]
    lines = []
    for row in rows:
        if "exponent" not in row:
            continue
        scale = OBJECTS365_BOXES / row["size"]
        lines.append(
            cells(
                {"ours": "now, one process of all"}.get(row["side"], "2026-11-27, every process"),
                f"{row['exponent']:.2f}",
                short(row["median"] * scale ** row["exponent"]),
                short(row["peak_mib"] * scale / 1024),
                short(row["kept_mib"] * scale / 1024),
            )
        )
    head = ("version", "exponent", "CPU s", "private memory at most, GiB", "kept, GiB")
    return table(head, lines)


def growth():
    """Return the exponents of time and memory at the end of the ranges of bench_growth.py."""
    records = [record for record in (read("growth"), read("growth_cuda")) if record]
    head = ["what grows"]
    for record in records:
        head += [f"time, {device(record)}", f"memory, {device(record)}"]
    lines = []
    for rows in zip(*(record["results"] for record in records)):
        exponents = [row.get(f"exponent_{key}") for row in rows for key in ("ms", "peak_mib")]
        shown = ["-" if value is None else f"{value:z.2f}" for value in exponents]
        lines.append(cells(rows[0]["what"], *shown))
    return table(head, lines)


def learned():
    return accuracy.summary(RESULTS / "accuracy.jsonl")


def padding():
    """Return the pixels and padded sizes of training steps: see padding.py."""
    lines = []
    for row in read("padding")["results"]:
        sizes = [f"{h}x{w} {share:.0%}" for h, w, share in row["sizes"][:3]]
        lines.append(
            cells(
                row["what"],
                str(row["multiple"]),
                str(row["padded_sizes"]),
                f"{row['share_of_images']:.0%}",
                f"{row['more_pixels']:+.1%}",
                ", ".join(sizes),
            )
        )
    head = (
        "data set and short sides",
        "multiple",
        "padded sizes",
        "image pixels",
        "pixels against 32",
        "most frequent",
    )
    return table(head, lines)


def road():
    """Return the hours of the recipe fcos_imprv_R_50_FPN_1x on one GPU."""
    pixels = {
        row["multiple"]: row["pixels_per_image"]
        for row in read("padding")["results"]
        if row["what"] == "COCO, 800"
    }
    steps = {row["side"]: row for row in good(read("train")["results"]) if "share" not in row}
    sides = [("ours", "eager", 32), ("ours, compiled", "compiled", 128)]
    lines = []
    for gpu, bandwidth in {"H200": H200_BANDWIDTH, **BANDWIDTH}.items():
        for side, label, multiple in sides:
            rate = steps[side]["median"] * bandwidth / H200_BANDWIDTH
            seconds = RECIPE_STEPS * RECIPE_BATCH / rate * pixels[multiple] / MEASURED_PIXELS
            measured = gpu == "H200"
            lines.append(
                cells(
                    gpu,
                    f"{label}, multiple {multiple}",
                    f"{short(rate)} images/s, {'measured' if measured else 'projected'}",
                    f"{seconds / 3600:.1f}, projected",
                )
            )
    return table(("GPU", "step", "batch 16 of 800x1333 in bf16", "hours for 90,000 steps"), lines)


def sources():
    """Return when and on what each file was measured."""
    names = ("model", "train", "kernels", "growth_cuda", "model_cpu", "model_cpu_1_thread")
    names += ("loader", "data", "growth", "quantize", "quantize_shapes", "tiles")
    lines = []
    for name in names:
        record = read(name)
        if record is None:
            continue
        note = f"; {record['note']}" if "note" in record else ""
        lines.append(
            f"- `{name}.json`: {record['date']}, {device(record)}, torch "
            f"{record['versions']['torch']}, system load {record['load_before']} "
            f"before{note}"
        )
    return "\n".join(lines)


BLOCKS = {
    function.__name__: function
    for function in (
        inference,
        quantized,
        tiles,
        training,
        kernels,
        data,
        objects365,
        growth,
        learned,
        padding,
        road,
        sources,
    )
}


def replaced(text):
    """Return the text of the README with every block written anew."""
    return BLOCK.sub(lambda match: f"{match[1]}{BLOCKS[match[2]]()}\n{match[3]}", text)


if __name__ == "__main__":
    README.write_text(replaced(README.read_text()))
