"""Run both scripts on odd and damaged inputs, made from a seed.

    python tests/fuzz.py --seed 0 --count 200

Each input runs in a process of its own, in a copy of one small folder. It reports tracebacks,
processes that die or hang, errors of more than one line, lost files, and results that differ from
those of the undamaged input without a message. A person must judge the last: a moved box may change
the score. pytest does not collect this file; test_robustness.py uses its first half.
"""

import argparse
import contextlib
import io
import json
import operator
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from functools import partial, reduce
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]
import evaluate  # noqa: E402
import train  # noqa: E402

MODEL, LAST, FOUND = "run/model.pt", "run/last.pt", "found.json"
VAL, PHOTO = "data/annotations/instances_val2017.json", "data/val2017/000001000001.jpg"
SMALL = "--min-size 64 --max-size 96 --workers 0 --device cpu"
TRAIN = (
    f"train.py shapes --data data --out run --iters 4 --batch-size 4 {SMALL} "
    "--set stem=16 channels=64 --checkpoint-every 2"
)
FROM = TRAIN.replace("out run", "out new") + " --weights " + MODEL
EVAL = f"evaluate.py {MODEL} --data data {SMALL}"
DRAW = f"evaluate.py {MODEL} --images {PHOTO} --out drawn {SMALL}"
SCORE = f"evaluate.py --results {FOUND} --annotations {VAL}"


def make_folder():
    """Make a data set, a finished run, and results that find all objects of the data set."""
    train.make_shapes("data", train=8, val=4)
    code, _, err = call(TRAIN)
    assert code == 0, err
    truth = json.loads(Path(VAL).read_text())["annotations"]
    Path(FOUND).write_text(
        json.dumps(
            [
                {key: box[key] for key in ("image_id", "category_id", "bbox")}
                | {"score": 0.9 - i / 99}
                for i, box in enumerate(truth)
            ]
        )
    )


def call(line):
    """Call a command line or a function in this process; return exit code, stdout and stderr."""
    encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
    out, err = (
        io.TextIOWrapper(io.BytesIO(), encoding, errors, write_through=True)
        for errors in ("strict", "backslashreplace")
    )  # as Python's own
    code, (script, *argv) = 0, ("", "") if callable(line) else shlex.split(line)
    module = {"train.py": train, "evaluate.py": evaluate}.get(script)
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(record=True) as told,
    ):
        warnings.simplefilter("always")
        try:
            evaluate.run(
                module.main if module else lambda _: line(),
                module.parse_args(argv) if module else argparse.Namespace(),
            )
        except SystemExit as end:
            code = end.code
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    shown = [w for w in told if issubclass(w.category, (UserWarning, RuntimeWarning))]
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in (out, err))
    return code, out, "".join(f"Warning: {w.message}\n" for w in shown) + err


def lines_of(err):
    """Return the lines of stderr without progress bars."""
    return [line for line in re.split(r"[\r\n]+", err) if line.strip() and "%|" not in line]


def files():
    """Return {path: content, or the mode of what is no file} of everything in this folder."""
    return {
        str(path): path.read_bytes() if path.is_file() else path.lstat().st_mode
        for path in Path().rglob("*")
    }


def change(path, where, value):
    """Return a function that sets a value in a JSON file or a checkpoint.

    where: its keys, such as "annotations 0 bbox" or a list. value: a function changes the old
    value, and ... removes it.
    """

    def prepare():
        ours = path.endswith(".pt")
        content = torch.load(path) if ours else json.loads(Path(path).read_text())
        keys = (
            where
            if isinstance(where, list)
            else [int(key) if key.isdigit() else key for key in where.split()]
        )
        place, key = reduce(operator.getitem, keys[:-1], content), keys[-1]
        place[key] = value(place[key]) if callable(value) else value
        if value is ...:
            del place[key]
        torch.save(content, path) if ours else Path(path).write_text(json.dumps(content))

    return prepare


