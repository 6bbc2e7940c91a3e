"""Odd and damaged inputs must not cause a traceback, a hang, a lost file or a silent wrong score.

All are in one table. A row is a command line and the steps that prepare a folder for it.
"""

import contextlib
import json
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from unittest import mock

import fuzz
import numpy as np
import pytest
import torch
from fuzz import DRAW, EVAL, FOUND, FROM, LAST, MODEL, PHOTO, SCORE, TRAIN, VAL
from PIL import Image

import fcos
import train

HANGS = 240  # seconds; the slowest row takes 2 on an idle machine
LOG, PREVIOUS, DRAWN = "run/log.jsonl", "run/previous.pt", "drawn/000001000001.jpg"
YOLO = TRAIN.replace("--data data --out run", "--data yolo --out new")
ONE_LINE = ("train/images/000001000001.png", "../yolo/data.yaml")
LONG, BOX, FRESH = "x" * 5000, "annotations 0", TRAIN + " --fresh"
OWN = (
    TRAIN.replace("--data data --out run", "--out new") + f" --train-annotations {VAL} "
    "--train-images data/val2017 --val-images data/val2017 --val-annotations new/"
)
PLAIN = f"evaluate.py {MODEL} --images {PHOTO} --out drawn --workers 0 --device cpu"


# ---- preparations: functions without arguments, and functions that return one --------------------


val, found, model, last = (partial(fuzz.change, path) for path in (VAL, FOUND, MODEL, LAST))
weight = partial(model, "model head.cls.weight")


def put(path, content=None):
    """Replace a path by a file, or by a folder without `content`."""

    def prepare():
        Path(path).unlink(missing_ok=True)
        Path(path).mkdir(parents=True) if content is None else Path(path).write_bytes(content)

    return prepare


def grey(shift):
    """Return a grey picture whose values take 8 + shift bits."""

    def prepare():
        pixels = np.asarray(Image.open(PHOTO).convert("L"))
        Image.fromarray(pixels.astype(np.uint16) << shift if shift else pixels).save("grey.png")

    return prepare


def adam():
    """The checkpoint of step 2 of 4, as a train.py with another optimizer writes it."""
    os.replace("run/previous.pt", LAST)
    optimizer = torch.optim.Adam(train.parameter_groups(fcos.load(LAST), 1e-3))
    last("optimizer", optimizer.state_dict())()
    last(["settings", "optimizer", "class"], "Adam")()


def spoilt_average():
    """A run with a moving average of which all is NaN."""
    content = torch.load(LAST)
    content["settings"]["ema"] = 0.9
    content["ema"] = {
        name: x * torch.nan if x.is_floating_point() else x
        for name, x in content["model"]["model"].items()
    }
    content["layout"] |= train.tensor_shapes({"ema": content["ema"]})
    torch.save(content, LAST)


def shared_lists(depth=60):
    """A list that is 2**60 numbers as text, and small in a file."""
    value = [1]
    for _ in range(depth):
        value = [value, value]
    return value


def load_spoilt():
    """Weights of which the last is NaN; the first must not be loaded either."""
    content, loaded = fcos.read_checkpoint(MODEL), fcos.load(MODEL)
    before = loaded.head.cls.bias.clone()
    content["model"]["head.cls.bias"] += 1
    content["model"]["head.scale.4"] *= torch.nan
    try:
        fcos.load_weights(loaded, content)
    finally:
        assert torch.equal(loaded.head.cls.bias, before)


def small_results():
    """Results in fractions of the image, as YOLO has them."""
    rows = json.loads(Path(FOUND).read_text())
    Path(FOUND).write_text(json.dumps([row | {"bbox": [0.1, 0.2, 0.3, 0.4]} for row in rows]))


