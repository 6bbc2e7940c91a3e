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
    outputs_of,
    randomise,
    shared_lists,
    thin,
)
from foreign import AFFINE, adelaidet, backbone_file, mmdetection, official, python2_pickle, renamed

import fcos
from fcos import UserError

# ---- our own checkpoints -----------------------------------------------------------------------


def results_of(model):
    """Return the outputs and detections of a model on two generated images."""
    torch.manual_seed(2)
    images = torch.randint(256, (2, 3, 64, 96), dtype=torch.uint8)
    sizes = torch.tensor([[64, 96], [50, 60]])
    outputs = outputs_of(model.eval(), images, sizes)
    detections = model.decode(outputs, sizes)
    return [outputs[part] for part in ("cls", "ltrb", "ctr", "points")] + list(detections.values())


ATTRIBUTES = """
    name num_classes keywords classes category_ids test_size convention radius loss strides ranges
""".split()


def assert_same_model(loaded, model, results):
    """Check that attributes, frozen parameters and results are the same."""
    for attribute in ATTRIBUTES:
        assert getattr(loaded, attribute) == getattr(model, attribute), attribute
    for ours, theirs in zip(loaded.parameters(), model.parameters(), strict=True):
        assert ours.requires_grad == theirs.requires_grad
    assert all(ours.equal(theirs) for ours, theirs in zip(results_of(loaded), results))


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
def test_a_saved_model_is_restored_even_if_its_row_changes(name, overrides, tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = fcos.build(name, 3, **overrides)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2)
    model.set_convention(
        inclusive=True, bgr=False, mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0), bn_eps=1e-3
    )
    model.classes = ["cat", "dög", "tree"]
    model.category_ids = [1, 7, 90]
    model.test_size = (320, 533)
    model.candidate_threshold = 0.0
    results = results_of(model)
    path = tmp_path / "model.pt"
    fcos.save(model.train(), path)
    loaded = fcos.load(path, name)
    assert not loaded.training
    assert_same_model(loaded, model, results)

    other = dict(backbone="mobilenet", norm="gn", radius=9.0, box_loss="iou", channels=16)
    monkeypatch.setitem(fcos.MODELS, name, other)
    assert_same_model(fcos.load(path), model, results)
    monkeypatch.delitem(fcos.MODELS, name)
    assert_same_model(fcos.load(path), model, results)


def test_a_checkpoint_holds_resolved_keywords(tmp_path):
    model = fcos.build("shapes", 3, quality="iou")
    fcos.save(model, tmp_path / "model.pt")
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    assert all(type(key) is str for key in content)
    assert content["keywords"] == model.keywords
    assert content["keywords"] == fcos.resolve(content["keywords"])


def test_own_weights_fill_a_model_and_bring_their_convention(tmp_path):
    model = fcos.build("shapes", 2)
    model.set_convention(inclusive=True)
    fcos.save(model, tmp_path / "model.pt")
    content = {"settings": {}, "step": 7, "model": fcos.checkpoint(model), "optimizer": {}}
    torch.save(content, tmp_path / "last.pt")  # as the trainer does
    for source in (tmp_path / "model.pt", fcos.checkpoint(model), tmp_path / "last.pt"):
        other = fcos.build("shapes", 2)
        report = fcos.load_weights(other, source)
        assert report["family"] == "fcos"
        assert not report["missing"] + report["ignored"]
        assert other.convention == model.convention
        assert_same_weights(other, model)
    assert fcos.load(tmp_path / "last.pt").name == "shapes"
    other = fcos.build("shapes", 2)
    assert not fcos.load_weights(other, model.state_dict())["missing"]
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
def test_weights_trained_with_other_keywords_are_refused(keyword, value):
    content = fcos.checkpoint(fcos.build("shapes", 2, **{keyword: value}))
    model = fcos.build("shapes", 2)
    assert_refused(lambda: fcos.load_weights(model, content), keyword, value)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_save_keeps_the_old_file(error, tmp_path, monkeypatch):
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


def test_wrapped_models_are_saved_without_their_wrapper(tmp_path):
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


@pytest.mark.parametrize("name", ["x" * 254, "x" * 250 + ".pt", "new/folder/model.pt", "dög \n.pt"])
def test_a_file_of_any_name_is_written(name, tmp_path):
    with fcos.atomic_write(tmp_path / name, "w") as file:
        file.write("whole")
    assert (tmp_path / name).read_text() == "whole"


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_replaced_not_followed(exists, tmp_path):
    target = tmp_path / "target"
    if exists:
        target.write_text("mine")
    link = tmp_path / "link"
    link.symlink_to(target)
    with fcos.atomic_write(link, "w") as file:
        file.write("new")
    assert not link.is_symlink()
    assert link.read_text() == "new"
    assert target.exists() == exists
    assert not exists or target.read_text() == "mine"