def damage(path, length, at=None):
    """Return a function that inverts `length` bytes of a file, in its middle or at a share `at`."""

    def prepare():
        content = np.fromfile(path, np.uint8)
        content[len(content) // 2 if at is None else int(at * len(content)) :][:length] ^= 255
        content.tofile(path)

    return prepare


def little_memory(more=2):
    """Limit the memory of this process to that many GB more than now."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more * 2**30, -1))


# ---- inputs --------------------------------------------------------------------------------------

TRAIN_JSON = VAL.replace("val", "train")
NEW, SAVE = FROM.replace(" --weights " + MODEL, ""), EVAL + " --save-json saved.json"
WORDS = [
    "",
    " ",
    "-1",
    "0",
    "nan",
    "inf",
    "-inf",
    "1e308",
    "1e-308",
    "9" * 25,
    "0x10",
    "1_0",
    "None",
    "[]",
    "true",
    "\u0663",
    "\u00e9",
    "/",
    ".",
    "..",
    "/dev/null",
    "/dev/zero",
    "pipe",
    "gone/gone",
    "x" * 300,
    "%s{}",
    "*",
    "~",
    "\udcff",
    VAL,
    MODEL,
    PHOTO,
]
FLAGS = {
    NEW: (
        "data out weights batch-size iters lr min-size max-size ema seed precision accumulate "
        "eval-every checkpoint-every train-images val-annotations device set workers"
    ).split(),
    SAVE: (
        "model device precision min-size max-size workers data split annotations image-dir "
        "batch-size save-json"
    ).split(),
    DRAW: "images out score-threshold min-size max-size model".split(),
    SCORE: "results annotations save-json split".split(),
}
VALUES = [
    None,
    "",
    "\u00e9",
    "1",
    -1,
    0,
    1,
    0.5,
    1e308,
    -1e308,
    1e-320,
    np.nan,
    np.inf,
    10**400,
    2**63,
    2**31,
    [],
    {},
    [1],
    [[]],
    {"id": 1},
    True,
    False,
    "x" * 10_000,
    ...,
]
TENSORS = {
    "of NaN": lambda x: x * torch.nan,
    "empty": lambda x: x[:0],
    "flat": lambda x: x.flatten(),
    "of whole numbers": lambda x: x.to(torch.int32),
    "double": lambda x: x.double(),
    "half": lambda x: x.half(),
    "complex": lambda x: x.to(torch.complex64),
    "huge": lambda x: x * 0 + 3e38,
    "a number": lambda x: x.sum(),
    "of one dimension more": lambda x: x[..., None],
    "of one value, expanded": lambda x: x.flatten()[:1].expand(x.shape),
    "a list": lambda x: [1.0],
}
TEXTS = {
    "nothing": b"",
    "null": b"null",
    "[]": b"[]",
    "{}": b"{}",
    "brackets": b"[" * 100_000,
    "UTF-16": '{"images": []}'.encode("utf-16"),
    "bytes": bytes(range(256)),
    "NaN": b"NaN",
    "twice": b"{}{}",
    "lists": b'{"images": [], "annotations": [], "categories": []}',
}
IMAGES = {
    "CMYK": ("CMYK", "JPEG"),
    "palette": ("P", "PNG"),
    "a bit": ("1", "PNG"),
    "grey": ("L", "BMP"),
    "alpha": ("RGBA", "PNG"),
    "grey alpha": ("LA", "PNG"),
    "16 bits": ("I;16", "PNG"),
    "floats": ("F", "TIFF"),
    "WebP": ("RGB", "WEBP"),
    "GIF": ("P", "GIF"),
    "32 bits": ("I", "TIFF"),
    "YCbCr": ("YCbCr", "TIFF"),
}


def random_place(rng, path):
    """Return the keys of a random value in a JSON file or checkpoint, and the value."""
    here = torch.load(path) if path.endswith(".pt") else json.loads(Path(path).read_text())
    keys = []
    for free in ("info", "licenses", "launch", "log") if isinstance(here, dict) else ():
        here.pop(free, None)
    while isinstance(here, (dict, list, tuple)) and here and (not keys or rng.random() < 0.85):
        keys.append(rng.choice(list(here) if isinstance(here, dict) else range(len(here))))
        here = here[keys[-1]]
        if isinstance(here, tuple):  # cannot be changed inside
            break
    return keys, here


def flag(rng):
    line = rng.choice(list(FLAGS))
    name = rng.choice(FLAGS[line])
    words = WORDS  # below: no thousands of processes, no path outside, no pipe that nobody reads
    if name in ("workers", "out", "save-json"):
        words = [w for w in WORDS if len(w) < 25 and "/" not in w and w not in ("..", "pipe")]
    word = rng.choice(words + [VAL, MODEL, PHOTO, "/dev/null"] * (name == "save-json"))
    return f"--{name} {word[:40]!a} (valid)", [], f"{line} --{name}={shlex.quote(word)}"


def field(rng):
    path, line = rng.choice([(VAL, SAVE), (VAL, SCORE), (FOUND, SCORE), (TRAIN_JSON, NEW)])
    if rng.random() < 0.2:
        name = rng.choice(list(TEXTS))
        return f"{path}: {name}", [partial(Path(path).write_bytes, TEXTS[name])], line
    (keys, _), value = random_place(rng, path), rng.choice(VALUES)
    return f"{path} {keys}: {value!a:.40} ({line[:8]})", [change(path, keys, value)], line


def picture(rng):
    path = rng.choice([PHOTO, "data/train2017/000000000003.jpg"])
    line = rng.choice([SAVE, DRAW]) if path == PHOTO else NEW
    how = rng.choice(["bytes", "cut", "turned", "small", "folder", "link", *IMAGES])
    image = Image.open(path)
    if how == "bytes":
        at, length = rng.random(), rng.choice([1, 16, 256])
        return f"{path}: {length} bytes at {at:.2f}", [damage(path, length, at)], line
    if how == "cut":
        size = rng.randrange(os.path.getsize(path))
        return f"{path}: cut to {size}", [partial(os.truncate, path, size)], line
    if how in ("folder", "link"):
        make = partial(os.mkdir, path) if how == "folder" else partial(os.symlink, path, path)
        return f"{path}: a {how}", [partial(os.remove, path), make], line
    if how == "small":
        return f"{path}: 1x1", [lambda: Image.new("RGB", (1, 1)).save(path)], line
    if how == "turned":
        exif = Image.Exif()
        exif[0x0112] = rng.randrange(10)
        save = partial(image.save, path, "JPEG", exif=exif)
        return f"{path}: EXIF {exif[0x0112]} (valid)", [save], line
    mode, form = IMAGES[how]
    if mode == "I;16":
        image, mode = image.convert("L").convert("I"), "I;16"
    image = image.convert(mode)
    return f"{path}: {how} (valid)", [lambda: image.save(path, form)], line


def weights(rng):
    path, line = rng.choice([(MODEL, SAVE), (MODEL, DRAW), (MODEL, FROM), (LAST, TRAIN)])
    if rng.random() < 0.3:
        at, length = rng.random(), rng.choice([1, 64, 4096])
        if rng.random() < 0.5:
            return f"{path}: {length} bytes at {at:.3f}", [damage(path, length, at)], line
        return (
            f"{path}: cut at {at:.2f}",
            [lambda: os.truncate(path, int(at * os.path.getsize(path)))],
            line,
        )
    keys, here = random_place(rng, path)
    if isinstance(here, torch.Tensor):
        name = rng.choice(list(TENSORS))
        valid = " (valid)" if name in ("half", "double") else ""
        what = f"{path} {keys}: {name} ({line[:8]}){valid}"
        return what, [change(path, keys, TENSORS[name])], line
    value = rng.choice(VALUES)
    return f"{path} {keys}: {value!a:.40} ({line[:8]})", [change(path, keys, value)], line


# ---- runs ----------------------------------------------------------------------------------------


def result(line, told):
    """Return the part of a run's results that must not change."""
    code, out, _ = told
    found = [
        Path(name).read_bytes()
        for name in ("saved.json", "drawn/detections.json")
        if Path(name).exists()
    ]
    out = re.sub(r"; \d+ s\.|[\d.]+ img", "", out)
    return code, found, out if line.startswith("evaluate") else out.splitlines()[-1:]


def attempt(steps, line):
    """Return ("traceback", text) or ("ended", code, stdout, stderr, result, lost files)."""
    torch.set_num_threads(1)
    for step in steps:
        step()
    before = files()
    little_memory(4)
    try:
        told = call(line)
    except BaseException:
        return "traceback", "".join(traceback.format_exc().splitlines(True)[-3:])
    after = files()
    resumed = told[0] == 0 and "--out run" in line
    lost = [
        path
        for path, content in before.items()
        if after.get(path) != content
        and path != "run/log.jsonl"
        and not (resumed and path.startswith("run/"))
    ]
    return "ended", *told, result(line, told), lost + [p for p in after if p.endswith(".tmp")]


def forked(function, seconds=180):
    """Return the result of a function in a process of its own, or ("hang",) or ("died",)."""
    with tempfile.NamedTemporaryFile() as file:
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                Path(file.name).write_bytes(pickle.dumps(function()))
            os._exit(0)
        end = time.monotonic() + seconds
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return ("hang",)
            time.sleep(0.02)
        content = Path(file.name).read_bytes()
        return pickle.loads(content) if content else ("died",)


def judge(outcome, clean, valid):
    """Return a verdict and its reason. clean: the outcome of the undamaged input."""
    if outcome[0] != "ended":
        return outcome[0], outcome[-1]
    _, code, out, err, got, lost = outcome
    lines = lines_of(err)
    if lost:
        return "lost", f"{lost} {lines[-1:]}"
    if code == 2:
        bad = len(lines) != 1 and "left out" not in err
        return ("not one line", "\n".join(lines)) if bad else ("refused", lines[-1])
    if code != 0 or "Warning: " in err:
        return f"exit code {code} or warning", "\n".join(lines)
    if got == clean[4]:
        return "same result", ""
    new = {*lines, *out.splitlines()} - {*lines_of(clean[3]), *clean[2].splitlines()}
    notes = r"are left out|[1-9] left out|clipped|takes its place|not a class|without a category"
    words = [line for line in new if re.search(notes, line)]
    return ("told", words[0]) if words else ("used" if valid else "silent", "")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--only", type=int, help="the number of one input")
    args = parser.parse_args()
    counts, clean = Counter(), {}
    with tempfile.TemporaryDirectory() as tmp:
        made = Path(tmp, "made")
        made.mkdir()
        os.chdir(made)
        forked(make_folder, 600)
        change(MODEL, "model head.cls.bias", lambda x: x * 0)()  # so that it finds something
        change(LAST, "step", 2)()  # so that there is something to resume
        os.mkfifo("pipe")

        def copied(steps, line):
            with tempfile.TemporaryDirectory(dir=tmp) as folder:
                shutil.copytree(made, folder, dirs_exist_ok=True, copy_function=copy)
                os.chdir(folder)
                outcome = forked(partial(attempt, steps, line))
                os.chdir(made)
            return outcome

        def copy(source, target):
            os.mkfifo(target) if source.endswith("pipe") else shutil.copy(source, target)

        for number in range(args.count) if args.only is None else [args.only]:
            kind = (flag, field, picture, weights)[number % 4]
            what, steps, line = kind(random.Random(f"{args.seed} {number}"))
            base = next(
                (
                    known
                    for known in (SCORE, SAVE, DRAW, FROM, NEW, TRAIN)
                    if line.startswith(known)
                ),
                line,
            )
            if base not in clean:
                clean[base] = copied([], base)
                assert clean[base][:2] == ("ended", 0), clean[base]
            verdict, why = judge(copied(steps, line), clean[base], what.endswith("(valid)"))
            counts[kind.__name__, verdict] += 1
            print(f"{number:4d} {kind.__name__:8s} {verdict:12s} {what}")
            print(f"     {why[:300]}", flush=True)
    for (kind, verdict), count in sorted(counts.items()):
        print(f"{kind:8s} {verdict:14s} {count}")


if __name__ == "__main__":
    main()
