"""Runs that are killed, stopped or left without room, in processes of their own."""

import contextlib
import ctypes
import io
import itertools
import multiprocessing
import os
import re
import resource
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_runs import (
    EVERY_3,
    TIME_LIMIT,
    assert_same_run,
    at_step,
    command_line,
    error_line,
    kill_9,
    read_files,
    read_losses,
    read_metrics,
    run,
    run_apart,
    saved_step,
    start,
)
from torch.utils.data import DataLoader

import evaluate
import train
from fcos import UserError

pytestmark = pytest.mark.usefixtures("no_process_left")


# ---- kill -9 -----------------------------------------------------------------------------------


def kill_within_save(number):
    """Kill this process when it has written half of a checkpoint: the first, the second, ..."""
    save = torch.save
    numbers = itertools.count(1)

    def save_or_die(content, file):
        if next(numbers) < number:
            return save(content, file)
        whole = io.BytesIO()
        save(content, whole)
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        kill_9()

    torch.save = save_or_die


def test_kill_9_at_any_moment_changes_nothing(shapes, tmp_path):
    """Kill a run within a save and at two random moments; it ends as one that was not killed."""
    begin = time.monotonic()
    run(command_line(shapes, tmp_path / "whole", "--checkpoint-every", 1))
    seconds = time.monotonic() - begin
    out = tmp_path / "killed"
    argv = command_line(shapes, out, "--checkpoint-every", 1)
    code, _ = run_apart(argv, lambda: kill_within_save(3))
    assert code == -signal.SIGKILL
    assert list(out.glob(".fcos-*.tmp"))
    assert saved_step(out) == 2
    for delay in np.random.default_rng().uniform(0, 0.6 * seconds, 2):
        process = start(argv)
        process.join(delay)
        process.kill()
        process.join()
    code, output = run_apart(argv)
    assert code == 0, output
    assert "resumes after step" in output
    assert "Traceback" not in output
    assert_same_run(out, tmp_path / "whole")
    assert not list(out.glob("*.tmp"))


def test_a_second_run_in_a_folder_is_refused_while_the_first_lives(
    finished, shapes, tmp_path, capsys
):
    """When the first is killed, its dataloader worker does not block the next run."""
    out = tmp_path / "run"
    argv = command_line(shapes, out, *EVERY_3, "--workers", 1)
    reached = tmp_path / "reached"

    def wait_in_step():
        reached.touch()
        time.sleep(TIME_LIMIT)

    first = start(argv, lambda: at_step(1, wait_in_step))
    while not reached.exists():
        assert first.is_alive()
        time.sleep(0.05)
    before = read_files(out)
    line = error_line(capsys, [*argv, "--fresh"])
    assert line.endswith("run: another process writes there; use another --out")
    assert read_files(out) == before
    first.kill()
    first.join()
    run(argv)
    assert_same_run(out, finished.out)


# ---- signals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("workers, name", [(0, "SIGTERM"), (1, "SIGUSR1"), (1, "SIGHUP")])
def test_a_signal_ends_the_step_and_saves(finished, shapes, tmp_path, workers, name):
    """As when a machine shuts down, every process gets the signal, dataloader workers included."""
    out = tmp_path / "run"
    argv = command_line(shapes, out, "--eval-every", 3, "--workers", workers)

    def signal_all():
        pids = [worker.pid for worker in multiprocessing.active_children()]
        assert len(pids) == workers
        for pid in (*pids, os.getpid()):
            os.kill(pid, getattr(signal, name))

    code, output = run_apart(argv, lambda: at_step(3, signal_all))
    assert code == 0, output
    assert f"{name}: stopped after step 4 of 6; the same command resumes" in output
    assert saved_step(out) == 4
    code, output = run_apart(argv)
    assert code == 0, output
    assert "resumes after step 4 of 6" in output
    assert_same_run(out, finished.out)


