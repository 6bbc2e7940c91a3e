"""Run both scripts on odd and damaged inputs, made from a seed.

    python tests/fuzz.py --seed 0 --count 200

Each input runs in a process of its own, in a copy of one small folder. The report lists tracebacks,
processes that die or hang, errors of more than one line, lost files, and results that differ from
those of the undamaged input without a message. A person must judge the last: a moved box may change
the score.

pytest does not collect this file; test_robustness.py uses the functions above "inputs".
"""

import argparse
import contextlib
import io
import json
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
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
import evaluate  # noqa: E402
import train  # noqa: E402

MODEL = "run/model.pt"
LAST = "run/last.pt"
FOUND = "found.json"
TRAIN_JSON = "data/annotations/instances_train2017.json"
VAL = "data/annotations/instances_val2017.json"
PHOTO = "data/val2017/000001000001.jpg"

SMALL = "--min-size 64 --max-size 96 --workers 0 --device cpu"
TRAIN = (
    f"train.py shapes --data data --out run --iters 4 --batch-size 4 {SMALL} "
    "--set stem=16 channels=64 --checkpoint-every 2"
)
NEW = TRAIN.replace("--out run", "--out new")
FROM = f"{NEW} --weights {MODEL}"
EVAL = f"evaluate.py {MODEL} --data data {SMALL}"
SAVE = f"{EVAL} --save-json saved.json"
DRAW = f"evaluate.py {MODEL} --images {PHOTO} --out drawn {SMALL}"
SCORE = f"evaluate.py --results {FOUND} --annotations {VAL}"


def make_folder():
    """Write a data set, a finished run, and results that find every object, to this folder."""
    train.make_shapes("data", train=8, val=4)
    code, _, err = call(TRAIN)
    assert code == 0, err
    results = []
    for i, box in enumerate(read(VAL)["annotations"]):
        result = {key: box[key] for key in ("image_id", "category_id", "bbox")}
        results.append(result | {"score": 0.9 - i / 99})
    write(FOUND, results)


def call(line):
    """Run a command line, or call a function, in this process; return code, stdout and stderr.

    stderr begins with the warnings, one line each.
    """
    encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
    # As in a process of its own, stdout refuses characters that stderr escapes.
    out = io.TextIOWrapper(io.BytesIO(), encoding, "strict", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), encoding, "backslashreplace", write_through=True)
    code = 0
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        try:
            run_line(line)
        except SystemExit as end:
            code = end.code
        finally:
            unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            resource.setrlimit(resource.RLIMIT_AS, unlimited)  # after limit_memory
    stdout = out.buffer.getvalue().decode(encoding)
    stderr = err.buffer.getvalue().decode(encoding)
    shown = [w for w in caught if issubclass(w.category, (UserWarning, RuntimeWarning))]
    return code, stdout, "".join(f"Warning: {w.message}\n" for w in shown) + stderr


def run_line(line):
    """Run a command line of train.py or evaluate.py, or a function, with their error messages."""
    if callable(line):
        evaluate.run(lambda _: line(), argparse.Namespace())
        return
    script, *argv = shlex.split(line)
    module = {"train.py": train, "evaluate.py": evaluate}[script]
    evaluate.run(module.main, module.parse_args(argv))


def lines_of(err):
    """Return the lines of stderr without progress bars."""
    return [line for line in re.split(r"[\r\n]+", err) if line.strip() and "%|" not in line]


def files():
    """Return {path: content} of this folder; folders, pipes and devices have a mode instead."""
    contents = {}
    for path in Path().rglob("*"):
        contents[str(path)] = path.read_bytes() if path.is_file() else path.lstat().st_mode
    return contents


def lost_files(before, after):
    """Return the paths of `before` that are missing or different in `after`."""
    return [path for path, content in before.items() if after.get(path) != content]


def read(path):
    """Return the content of a JSON file or a checkpoint."""
    if path.endswith(".pt"):
        return torch.load(path)
    return json.loads(Path(path).read_text())


