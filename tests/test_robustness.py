"""Odd and damaged inputs must not cause a traceback, a hang, a lost file or a silent wrong score.

All of them are in one table. A row is a command line, the steps that prepare a folder for it, and
the expected result.
"""

import contextlib
import dataclasses
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from unittest import mock

import fuzz
import numpy as np
import pytest
import torch
from fuzz import DRAW, EVAL, FOUND, FROM, LAST, MODEL, PHOTO, SCORE, TRAIN, TRAIN_JSON, VAL
from PIL import Image

import fcos
import train

HANGS = 240  # seconds; the slowest row takes 2 on an idle machine
LOG = "run/log.jsonl"
PREVIOUS = "run/previous.pt"
DRAWN = "drawn/000001000001.jpg"
FRESH = TRAIN + " --fresh"
YOLO = TRAIN.replace("--data data --out run", "--data yolo --out new")
PLAIN = f"evaluate.py {MODEL} --images {PHOTO} --out drawn --workers 0 --device cpu"
INTO_NEW = (  # followed by the name of a file in new/
    TRAIN.replace("--data data --out run", "--out new") + f" --train-annotations {VAL} "
    "--train-images data/val2017 --val-images data/val2017 --val-annotations new/"
)
BOX = "annotations 0"
LONG = "x" * 5000


# ---- preparations: functions without arguments, and functions that return one --------------------


change_val = partial(fuzz.change, VAL)
change_found = partial(fuzz.change, FOUND)
change_model = partial(fuzz.change, MODEL)
change_weight = partial(fuzz.change, MODEL, "model head.cls.weight")
change_last = partial(fuzz.change, LAST)


def every(**values):
    """Return a function that sets values in each row of a list."""
    return lambda rows: [row | values for row in rows]


def environment(**values):
    """Return a function that sets environment variables."""
    return partial(os.environ.update, values)


def put_file(path, content):
    """Return a function that replaces a path by a file."""

    def prepare():
        Path(path).unlink(missing_ok=True)
        Path(path).write_bytes(content)

    return prepare


def put_folder(path):
    """Return a function that replaces a path by an empty folder."""

    def prepare():
        Path(path).unlink(missing_ok=True)
        Path(path).mkdir(parents=True)

    return prepare


def write_grey(shift):
    """Return a function that writes a grey picture whose values take 8 + `shift` bits."""

    def prepare():
        pixels = np.asarray(Image.open(PHOTO).convert("L"))
        if shift:
            pixels = pixels.astype(np.uint16) << shift
        Image.fromarray(pixels).save("grey.png")

    return prepare


def use_adam():
    """Write the checkpoint of step 2 of 4 as a train.py with another optimizer would."""
    os.replace(PREVIOUS, LAST)
    optimizer = torch.optim.Adam(train.parameter_groups(fcos.load(LAST), 1e-3))
    change_last("optimizer", optimizer.state_dict())()
    change_last(["settings", "optimizer", "class"], "Adam")()


def spoil_average():
    """Add a moving average to the checkpoint whose weights are all NaN."""
    content = torch.load(LAST)
    content["settings"]["ema"] = 0.9
    content["ema"] = {
        name: value * torch.nan if value.is_floating_point() else value
        for name, value in content["model"]["model"].items()
    }
    content["layout"] |= train.tensor_shapes({"ema": content["ema"]})
    torch.save(content, LAST)


def shared_lists(depth=60):
    """Return a list that has 2**60 numbers as text, and is small in a file."""
    value = [1]
    for _ in range(depth):
        value = [value, value]
    return value


def load_spoilt():
    """Load weights of which the last is NaN; the first must not be loaded either."""
    content = fcos.read_checkpoint(MODEL)
    loaded = fcos.load(MODEL)
    before = loaded.head.cls.bias.clone()
    content["model"]["head.cls.bias"] += 1
    content["model"]["head.scale.4"] *= torch.nan
    try:
        fcos.load_weights(loaded, content)
    finally:
        assert torch.equal(loaded.head.cls.bias, before)


