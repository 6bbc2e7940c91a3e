"""Our own checkpoints, and files that are broken, hostile or something else."""

import os
import pickle
import resource
import sys
import time
import zipfile
from collections import Counter, OrderedDict
from functools import partial

import numpy as np
import pytest
import torch
from conftest import (
    DEEP,
    DEEP_KEY,
    HUGE,
    NAN,
    THIN,
    assert_refused,
    assert_same_weights,
    randomise,
    shared_lists,
    thin,
)
from foreign import AFFINE, adelaidet, backbone_file, mmdetection, official, python2_pickle, renamed

import fcos
from fcos import UserError

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- our own checkpoints -----------------------------------------------------------------------
def found_in(model):
    torch.manual_seed(2)
    images = torch.randint(256, (2, 3, 64, 96), dtype=torch.uint8)
    sizes = torch.tensor([[64, 96], [50, 60]])
    with torch.inference_mode():
        outputs = model.eval()(images, sizes)
        detections = model.decode(outputs, sizes)
    return [outputs[part] for part in ("cls", "ltrb", "ctr", "points")] + list(detections.values())


def assert_finds_the_same(model, expected):
    assert all(ours.equal(theirs) for ours, theirs in zip(found_in(model), expected))


@pytest.mark.parametrize(
    "name, overrides",
    [
        ("shapes", {}),
        ("fcos_R_50_FPN", THIN),
        ("shapes", dict(quality="iou", levels=[3, 4, 5], ranges=[64, 128])),
        ("fcos_imprv_X_101_32x8d_FPN", {"channels": 32, "stem": 8, "groups": 4, "width": 2}),
        ("fcos_imprv_R_50_FPN", {**THIN, "norm": "bn", "frozen_stages": 0, "radius": 2.5}),
    ],
)
def test_saved_model_comes_back_whole_whatever_becomes_of_its_row(
    name, overrides, tmp_path, monkeypatch
):
    torch.manual_seed(0)
    model = fcos.build(name, 3, **overrides)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2)
    model.set_convention(
        inclusive=True, bgr=False, mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0), bn_eps=1e-3
    )
    model.classes, model.category_ids = ["cat", "dög", "tree"], [1, 7, 90]
    model.test_size = (320, 533)
    model.candidate_threshold = 0.0
    expected = found_in(model)
    path = tmp_path / "model.pt"
    fcos.save(model.train(), path)
    assert fcos.load(path, name).name == name
    content = torch.load(path, weights_only=True)
    assert "overrides" not in content
    assert all(type(key) is str for key in content)
    assert content["keywords"] == model.keywords == fcos.resolve(content["keywords"])

    other = dict(backbone="mobilenet", norm="gn", radius=9.0, box_loss="iou", channels=16)
    for change in (
        lambda: None,
        lambda: monkeypatch.setitem(fcos.MODELS, name, other),
        lambda: monkeypatch.delitem(fcos.MODELS, name),
    ):
        change()
        loaded = fcos.load(path)
        assert not loaded.training
        for attribute in (
            "name",
            "num_classes",
            "keywords",
            "classes",
            "category_ids",
            "test_size",
            "convention",
            "radius",
            "loss",
            "strides",
            "ranges",
        ):
            assert getattr(loaded, attribute) == getattr(model, attribute), attribute
        assert_finds_the_same(loaded, expected)
        assert [p.requires_grad for p in loaded.parameters()] == [
            p.requires_grad for p in model.parameters()
        ]


def test_own_weights_fill_a_model_and_bring_their_convention(tmp_path):
    model = fcos.build("shapes", 2)
    model.set_convention(inclusive=True)
    fcos.save(model, tmp_path / "model.pt")
    content = {"settings": {}, "step": 7, "model": fcos.checkpoint(model), "optimizer": {}}
    torch.save(content, tmp_path / "last.pt")  # the trainer's
    for source in (tmp_path / "model.pt", fcos.checkpoint(model), tmp_path / "last.pt"):
        other = fcos.build("shapes", 2)
        report = fcos.load_weights(other, source)
        assert report["family"] == "fcos"
        assert not report["missing"] + report["ignored"]
        assert other.convention == model.convention
        assert_same_weights(other, model)
    assert fcos.load(tmp_path / "last.pt").name == "shapes"
    other = fcos.build("shapes", 2)
    assert not fcos.load_weights(other, model.state_dict())["missing"]  # without what is around it
    assert_refused(
        lambda: fcos.load(tmp_path / "model.pt", "fcos_R_50_FPN"),
        "model.pt",
        "shapes",
        "fcos_R_50_FPN",
    )