def write(path, content):
    """Write a JSON file or a checkpoint."""
    if path.endswith(".pt"):
        torch.save(content, path)
    else:
        Path(path).write_text(json.dumps(content))


def change(path, where, value):
    """Return a function that changes a value in a JSON file or a checkpoint.

    where: the keys of the value, a list or a text such as "annotations 0 bbox". value: the new
    value, a function of the old value, or ... to remove it.
    """
    keys = where
    if isinstance(where, str):
        keys = [int(key) if key.isdigit() else key for key in where.split()]

    def prepare():
        content = read(path)
        parent = content
        for key in keys[:-1]:
            parent = parent[key]
        last = keys[-1]
        if value is ...:
            del parent[last]
        elif callable(value):
            parent[last] = value(parent[last])
        else:
            parent[last] = value
        write(path, content)

    return prepare


def damage(path, length, at=0.5):
    """Return a function that inverts `length` bytes of a file, from the share `at` of its size."""

    def prepare():
        content = np.fromfile(path, np.uint8)
        start = int(at * len(content))
        content[start : start + length] ^= 255
        content.tofile(path)

    return prepare


def limit_memory(gigabytes=2):
    """Limit the memory of this process to that much more than it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    now = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + gigabytes * 2**30, resource.RLIM_INFINITY))


# ---- inputs --------------------------------------------------------------------------------------


class Input(NamedTuple):
    """A command line, and the functions that prepare a folder for it.

    valid: whether the scripts have to accept it, so that another result needs no message.
    """

    name: str
    steps: list
    line: str
    valid: bool = False


WORDS = [
    *("", " "),
    *"-1 0 nan inf -inf 1e308 1e-308".split(),
    "9" * 25,
    *"0x10 1_0 None [] true \u0663 \u00e9 / . .. /dev/null /dev/zero pipe gone/gone".split(),
    "x" * 300,
    *("%s{}", "*", "~", "\udcff"),
    *(VAL, MODEL, PHOTO),
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
    *(None, "", "\u00e9", "1"),
    *(-1, 0, 1, 0.5, 1e308, -1e308, 1e-320, np.nan, np.inf, 10**400, 2**63, 2**31),
    *([], {}, [1], [[]], {"id": 1}),
    *(True, False, "x" * 10_000, ...),
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
IMAGES = {  # mode and format of Pillow
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
    value = read(path)
    if isinstance(value, dict):
        for name in ("info", "licenses", "launch", "log"):  # nothing depends on these
            value.pop(name, None)
    keys = []
    while isinstance(value, (dict, list, tuple)) and value:
        if keys and rng.random() >= 0.85:
            break
        keys.append(rng.choice(list(value) if isinstance(value, dict) else range(len(value))))
        value = value[keys[-1]]
        if isinstance(value, tuple):  # its elements cannot be changed
            break
    return keys, value


def flag(rng):
    """Give a random word to a random flag."""
    line = rng.choice(list(FLAGS))
    name = rng.choice(FLAGS[line])
    words = WORDS
    if name in ("workers", "out", "save-json"):
        # No thousands of processes, no path outside of the folder, no pipe without a reader.
        words = [word for word in WORDS if len(word) < 25 and "/" not in word]
        words = [word for word in words if word not in ("..", "pipe")]
    if name == "save-json":
        words = [*words, VAL, MODEL, PHOTO, "/dev/null"]
    word = rng.choice(words)
    line = f"{line} --{name}={shlex.quote(word)}"
    return Input(f"--{name} {word[:40]!a}", [], line, valid=True)


def field(rng):
    """Change a value in a JSON file, or replace the file."""
    path, line = rng.choice([(VAL, SAVE), (VAL, SCORE), (FOUND, SCORE), (TRAIN_JSON, NEW)])
    if rng.random() < 0.2:
        name = rng.choice(list(TEXTS))
        return Input(f"{path}: {name}", [partial(Path(path).write_bytes, TEXTS[name])], line)
    keys, _ = random_place(rng, path)
    value = rng.choice(VALUES)
    return Input(f"{path} {keys}: {value!a:.40} ({line[:8]})", [change(path, keys, value)], line)


def picture(rng):
    """Damage an image, replace it, or store it in another format."""
    path = rng.choice([PHOTO, "data/train2017/000000000003.jpg"])
    line = rng.choice([SAVE, DRAW]) if path == PHOTO else NEW
    how = rng.choice(["bytes", "cut", "turned", "small", "folder", "link", *IMAGES])
    image = Image.open(path)
    if how == "bytes":
        at = rng.random()
        length = rng.choice([1, 16, 256])
        return Input(f"{path}: {length} bytes at {at:.2f}", [damage(path, length, at)], line)
    if how == "cut":
        size = rng.randrange(os.path.getsize(path))
        return Input(f"{path}: cut to {size}", [partial(os.truncate, path, size)], line)
    if how == "folder":
        steps = [partial(os.remove, path), partial(os.mkdir, path)]
        return Input(f"{path}: a folder", steps, line)
    if how == "link":
        steps = [partial(os.remove, path), partial(os.symlink, path, path)]
        return Input(f"{path}: a link to itself", steps, line)
    if how == "small":
        return Input(f"{path}: 1x1", [lambda: Image.new("RGB", (1, 1)).save(path)], line)
    if how == "turned":
        exif = Image.Exif()
        exif[0x0112] = rng.randrange(10)
        save = partial(image.save, path, "JPEG", exif=exif)
        return Input(f"{path}: EXIF {exif[0x0112]}", [save], line, valid=True)
    mode, form = IMAGES[how]
    if mode == "I;16":
        image = image.convert("L").convert("I")
    image = image.convert(mode)
    return Input(f"{path}: {how}", [lambda: image.save(path, form)], line, valid=True)


def weights(rng):
    """Damage a checkpoint, cut it, or change a value in it."""
    path, line = rng.choice([(MODEL, SAVE), (MODEL, DRAW), (MODEL, FROM), (LAST, TRAIN)])
    if rng.random() < 0.3:
        at = rng.random()
        length = rng.choice([1, 64, 4096])
        if rng.random() < 0.5:
            return Input(f"{path}: {length} bytes at {at:.3f}", [damage(path, length, at)], line)
        size = int(at * os.path.getsize(path))
        return Input(f"{path}: cut at {at:.2f}", [partial(os.truncate, path, size)], line)
    keys, old = random_place(rng, path)
    if isinstance(old, torch.Tensor):
        name = rng.choice(list(TENSORS))
        steps = [change(path, keys, TENSORS[name])]
        valid = name in ("half", "double")
        return Input(f"{path} {keys}: {name} ({line[:8]})", steps, line, valid)
    value = rng.choice(VALUES)
    return Input(f"{path} {keys}: {value!a:.40} ({line[:8]})", [change(path, keys, value)], line)


# ---- runs ----------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """How a run ended: "ended", "traceback" with its text, "hang" or "died"."""

    kind: str
    text: str = ""
    code: int = 0
    out: str = ""
    err: str = ""
    result: object = None  # must be that of the undamaged input, or explained
    lost: tuple = ()  # files that the run removed, changed or left behind


def result(line, code, out):
    """Return the part of a run's results that a damaged input must not change silently."""
    contents = []
    for name in ("saved.json", "drawn/detections.json"):
        if Path(name).exists():
            contents.append(Path(name).read_bytes())
    out = re.sub(r"; \d+ s\.|[\d.]+ img", "", out)  # the speed
    return code, contents, out if line.startswith("evaluate") else out.splitlines()[-1:]


