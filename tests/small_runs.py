"""Small runs of train.py: start one in this process or in others, kill it, compare its files."""

import contextlib
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm import tqdm

import evaluate
import fcos
import train

ROOT = Path(__file__).resolve().parents[1]
SHAPES_LR = train.RECIPES["shapes"]["lr"]  # for 8 images per step; half of it for 4
TIME_LIMIT = 240  # seconds that a process may take on a slow machine
EVERY_3 = ["--eval-every", 3, "--checkpoint-every", 3]


# ---- runs in this process ----------------------------------------------------------------------


def command_line(data, out, *flags):
    """Return the arguments of a run of six steps of four small images; `flags` override them."""
    small = "--iters 6 --batch-size 4 --min-size 64 --max-size 96 --workers 0 --device cpu"
    return ["shapes", "--data", str(data), "--out", str(out), *small.split(), *map(str, flags)]


def run(argv):
    train.main(train.parse_args(argv))


def error_lines(capsys, argv):
    """Run a command that must fail as a user's mistake does; return its lines on stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        evaluate.run(train.main, train.parse_args(argv))
    assert stop.value.code == 2
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    return [line for line in lines if line.strip() and "%|" not in line]


def error_line(capsys, argv):
    """Run a command that must fail with one line on stderr; return the line."""
    (line,) = error_lines(capsys, argv)
    return line


class Killed(BaseException):
    """Ends a run in this process as a kill would; nothing in train.py may catch it."""


def kill():
    raise Killed


def at_step(number, action):
    """From now on, call `action` before the update of a step, counted from 0."""
    update = train.update

    def act_and_update(step, *rest):
        if step == number:
            action()
        update(step, *rest)

    train.update = act_and_update


@contextlib.contextmanager
def acting_at_step(number, action):
    """Let runs in this context call `action` before the update of a step, counted from 0."""
    update = train.update
    at_step(number, action)
    try:
        yield
    finally:
        train.update = update


def run_killed_at(step, argv):
    """Run a command in this process, and kill it within a step, counted from 0."""
    with acting_at_step(step, kill), pytest.raises(Killed):
        run(argv)


def set_scores(monkeypatch, values):
    """Replace scoring: each evaluated model gets the next of `values` as its AP, and equal weights
    get equal APs.

    Returns a dict that collects {AP: the weights that were evaluated}.
    """
    values = iter(values)
    evaluated = {}

    def predict(model, *_):
        state = {name: value.clone() for name, value in model.state_dict().items()}
        for ap, known in evaluated.items():
            if torch.equal(known["head.cls.bias"], state["head.cls.bias"]):
                return ap
        ap = next(values)
        evaluated[ap] = state
        return ap

    monkeypatch.setattr(evaluate, "predict", predict)
    monkeypatch.setattr(evaluate, "score", lambda ap, _: {"AP": ap})
    return evaluated


def poison(number, monkeypatch, gradient_only=False):
    """Make the loss of a step, counted from 0, infinite, or only its gradient NaN."""
    fcos_loss = fcos.fcos_loss
    compute_gradients = train.compute_gradients
    steps = itertools.count()

    def poisoned_loss(*args, **keywords):
        losses = fcos_loss(*args, **keywords)
        losses["box"] = losses["box"] * (1 if gradient_only else torch.inf)
        losses["box"].register_hook(lambda gradient: gradient * torch.nan)
        return losses

    def poisoned_gradients(model, network, batches, settings):
        rehearsal = not network.training
        if rehearsal or next(steps) != number:
            return compute_gradients(model, network, batches, settings)
        with monkeypatch.context() as patch:
            patch.setattr(fcos, "fcos_loss", poisoned_loss)
            return compute_gradients(model, network, batches, settings)

    monkeypatch.setattr(train, "compute_gradients", poisoned_gradients)


# ---- what runs read and write ------------------------------------------------------------------


def read_files(folder):
    """Return {relative path: bytes} of all files in a folder."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def edit_annotations(data, split, change):
    """Call change(content) on the COCO annotations of a split, and write the changed content."""
    path, _ = evaluate.coco_paths(data, f"{split}2017")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def copy_data(data, folder, split, change):
    """Copy a data set and edit the annotations of a split; return the new folder."""
    shutil.copytree(data, folder)
    edit_annotations(folder, split, change)
    return folder


def load_dataset(data, split="train"):
    return evaluate.CocoDataset(*evaluate.coco_paths(data, f"{split}2017"))


def read_log(out):
    """Return the rows of log.jsonl without the speed, which differs from run to run."""
    rows = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("images_per_second", None)
    return rows


def read_losses(out):
    return [row for row in read_log(out) if "loss" in row]


def read_metrics(out):
    return json.loads((Path(out) / "metrics.json").read_text())


def load_checkpoint(out, name="last.pt"):
    return torch.load(Path(out) / name, weights_only=True)


def saved_step(out):
    return load_checkpoint(out)["step"]


def saved_weights(out, name="last.pt"):
    content = load_checkpoint(out, name)
    return content["model"] if name == "model.pt" else content["model"]["model"]


