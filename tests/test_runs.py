"""What a run writes and prints: files, metrics, the best model, and where patience ends it."""

import itertools
import json
import re
import shutil

import pytest
import torch
from small_runs import (
    EVERY_3,
    ROOT,
    SHAPES_LR,
    Killed,
    acting_at_step,
    assert_equal_tensors,
    assert_same_run,
    command_line,
    error_lines,
    kill,
    load_checkpoint,
    load_dataset,
    read_files,
    read_log,
    read_losses,
    read_metrics,
    run,
    run_killed_at,
    saved_step,
    saved_weights,
    set_scores,
)

import evaluate
import fcos
import train


def test_a_run_writes_five_files(finished):
    names = "last.pt log.jsonl metrics.json model.pt previous.pt"
    assert sorted(path.name for path in finished.out.iterdir()) == names.split()


def test_the_last_line_of_a_run_is_its_metrics(finished):
    found = read_metrics(finished.out)
    assert list(found) == [*evaluate.METRICS, "step"]
    assert json.loads(finished.stdout[-1]) == found
    evaluations = [row for row in read_log(finished.out) if "AP" in row]
    assert max(evaluations, key=lambda row: row["AP"]) == found


def test_a_run_ends_with_a_command_that_uses_its_model(finished):
    script, model, *_ = finished.stdout[-2].removeprefix("python ").split()
    assert (ROOT / script).exists()
    assert model == str(finished.out / "model.pt")


