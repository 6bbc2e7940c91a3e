"""What the benchmarks share: the record of a run, and sides that are timed in turn.

A record is a JSON file, {date, gpu, driver, cpu, threads, versions, ..., "results": rows}, written
whole after every row and every round, so that a time limit costs no more than what it cuts off. A
row that fails holds its error, and the others go on.
"""

import contextlib
import datetime
import gc
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import time

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("FCOS_KERNELS", "cupy")  # on a GPU no fallback may pass for a kernel

if "FCOS_TEST_DEVICE" not in os.environ and not torch.cuda.is_available():
    os.environ["FCOS_TEST_DEVICE"] = "cpu"

import device  # noqa: E402
from device import DEVICE  # noqa: E402

import fcos  # noqa: E402

CUDA = DEVICE.type == "cuda"
PACKAGES = (
    "torch",
    "torchvision",
    "numpy",
    "cupy-cuda13x",
    "triton",
    "pillow",
    "hotcoco",
    "pycocotools",
    "onnxruntime",
    "openvino",
)


def machine():
    """What the figures were measured on."""
    gpu = driver = None
    if CUDA:
        gpu = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")[0]
    cpu, flags = platform.processor() or platform.machine(), ""
    with contextlib.suppress(OSError):
        text = pathlib.Path("/proc/cpuinfo").read_text()
        cpu = re.search(r"model name\s*: (.*)", text)[1]
        flags = re.search(r"flags\s*: (.*)", text)[1]
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "date": datetime.date.today().isoformat(),
        "gpu": gpu,
        "driver": driver,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_bf16": "avx512_bf16" in flags or "amx_bf16" in flags,
        "load_before": round(os.getloadavg()[0], 2),
        "nice": os.nice(0),
        "versions": versions,
    }


class Record:
    """The rows of one benchmark; `path` None writes nothing, but prints all the same.

    parts: the parts that this run measures, where several runs share a file.
    """

    def __init__(self, path, parts=None, **settings):
        self.path = path and pathlib.Path(path)
        self.failed = False
        self.common = {}  # what every row holds from now on
        self.content = {**machine(), **settings, "results": []}
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if parts and self.path.exists():
                self.content["results"] = self.earlier_rows(parts)

    def earlier_rows(self, parts):
        """Return the rows of the file at `path` that this run does not measure again.

        They are those of other parts, measured on the same day, machine and versions.
        """
        earlier = json.loads(self.path.read_text())
        same = ("date", "gpu", "driver", "cpu", "threads", "versions")
        if any(earlier.get(key) != self.content[key] for key in same):
            return []
        return [row for row in earlier["results"] if row.get("part") not in parts]

    def write(self):
        if self.path:
            with fcos.atomic_write(self.path, "w") as file:
                json.dump(self.content, file, indent=1)
                file.write("\n")

    def add(self, **row):
        row = row | self.common
        self.content["results"].append(row)
        self.write()
        return row

    def show(self, row):
        self.write()
        numbers = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
        print("  ".join(f"{k} {v}" for k, v in numbers.items() if v is not None), flush=True)

    @contextlib.contextmanager
    def attempt(self, row):
        """What fails inside is the row's error, and no more."""
        try:
            yield
        except Exception as error:
            row["error"] = f"{error!r:.500}"
            self.failed = True
            self.show(row)
            gc.collect()  # the traceback held the tensors
            if CUDA:
                torch.cuda.empty_cache()

    def compare(self, what, sides, rounds=7, calls=1, unit="ms", per_call=1, base="torchvision"):
        """Time sides in turn, A B C A B C, and keep the median of the rounds and their range.

        sides: {name: make}; make() -> the function to be timed, or that and a dict of what else is
        to stand in the row. Making and the first call, torch.compile's minutes included, are
        "first_s". Unit "ms" is the time of a call, any other one `per_call` / its seconds. On a
        GPU "peak_gib" is what a side needs by itself: its model, and the most that a call adds. On
        a CPU "cpu_ms" is the time of all threads while they work, which depends less on what else
        the machine does, if threads that wait sleep: OMP_WAIT_POLICY=PASSIVE.
        """
        rows, runs, times, busy = {}, {}, {}, {}
        for name, make in sides.items():
            rows[name] = row = self.add(what=what, side=name, unit=unit)
            with self.attempt(row):
                start, before = time.perf_counter(), torch.cuda.memory_allocated() if CUDA else 0
                made = make()
                run, more = made if isinstance(made, tuple) else (made, {})
                own = torch.cuda.memory_allocated() - before if CUDA else 0
                run()
                device.synchronize()
                row["first_s"] = round(time.perf_counter() - start, 2)
                for _ in range(2 if CUDA else 0):
                    run()
                if CUDA:
                    row["peak_gib"] = (own + device.peak_bytes(run)) / 2**30
                row.update(more)
                runs[name], times[name], busy[name] = run, [], []
        for _ in range(rounds):
            for name in list(runs):
                with self.attempt(rows[name]):
                    device.synchronize()
                    start, cpu_start = time.perf_counter(), time.process_time()
                    for _ in range(calls):
                        runs[name]()
                    device.synchronize()
                    seconds = (time.perf_counter() - start) / calls
                    busy[name].append(1000 * (time.process_time() - cpu_start) / calls)
                    times[name].append(1000 * seconds if unit == "ms" else per_call / seconds)
                    self.summarise(rows[name], times[name])
                if "error" in rows[name]:
                    del runs[name]
            for name, row in rows.items():  # rounds are side by side, and so are their ratios
                if times.get(name) and times.get(base):
                    pairs = zip(times[name], times[base])
                    row[f"of_{base}"] = statistics.median(a / b for a, b in pairs)
                if times.get(name) and not CUDA:
                    row["cpu_ms"] = statistics.median(busy[name])
                    if busy.get(base):
                        row["cpu_of_" + base] = row["cpu_ms"] / statistics.median(busy[base])
            self.write()
        for row in rows.values():
            if "error" not in row:
                self.show(row)
        return rows

    @staticmethod
    def summarise(row, values):
        row.update(
            median=statistics.median(values), low=min(values), high=max(values), rounds=len(values)
        )


def arguments(parser):
    """The two arguments that all benchmarks have, parsed: the folder of the record; --small."""
    parser.add_argument("folder", nargs="?", help="where the record goes (not written)")
    parser.add_argument("--small", action="store_true", help="small sizes: whether it runs at all")
    return parser.parse_args()