def write_yolo():
    """Write a data set of YOLO with two classes."""
    for split in ("train", "valid"):
        os.makedirs(f"yolo/{split}/labels")
        shutil.copytree("data/val2017", f"yolo/{split}/images")
        for name in os.listdir("data/val2017"):
            label = Path(f"yolo/{split}/labels", name).with_suffix(".txt")
            label.write_text("0 0.5 0.5 0.4 0.4\n1 0.3 0.3 0.2 0.2\n")
    Path("yolo/data.yaml").write_text("names: [a, b]\n")


def write_recursive_checkpoint():
    content = {}
    content["model"] = content
    torch.save(content, MODEL)


# ---- the table -----------------------------------------------------------------------------------


@dataclasses.dataclass
class Row:
    """One input and its expected result."""

    line: str | Callable  # a command line, or a function
    parts: str  # texts in the error, or in the output of a run that succeeds: "one|two"
    steps: tuple
    code: int
    changes: str = ""  # the pattern of the files that may change
    same: Callable | None = None  # another preparation that must lead to the same stdout
    moved: dict = dataclasses.field(default_factory=dict)  # {file: where it must be afterwards}


def refused(line, parts, *steps):
    """Return the row of an input that ends in an error of one line."""
    return Row(line, parts, steps, code=2)


def accepted(line, parts, *steps, **more):
    """Return the row of an input that does not stop the run."""
    return Row(line, parts, steps, code=0, **more)


NOTHING_LOST = {
    **{
        f"kernels {name}": refused(line, "FCOS_KERNELS|cupy", environment(FCOS_KERNELS="foo"))
        for name, line in (("train", FRESH), ("evaluate", EVAL))
    },
    "rate": refused(FRESH + " --lr 1e30", "not finite"),
    "huge rate": refused(FRESH + " --lr 1e300", "--lr|1e300"),
    "memory": refused(FRESH + " --min-size 20000 --max-size 30000", "memory", fuzz.limit_memory),
    "batch": refused(FRESH + " --batch-size 1000000000000", "--batch-size|65536"),
    "heights": refused(
        FRESH, "as in its annotations", fuzz.change(TRAIN_JSON, "images", every(height=50))
    ),
    "previous.pt": refused(f"{FRESH} --weights {PREVIOUS}", PREVIOUS, partial(os.remove, MODEL)),
    "last.pt": refused(f"{FRESH} --weights {LAST}", LAST, partial(os.remove, MODEL)),
    **{
        f"over {path}": refused(f"{EVAL} --save-json {path}", path + "|input of this run")
        for path in (MODEL, VAL, PHOTO)
    },
    "export": refused(f"evaluate.py {MODEL} --export {MODEL}", MODEL + "|input of this run"),
    "device": refused(
        EVAL + " --save-json null", "null|expected a file", partial(os.symlink, "/dev/null", "null")
    ),
    "photo": refused(
        DRAW.replace(PHOTO, "link.jpg").replace("drawn", "data/val2017"),
        "holds the pictures",
        partial(os.symlink, PHOTO, "link.jpg"),
    ),
    "link": accepted(
        DRAW,
        "drawn",
        put_folder("drawn"),
        partial(os.symlink, "../" + PHOTO, DRAWN),
        changes=DRAWN,
    ),
    **{
        f"annotations in {name}": refused(
            INTO_NEW + name,
            f"new/{name}|input of this run",
            put_folder("new"),
            partial(shutil.copy, VAL, f"new/{name}"),
        )
        for name in ("metrics.json", "log.jsonl")
    },
}