def test_every_step_is_logged(finished):
    rows = [json.loads(line) for line in (finished.out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 3, 4, 5, 6, 6]
    losses = [row for row in rows if "loss" in row]
    assert len(losses) == 6
    for row in losses:
        assert row["loss"] == pytest.approx(row["cls"] + row["box"] + row["ctr"])
        assert row["lr"] == pytest.approx(SHAPES_LR / 2 * 0.1 ** max(row["step"] - 4, 0))
        assert row["images_per_second"] > 0


def test_checkpoints_hold_the_last_two_saved_steps(finished):
    last = load_checkpoint(finished.out)
    assert last["step"] == 6
    assert last["settings"]["lr"] == SHAPES_LR / 2
    rates = [group["lr"] for group in last["optimizer"]["param_groups"]]
    assert rates == pytest.approx([SHAPES_LR / 200, SHAPES_LR / 100])  # weights, biases
    assert load_checkpoint(finished.out, "previous.pt")["step"] == 3


def test_model_pt_is_the_model_of_the_best_evaluation(finished, shapes):
    model = fcos.load(finished.out / "model.pt")
    dataset = load_dataset(shapes, "val")
    assert model.classes == dataset.classes
    assert model.category_ids == dataset.category_ids
    assert model.test_size == (64, 96)
    assert not model.convention["inclusive"]
    checkpoint = {3: "previous.pt", 6: "last.pt"}[read_metrics(finished.out)["step"]]
    assert_equal_tensors(model.state_dict(), saved_weights(finished.out, checkpoint))


def test_the_settings_and_learning_rates_are_printed(finished):
    output = re.sub(" +", " ", "\n".join(finished.stdout))
    rates = {1: SHAPES_LR / 2, 5: SHAPES_LR / 20, 6: SHAPES_LR / 200}
    assert "iters 6" in output
    assert "batch_size 4" in output
    for step, rate in rates.items():
        assert f"learning rate from step {step} {rate:.9g}" in output


# ---- the best evaluation -----------------------------------------------------------------------


def test_model_pt_is_the_best_model_however_often_the_run_was_killed(
    shapes, tmp_path, monkeypatch, capsys
):
    """Kill it after the best evaluation, which is then repeated; after the next checkpoint, which
    stores the best metrics; and within the best evaluation."""
    evaluated = set_scores(monkeypatch, [0.1, 0.5, 0.3])
    flags = ["--iters", 6, "--eval-every", 2, "--checkpoint-every", 5]
    whole = tmp_path / "whole"
    run(command_line(shapes, whole, *flags))
    assert read_metrics(whole) == {"AP": 0.5, "step": 4}
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == read_metrics(whole)
    assert_equal_tensors(saved_weights(whole, "model.pt"), evaluated[0.5])
    assert_equal_tensors(saved_weights(whole), evaluated[0.3])
    logged = [(row["step"], row["AP"]) for row in read_log(whole) if "AP" in row]
    assert logged == [(2, 0.1), (4, 0.5), (6, 0.3)]

    for name, step in {"after it": 4, "after a checkpoint": 5}.items():
        run_killed_at(step, command_line(shapes, tmp_path / name, *flags))
    predict = evaluate.predict
    evaluations = itertools.count(1)

    def kill_second(*args):
        if next(evaluations) == 2:
            kill()
        return predict(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(evaluate, "predict", kill_second)
        run(command_line(shapes, tmp_path / "within it", *flags))
    assert [row["step"] for row in read_log(tmp_path / "within it") if "AP" in row] == [2]
    for name, step in {"after it": 4, "after a checkpoint": 5, "within it": 4}.items():
        assert saved_step(tmp_path / name) == step
        run(command_line(shapes, tmp_path / name, *flags))
        assert_same_run(tmp_path / name, whole)


def test_model_pt_stays_if_only_the_first_checkpoint_found_no_room(
    shapes, tmp_path, monkeypatch, capsys
):
    """The second checkpoint removes what --fresh replaces, but not what the run has written."""
    save = torch.save
    refusals = iter(["last.pt"])

    def save_without_room(content, file):
        if "settings" in content and next(refusals, None):
            raise OSError(28, "No space left on device")
        save(content, file)

    monkeypatch.setattr(torch, "save", save_without_room)
    evaluated = set_scores(monkeypatch, [0.5, 0.4])
    run(command_line(shapes, tmp_path, *EVERY_3))
    assert "No space left" in capsys.readouterr().err
    assert len(evaluated) == 2
    assert read_metrics(tmp_path) == {"AP": 0.5, "step": 3}
    assert_equal_tensors(saved_weights(tmp_path, "model.pt"), evaluated[0.5])


@pytest.mark.parametrize("eval_every", [1, 2])
def test_patience_ends_a_run_where_it_would_end_uninterrupted(
    shapes, tmp_path, monkeypatch, eval_every
):
    """The learning rate changes last after step 4 of 9. Two evaluations after that, which find no
    better model, end the run."""
    monkeypatch.setitem(train.RECIPES["shapes"], "decays", [6, 8])
    set_scores(monkeypatch, [0.4, 0.5, *(0.3 - k / 100 for k in range(9))])
    flags = ["--iters", 9, "--eval-every", eval_every, "--patience", 2, "--checkpoint-every", 5]
    whole = tmp_path / "whole"
    argv = command_line(shapes, whole, *flags)
    run(argv)
    end = 4 + 2 * eval_every
    assert read_losses(whole)[-1]["step"] == end
    assert saved_step(whole) == end
    names = read_files(whole).keys()
    run(argv)
    assert read_files(whole).keys() == names
    assert saved_step(whole) == end
    killed = command_line(shapes, tmp_path / "killed", *flags)
    run_killed_at(end - 1, killed)
    run(killed)
    assert_same_run(tmp_path / "killed", whole)


def test_patience_that_cannot_end_a_run_is_reported(shapes, tmp_path, capsys):
    """The learning rate changes last after step 5 of 6."""
    run(command_line(shapes, tmp_path, "--eval-every", 2, "--patience", 2))
    assert "--patience cannot end this run before step 8: it counts" in capsys.readouterr().out


# ---- folders -----------------------------------------------------------------------------------


def test_a_folder_that_is_deleted_during_a_run_is_made_again(shapes, tmp_path, capsys):
    out = tmp_path / "run"
    with acting_at_step(4, lambda: shutil.rmtree(out)):
        run(command_line(shapes, out, *EVERY_3))
    assert {"last.pt", "log.jsonl"} <= read_files(out).keys()
    assert read_metrics(out) == json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_run_whose_folder_becomes_a_file_is_reported_as_lost(shapes, tmp_path, capsys):
    out = tmp_path / "run"

    def replace_by_file():
        shutil.rmtree(out)
        out.write_text("in the way")

    with acting_at_step(5, replace_by_file):
        lines = error_lines(capsys, command_line(shapes, out))
    assert lines[-1].endswith("no checkpoint could be written, so this run is lost")
    assert "holds the model" not in str(lines)
    assert "resumes" not in str(lines)


def test_initial_weights_may_lie_in_the_folder_of_the_run(finished, shapes, tmp_path):
    initial = tmp_path / "initial.pt"
    shutil.copy(finished.out / "model.pt", initial)
    run(command_line(shapes, tmp_path, "--weights", initial, "--iters", 1))
    assert (tmp_path / "model.pt").exists()
    assert initial.exists()
