"""Fixtures, models and checks that several test files need.

The tests of kernels and of a GPU run where msgspec may be missing: import evaluate.py late.
"""

import contextlib
import io
import math
import multiprocessing
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from golden.synth_image import image as synth_image
from recorded import GOLDEN, read_golden

import fcos
from fcos import UserError

SHARED = Path(__file__).resolve().parents[2] / "shared"

# pytest-xdist ignores SIGINT, and nohup SIGHUP: processes that tests start would inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# tests run in two processes (see pyproject.toml), and networks this small gain nothing from threads
torch.set_num_threads(1)


@pytest.fixture
def shared():
    """Return the folder of the full golden sets and a few real images; a clone does not have it."""
    if not SHARED.is_dir():
        pytest.skip("needs the full golden sets of ../shared")
    return SHARED


@pytest.fixture
def coco_tiny(shared):
    """Return the data sets "train" and "val", a small part of COCO."""
    import evaluate

    root = shared / "data" / "coco2017_tiny"
    return {
        split: evaluate.CocoDataset(*evaluate.coco_paths(root, f"{split}2017"))
        for split in ("train", "val")
    }


@pytest.fixture(scope="session")
def mixed_coco(tmp_path_factory):
    """Return the paths of the annotations and the folder of seven images of four sizes."""
    from coco_files import box, write_coco

    sizes = [(64, 64), (90, 60), (60, 90), (64, 64), (90, 60), (33, 21), (90, 60)]
    annotations = [box(k, k, [5, 5, 20, 10]) for k in range(7)]
    return write_coco(tmp_path_factory.mktemp("mixed"), dict(enumerate(sizes)), annotations)


@pytest.fixture(scope="session")
def model_file(tmp_path_factory):
    """Return the path of a model of the three classes of `coco_files`."""
    path = tmp_path_factory.mktemp("model") / "model.pt"
    fcos.save(coco_model(), path)
    return path


@pytest.fixture(scope="session")
def product(tmp_path_factory):
    """Return a server of processes, and a folder with a copy of the product and its data."""
    import changed_copy

    server = changed_copy.start_server()
    folder = tmp_path_factory.mktemp("product")
    changed_copy.copy_product(server, folder)
    return server, folder


@pytest.fixture
def change(product, tmp_path):
    """Return a function that makes edits in a copy of the product, and runs a scenario in it.

    See changed_copy.py for the edits and the scenarios.
    """
    import changed_copy

    server, original = product

    def run(scenario, edits=(), world_size=1):
        folder = shutil.copytree(original, tmp_path / "copy")
        changed_copy.edit(folder, edits)
        changed_copy.run_apart(server, folder, scenario, world_size)

    return run


@pytest.fixture(params=["small", "full"])
def golden(request):
    """Return a function that reads a recording by name, from the small or the full sets."""
    if request.param == "small":
        return lambda name: read_golden(GOLDEN / name)
    folder = request.getfixturevalue("shared") / "golden"
    return lambda name: read_golden(folder / name)


@pytest.fixture
def seeded():
    """Set the seed of torch's global random numbers."""
    torch.manual_seed(0)


@pytest.fixture(params=["forward", "reverse"])
def on_shim(request, monkeypatch):
    """Run the CUDA text on the CPU, in both orders of threads, with NaN in new empty tensors."""
    import cuda_shim
    import kernel_inputs

    for file in kernel_inputs.FILES.values():
        cuda_shim.install(monkeypatch, file, reverse=request.param == "reverse")
    torch.use_deterministic_algorithms(True)  # fills the memory of torch.empty with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def no_process_left():
    """Kill the processes that a failed test leaves behind, since they could hold up later tests."""
    yield
    for process in multiprocessing.active_children():
        process.kill()
        process.join()


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """Return the folder of a shapes data set: 24 pictures to train on and 4 to validate."""
    import train

    root = tmp_path_factory.mktemp("data") / "shapes"
    train.make_shapes(root, train=24, val=4)
    return root


@pytest.fixture(scope="session")
def finished(shapes, tmp_path_factory):
    """Return a finished run of six steps, evaluated after three and six: its .out and .stdout."""
    import small_runs

    out = tmp_path_factory.mktemp("finished") / "run"
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        small_runs.run(small_runs.command_line(shapes, out, *small_runs.EVERY_3))
    return SimpleNamespace(out=out, stdout=stdout.getvalue().splitlines())


@pytest.fixture
def finished_copy(finished, tmp_path):
    """Return a copy of the folder of a finished run, which a test may change."""
    return shutil.copytree(finished.out, tmp_path / "run")


@pytest.fixture
def half_finished(finished_copy):
    """Return the folder of a run that was killed after its checkpoint of step three of six."""
    (finished_copy / "last.pt").unlink()
    return finished_copy


NAN = math.nan
HUGE = "x" * 10**6
DEEP = b")" + b"\x85" * 200_000  # a pickle of nested tuples, whose hash overflows the stack
DEEP_KEY = DEEP + b"K\x01s"  # as the key of an entry of a dict


# ---- models and images -------------------------------------------------------------------------

SMALL = dict(blocks=(1, 1, 1, 1), channels=32)
THIN = dict(stem=8, channels=32)


def randomise(model, seed=0):
    """Fill weights and buffers with different random values; variances are above 0."""
    generator = torch.Generator().manual_seed(seed)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
        else:
            value.fill_(7)
    return model


def small(name, num_classes=80, **overrides):
    return fcos.build(name, num_classes, **{**SMALL, **overrides})


def thin(num_classes=3, name="fcos_imprv_R_50_FPN", **overrides):
    torch.manual_seed(0)
    return fcos.build(name, num_classes, **{**THIN, **overrides})


def detector(num_classes=3, **overrides):
    """Build a small model, in eval mode, that finds objects in every image."""
    torch.manual_seed(0)
    model = fcos.build("shapes", num_classes, **overrides).eval()
    with torch.no_grad():
        model.head.cls.weight.normal_(std=0.2)
        model.head.cls.bias.fill_(-1)
        model.head.box.weight.normal_(std=0.1)
        model.head.box.bias.fill_(2)
        model.head.ctr.weight.normal_(std=0.2)
    return model


def coco_model(classes=("three", "seven", "ninety"), ids=(3, 7, 90)):
    """Build a model of the classes of `coco_files` that finds objects in every image."""
    model = detector(len(classes))
    model.classes = list(classes)
    model.category_ids = list(ids)
    model.test_size = (64, 96)
    return model


def picture(h, w, seed=1):
    """Return a generated image, uint8 (3, h, w)."""
    return torch.from_numpy(synth_image(seed, h, w)).permute(2, 0, 1)


def objects(*rows):
    """Return the ground truth of one image, from rows (x1, y1, x2, y2, label)."""
    table = torch.tensor(rows, dtype=torch.float32).view(-1, 5)
    return {"boxes": table[:, :4], "labels": table[:, 4].long()}


@torch.no_grad()
def outputs_of(model, images, sizes=None):
    return model(images, sizes)


# ---- checks ------------------------------------------------------------------------------------


def assert_same_weights(model, expected):
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def assert_same_backbone(model, expected):
    for name, value in expected.backbone.state_dict().items():
        if ".offset." not in name:
            assert torch.equal(model.backbone.state_dict()[name], value), name


def assert_refused(call, *parts):
    """Check that a call raises a UserError of one short line that contains all parts."""
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    assert "Traceback" not in message
    assert len(message) < 600
    for part in parts:
        assert str(part) in message, message


def shared_lists():
    """Return a list of 2**60 elements that takes a few kilobytes."""
    value = []
    for _ in range(60):
        value = [value, value]
    return value
