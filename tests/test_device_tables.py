"""What other devices get, run on the host: their tables, cut into chunks, and their kernels' code.

The tests of the CPU's kernels are run again, with plain CPU tensors standing for a device's.
What only devices have is tested in ``test_device``.
"""

from __future__ import annotations

from collections.abc import Iterator

import places
import pytest
from cases import Row
from test_layouts import *  # noqa: F403
from test_parity import *  # noqa: F403
from test_zero_grad import *  # noqa: F403
from torch import Tensor

pytestmark = places.on_host


def tensor_betas(row: Row) -> bool:
    """Whether betas may be tensors, whose powers torch takes from a library of its own."""
    return any(isinstance(o.get("betas", (0,))[0], Tensor) for o in row.options)


@pytest.fixture(autouse=True)
def emulated(settings: None, request: pytest.FixtureRequest) -> Iterator[None]:
    """Let the host do what a device would."""
    name = request.node.name
    if "betas=tensors" in name or (
        "own_options" in name and tensor_betas(request.node.callspec.params["row"])
    ):
        pytest.skip("torch's power of a float32 tensor is a unit off now and then")
    with places.emulated():
        yield