def assert_equal_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def assert_same_run(out, expected):
    """Compare two runs bit for bit: weights, optimizer, averages, model.pt, metrics and log."""
    one = load_checkpoint(out)
    other = load_checkpoint(expected)
    assert one["settings"] == other["settings"]
    assert one["step"] == other["step"]
    momenta = []
    for content in (one, other):
        state = content["optimizer"]["state"]
        momenta.append({key: values["momentum_buffer"] for key, values in state.items()})
    assert momenta[0]
    assert_equal_tensors(*momenta)
    assert_equal_tensors(one.get("ema", {}), other.get("ema", {}))
    for name in ("last.pt", "model.pt"):
        assert_equal_tensors(saved_weights(out, name), saved_weights(expected, name))
    assert read_log(out) == read_log(expected)
    assert read_metrics(out) == read_metrics(expected)


def assert_close_run(out, expected, tolerance=1e-4):
    """Compare the weights and losses of two runs, which may round sums differently."""
    close = dict(rtol=tolerance, atol=tolerance)
    for name in ("last.pt", "model.pt"):
        torch.testing.assert_close(saved_weights(out, name), saved_weights(expected, name), **close)
    for one, other in zip(read_losses(out), read_losses(expected), strict=True):
        assert one == pytest.approx(other, rel=tolerance, abs=tolerance)


# ---- runs in processes of their own ------------------------------------------------------------


def fork(function, *arguments, environment=None):
    """Call a function in a fork of this process, which saves the seconds of importing torch.

    Returns the process. `wait` returns its exit code and what it printed.
    """
    output = tempfile.TemporaryFile("w+")  # noqa: SIM115  (a pipe that nobody reads fills up)

    def child():
        # A lock that another thread of the parent holds is never released in a fork. This concerns
        # tqdm's lock and monitor, and hotcoco's threads: pycocotools scores instead.
        tqdm.set_lock(threading.RLock())
        tqdm.monitor = None
        tqdm.monitor_interval = 0
        sys.modules["hotcoco"] = None
        os.environ.update(environment or {})
        sys.stdout = sys.stderr = open(output.fileno(), "w", buffering=1)  # noqa: SIM115
        function(*arguments)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.output = output
    return process


def wait(process):
    """Wait for a fork to end. Returns its exit code and what it printed."""
    process.join(TIME_LIMIT)
    process.output.seek(0)
    return process.exitcode, process.output.read()


def run_script(argv, prepare=None):
    """Do what `python train.py` does, after the patches that prepare() makes in this process."""
    if prepare:
        prepare()
    evaluate.run(train.main, train.parse_args(argv))


def start(argv, prepare=None):
    """Start train.py in a fork of this process. Returns the process."""
    return fork(run_script, argv, prepare)


def run_apart(argv, prepare=None):
    """Run train.py in a fork of this process. Returns its exit code and what it printed."""
    return wait(start(argv, prepare))


def start_ranks(world_size, argv, prepare=None):
    """Start train.py in several forks with the environment variables that Kubernetes sets."""
    variables = dict(WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    return [
        fork(run_script, argv, prepare, environment=variables | {"RANK": str(rank)})
        for rank in range(world_size)
    ]


def run_ranks(world_size, argv, prepare=None):
    """Run train.py in several forks. Returns the exit code and the output of every rank."""
    return [wait(rank) for rank in start_ranks(world_size, argv, prepare)]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def kill_9():
    os.kill(os.getpid(), signal.SIGKILL)


# ---- batches of images that are not read from files --------------------------------------------


class FakeDataset:
    """A data set of images of given (height, width), one box in each.

    Red is the index of the image and green the column of the pixel; the label is the index.
    """

    sample = evaluate.CocoDataset.sample
    truth = evaluate.CocoDataset.truth

    def __init__(self, hw, trainable=None):
        self.hw = np.array(hw)
        self.trainable = np.ones(len(hw), bool) if trainable is None else np.array(trainable)
        self.classes = range(len(hw))
        self.offsets = np.arange(len(hw) + 1)
        self.columns = {}
        self.files_read = []

    def __len__(self):
        return len(self.hw)

    def image(self, i):
        height, width = self.hw[i]
        image = torch.zeros(3, height, width, dtype=torch.uint8)
        image[0] = int(i)
        image[1] = torch.arange(width) % 256
        return image

    def path(self, i):
        return f"{i}.jpg"

    def target(self, i):
        height, width = self.hw[i].tolist()
        return torch.tensor([[1.0, 2, width / 2, height]]), torch.tensor([int(i)])


# usual sizes of the images of COCO, the most frequent twice
COCO_SIZES = """
    480x640 480x640 427x640 427x640 640x480 640x480 640x427 426x640 612x612 375x500 333x500 500x375
    640x640 360x640 424x640 640x425 281x500 640x360 300x640 523x640 640x512 457x640 640x540 213x640
    640x238
"""
COCO = FakeDataset([tuple(map(int, size.split("x"))) for size in COCO_SIZES.split()])


def make_batches(dataset, rank=0, world_size=1, micro_batches=1, **settings):
    """Return the TrainBatches of a data set, by default of 30 steps of four small images."""
    defaults = dict(seed=0, batch_size=4, min_size=[32, 48, 64], max_size=96, iters=30)
    defaults |= dict(negatives=False, augment=False, multiple=32)
    return train.TrainBatches(dataset, defaults | settings, rank, world_size, micro_batches)