NO_SILENT_RESULT = {
    "NaN": accepted(
        SCORE, "AP", change_val(f"{BOX} bbox", [np.nan] * 4), same=change_val(BOX, ...)
    ),
    "area": accepted(
        SCORE, "AP", change_val(f"{BOX} area", -1), same=change_val(f"{BOX} area", ...)
    ),
    "empty box": accepted(EVAL, "no area inside", change_val(f"{BOX} bbox", [1, 1, 0, 0])),
    "huge box": accepted(EVAL, "no area inside", change_val(f"{BOX} bbox", [1e308] * 4)),
    "ids as text": accepted(
        SCORE,
        "AP",
        change_val(
            "annotations", lambda rows: [row | {"image_id": str(row["image_id"])} for row in rows]
        ),
        same=lambda: None,
    ),
    "results of text": accepted(SCORE, "AP", change_found("0 image_id", repr), same=lambda: None),
    "another text": refused(
        SCORE,
        "no annotation belongs to an image|'a'",
        change_val("annotations", every(image_id="a")),
    ),
    "twice": refused(SCORE, "images|2 times", change_val("images", lambda rows: rows + rows[:1])),
    "category": refused(SCORE, "category_id 99", change_val(f"{BOX} category_id", 99)),
    "unknown image": accepted(SCORE, "unknown image_id", change_val(f"{BOX} image_id", 5)),
    "image of a result": refused(
        SCORE, "expected an image_id|'image_id': 99", change_found("0 image_id", 99)
    ),
    "model.pt": refused(EVAL, MODEL + "|damaged", fuzz.damage(MODEL, 64)),
    "weights": refused(FROM, MODEL + "|damaged", fuzz.damage(MODEL, 64)),
    "NaN weight": refused(EVAL, "head.cls.weight|NaN", change_weight(lambda x: x * torch.nan)),
    "NaN mean": refused(EVAL, MODEL + "|mean", change_model("convention mean", (np.nan,) * 3)),
    "last.pt": accepted(TRAIN, "takes its place", fuzz.damage(LAST, 4096), changes="run/*"),
    "infinity": refused(TRAIN, LAST, change_last("model model head.cls.weight", lambda x: x / 0)),
    **{
        f"weight {kind}": refused(EVAL, "head.cls.weight", change_weight(convert))
        for kind, convert in {
            "int64": lambda x: x.long(),
            "uint8": lambda x: x.byte(),
            "bool": lambda x: x > 0,
            "sparse": lambda x: x.to_sparse(),
            "meta": lambda x: x.to("meta"),
            "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
            "nested": lambda x: torch.nested.nested_tensor([x[0], x[1]]),
        }.items()
    },
    "untouched": refused(load_spoilt, "NaN"),
    "12 bits": accepted(
        lambda: print(fcos.read_image("grey.png").float().mean()),
        "",
        write_grey(4),
        same=write_grey(0),
    ),
    "threshold nan": refused(DRAW + " --score-threshold nan", "--score-threshold"),
    "save without data": refused(DRAW + " --save-json r.json", "--save-json"),
    "save of results": refused(SCORE + " --save-json r.json", "--save-json"),
    "save to nothing": refused(EVAL + " --save-json ''", "save_json: expected a value"),
    "out": refused(EVAL + " --out drawn", "--out needs --images"),
    "floats": refused(lambda: fcos.pad_batch([torch.rand(3, 9, 9)]), "uint8"),
}

NO_HANG = {
    "itself": refused(EVAL, MODEL, write_recursive_checkpoint),
    **{
        f"{kind} {path}": refused(line, f"{path}|regular", partial(os.replace, kind, path))
        for kind in ("pipe", "zero")
        for line, path in ((EVAL, MODEL), (EVAL, VAL), (SCORE, FOUND), (DRAW, PHOTO))
    },
    "image": refused(EVAL, PHOTO + "|regular", partial(os.replace, "pipe", PHOTO)),
    "log": refused(TRAIN, LOG, partial(os.replace, "pipe", LOG)),
    "lock": refused(TRAIN, "regular", partial(os.replace, "pipe", "run/.lock")),
    "picture that links to itself": refused(
        DRAW.replace(PHOTO, "data/val2017"),
        "data/val2017/loop.jpg",
        partial(os.symlink, "loop.jpg", "data/val2017/loop.jpg"),
    ),
    "file that links to itself": accepted(
        EVAL + " --save-json loop.json",
        "AP",
        partial(os.symlink, "loop.json", "loop.json"),
        changes="loop.json",
    ),
    "last.pt": accepted(TRAIN, "regular", partial(os.replace, "pipe", LAST), changes="run/*"),
    "many boxes": accepted(
        SCORE,
        "AP",
        change_val(
            "annotations",
            lambda rows: [
                rows[0] | dict(id=k, bbox=[k % 100, k % 90, 9, 9]) for k in range(100_000)
            ],
        ),
    ),
}

