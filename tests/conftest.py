"""Fixtures of every test: a seed, exact square roots, torch's global settings put back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import OPTIMIZERS, Row
from oracle import exact_roots


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """Seed before a test, which sees exact roots; after it put back threads and default dtype."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.manual_seed(0)
    with exact_roots():
        yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    assert torch.is_grad_enabled(), "the test or a step left gradients switched off"


@pytest.fixture(params=OPTIMIZERS, ids=repr)
def row(request: pytest.FixtureRequest) -> Row:
    """Every optimizer."""
    return request.param