def yolo():
    """A data set of YOLO with two classes."""
    for split in ("train", "valid"):
        os.makedirs(f"yolo/{split}/labels")
        shutil.copytree("data/val2017", f"yolo/{split}/images")
        for name in os.listdir("data/val2017"):
            label = Path(f"yolo/{split}/labels", name).with_suffix(".txt")
            label.write_text("0 0.5 0.5 0.4 0.4\n1 0.3 0.3 0.2 0.2\n")
    Path("yolo/data.yaml").write_text("names: [a, b]\n")


# ---- the table -----------------------------------------------------------------------------------


def row(line, says, *steps, code=2, changes="", same=None, kept=None):
    """A command line or a function; what its one line of error, or any line if it succeeds, names
    (a|b: both); preparations; the files that may change; what must lead to the same stdout; and
    {file: where it must have been moved}."""
    return types.SimpleNamespace(**locals())


fine = partial(row, code=0)
ITSELF = {}
ITSELF["model"] = ITSELF
TABLE = {  # by number of the point of the list that this test began with
    # ---- no start that fails, and nothing that is written, costs a file
    **{
        f"{point} kernels": row(
            line, "FCOS_KERNELS|cupy", partial(os.environ.update, FCOS_KERNELS="foo")
        )
        for point, line in ((1, FRESH), (13, EVAL))
    },
    "1 rate": row(FRESH + " --lr 1e30", "not finite"),
    "1 huge rate": row(FRESH + " --lr 1e300", "--lr|1e300"),
    "1 memory": row(FRESH + " --min-size 20000 --max-size 30000", "memory", fuzz.little_memory),
    "1 batch": row(FRESH + " --batch-size 1000000000000", "--batch-size|65536"),
    "1 heights": row(
        FRESH,
        "as in its annotations",
        fuzz.change(fuzz.TRAIN_JSON, "images", lambda rows: [row | {"height": 50} for row in rows]),
    ),
    "2 previous.pt": row(f"{FRESH} --weights {PREVIOUS}", PREVIOUS, partial(os.remove, MODEL)),
    "2 last.pt": row(f"{FRESH} --weights {LAST}", LAST, partial(os.remove, MODEL)),
    **{
        f"3 over {path}": row(f"{EVAL} --save-json {path}", path + "|input of this run")
        for path in (MODEL, VAL, PHOTO)
    },
    "3 export": row(f"evaluate.py {MODEL} --export {MODEL}", MODEL + "|input of this run"),
    "4 device": row(
        EVAL + " --save-json null", "null|expected a file", partial(os.symlink, "/dev/null", "null")
    ),
    "5 photo": row(
        DRAW.replace(PHOTO, "link.jpg").replace("drawn", "data/val2017"),
        "holds the pictures",
        partial(os.symlink, PHOTO, "link.jpg"),
    ),
    "5 link": fine(
        DRAW, "drawn", put("drawn"), partial(os.symlink, "../" + PHOTO, DRAWN), changes=DRAWN
    ),
    **{
        f"6 {name}": row(
            OWN + name,
            f"new/{name}|input of this run",
            put("new"),
            partial(shutil.copy, VAL, f"new/{name}"),
        )
        for name in ("metrics.json", "log.jsonl")
    },
    # ---- no wrong result without a word
    "7 NaN": fine(SCORE, "AP", val(f"{BOX} bbox", [np.nan] * 4), same=val(BOX, ...)),
    "7 area": fine(SCORE, "AP", val(f"{BOX} area", -1), same=val(f"{BOX} area", ...)),
    "7 notes": fine(EVAL, "no area inside", val(f"{BOX} bbox", [1, 1, 0, 0])),
    "7 text": fine(
        SCORE,
        "AP",
        val("annotations", lambda rows: [row | {"image_id": str(row["image_id"])} for row in rows]),
        same=lambda: None,
    ),
    "7 results of text": fine(SCORE, "AP", found("0 image_id", repr), same=lambda: None),
    "7 another text": row(
        SCORE,
        "no annotation belongs to an image|'a'",
        val("annotations", lambda rows: [row | {"image_id": "a"} for row in rows]),
    ),
    "7 twice": row(SCORE, "images|2 times", val("images", lambda rows: rows + rows[:1])),
    "7 category": row(SCORE, "category_id 99", val(f"{BOX} category_id", 99)),
    "7 unknown": fine(SCORE, "unknown image_id", val(f"{BOX} image_id", 5)),
    "7 image": row(SCORE, "expected an image_id|'image_id': 99", found("0 image_id", 99)),
    "8 model.pt": row(EVAL, MODEL + "|damaged", fuzz.damage(MODEL, 64)),
    "8 weights": row(FROM, MODEL + "|damaged", fuzz.damage(MODEL, 64)),
    "8 NaN": row(EVAL, "head.cls.weight|NaN", weight(lambda x: x * torch.nan)),
    "8 mean": row(EVAL, MODEL + "|mean", model("convention mean", (np.nan,) * 3)),
    "8 last.pt": fine(TRAIN, "takes its place", fuzz.damage(LAST, 4096), changes="run/*"),
    "8 infinity": row(TRAIN, LAST, last("model model head.cls.weight", lambda x: x / 0)),
    **{
        f"9 {kind}": row(EVAL, "head.cls.weight", weight(turn))
        for kind, turn in dict(
            int64=lambda x: x.long(),
            uint8=lambda x: x.byte(),
            bool=lambda x: x > 0,
            sparse=lambda x: x.to_sparse(),
            meta=lambda x: x.to("meta"),
            quantised=lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
            nested=lambda x: torch.nested.nested_tensor([x[0], x[1]]),
        ).items()
    },
    "9 untouched": row(load_spoilt, "NaN"),
    "10 12 bits": fine(
        lambda: print(fcos.read_image("grey.png").float().mean()), "", grey(4), same=grey(0)
    ),
    "11 nan": row(DRAW + " --score-threshold nan", "--score-threshold"),
    **{
        f"11 save {i}": row(line + " --save-json r.json", "--save-json")
        for i, line in enumerate((DRAW, SCORE))
    },
    "11 nothing": row(EVAL + " --save-json ''", "save_json: expected a value"),
    "11 out": row(EVAL + " --out drawn", "--out needs --images"),
    "11 floats": row(lambda: fcos.pad_batch([torch.rand(3, 9, 9)]), "uint8"),
    # ---- no hang
    "12 itself": row(EVAL, MODEL, lambda: torch.save(ITSELF, MODEL)),
    **{
        f"12 {kind} {path}": row(line, f"{path}|regular", partial(os.replace, kind, path))
        for kind in ("pipe", "zero")
        for line, path in ((EVAL, MODEL), (EVAL, VAL), (SCORE, FOUND), (DRAW, PHOTO))
    },
    "12 image": row(EVAL, PHOTO + "|regular", partial(os.replace, "pipe", PHOTO)),
    "12 log": row(TRAIN, LOG, partial(os.replace, "pipe", LOG)),
    "12 lock": row(TRAIN, "regular", partial(os.replace, "pipe", "run/.lock")),
    "12 picture that links to itself": row(
        DRAW.replace(PHOTO, "data/val2017"),
        "data/val2017/loop.jpg",
        partial(os.symlink, "loop.jpg", "data/val2017/loop.jpg"),
    ),
    "12 file that links to itself": fine(
        EVAL + " --save-json loop.json",
        "AP",
        partial(os.symlink, "loop.json", "loop.json"),
        changes="loop.json",
    ),
    "12 last.pt": fine(TRAIN, "regular", partial(os.replace, "pipe", LAST), changes="run/*"),
    "12 boxes": fine(
        SCORE,
        "AP",
        val(
            "annotations",
            lambda rows: [
                rows[0] | dict(id=k, bbox=[k % 100, k % 90, 9, 9]) for k in range(100_000)
            ],
        ),
    ),
    # ---- no traceback
    "13 no id": fine(SCORE, "AP", val(f"{BOX} id", ...), same=lambda: None),
    "13 image without id": row(SCORE, VAL + "|images[0]|`id`", val("images 0 id", ...)),
    "13 list as id": row(SCORE, VAL + "|images[0].id|array", val("images 0 id", [1])),
    "13 list as image_id": row(SCORE, VAL + "|image_id", val(f"{BOX} image_id", [1])),
    "13 list in results": row(SCORE, FOUND + "|image_id", found("0 image_id", [1])),
    "13 bbox": row(SCORE, VAL + "|bbox", val(f"{BOX} bbox", [10**400, 1, 1, 1])),
    "13 found bbox": row(SCORE, FOUND + "|bbox", found("0 bbox", [10**400, 1, 1, 1])),
    "13 score": row(SCORE, FOUND + "|score", found("0 score", 10**400)),
    **{
        f"13 {where} {value}": row(PLAIN, f"{MODEL}|{where.split()[-1]}", model(where, value))
        for where, value in {
            "convention": None,
            "convention mean": (1, 2),
            "keywords test_size": (5,),
            "keywords channels": -1,
            "classes": "abcdef",
        }.items()
    },
    "13 no keywords": row(EVAL, MODEL + "|which model", model("keywords", ...)),
    **{
        f"13 step {step}": row(TRAIN, LAST + "|step", last("step", step))
        for step in (..., "x", -1, 99)
    },
    "13 optimizer": row(TRAIN, "run|optimizer class Adam there, SGD here", adam),
    "13 log of bytes": fine(TRAIN, "AP", put(LOG, b"\xff\xfe"), changes="run/*"),
    "13 log of files": row(TRAIN, LOG, put(LOG)),
    **{
        f"13 long {word}": row(line.replace(word, LONG), LONG[:99])
        for line, word in (
            (EVAL, MODEL),
            (EVAL + " --save-json saved", "saved"),
            (PLAIN, PHOTO),
            (FROM, MODEL),
            (FROM, "new"),
            (EVAL, "data "),
        )
    },
    "13 ASCII": row(
        SCORE + " --per-class",
        "ascii",
        val("categories 0 name", "\xe9"),
        partial(os.environ.update, PYTHONIOENCODING="ascii"),
    ),
    "13 drawing": row(DRAW, DRAWN + "|cannot be written", put(DRAWN)),
    "13 size": row(TRAIN + " --min-size 100000", "min_size 100000|max_size"),
    "13 memory": row(EVAL + " --min-size 99999 --max-size 99999", "memory", fuzz.little_memory),
    "13 RUN_ID": fine(
        TRAIN, "AP", partial(os.environ.update, TORCHELASTIC_RUN_ID="7"), changes="run/*"
    ),
    **{
        f"13 launch {values}": row(
            line,
            words,
            partial(os.environ.update, dict(pair.split("=") for pair in values.split())),
        )
        for line in (TRAIN,)
        for values, words in {
            "RANK=x": "RANK: expected|found x|torchrun",
            "RANK=1 WORLD_SIZE=2": "MASTER_ADDR: expected|torchrun",
            "RANK=2 WORLD_SIZE=2": "RANK: expected less than WORLD_SIZE 2, found 2|torchrun",
            "RANK=1 WORLD_SIZE=2 MASTER_ADDR=a MASTER_PORT=0": "MASTER_PORT: expected 1",
            "WORLD_SIZE=2": "RANK: expected|found None|torchrun",
            "SLURM_STEP_NUM_TASKS=2": "2 independent tasks|torchrun",
            "OMPI_COMM_WORLD_SIZE=2": "2 independent tasks|torchrun",
            "TORCHELASTIC_RUN_ID=a RANK=0 WORLD_SIZE=1": "MASTER_ADDR: expected",
        }.items()
    },
    "13 launch alone": fine(
        TRAIN, "AP", partial(os.environ.update, RANK="0", WORLD_SIZE="1"), changes="run/*"
    ),
    "13 SLURM_NTASKS": fine(
        TRAIN, "AP", partial(os.environ.update, SLURM_NTASKS="2"), changes="run/*"
    ),
    "13 RESTART_COUNT": fine(
        FRESH, "AP", partial(os.environ.update, SLURM_RESTART_COUNT="abc"), changes="run/*"
    ),
    # ---- no message that misleads
    "14 torn": row(
        TRAIN,
        LAST + "|damaged|--fresh",
        partial(os.truncate, LAST, 10_000),
        partial(os.remove, PREVIOUS),
    ),
    "14 file_name": row(EVAL, "images|file_name|'height'", val("images 0 file_name", ...)),
    "14 name": row(EVAL, "categories|name", val("categories 0 name", ...)),
    "14 image_id": row(EVAL, VAL + "|image_id|'area'", val(f"{BOX} image_id", ...)),
    **{
        f"14 code {path}": row(
            FROM.replace(MODEL, path),
            "refused|system",
            put(path, pickle.dumps({"model": os.system}, 2)),
        )
        for path in (MODEL, "w.pkl")
    },
    "14 keys": row(EVAL, MODEL + "|keys", model("model", {1: torch.zeros(1)})),
    "14 inclusive": row(PLAIN, MODEL + "|inclusive", model("convention inclusive", [[]])),
    **{
        f"14 {what}": row(PLAIN, MODEL + "|" + what.split()[0], model(f"convention {name}", value))
        for what, name, value in (
            ("std of 0", "std", (0.0,) * 3),
            ("mean of 1e300", "mean", (1e300,) * 3),
            ("bn_eps NaN", "bn_eps", np.nan),
            ("bgr no", "bgr", "no"),
        )
    },
    "14 size": row(PLAIN, MODEL + "|64.5", model("keywords test_size", (64.5, 96.5))),
    "14 EMA": row(TRAIN + " --ema 0.9", LAST + "|ema holds NaN", spoilt_average),
    "14 momentum": row(
        TRAIN,
        LAST + "|optimizer holds NaN",
        last("optimizer state 0 momentum_buffer", lambda x: x * torch.nan),
    ),
    "14 foreign last.pt": fine(
        TRAIN,
        "takes its place",
        put(LAST, b"yolo weights"),
        changes="run/*",
        kept={LAST: "run/damaged.pt"},
    ),
    "14 fresh log": row(FRESH + " --lr 1e30", "not finite"),
    "14 model and results": row(
        SCORE.replace("evaluate.py", "evaluate.py gone.pt"), "choose one of"
    ),
    "14 group": row(TRAIN, LAST + "|dampening", last("optimizer param_groups 1 dampening", ...)),
    "14 best": row(TRAIN, LAST + "|float", last("best", np.inf)),
    "14 best of NaN": row(TRAIN, LAST + "|best AP nan", last("best", {"AP": np.nan, "step": 1})),
    "14 no best": row(TRAIN, LAST + "|int", last("best", 0)),
    "14 shared lists": row(TRAIN, "run|lr [[", last("settings lr", shared_lists())),
    "14 escape codes": row(
        TRAIN, r"run|recipe \x1b[31m", last("settings recipe", "\x1b[31m\n" * 999)
    ),
    "13 LOCAL_WORLD_SIZE": row(
        TRAIN + " --workers 1",
        "LOCAL_WORLD_SIZE|torchrun",
        partial(os.environ.update, LOCAL_WORLD_SIZE="x"),
    ),
    "14 no classes": row(PLAIN, MODEL + "|classes", model("classes", [])),
    "14 convention": row(
        EVAL, MODEL + "|convention 1: expected entries", model("convention", {1: 2})
    ),
    "14 list as convention": row(FROM, MODEL + "|convention [[]]", model("convention", [[]])),
    **{
        f"14 nothing found {view}": fine(f"{line} {view}", says)
        for line, view, says in ((EVAL, "--tta", "AP"), (DRAW, "--tile 40", "0 boxes drawn"))
    },
    # ---- annotations as tools write them
    "15 absolute names": fine(
        EVAL,
        "AP",
        val(
            "images",
            lambda rows: [
                row | {"file_name": os.path.abspath(f"data/val2017/{row['file_name']}")}
                for row in rows
            ],
        ),
    ),
    "15 normalized but for one": row(
        EVAL,
        VAL + "|normalized",
        val(
            "annotations",
            lambda rows: rows[:1] + [row | {"bbox": [0.1, 0.2, 0.3, 0.4]} for row in rows[1:]],
        ),
    ),
    "15 normalized results": row(SCORE, FOUND + "|normalized", small_results),
    **{
        f"15 YOLO {path}": (row if path in ONE_LINE else fine)(
            YOLO, says, yolo, put(f"yolo/{path}", content), changes="new/*"
        )
        for path, content, says in (
            ("train/images/._1.jpg", b"of macOS", "AP"),
            ("train/labels/000001000001.txt", b"\xef\xbb\xbf0 0.5 0.5 0.4 0.4\r\n", "AP"),
            ("train/labels/alone.txt", b"0 0.5 0.5 0.4 0.4", "alone.txt"),
            ("train/images/000001000001.png", b"", "share one text file"),
            ("data.yaml", b"names: {1: b, 0: a}", "classes: a, b"),
            ("../yolo/data.yaml", b"names: {0: a, 2: b}", "expected 0 to 1, found [0, 2]"),
        )
    },
    "14 1e308": fine(EVAL, "no area inside", val(f"{BOX} bbox", [1e308] * 4)),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
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
    lines, after = fuzz.lines_of(err), fuzz.files()
    print(f"exit code {code}, stderr {[line[-300:] for line in lines]}")
    assert code == row.code and "Warning: " not in err
    assert [part for part in row.says.split("|") if part not in (err if code else out + err)] == []
    assert code == 0 or len(lines) == 1 or "left out" in err
    assert [
        path
        for path, content in before.items()
        if after.get(path) != content and not fnmatch(path, row.changes)
    ] == []
    assert not [path for path in after if path.endswith(".tmp") and path not in before]
    assert all(before[old] == after[new] for old, new in (row.kept or {}).items())
    if row.same:
        shutil.copytree(made, ".", dirs_exist_ok=True)
        row.same()
        assert fuzz.call(row.line)[1] == out


@pytest.mark.parametrize("how", ["a full device", "Ctrl-C"])
def test_process(here, how):
    out = open("/dev/full" if how == "a full device" else os.devnull, "w")  # noqa: SIM115
    process = subprocess.Popen(
        [sys.executable, *shlex.split(f"{fuzz.ROOT}/{SCORE}")],
        stdout=out,
        stderr=subprocess.PIPE,
        text=True,
    )
    if how == "Ctrl-C":
        time.sleep(0.5)  # during the imports, which take 3 s
        process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    expected = (-signal.SIGINT, 0) if how == "Ctrl-C" else (2, 1)
    assert (process.returncode, err.count("\n")) == expected, err
    assert how == "Ctrl-C" or err.startswith("evaluate.py: ")


@pytest.mark.parametrize("stderr", ["&-", "/dev/full"])
def test_a_stderr_that_cannot_be_written(here, stderr):
    """A log on a full disk must not end the run."""
    command = shlex.join([sys.executable, *shlex.split(f"{fuzz.ROOT}/{FRESH}")])
    assert subprocess.run(f"{command} 2>{stderr} >out", shell=True, timeout=HANGS).returncode == 0
    assert '"AP"' in Path("out").read_text()
