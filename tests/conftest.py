"""What several test files need."""

from pathlib import Path

import pytest
import torch

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