def run_input(steps, line):
    """Prepare this folder and run a command line in it; return its Outcome."""
    torch.set_num_threads(1)
    for step in steps:
        step()
    before = files()
    limit_memory(4)
    try:
        code, out, err = call(line)
    except BaseException:
        return Outcome("traceback", "".join(traceback.format_exc().splitlines(True)[-3:]))
    after = files()
    lost = [path for path in lost_files(before, after) if path != "run/log.jsonl"]
    if code == 0 and "--out run" in line:  # a resumed run replaces its files
        lost = [path for path in lost if not path.startswith("run/")]
    lost += [path for path in after if path.endswith(".tmp")]
    return Outcome("ended", "", code, out, err, result(line, code, out), tuple(lost))


def forked(function, seconds=180):
    """Return the result of a function that runs in a process of its own, or why there is none."""
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
                return Outcome("hang")
            time.sleep(0.02)
        content = Path(file.name).read_bytes()
        return pickle.loads(content) if content else Outcome("died")


def run_in_copy(made, steps, line):
    """Run an input in a copy of the folder `made`, which must be the current one."""
    with tempfile.TemporaryDirectory(dir=made.parent) as folder:
        shutil.copytree(made, folder, dirs_exist_ok=True, copy_function=copy_or_make_pipe)
        os.chdir(folder)
        outcome = forked(partial(run_input, steps, line))
        os.chdir(made)
    return outcome


