"""Write the README's tables of what was measured from the files in tests/benchmarks/results.

    python tests/benchmarks/readme_table.py

They stand between comments in README.md, and tests/test_benchmarks.py says whether they are still
what this script would write. Goals are shown beside the figures, reached or not.
"""

import json
from pathlib import Path

import accuracy

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "tests/benchmarks/results"
BEGIN = "<!-- measured: up to the next comment by tests/benchmarks/readme_table.py -->"
END = "<!-- end of measured -->"
LEARNED = "<!-- learned: up to the next comment by tests/benchmarks/readme_table.py -->"
GOALS = {  # of torchvision's time, for a side of ours on a CPU and on a GPU
    "ours": ("≤ 0.75", "≤ 1/3"),
    "ours, compiled": ("≤ 0.6", ""),
    "ours, bf16": ("≤ 0.4", "≤ 1/3"),
    "ours, bf16, CUDA graph": ("", "≤ 1/3"),
    "ours, bf16, compiled": ("", "≤ 1/3"),
    "ours, bf16, compiled, CUDA graph": ("", "≤ 1/3"),
}
KERNEL_GOALS = {  # of a peer's time; NMS and assignment at the largest of the usual sizes
    ("assignment", "vectorised PyTorch"): "≤ 0.1",
    ("NMS, 16 images x 5000", "torchvision"): "≤ 0.1",
    ("GIoU", "torchvision"): "≤ 0.2",
    ("focal", "torchvision"): "≤ 0.2",
    ("focal", "torch.compile of torchvision"): "≤ 0.83",
    ("focal", "torch.compile"): "≤ 0.83",
}


def short(number):
    """Three digits that count."""
    return f"{number:.3g}" if abs(number) < 1000 else f"{number:,.0f}"


def cells(*texts):
    return "| " + " | ".join(texts) + " |"


def good(rows):
    return [row for row in rows if row.get("median") and "error" not in row]


def spread(row):
    return f"{short(row['median'])} ({short(row['low'])} to {short(row['high'])})"


def model_rows(record):
    """Every side of ours beside torchvision's, as it comes, of the same rounds."""
    peer = None
    for row in good(record["results"]):
        if row["side"] == "torchvision":
            peer = row
        elif row["side"].startswith("ours") and peer and "of_torchvision" in row:
            goal = GOALS.get(row["side"], ("", ""))[bool(record["gpu"])]
            if row["unit"] != "ms":
                goal = "≥ 2.5" if record["gpu"] else ""
            yield cells(
                f"{row['what']}: {row['side'].removeprefix('ours').strip(', ') or 'eager'}",
                f"{spread(row)} {row['unit']}",
                f"{spread(peer)} {row['unit']}",
                short(row["of_torchvision"]),
                goal,
            )


def loader_rows(record):
    sides = {row["side"]: row for row in good(record["results"])}
    if {"ours", "torchvision"} <= sides.keys():
        ours, theirs = sides["ours"], sides["torchvision"]
        yield cells(
            ours["what"],
            f"{spread(ours)} images/s",
            f"{spread(theirs)} images/s",
            short(ours["of_torchvision"]),
            "≥ 2",
        )


def scoring_rows(record):
    rows = good(record["results"])
    for row in rows:
        if "of_pycocotools" in row:
            peer = next(r for r in rows if r["what"] == row["what"] and r["side"] == "pycocotools")
            goal = "≤ 0.05" if "5000 images x 36" in row["what"] else ""
            yield cells(
                row["what"] + (", same bits" if row["same_bits"] else ", OTHER NUMBERS"),
                f"{short(row['median'])} s, {short(row['peak_mib'])} MiB",
                f"{short(peer['median'])} s, {short(peer['peak_mib'])} MiB",
                short(row["of_pycocotools"]),
                goal,
            )


def kernel_rows(record):
    """Of the work of the GPU alone where both sides have it, and else as a program sees it."""
    rows = [row for row in record["results"] if row.get("ms") and "error" not in row]
    for row in rows:
        if row["contender"] == "kernel":
            for peer in rows:
                if peer["what"] == row["what"] and peer is not row:
                    clock = "device_ms" if peer.get("device_ms") else "ms"
                    goal = [
                        text
                        for (what, contender), text in KERNEL_GOALS.items()
                        if row["what"].startswith(what) and peer["contender"] == contender
                    ]
                    yield cells(
                        f"{row['what']}, beside {peer['contender']}",
                        f"{short(row[clock])} ms",
                        f"{short(peer[clock])} ms",
                        short(row[clock] / peer[clock]),
                        *(goal or [""]),
                    )


FILES = {
    "model": model_rows,
    "kernels": kernel_rows,
    "model_cpu": model_rows,
    "loader": loader_rows,
    "scoring": scoring_rows,
}


def growth(record):
    """A sentence on how cost grows."""
    slopes = [
        f"{row['what']} {row['exponent_ms']:z.2f} and {memory:z.2f}"
        for row in record["results"]
        if row.get("exponent_ms") and (memory := row.get("exponent_peak_mib")) is not None
    ]
    return (
        "How time and memory grow at the end of the ranges of `bench_growth.py` "
        f"({record['gpu'] or record['cpu']}; 1 is in proportion): {'; '.join(slopes)}."
    )


def measured(folder=RESULTS):
    """All that stands between the comments."""
    lines = [cells("what", "ours", "the peer", "ratio", "goal"), "|---|---|---|---|---|"]
    sources, sentences = [], []
    for name, make in FILES.items():
        path = Path(folder) / f"{name}.json"
        if path.exists():
            record = json.loads(path.read_text())
            lines += make(record)
            versions = record["versions"]
            sources.append(
                f"`{name}.json`: {record['date']}, {record['gpu'] or record['cpu']}, "
                f"{record['threads']} threads, torch {versions['torch']}, load of the machine "
                f"{record['load_before']} before"
            )
            sources[-1] += f" ({record['note']})" if "note" in record else ""
    for name in ("growth", "growth_cuda"):
        path = Path(folder) / f"{name}.json"
        if path.exists():
            sentences += ["", growth(json.loads(path.read_text()))]
    median = (
        "Medians and, in brackets, ranges of rounds in which the sides take turns; a ratio "
        "is the median of the rounds' own."
    )
    return "\n".join([*lines, "", f"{median} {'; '.join(sources)}.", *sentences])


def replaced(text, folder=RESULTS):
    """The README with the lines between the comments written anew."""
    for begin, content in (
        (BEGIN, measured(folder)),
        (LEARNED, accuracy.summary(Path(folder) / "accuracy.jsonl")),
    ):
        before, rest = text.split(begin)
        _, after = rest.split(END, 1)
        text = f"{before}{begin}\n{content}\n{END}{after}"
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(replaced(readme.read_text()))