TORCHRUN = {  # environment variables of a launch, and the error
    "RANK=x": "RANK: expected|found x|torchrun",
    "RANK=1 WORLD_SIZE=2": "MASTER_ADDR: expected|torchrun",
    "RANK=2 WORLD_SIZE=2": "WORLD_SIZE: expected 3 to 65535, found 2|torchrun",
    "RANK=1 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=0": "MASTER_PORT: expected 1",
    "WORLD_SIZE=2": "RANK: expected|found None|torchrun",
    "SLURM_STEP_NUM_TASKS=2": "2 independent tasks|torchrun",
    "OMPI_COMM_WORLD_SIZE=2": "2 independent tasks|torchrun",
    "TORCHELASTIC_RUN_ID=a RANK=0 WORLD_SIZE=1": "MASTER_ADDR: expected",
}
NO_TRACEBACK = {
    "no id": accepted(SCORE, "AP", change_val(f"{BOX} id", ...), same=lambda: None),
    "image without id": refused(SCORE, VAL + "|images[0]|`id`", change_val("images 0 id", ...)),
    "list as id": refused(SCORE, VAL + "|images[0].id|array", change_val("images 0 id", [1])),
    "list as image_id": refused(SCORE, VAL + "|image_id", change_val(f"{BOX} image_id", [1])),
    "list in results": refused(SCORE, FOUND + "|image_id", change_found("0 image_id", [1])),
    "bbox": refused(SCORE, VAL + "|bbox", change_val(f"{BOX} bbox", [10**400, 1, 1, 1])),
    "found bbox": refused(SCORE, FOUND + "|bbox", change_found("0 bbox", [10**400, 1, 1, 1])),
    "score": refused(SCORE, FOUND + "|score", change_found("0 score", 10**400)),
    **{
        f"{where} {value}": refused(
            PLAIN, f"{MODEL}|{where.split()[-1]}", change_model(where, value)
        )
        for where, value in {
            "convention": None,
            "convention mean": (1, 2),
            "keywords test_size": (5,),
            "keywords channels": -1,
            "classes": "abcdef",
        }.items()
    },
    "no keywords": refused(EVAL, MODEL + "|which model", change_model("keywords", ...)),
    **{
        f"step {step}": refused(TRAIN, LAST + "|step", change_last("step", step))
        for step in (..., "x", -1, 99)
    },
    "optimizer": refused(TRAIN, "run|optimizer class Adam there, SGD here", use_adam),
    "log of bytes": accepted(TRAIN, "AP", put_file(LOG, b"\xff\xfe"), changes="run/*"),
    "folder as log": refused(TRAIN, LOG, put_folder(LOG)),
    **{
        f"long {word}": refused(line.replace(word, LONG), LONG[:99])
        for line, word in (
            (EVAL, MODEL),
            (EVAL + " --save-json saved", "saved"),
            (PLAIN, PHOTO),
            (FROM, MODEL),
            (FROM, "new"),
            (EVAL, "data "),
        )
    },
    "ASCII": refused(
        SCORE + " --per-class",
        "ascii",
        change_val("categories 0 name", "\xe9"),
        environment(PYTHONIOENCODING="ascii"),
    ),
    "folder as drawing": refused(DRAW, DRAWN + "|cannot be written", put_folder(DRAWN)),
    "size": refused(TRAIN + " --min-size 100000", "min_size 100000|max_size"),
    "memory": refused(EVAL + " --min-size 99999 --max-size 99999", "memory", fuzz.limit_memory),
    "RUN_ID": accepted(TRAIN, "AP", environment(TORCHELASTIC_RUN_ID="7"), changes="run/*"),
    **{
        f"launch {values}": refused(
            TRAIN, parts, environment(**dict(pair.split("=") for pair in values.split()))
        )
        for values, parts in TORCHRUN.items()
    },
    "launch alone": accepted(TRAIN, "AP", environment(RANK="0", WORLD_SIZE="1"), changes="run/*"),
    "SLURM_NTASKS": accepted(TRAIN, "AP", environment(SLURM_NTASKS="2"), changes="run/*"),
    "RESTART_COUNT": accepted(FRESH, "AP", environment(SLURM_RESTART_COUNT="abc"), changes="run/*"),
    "LOCAL_WORLD_SIZE": refused(
        TRAIN + " --workers 1", "LOCAL_WORLD_SIZE|torchrun", environment(LOCAL_WORLD_SIZE="x")
    ),
}