@pytest.mark.parametrize(
    "keyword, value",
    [
        ("activation", "exp"),
        ("ctr_on", "cls"),
        ("quality", "iou"),
        ("stride_in_1x1", False),
    ],
)
def test_own_weights_of_another_meaning_are_refused(keyword, value):
    there = fcos.build("shapes", 2, **{keyword: value})
    here = fcos.build("shapes", 2)
    assert_refused(lambda: fcos.load_weights(here, fcos.checkpoint(there)), keyword, value)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_save_leaves_the_old_file_when_it_fails(error, tmp_path, monkeypatch):
    model = fcos.build("shapes", 2)
    fcos.save(model, tmp_path / "model.pt")
    before = (tmp_path / "model.pt").read_bytes()

    def fail(content, file):
        file.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises((UserError, KeyboardInterrupt)):
        fcos.save(model, tmp_path / "model.pt")
    assert (tmp_path / "model.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_wrapped_models_are_saved_as_they_are(tmp_path):
    model = randomise(fcos.build("shapes", 2))
    compiled = fcos.build("shapes", 2)
    compiled.load_state_dict(model.state_dict())
    compiled.head = torch.compile(compiled.head)
    average = torch.optim.swa_utils.AveragedModel(model)
    for wrapped in (torch.nn.DataParallel(model), torch.compile(model), compiled, average):
        fcos.save(wrapped, tmp_path / "model.pt")
        assert_same_weights(fcos.load(tmp_path / "model.pt"), model)
    for other in (torch.nn.Linear(1, 1), torch.nn.DataParallel(torch.nn.Linear(1, 1)), None):
        assert_refused(lambda other=other: fcos.save(other, tmp_path / "model.pt"), "fcos.build")


def test_a_file_appears_whole_in_any_folder_under_any_name(tmp_path):
    for name in ("x" * 254, "x" * 250 + ".pt", "new/folder/model.pt", "dög \n.pt"):
        with fcos.atomic_write(tmp_path / name, "w") as file:
            file.write("whole")
        assert (tmp_path / name).read_text() == "whole"
    target = tmp_path / "target"
    target.write_text("mine")
    for link in ("link", "dangling"):
        (tmp_path / link).symlink_to(target if link == "link" else tmp_path / "nowhere")
        with fcos.atomic_write(tmp_path / link, "w") as file:
            file.write("new")
        assert not (tmp_path / link).is_symlink()
        assert (tmp_path / link).read_text() == "new"
    assert target.read_text() == "mine"
    with (
        pytest.raises(UserError, match="cannot be written"),
        fcos.atomic_write(target / "x") as file,
    ):
        pass
    with fcos.atomic_write(target, "w") as first, fcos.atomic_write(target, "w") as second:
        first.write("first")
        second.write("second")
    assert target.read_text() == "first"
    assert not list(tmp_path.rglob("*.tmp"))


def test_leftovers_of_killed_processes_are_removed_and_no_other_file(tmp_path):
    child = os.fork()
    if not child:
        with fcos.atomic_write(tmp_path / "model.pt"):
            os._exit(9)
    os.waitpid(child, 0)
    assert len(list(tmp_path.glob(".fcos-*.tmp"))) == 1
    for name in ("notes.tmp", "model.pt"):
        (tmp_path / name).touch()
    fcos.remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.tmp", "model.pt"}
    fcos.remove_leftovers(tmp_path / "nowhere")


def test_safetensors_hold_whole_models_and_plain_weights(tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    model = randomise(fcos.build("shapes", 2, levels=(2, 3, 4, 5), ranges=(32, 64, 128)))
    model.set_convention(inclusive=True, mean=(1.0, 2.0, 3.0))
    model.classes, model.category_ids, model.nms_threshold = ["a", "dög"], [1, 7], 0.5
    path = tmp_path / "model.safetensors"
    fcos.save(model, path)
    loaded = fcos.load(path)
    assert_same_weights(loaded, model)
    for attribute in ("name", "keywords", "classes", "category_ids", "convention", "loss"):
        assert getattr(loaded, attribute) == getattr(model, attribute), attribute
    with safetensors.safe_open(path, "pt") as file:
        assert list(file.metadata()) == ["fcos"]

    for rule in (official, adelaidet, mmdetection):  # as they come from elsewhere
        source, other = randomise(thin()), thin()
        state = {key: value.contiguous() for key, value in renamed(source, rule).items()}
        safetensors.save_file(state, path)
        assert not fcos.load_weights(other, path)["ignored"]
        assert_same_weights(other, source)
    assert_refused(lambda: fcos.load(path), path, "does not say which model")
    content = path.read_bytes()
    for damaged in (content[:-1], content[:100], b"", b"\xff" * 99):
        path.write_bytes(damaged)
        assert_refused(lambda: fcos.load(path), path, "damaged")
    for stored in ("[", "[]", '{"keywords": 3}', "[" * 10**5, '{"keywords": {"blocks": [1]}}'):
        safetensors.save_file(state | {"head.cls.weight": torch.ones(2, 1)}, path, {"fcos": stored})
        assert_refused(lambda: fcos.load(path), path)
    for module in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, module, None)
    for call in (lambda: fcos.load(path), lambda: fcos.save(model, tmp_path / "m.safetensors")):
        assert_refused(call, "pip install safetensors")
    assert not (tmp_path / "m.safetensors").exists()


# ---- checkpoints made by hand --------------------------------------------------------------------
def repeated(*sides):
    """A tensor whose elements are all the same one in memory."""
    return torch.zeros(1).expand(sides)


def rezipped(change, compression=zipfile.ZIP_STORED):
    """The archive of a checkpoint with other bytes in its members."""

    def write(path, content):
        torch.save(content, path)
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, data in members.items():
                archive.writestr(name, change(name.partition("/")[2], data))

    return write


def legacy_with_deep_keys(path, content):
    """As torch.save wrote before version 1.6, with a nested tuple among the keys of storages."""
    numbers = torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION
    programs = [pickle.dumps(value, 2) for value in (*numbers, {}, {})]
    path.write_bytes(b"".join(programs) + b"\x80\x02](" + DEEP + b"e.")


def pickled(program):
    return rezipped(lambda name, data: program if name == "data.pkl" else data)


BLOCKS = [(10**6, 1, 1, 1), (200, 200, 200, 200), (1, 1, 1), (1.5, 1, 1, 1), shared_lists()]
CRAFTED = {  # entry of the checkpoint: values
    "keywords blocks": BLOCKS,
    "keywords channels": [2**14, 10**9],
    "keywords stem": [2**14],
    "keywords levels": [tuple(range(2, 10**5)), shared_lists(), None],
    **{f"keywords {k}": [shared_lists(), HUGE] for k in ("norm", "test_size", "backbone")},
    "keywords imagenet": [shared_lists(), 3],
    "keywords": [None, shared_lists(), [], {"blocks": 3}, {HUGE: 1}, {3: 4}, {"backbone": "vgg"}],
    "name": [None, shared_lists(), 3],
    "num_classes": [None, "two", 10**9, 3, True, "2", shared_lists()],
    "classes": [shared_lists(), [1, 2], ["a"], {0: "a", 1: "b"}, "ab", ["a", shared_lists()]],
    "category_ids": [shared_lists(), ["1", "2"], [1], 7, [True, False], [1, 10**5000]],
    "convention": [None, shared_lists(), {1: 2}, {HUGE: 1}, []],
    **{
        f"convention {k}": [shared_lists(), HUGE, None]
        for k in ("mean", "std", "bn_eps", "grid", "bgr")
    },
    "convention std": [(0.0, 0.0, 0.0), ("a", "b", "c"), (1.0,), (NAN,) * 3],
    "model": [None, shared_lists(), {}, {1: torch.zeros(1)}, torch.zeros(3)],
    "model head.cls.weight": [
        repeated(2 * 10**9, 64, 3, 3),
        repeated(2, 64, 3, 10**9),
        torch.zeros(()),
        torch.zeros(2, 64, 3, 3).to_sparse(),
        torch.zeros(2, 64, 3, 3, device="meta"),
        torch.zeros(2, 64, 3, 3, dtype=torch.int64),
        HUGE,
        shared_lists(),
    ],
    "model head.cls.bias": [repeated(2 * 10**9), torch.zeros(()), torch.full((2,), NAN), None],
    f"model {HUGE}": [torch.zeros(1)],
    "all": [
        rezipped(lambda name, data: data, zipfile.ZIP_DEFLATED),
        rezipped(
            lambda name, data: bytes(10**8) if name == "data/0" else data, zipfile.ZIP_DEFLATED
        ),
        rezipped(lambda name, data: data[:-4] if name == "data/3" else data),
        pickled(b"\x80\x02}" + DEEP_KEY + b"."),
        pickled(b"\x80\x02}" + b"cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x10\x85Rs."),
        pickled(b"\x80\x02}" + b"c__builtin__\nset\n](" + DEEP + b"e\x85Rs."),
        pickled(b"\x80\x02}" + b"ccollections\nCounter\n](" + DEEP + b"e\x85Rs."),
        pickled(b"\x80\x02}" + b"ccollections\nOrderedDict\n](](" + DEEP + b"Nee\x85Rs."),
        pickled(b"\x80\x02(X\x07\0\0\0storagectorch\nFloatStorage\n" + DEEP + b"NK\x01tQ."),
        pickled(
            b"\x80\x02ctorch._tensor\n_rebuild_from_type_v2\n(ccollections\nCounter\n"
            b"ctorch\nTensor\n](" + DEEP + b"e\x85}tR."
        ),
        pickled(  # a list of 100,000 elements, and 1,000 copies of it
            b"\x80\x02](" + b"N" * 10**5 + b"eq\x010"
            b"(" + b"ccollections\nCounter\nh\x01\x85R" * 1000 + b"l."
        ),
        legacy_with_deep_keys,
    ],
}


@pytest.mark.parametrize("entry", CRAFTED, ids=lambda entry: entry[:30])
def test_crafted_checkpoints_are_refused_in_one_line(entry, tmp_path):
    for value in CRAFTED[entry]:
        content = fcos.checkpoint(fcos.build("shapes", 2))
        path = tmp_path / "model.pt"
        if entry == "all":
            value(path, content)
        else:
            first, _, second = entry.partition(" ")
            content[first] = {**content[first], second: value} if second else value
            torch.save(content, path)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.process_time()
        assert_refused(partial(fcos.load, path), path)
        assert time.process_time() - start < 20
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 500_000  # kB


def test_a_model_of_repeated_elements_does_not_fill_the_memory(tmp_path):
    """Names and shapes agree, but the file holds one element of each tensor."""
    content = fcos.checkpoint(fcos.build("shapes", 2))
    content["keywords"]["channels"] = 2**14
    for name, value in content["model"].items():
        wide = [2**14 if side == 64 and name[:8] != "backbone" else side for side in value.shape]
        content["model"][name] = repeated(*wide)
    torch.save(content, tmp_path / "model.pt")
    assert_refused(lambda: fcos.load(tmp_path / "model.pt"), "far larger than its tensors")


# ---- files that are something else -------------------------------------------------------------
DAMAGED = "not a checkpoint or damaged"
SOMETHING_ELSE = {  # bytes of a file, or what torch.save puts into it: words of the error
    "empty": (b"", DAMAGED),
    "zeros": (b"\x00" * 100, DAMAGED),
    "text": (b"hello, this is no checkpoint\n" * 9, DAMAGED),
    "start": (b"\x80\x02", DAMAGED),
    "zip": (b"PK\x03\x04 and no zip", DAMAGED),
    "html": (b"<html>404</html>", DAMAGED),
    "array of objects": (pickle.dumps({"conv1_w": np.zeros(3, dtype=object)}), "conv1_w"),
    "list": ([1, 2, 3], "list"),
    "tensor": (torch.zeros(3), "Tensor"),
    "numbers as keys": ({0: torch.zeros(3)}, "1 keys such as 0"),
    "nothing": ({}, "none"),
    "unknown key": ({"conv1.weight": torch.zeros(3)}, "conv1.weight"),
    "no weights": ({"model": {}}, "none"),
    "a key of a backbone": ({"model": {"backbone.conv1.weight": torch.zeros(3)}}, "backbone.conv1"),
    "text as weight": ({"head.cls.weight": "text"}, "head.cls.weight"),
    "no model": ({"name": "shapes", "overrides": {}, "convention": {}}, "name"),
}


@pytest.mark.parametrize("what", SOMETHING_ELSE)
@pytest.mark.parametrize("suffix", ["pt", "pkl"])
def test_a_file_of_something_else_is_named(what, suffix, tmp_path):
    content, said = SOMETHING_ELSE[what]
    path = tmp_path / f"other.{suffix}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    assert_refused(lambda: fcos.load_weights(fcos.build("shapes", 2), path), path, said)
    assert_refused(lambda: fcos.load(path), path, said)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_torn_checkpoint_is_named(share, tmp_path):
    fcos.save(fcos.build("shapes", 2), tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "torn.pt").write_bytes(content[: int(share * len(content))])
    content = python2_pickle(backbone_file(thin(), AFFINE))
    (tmp_path / "torn.pkl").write_bytes(content[: int(share * 100_000)])
    for name in ("torn.pt", "torn.pkl"):
        assert_refused(lambda name=name: fcos.load(tmp_path / name), name, DAMAGED)


def test_missing_file_and_folder_are_named(tmp_path):
    path = tmp_path / "nowhere.pth"
    assert_refused(lambda: fcos.load(path), path, "No such file")
    assert_refused(lambda: fcos.load(tmp_path), tmp_path, "Is a directory")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_may_hold_what_torch_reads(zipped, tmp_path):
    """As a zip archive, and as torch.save wrote before version 1.6."""
    model = fcos.build("shapes", 2)
    content = fcos.checkpoint(model) | {
        "ordered": OrderedDict(a=1),
        "counted": Counter("abca"),
        "set": {1, 2},
        "bytes": b"abc",
        "dtype": torch.float32,
        "half": torch.zeros(2, dtype=torch.bfloat16),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "size": torch.Size([1, 2]),
        "device": torch.device("cpu"),
    }
    torch.save(content, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    assert_same_weights(fcos.load(tmp_path / "model.pt"), model)
