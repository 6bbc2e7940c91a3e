"""Edit copies of the product and run scenarios in them, for test_changes_*.py.

A scenario is a function without arguments. It runs in a process of its own in the folder of a
copy: there, `import fcos` imports the changed file. Neither this file nor a file with scenarios may
import the product at the top.
"""

import json
import multiprocessing
import os
import shutil
import socket
import sys
import traceback
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PHOTO = "data/shapes/val2017/000001000001.jpg"


# ---- copies and processes ------------------------------------------------------------------------


def start_server():
    """Return a context of processes that are forks of a server with the large packages loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision", "matplotlib", "hotcoco"])
    return context


def copy_product(context, folder):
    """Copy the three files and the kernels to a folder, and draw 8 + 4 pictures of shapes there."""
    for name in ("fcos.py", "evaluate.py", "train.py"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "kernels", folder / "kernels")
    run_apart(context, folder, draw_data)


def edit(folder, edits):
    """Make edits, [(file, text, replacement)], in a folder. Each text must occur exactly once."""
    for file, text, replacement in edits:
        content = (folder / file).read_text()
        assert content.count(text) == 1, f"{file}: {content.count(text)} places say {text!r}"
        (folder / file).write_text(content.replace(text, replacement))


def run_apart(context, folder, scenario, world_size=1):
    """Run a scenario in processes of its own, one for each rank; fail with their tracebacks."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    started = []
    for rank in range(world_size):
        env = {}
        if world_size > 1:
            env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
            env |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(folder, scenario, env, sender))
        process.start()
        sender.close()
        started.append((process, receiver))
    errors = []
    for process, receiver in started:
        try:
            errors.append(receiver.recv())
        except EOFError:
            errors.append("the process died")
        process.join()
    if any(errors):
        pytest.fail("\n".join(filter(None, errors)), pytrace=False)


def work(folder, scenario, env, sender):
    """Run a scenario in a folder, and send its traceback or None."""
    os.environ.update({name: str(value) for name, value in env.items()})
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    # Dataloader workers must be forks, to see the functions that a scenario replaces.
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    try:
        scenario()
        sender.send(None)
    except BaseException:
        sender.send(traceback.format_exc())


def draw_data():
    import train

    train.make_shapes("data/shapes", train=8, val=4)


# ---- runs in a copy ------------------------------------------------------------------------------


def run_train(*flags, out="run"):
    """Train four steps, with an evaluation after two and four; return the rows of the losses."""
    import train

    argv = f"shapes --out {out} --iters 4 --batch-size 4 --min-size 64 --max-size 96 --device cpu"
    argv += " --workers 0 --eval-every 2 --checkpoint-every 2"
    train.main(train.parse_args([*argv.split(), *flags]))
    rows = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def run_train_in_two_parts(*flags):
    """Do the same as `run_train`, but stop after the checkpoint of step 2 and resume."""
    import train

    update = train.update

    def stop(step, *rest):
        if step == 2:
            raise KeyboardInterrupt
        update(step, *rest)

    train.update = stop
    with pytest.raises(KeyboardInterrupt):
        run_train(*flags)
    train.update = update
    return run_train(*flags)


def run_evaluate(*flags):
    import evaluate

    argv = ["run/model.pt", "--device", "cpu", "--workers", "0", *flags]
    evaluate.main(evaluate.parse_args(argv))


def found_in_results(*flags):
    """Score the data set with evaluate.py; return the detections of --save-json."""
    run_evaluate("--data", "data/shapes", "--save-json", "results.json", *flags)
    return json.loads(Path("results.json").read_text())


def found_in_drawing(*flags):
    """Draw a photo with evaluate.py; return the detections of detections.json."""
    run_evaluate("--images", PHOTO, "--out", "drawn", "--score-threshold", "0", *flags)
    return json.loads(Path("drawn/detections.json").read_text())[0]["detections"]


def save_model(**keywords):
    """Save a model as run/model.pt that finds many overlapping boxes; return it and its data."""
    import evaluate
    import fcos

    torch.manual_seed(0)
    model = fcos.build("shapes", 6, test_size=(64, 96), **keywords).eval()
    torch.nn.init.normal_(model.head.cls.weight, std=0.4)
    torch.nn.init.constant_(model.head.cls.bias, -1.0)
    torch.nn.init.constant_(model.head.box.bias, 1.5)
    dataset = evaluate.CocoDataset(*evaluate.coco_paths("data/shapes", "val2017"))
    model.classes = dataset.classes
    model.category_ids = dataset.category_ids
    Path("run").mkdir()
    fcos.save(model, "run/model.pt")
    return model, dataset