CLEAR_MESSAGES = {
    "torn": refused(
        TRAIN,
        LAST + "|damaged|--fresh",
        partial(os.truncate, LAST, 10_000),
        partial(os.remove, PREVIOUS),
    ),
    "file_name": refused(EVAL, "images|file_name|'height'", change_val("images 0 file_name", ...)),
    "name": refused(EVAL, "categories|name", change_val("categories 0 name", ...)),
    "image_id": refused(EVAL, VAL + "|image_id|'area'", change_val(f"{BOX} image_id", ...)),
    **{
        f"code {path}": refused(
            FROM.replace(MODEL, path),
            "refused|system",
            put_file(path, pickle.dumps({"model": os.system}, 2)),
        )
        for path in (MODEL, "w.pkl")
    },
    "keys": refused(EVAL, MODEL + "|tensors by name", change_model("model", {1: torch.zeros(1)})),
    "inclusive": refused(PLAIN, MODEL + "|inclusive", change_model("convention inclusive", [[]])),
    **{
        f"{name} {value}": refused(
            PLAIN, f"{MODEL}|{name}", change_model(f"convention {name}", value)
        )
        for name, value in (
            ("std", (0.0,) * 3),
            ("mean", (1e300,) * 3),
            ("bn_eps", np.nan),
            ("bgr", "no"),
        )
    },
    "size": refused(PLAIN, MODEL + "|64.5", change_model("keywords test_size", (64.5, 96.5))),
    "EMA": refused(TRAIN + " --ema 0.9", LAST + "|ema holds NaN", spoil_average),
    "momentum": refused(
        TRAIN,
        LAST + "|optimizer holds NaN",
        change_last("optimizer state 0 momentum_buffer", lambda x: x * torch.nan),
    ),
    "foreign last.pt": accepted(
        TRAIN,
        "takes its place",
        put_file(LAST, b"yolo weights"),
        changes="run/*",
        moved={LAST: "run/damaged.pt"},
    ),
    "model and results": refused(
        SCORE.replace("evaluate.py", "evaluate.py gone.pt"), "choose one of"
    ),
    "group": refused(
        TRAIN, LAST + "|dampening", change_last("optimizer param_groups 1 dampening", ...)
    ),
    "best": refused(TRAIN, LAST + "|float", change_last("best", np.inf)),
    "best of NaN": refused(
        TRAIN, LAST + "|best AP nan", change_last("best", {"AP": np.nan, "step": 1})
    ),
    "no best": refused(TRAIN, LAST + "|int", change_last("best", 0)),
    "shared lists": refused(TRAIN, "run|lr [[", change_last("settings lr", shared_lists())),
    "escape codes": refused(
        TRAIN, r"run|recipe \x1b[31m", change_last("settings recipe", "\x1b[31m\n" * 999)
    ),
    "no classes": refused(PLAIN, MODEL + "|classes", change_model("classes", [])),
    "convention": refused(
        EVAL, MODEL + "|convention 1: expected one of", change_model("convention", {1: 2})
    ),
    "list as convention": refused(
        FROM, MODEL + "|convention [[]]", change_model("convention", [[]])
    ),
    "nothing found --tta": accepted(EVAL + " --tta", "AP"),
    "nothing found --tile": accepted(DRAW + " --tile 40", "0 boxes drawn"),
}