def test_a_hangup_is_ignored_under_nohup(shapes, tmp_path):
    def prepare():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        at_step(1, lambda: os.kill(os.getpid(), signal.SIGHUP))

    code, output = run_apart(command_line(shapes, tmp_path / "run", "--iters", 2), prepare)
    assert code == 0, output
    assert "stopped" not in output
    assert saved_step(tmp_path / "run") == 2


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
def test_a_second_signal_ends_the_run_at_once(shapes, tmp_path, number, code):
    """Except within a second of the first, since Slurm and torchrun may forward the same signal."""

    def hang():
        for pause in (0.1, 1.1, 60):
            os.kill(os.getpid(), number)
            time.sleep(pause)

    begin = time.monotonic()
    process = start(command_line(shapes, tmp_path / "run"), lambda: at_step(1, hang))
    process.join(50)
    assert process.exitcode == code
    assert 1 < time.monotonic() - begin < 50
    assert not (tmp_path / "run" / "last.pt").exists()


# ---- dataloader workers ------------------------------------------------------------------------


def is_running(pid):
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    return False


def test_workers_end_when_their_parent_is_killed(shapes, tmp_path):
    """PyTorch's workers look for their parent every five seconds."""
    pids = tmp_path / "pids"

    def note_workers_and_die():
        pids.write_text(" ".join(str(p.pid) for p in multiprocessing.active_children()))
        kill_9()

    argv = command_line(shapes, tmp_path / "run", "--workers", 2)
    run_apart(argv, lambda: at_step(1, note_workers_and_die))
    workers = pids.read_text().split()
    assert len(workers) == 2
    limit = time.monotonic() + 30
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < limit, "a dataloader worker outlives its parent"
        time.sleep(0.1)


@pytest.mark.parametrize(
    "when, failure, message",
    [
        ("training", "dies", "DataLoader worker .* (killed by signal|exited)"),
        ("training", "hangs", "DataLoader timed out"),
        ("evaluation", "dies", "DataLoader worker .* (killed by signal|exited)"),
        ("evaluation", "is broken", r"val2017/\d+\.jpg: is broken"),
    ],
)
def test_a_worker_that_fails_ends_the_run_with_one_line(shapes, tmp_path, when, failure, message):
    """Here at its second image. In an evaluation the workers of both loaders are alive."""
    read_image = evaluate.CocoDataset.image
    images = itertools.count()

    def fail_at_second(self, i):
        if next(images) == 1:
            if failure == "is broken":
                raise UserError(f"{self.path(i)}: is broken")
            if failure == "dies":
                kill_9()
            time.sleep(600)
        return read_image(self, i)

    def prepare():
        predict = evaluate.predict

        def predict_with_failure(*args):
            evaluate.CocoDataset.image = fail_at_second
            return predict(*args)

        if when == "training":
            evaluate.CocoDataset.image = fail_at_second
        evaluate.predict = predict_with_failure
        evaluate.DataLoader = lambda *args, **keywords: DataLoader(
            *args, **keywords | {"timeout": 5 if failure == "hangs" else 60}
        )

    argv = command_line(shapes, tmp_path / "run", "--iters", 2, "--workers", 1)
    code, output = run_apart(argv, prepare)
    assert code == 2, output
    assert "Traceback" not in output, output
    lines = output.splitlines()
    assert re.search(message, lines[-1]), output
    assert len([line for line in lines if re.search(message, line)]) == 1


def few_open_files():
    """Report a low limit: pytest's own open files would count against a real one."""
    os.sysconf = lambda name: 50


def small_shared_memory():
    shutil.disk_usage = lambda path: SimpleNamespace(free=2**20)


