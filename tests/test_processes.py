"""Several processes train as one does; they stop, fail, restart and resume together.

Ranks are forks of this process, which saves the seconds of importing torch in each. The last test
also starts one run by the real torchrun command.
"""

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.run
from small_runs import (
    EVERY_3,
    ROOT,
    TIME_LIMIT,
    assert_close_run,
    assert_equal_tensors,
    assert_same_run,
    at_step,
    command_line,
    copy_data,
    fork,
    free_port,
    kill_9,
    load_checkpoint,
    poison,
    read_losses,
    read_metrics,
    run_apart,
    run_killed_at,
    run_ranks,
    run_script,
    saved_step,
    saved_weights,
    start_ranks,
    wait,
)
from torch.distributed.launcher.api import elastic_launch

import evaluate
import fcos
import train

pytestmark = pytest.mark.usefixtures("no_process_left")


# ---- the same training -------------------------------------------------------------------------


def assert_success(ended):
    for code, output in ended:
        assert code == 0, output[-5000:]


@pytest.fixture(scope="module")
def four(shapes, tmp_path_factory):
    """Return the folder of the run `finished`, trained by four processes."""
    out = tmp_path_factory.mktemp("four") / "run"
    assert_success(run_ranks(4, command_line(shapes, out, *EVERY_3)))
    return out


def test_four_processes_train_as_one_does(four, finished):
    assert_close_run(four, finished.out)
    assert read_metrics(four) == pytest.approx(read_metrics(finished.out), abs=1e-3)


def test_four_processes_continue_a_run_of_one(finished, shapes, tmp_path):
    argv = command_line(shapes, tmp_path / "run", *EVERY_3)
    run_killed_at(4, argv)
    assert_success(run_ranks(4, argv))
    assert_close_run(tmp_path / "run", finished.out)
    assert read_metrics(tmp_path / "run") == pytest.approx(read_metrics(finished.out), abs=1e-3)


def test_four_killed_processes_resume_bit_for_bit(four, shapes, tmp_path):
    argv = command_line(shapes, tmp_path / "run", *EVERY_3)
    run_ranks(4, argv, lambda: at_step(4, kill_9))
    assert saved_step(tmp_path / "run") == 3
    assert_success(run_ranks(4, argv))
    assert_same_run(tmp_path / "run", four)


def use_float64():
    """Train in float64, so that runs which sum in another order differ by 1e-9 at most."""
    make_model = train.make_model

    def make_double(*args):
        model = make_model(*args).double()
        targets = model.targets

        def double_targets(*args):
            found = targets(*args)
            return found | {"ltrb": found["ltrb"].double()}

        model.targets = double_targets
        return model

    train.make_model = make_double


@pytest.fixture(scope="module")
def float64_run(shapes, tmp_path_factory):
    """Return the folder of a run of three steps in float64 by one process."""
    out = tmp_path_factory.mktemp("float64") / "run"
    assert_success([run_apart(command_line(shapes, out, "--iters", 3), use_float64)])
    assert saved_weights(out)["head.cls.weight"].dtype == torch.float64
    return out