ANNOTATIONS_OF_TOOLS = {
    "absolute names": accepted(
        EVAL,
        "AP",
        change_val(
            "images",
            lambda rows: [
                row | {"file_name": os.path.abspath(f"data/val2017/{row['file_name']}")}
                for row in rows
            ],
        ),
    ),
    "normalized but for one": refused(
        EVAL,
        VAL + "|normalized",
        change_val(
            "annotations", lambda rows: rows[:1] + every(bbox=[0.1, 0.2, 0.3, 0.4])(rows[1:])
        ),
    ),
    "normalized results": refused(
        SCORE,
        FOUND + "|normalized",
        lambda: fuzz.write(FOUND, every(bbox=[0.1, 0.2, 0.3, 0.4])(fuzz.read(FOUND))),
    ),
    **{
        f"YOLO {path}": accepted(
            YOLO, parts, write_yolo, put_file(f"yolo/{path}", content), changes="new/*"
        )
        for path, content, parts in (
            ("train/images/._1.jpg", b"of macOS", "AP"),
            ("train/labels/000001000001.txt", b"\xef\xbb\xbf0 0.5 0.5 0.4 0.4\r\n", "AP"),
            ("train/labels/alone.txt", b"0 0.5 0.5 0.4 0.4", "alone.txt"),
            ("data.yaml", b"names: {1: b, 0: a}", "classes: a, b"),
        )
    },
    "YOLO two images": refused(
        YOLO,
        "share one text file",
        write_yolo,
        put_file("yolo/train/images/000001000001.png", b""),
    ),
    "YOLO names with a gap": refused(
        YOLO,
        "expected 0 to 1, found [0, 2]",
        write_yolo,
        put_file("yolo/data.yaml", b"names: {0: a, 2: b}"),
    ),
}

SECTIONS = {
    "nothing lost": NOTHING_LOST,
    "no silent result": NO_SILENT_RESULT,
    "no hang": NO_HANG,
    "no traceback": NO_TRACEBACK,
    "clear messages": CLEAR_MESSAGES,
    "annotations of tools": ANNOTATIONS_OF_TOOLS,
}
TABLE = {
    f"{section}: {name}": row for section, rows in SECTIONS.items() for name, row in rows.items()
}


# ---- the tests -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a folder with a data set, a finished run and results."""
    with contextlib.chdir(tmp_path_factory.mktemp("made")):
        fuzz.make_folder()
        return Path.cwd()


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """Change to a copy of the folder, fail a row that hangs, and restore the environment."""
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "here"))
    os.mkfifo("pipe")
    os.symlink("/dev/zero", "zero")
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))
    signal.alarm(HANGS)
    with mock.patch.dict(os.environ):
        yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("name", TABLE)
def test_input(here, made, name):
    row = TABLE[name]
    for step in row.steps:
        step()
    before = fuzz.files()
    code, out, err = fuzz.call(row.line)
    after = fuzz.files()
    lines = fuzz.lines_of(err)
    print(f"exit code {code}, stderr {[line[-300:] for line in lines]}")
    assert code == row.code
    assert "Warning: " not in err
    if code:
        assert len(lines) == 1 or "left out" in err
    shown = err if code else out + err
    assert [part for part in row.parts.split("|") if part not in shown] == []
    lost = fuzz.lost_files(before, after)
    assert [path for path in lost if not fnmatch(path, row.changes)] == []
    assert not [path for path in after if path.endswith(".tmp") and path not in before]
    for old, new in row.moved.items():
        assert after[new] == before[old]
    if row.same:
        shutil.copytree(made, ".", dirs_exist_ok=True)
        row.same()
        _, expected, _ = fuzz.call(row.line)
        assert out == expected


def start_scoring(stdout):
    """Start evaluate.py, which scores the results, in a process of its own."""
    command = [sys.executable, *shlex.split(f"{fuzz.ROOT}/{SCORE}")]
    return subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, text=True)


def test_a_full_device_is_an_error_of_one_line(here):
    with open("/dev/full", "w") as full:
        process = start_scoring(full)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.startswith("evaluate.py: ")
    assert err.count("\n") == 1


def test_ctrl_c_during_the_imports_prints_nothing(here):
    process = start_scoring(subprocess.DEVNULL)
    time.sleep(0.5)  # the imports take 3 s
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert err.count("\n") == 0, err


@pytest.mark.parametrize("stderr", ["&-", "/dev/full"])
def test_a_stderr_that_cannot_be_written(here, stderr):
    """A log on a full disk must not end the run."""
    command = shlex.join([sys.executable, *shlex.split(f"{fuzz.ROOT}/{FRESH}")])
    process = subprocess.run(f"{command} 2>{stderr} >out", shell=True, timeout=HANGS)
    assert process.returncode == 0
    assert '"AP"' in Path("out").read_text()