def test_a_path_below_a_file_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match="cannot be written"), fcos.atomic_write(file / "x"):
        pass


def test_the_last_of_two_writers_replaces_the_file(tmp_path):
    path = tmp_path / "file"
    with fcos.atomic_write(path, "w") as first, fcos.atomic_write(path, "w") as second:
        first.write("first")
        second.write("second")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_only_leftovers_of_killed_processes_are_removed(tmp_path):
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


def test_safetensors_hold_a_whole_model(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model = randomise(fcos.build("shapes", 2, levels=(2, 3, 4, 5), ranges=(32, 64, 128)))
    model.set_convention(inclusive=True, mean=(1.0, 2.0, 3.0))
    model.classes = ["a", "dög"]
    model.category_ids = [1, 7]
    model.nms_threshold = 0.5
    path = tmp_path / "model.safetensors"
    fcos.save(model, path)
    loaded = fcos.load(path)
    assert_same_weights(loaded, model)
    for attribute in ATTRIBUTES:
        assert getattr(loaded, attribute) == getattr(model, attribute), attribute
    with safetensors.safe_open(path, "pt") as file:
        assert list(file.metadata()) == ["fcos"]


def write_safetensors(path, state, metadata=None):
    safetensors = pytest.importorskip("safetensors.torch")
    state = {name: value.contiguous() for name, value in state.items()}
    safetensors.save_file(state, path, metadata)


@pytest.mark.parametrize("rule", [official, adelaidet, mmdetection])
def test_safetensors_of_other_projects_are_read(rule, tmp_path):
    path = tmp_path / "model.safetensors"
    source = randomise(thin())
    write_safetensors(path, renamed(source, rule))
    model = thin()
    assert not fcos.load_weights(model, path)["ignored"]
    assert_same_weights(model, source)
    assert_refused(lambda: fcos.load(path), path, "does not say which model")


def test_damaged_safetensors_are_named(tmp_path):
    pytest.importorskip("safetensors")
    path = tmp_path / "model.safetensors"
    fcos.save(fcos.build("shapes", 2), path)
    content = path.read_bytes()
    for damaged in (content[:-1], content[:100], b"", b"\xff" * 99):
        path.write_bytes(damaged)
        assert_refused(lambda: fcos.load(path), path, "damaged")


@pytest.mark.parametrize(
    "stored", ["[", "[]", '{"keywords": 3}', "[" * 10**5, '{"keywords": {"blocks": [1]}}']
)
def test_safetensors_with_odd_metadata_are_refused(stored, tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, fcos.build("shapes", 2).state_dict(), {"fcos": stored})
    assert_refused(lambda: fcos.load(path), path)


def test_without_safetensors_the_message_names_it(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    for module in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, module, None)
    assert_refused(lambda: fcos.save(fcos.build("shapes", 2), path), "pip install safetensors")
    assert not path.exists()
    path.write_bytes(b"")
    assert_refused(lambda: fcos.load(path), "pip install safetensors")


# ---- hostile checkpoints -----------------------------------------------------------------------


def repeated(*sides):
    """Return a tensor whose elements are all the same one in memory."""
    return torch.zeros(1).expand(sides)


def rezipped(change, compression=zipfile.ZIP_STORED):
    """Return a function that writes a checkpoint and then changes the members of its archive."""

    def write(path, content):
        torch.save(content, path)
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, data in members.items():
                archive.writestr(name, change(name.partition("/")[2], data))

    return write


def with_folder(path, content):
    """Mark the last member of the archive as a folder: torch.load would not fill such a tensor."""
    torch.save(content, path)
    data = path.read_bytes()
    attributes = data.rindex(b"PK\1\2") + 38
    path.write_bytes(data[:attributes] + b"\x10" + data[attributes + 1 :])


def legacy_with_deep_keys(path, content):
    """Write the format of torch before 1.6, with a nested tuple among the keys of storages."""
    numbers = torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION
    programs = [pickle.dumps(value, 2) for value in (*numbers, {}, {})]
    path.write_bytes(b"".join(programs) + b"\x80\x02](" + DEEP + b"e.")


def pickled(program):
    return rezipped(lambda name, data: program if name == "data.pkl" else data)


BLOCKS = [(10**6, 1, 1, 1), (200, 200, 200, 200), (1, 1, 1), (1.5, 1, 1, 1), shared_lists()]
CRAFTED = {  # the entry of the checkpoint that is replaced, and its new values
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
    "category_ids": [shared_lists(), [1.0, 2.0], [1], 7, [True, False], [1, 10**5000]],
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
    "all": [  # functions that write the whole file
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
        with_folder,
    ],
}


@pytest.mark.parametrize(
    "entry, value",
    [
        ("classes", np.array(["a", "b"])),
        ("classes", ["a"]),
        ("classes", {0: "a", 1: "b"}),
        ("category_ids", list(np.arange(2))),
        ("category_ids", torch.arange(2)),
    ],
)
@pytest.mark.parametrize("file", ["model.pt", "model.safetensors"])
def test_classes_that_could_not_be_loaded_are_not_saved(tmp_path, entry, value, file):
    model = thin(2)
    setattr(model, entry, value)
    assert_refused(lambda: fcos.save(model, tmp_path / file), entry)
    assert list(tmp_path.iterdir()) == []


def test_category_ids_may_be_text(tmp_path):
    model = thin(2)
    model.category_ids = ["x1", "x2"]
    fcos.save(model, tmp_path / "model.pt")
    assert fcos.load(tmp_path / "model.pt").category_ids == ["x1", "x2"]


@pytest.mark.parametrize("entry", CRAFTED, ids=lambda entry: entry[:30])
def test_crafted_checkpoints_are_refused_in_one_line(entry, tmp_path):
    path = tmp_path / "model.pt"
    checkpoint = fcos.checkpoint(fcos.build("shapes", 2))
    for value in CRAFTED[entry]:
        content = dict(checkpoint)
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


# ---- other files -------------------------------------------------------------------------------

DAMAGED = "not a checkpoint or damaged"
OTHER_FILES = {  # the bytes of a file, or what torch.save writes, and a part of the message
    "empty": (b"", DAMAGED),
    "zeros": (b"\x00" * 100, DAMAGED),
    "text": (b"hello, this is no checkpoint\n" * 9, DAMAGED),
    "start": (b"\x80\x02", DAMAGED),
    "zip": (b"PK\x03\x04 and no zip", DAMAGED),
    "html": (b"<html>404</html>", DAMAGED),
    "array of objects": (pickle.dumps({"conv1_w": np.zeros(3, dtype=object)}), "conv1_w"),
    "list": ([1, 2, 3], "[1, 2, 3]"),
    "tensor": (torch.zeros(3), "Tensor"),
    "numbers as keys": ({0: torch.zeros(3)}, "at most 20000 tensors by name"),
    "nothing": ({}, "none"),
    "unknown key": ({"conv1.weight": torch.zeros(3)}, "conv1.weight"),
    "no weights": ({"model": {}}, "first keys are model"),
    "a key of a backbone": ({"model": {"backbone.conv1.weight": torch.zeros(3)}}, "backbone.conv1"),
    "text as weight": ({"head.cls.weight": "text"}, "head.cls.weight"),
    "no model": ({"name": "shapes", "overrides": {}, "convention": {}}, "name"),
}


@pytest.mark.parametrize("content, part", OTHER_FILES.values(), ids=OTHER_FILES)
@pytest.mark.parametrize("suffix", ["pt", "pkl"])
def test_a_file_without_a_model_is_named(content, part, suffix, tmp_path):
    path = tmp_path / f"other.{suffix}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    assert_refused(lambda: fcos.load_weights(fcos.build("shapes", 2), path), path, part)
    assert_refused(lambda: fcos.load(path), path, part)


@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_a_torn_checkpoint_is_named(share, tmp_path):
    fcos.save(fcos.build("shapes", 2), tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "torn.pt").write_bytes(content[: int(share * len(content))])
    content = python2_pickle(backbone_file(thin(), AFFINE))
    (tmp_path / "torn.pkl").write_bytes(content[: int(share * 100_000)])
    for name in ("torn.pt", "torn.pkl"):
        assert_refused(lambda name=name: fcos.load(tmp_path / name), name, DAMAGED)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    path = tmp_path / "nowhere.pth"
    assert_refused(lambda: fcos.load(path), path, "No such file")
    assert_refused(lambda: fcos.load(tmp_path), tmp_path, "Is a directory")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_may_hold_all_that_torch_reads(zipped, tmp_path):
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