@pytest.mark.parametrize("world_size, micro_batches", [(1, 2), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_processes_and_micro_batches_do_not_change_the_training(
    float64_run, shapes, tmp_path, world_size, micro_batches
):
    flags = ["--iters", 3, "--accumulate", micro_batches]
    argv = command_line(shapes, tmp_path / "run", *flags)
    assert_success(run_ranks(world_size, argv, use_float64))
    assert_close_run(tmp_path / "run", float64_run, 1e-9)


def train_alike(data, folder, world_size, *flags, change=None):
    """Train three steps in one process and in several, in float64, and compare them to 1e-9.

    change: a function that patches train.py in every process. Returns the folders of both runs.
    """

    def prepare():
        use_float64()
        if change:
            change()

    flags = ["--iters", 3, *flags]
    assert_success([run_apart(command_line(data, folder / "one", *flags), prepare)])
    assert_success(run_ranks(world_size, command_line(data, folder / "many", *flags), prepare))
    assert_close_run(folder / "many", folder / "one", 1e-9)
    return folder / "many", folder / "one"


def test_uneven_shares_of_many_scales_train_alike(shapes, tmp_path):
    train_alike(shapes, tmp_path, 4, "--min-size", 48, 64, 80, "--batch-size", 5)


def test_fewer_images_than_a_batch_of_one_aspect_train_alike(shapes, tmp_path):
    def keep_three_upright(content):
        upright = [image for image in content["images"] if image["height"] >= image["width"]][:3]
        ids = {image["id"] for image in upright}
        boxes = [box for box in content["annotations"] if box["image_id"] in ids]
        content |= dict(images=upright, annotations=boxes)

    few = copy_data(shapes, tmp_path / "few", "train", keep_three_upright)
    train_alike(few, tmp_path, 2)


def test_a_rank_without_positives_trains_alike(shapes, tmp_path):
    def empty_rank_1():
        """Remove the boxes of every odd slot of a step: rank 1 of 2 gets these slots."""
        read = train.TrainBatches.read

        def read_or_empty(self, i, hw, step, slot):
            sample = read(self, i, hw, step, slot)
            if slot % 2:
                sample |= {name: sample[name][:0] for name in ("boxes", "labels")}
            return sample

        train.TrainBatches.read = read_or_empty

    many, _ = train_alike(shapes, tmp_path, 2, change=empty_rank_1)
    assert all(row["box"] > 0 for row in read_losses(many))


def test_a_run_without_positives_trains_alike(shapes, tmp_path):
    def make_boxes_thin():
        """Make boxes so thin that no location lies inside."""
        target = evaluate.CocoDataset.target

        def thin_target(self, i):
            boxes, labels = target(self, i)
            return torch.cat([boxes[:, :2], boxes[:, :2] + 0.01], 1), labels

        evaluate.CocoDataset.target = thin_target

    many, _ = train_alike(shapes, tmp_path, 2, change=make_boxes_thin)
    for row in read_losses(many):
        assert row["box"] == row["ctr"] == 0
        assert row["cls"] > 0


class HeadWithExtra(fcos.Head):
    """A head with one more output, of two channels."""

    def __init__(self, channels, *rest):
        super().__init__(channels, *rest)
        self.extra = torch.nn.Conv2d(channels, 2, 3, padding=1)

    def forward(self, features):
        maps = [fcos.by_location(self.extra(self.box_tower(x))) for x in features]
        return super().forward(features) | {"extra": torch.cat(maps, 1)}


def test_further_losses_of_old_and_new_outputs_train_alike(shapes, tmp_path):
    def add_losses():
        fcos_loss = fcos.fcos_loss

        def more_losses(outputs, targets, normalizers, **keywords):
            losses = fcos_loss(outputs, targets, normalizers, **keywords)
            losses["large"] = 1e-6 * outputs["ltrb"].square().sum() / normalizers[0]
            losses["extra"] = 1e-2 * (outputs["extra"] - 1).square().sum() / normalizers[0]
            return losses

        fcos.Head = HeadWithExtra
        fcos.fcos_loss = more_losses

    many, one = train_alike(shapes, tmp_path, 2, change=add_losses)
    names = ("cls", "box", "ctr", "large", "extra")
    rows = read_losses(many)
    for row in rows:
        assert row["loss"] == pytest.approx(sum(row[name] for name in names))
        assert all(row[name] > 0 for name in names)
    assert rows[-1]["extra"] < rows[0]["extra"]
    assert all(saved_weights(one)["head.extra.bias"] > 0)


def test_moving_averages_train_alike(shapes, tmp_path):
    many, _ = train_alike(shapes, tmp_path, 2, "--ema", 0.9, "--eval-every", 2)
    average = saved_weights(many, "model.pt")["head.cls.bias"]
    assert not torch.allclose(average, saved_weights(many)["head.cls.bias"])


def test_patience_ends_all_ranks_at_the_same_step(shapes, tmp_path):
    """Only rank 0 knows the AP, which falls from evaluation to evaluation here."""

    def get_worse():
        score = evaluate.score
        aps = itertools.count(50, -1)
        evaluate.score = lambda *args: score(*args) | {"AP": next(aps) / 100}
        train.RECIPES["shapes"]["decays"] = [6, 8]  # eighteenths: the last after step 2 of 6

    flags = ["--iters", 6, "--eval-every", 1, "--patience", 1]
    many, _ = train_alike(shapes, tmp_path, 2, *flags, change=get_worse)
    assert read_losses(many)[-1]["step"] == 3


# ---- errors ------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(shapes, tmp_path):
    def poison_rank_1():
        if os.environ["RANK"] == "1":
            poison(4, pytest.MonkeyPatch())

    argv = command_line(shapes, tmp_path / "run", "--checkpoint-every", 2)
    for code, output in run_ranks(2, argv, poison_rank_1):
        assert code == 2
        assert "step 5 " in output
    assert load_checkpoint(tmp_path / "run")["step"] == 4
    assert all(value.isfinite().all() for value in saved_weights(tmp_path / "run").values())


def test_nodes_that_see_different_folders_are_refused(shapes, tmp_path):
    def see_another_folder():
        step = 3 * int(os.environ["RANK"])
        train.resume = lambda *args: (step, None, [])

    ended = run_ranks(2, command_line(shapes, tmp_path / "run"), see_another_folder)
    for code, output in ended:
        assert code == 2
        assert "one folder for all nodes" in output
        assert "[0, 3]" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", [("--lr", 0.5), ("--accumulate", 2), ("--set", "channels=32")])
def test_ranks_with_different_flags_are_refused(shapes, tmp_path, flags):
    """The command was edited on one of two nodes."""

    def change_rank_1():
        if os.environ["RANK"] == "1":
            main = train.main
            own = train.parse_args(command_line(shapes, tmp_path / "run", *flags))
            train.main = lambda _: main(own)

    for code, output in run_ranks(2, command_line(shapes, tmp_path / "run"), change_rank_1):
        assert code == 2
        assert "rank 1: expected the flags of rank 0, found" in output
    assert not (tmp_path / "run").exists()


def test_a_rank_that_fails_alone_ends_without_waiting_for_the_others(shapes, tmp_path):
    def fail_on_rank_1():
        if os.environ["RANK"] == "0":
            time.sleep(600)
        raise fcos.UserError("broken")

    argv = command_line(shapes, tmp_path / "run")
    ranks = start_ranks(2, argv, lambda: at_step(1, fail_on_rank_1))
    code, output = wait(ranks[1])
    assert code == 2
    assert output.splitlines()[-1].endswith(": broken")
    assert "Traceback" not in output
    assert ranks[0].is_alive()


# ---- torchrun ----------------------------------------------------------------------------------


def run_rank(argv, prepare):
    run_script(argv, prepare)
    os._exit(0)  # a function, unlike a script, would wait until its agent has read its result


def torchrun(flags, argv, prepare=None):
    """Do what the torchrun command does, but start the ranks as forks of this process."""
    args = torch.distributed.run.parse_args([*flags, "train.py"])
    config, _, _ = torch.distributed.run.config_from_args(args)
    config.start_method = "fork"
    elastic_launch(config, run_rank)(argv, prepare)


def test_torchrun_restarts_stops_and_changes_the_number_of_nodes(shapes, tmp_path):
    """Two agents of torchrun start a run, as on two nodes. A rank is killed, and both restart. Both
    agents get SIGTERM. One agent then finishes the run. Its weights equal those of an undisturbed
    run bit for bit."""
    flags = ["--iters", 20, "--batch-size", 2, "--checkpoint-every", 5]
    out = tmp_path / "run"
    argv = command_line(shapes, out, *flags)
    one_of_two_nodes = "--nnodes=2 --nproc_per_node=1 --rdzv_backend=c10d --max-restarts=3"
    endpoint = ["--rdzv_id=two", f"--rdzv_endpoint=127.0.0.1:{free_port()}"]
    agent_flags = [*one_of_two_nodes.split(), *endpoint]

    def slow_down():
        """Wait in step 12, so that the signals below arrive before the run ends."""
        at_step(12, lambda: time.sleep(4))

    agents = [fork(torchrun, agent_flags, [*argv, "--fresh"], slow_down) for _ in range(2)]

    def wait_for_step(number):
        limit = time.monotonic() + TIME_LIMIT
        step = 0
        while step < number:
            assert all(agent.is_alive() for agent in agents)
            assert time.monotonic() < limit
            time.sleep(0.05)
            with contextlib.suppress(FileNotFoundError):  # between two renames
                step = saved_step(out)

    wait_for_step(5)
    children = Path(f"/proc/{agents[1].pid}/task/{agents[1].pid}/children").read_text()
    os.kill(int(children), signal.SIGKILL)
    wait_for_step(10)
    for agent in agents:
        agent.terminate()
    output = "".join(wait(agent)[1] for agent in agents)
    assert re.search("resumes after step (5|10) of 20", output), output
    assert "SIGTERM: stopped after step" in output, output
    step = saved_step(out)
    assert 10 <= step < 20

    command = "-m torch.distributed.run --standalone --nproc_per_node=2 train.py"
    variables = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    ended = subprocess.run(
        [sys.executable, *command.split(), *argv],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT,
    )
    assert ended.returncode == 0, ended.stderr[-5000:]
    assert f"resumes after step {step} of 20" in ended.stdout
    assert not re.search(r"(train|evaluate|fcos)\.py:\d+: \w*Warning", ended.stderr)

    undisturbed = tmp_path / "undisturbed"
    assert_success(run_ranks(2, command_line(shapes, undisturbed, *flags)))
    assert_equal_tensors(saved_weights(out), saved_weights(undisturbed))