def copy_or_make_pipe(source, target):
    if source.endswith("pipe"):
        os.mkfifo(target)
    else:
        shutil.copy(source, target)


NOTES = r"are left out|[1-9] left out|clipped|takes its place|not a class|without a category"


def judge(outcome, clean, valid):
    """Return a verdict and its reason. clean: the outcome of the undamaged input."""
    if outcome.kind != "ended":
        return outcome.kind, outcome.text
    lines = lines_of(outcome.err)
    if outcome.lost:
        return "lost", f"{list(outcome.lost)} {lines[-1:]}"
    if outcome.code == 2:
        if len(lines) != 1 and "left out" not in outcome.err:
            return "not one line", "\n".join(lines)
        return "refused", lines[-1]
    if outcome.code != 0 or "Warning: " in outcome.err:
        return f"exit code {outcome.code} or warning", "\n".join(lines)
    if outcome.result == clean.result:
        return "same result", ""
    new = {*lines, *outcome.out.splitlines()}
    new -= {*lines_of(clean.err), *clean.out.splitlines()}
    explained = [line for line in new if re.search(NOTES, line)]
    if explained:
        return "explained", explained[0]
    return ("used" if valid else "silent"), ""


def undamaged_line(line):
    """Return the command line from which an input's line was made."""
    for known in (SCORE, SAVE, DRAW, FROM, NEW, TRAIN):
        if line.startswith(known):
            return known
    return line


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--only", type=int, help="the number of one input")
    args = parser.parse_args()
    numbers = range(args.count) if args.only is None else [args.only]
    counts = Counter()
    clean = {}  # the outcome of each undamaged line
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "made")
        made.mkdir()
        os.chdir(made)
        forked(make_folder, 600)
        change(MODEL, "model head.cls.bias", lambda x: x * 0)()  # so that it finds something
        change(LAST, "step", 2)()  # so that there is something to resume
        os.mkfifo("pipe")
        for number in numbers:
            kind = (flag, field, picture, weights)[number % 4]
            entry = kind(random.Random(f"{args.seed} {number}"))
            line = undamaged_line(entry.line)
            if line not in clean:
                clean[line] = run_in_copy(made, [], line)
                assert (clean[line].kind, clean[line].code) == ("ended", 0), clean[line]
            outcome = run_in_copy(made, entry.steps, entry.line)
            verdict, reason = judge(outcome, clean[line], entry.valid)
            counts[kind.__name__, verdict] += 1
            name = f"{entry.name} (valid)" if entry.valid else entry.name
            print(f"{number:4d} {kind.__name__:8s} {verdict:12s} {name}")
            print(f"     {reason[:300]}", flush=True)
    for (kind, verdict), count in sorted(counts.items()):
        print(f"{kind:8s} {verdict:14s} {count}")


if __name__ == "__main__":
    main()