def full_shared_memory():
    def refuse(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: (28)")

    torch.Tensor.share_memory_ = refuse


def no_shared_memory():
    shutil.disk_usage = lambda path: SimpleNamespace(free=4096)


@pytest.mark.parametrize(
    "prepare, texts",
    [
        (few_open_files, ("ulimit -n", "open files")),
        (small_shared_memory, ("/dev/shm has 1.0 MB free", "--shm-size")),
        (full_shared_memory, ("unable to allocate shared memory", "/dev/shm")),
        (no_shared_memory, ("/dev/shm has 0.0 MB free", "--shm-size")),
    ],
)
def test_a_run_without_room_for_workers_ends_with_one_line(shapes, tmp_path, prepare, texts):
    flags = ["--workers", 2, "--batch-size", 16, "--min-size", 96]
    code, output = run_apart(command_line(shapes, tmp_path / "run", *flags), prepare)
    assert code == 2, output
    assert "Traceback" not in output, output
    (line,) = [line for line in output.splitlines() if "--workers 0" in line]
    for text in texts:
        assert text in line


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bug_in_augment_keeps_its_traceback_and_leaves_no_process(shapes, tmp_path, workers):
    """It is a RuntimeError here, as PyTorch's errors about workers are."""

    def prepare():
        def augment(sample, rng):
            raise RuntimeError("a bug of mine")

        train.augment = augment

    begin = time.monotonic()
    code, output = run_apart(command_line(shapes, tmp_path / "run", "--workers", workers), prepare)
    assert code == 1
    assert time.monotonic() - begin < 60
    for text in ("Traceback", "in augment", "a bug of mine"):
        assert text in output, output
    assert re.search(r"in a sample made from .*train2017/\d+.jpg", output)


def test_an_error_of_the_system_names_the_line_of_code(shapes, tmp_path):
    def prepare():
        def augment(sample, rng):
            open(tmp_path / "missing.txt")

        train.augment = augment

    code, output = run_apart(command_line(shapes, tmp_path / "run", "--workers", 0), prepare)
    assert code == 2
    last = output.splitlines()[-1]
    assert re.search(r"No such file or directory: .*missing.txt' \(train.py line \d+\)", last)


def test_a_bug_after_training_ends_the_run_although_workers_are_alive(shapes, tmp_path):
    def prepare():
        train.print_result = lambda best, files: best["a bug of mine"]

    argv = command_line(shapes, tmp_path / "run", "--iters", 2, "--workers", 2)
    code, output = run_apart(argv, prepare)
    assert code == 1
    assert "KeyError: 'a bug of mine'" in output


def test_a_run_ends_although_an_exception_keeps_its_loader_alive(shapes, tmp_path):
    """Packages such as timm store exceptions, whose tracebacks hold the frames of all callers."""
    stored = []

    def prepare():
        make_model = train.make_model

        def make_model_and_store_an_exception(*args):
            try:
                raise KeyError("an optional package")
            except KeyError as error:
                stored.append(error)
            return make_model(*args)

        train.make_model = make_model_and_store_an_exception

    begin = time.monotonic()
    argv = command_line(shapes, tmp_path / "run", "--iters", 2, "--workers", 1)
    code, output = run_apart(argv, prepare)
    assert code == 0, output
    assert time.monotonic() - begin < 60


# ---- disks and folders -------------------------------------------------------------------------


def limit_file_size(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_costs_the_checkpoint_but_not_the_run(finished, shapes, tmp_path):
    out = tmp_path / "run"
    argv = command_line(shapes, out, *EVERY_3)
    run_apart(argv, lambda: at_step(4, kill_9))
    before = (out / "last.pt").read_bytes()
    room = len(before) // 4 * 3  # for model.pt, but not for last.pt
    code, output = run_apart(argv, lambda: limit_file_size(room))
    assert code == 0, output
    assert "last.pt: cannot be written ([Errno 27] File too large); the older" in output
    assert (out / "last.pt").read_bytes() == before
    assert not list(out.glob("*.tmp"))
    assert read_metrics(out) == read_metrics(finished.out)
    run(argv)  # now there is room
    assert_same_run(out, finished.out)


def test_a_run_that_could_write_no_checkpoint_ends_with_exit_code_2(shapes, tmp_path):
    argv = command_line(shapes, tmp_path / "run", "--eval-every", 3)
    code, output = run_apart(argv, lambda: limit_file_size(20_000))
    assert code == 2, output
    assert "the older model stays" in output
    assert "run: no checkpoint could be written" in output.splitlines()[-1]
    assert read_losses(tmp_path / "run")[-1]["step"] == 6


def test_a_folder_without_write_permission_is_named_before_training(shapes, tmp_path):
    out = tmp_path / "run"
    out.mkdir(mode=0o555)

    def drop_capabilities():
        """Give up the rights of root, who may write anywhere."""
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        none = (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset(header, none) == 0

    for folder in (out, out / "deeper"):
        code, output = run_apart(command_line(shapes, folder), drop_capabilities)
        assert code == 2
        assert "%|" not in output, "training has begun"
        words = "cannot be|denied"
        (line,) = [line for line in output.splitlines() if re.search(words, line)]
        assert str(folder) in line
        assert not list(out.iterdir())
