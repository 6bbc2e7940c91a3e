"""What several test files need."""

import math
from pathlib import Path

import pytest
import torch

import fcos
from fcos import UserError

SHARED = Path(__file__).resolve().parents[2] / "shared"

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture
def shared():
    """The folder with the full golden sets and a few real images, which is no part of a clone."""
    if not SHARED.is_dir():
        pytest.skip("needs the full golden sets of ../shared")
    return SHARED


@pytest.fixture(scope="module")
def one_thread():
    """Two are slower on networks as small as these, by far if the second core is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SMALL = dict(blocks=(1, 1, 1, 1), channels=32)
THIN = dict(stem=8, channels=32)
NAN, HUGE = math.nan, "x" * 10**6
DEEP = b")" + b"\x85" * 400_000  # a tuple in a tuple in ..., as a pickle
DEEP_KEY = DEEP + b"K\x01s"


def randomise(model, seed=0):
    """Values that differ everywhere, in buffers too, with variances over 0."""
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


def assert_same_weights(model, expected):
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def assert_same_backbone(model, expected):
    for name, value in expected.backbone.state_dict().items():
        if ".offset." not in name:
            assert torch.equal(model.backbone.state_dict()[name], value), name


def assert_refused(call, *said):
    """One line without the words of a traceback, that says all of these."""
    with pytest.raises(UserError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message and "Traceback" not in message and len(message) < 600
    for text in said:
        assert str(text) in message, message


def shared_lists():
    """A list of 2**60 elements that takes a few kilobytes."""
    value = []
    for _ in range(60):
        value = [value, value]
    return value
