"""Fixtures of every test: a seed, exact square roots, torch's global settings put back."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator
from typing import Any

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


# The Adagrad of torch 2.11 makes states in the constructor alone, and raises where a parameter has
# none; and it leaves unscaling to the scaler. What compares with that cannot pass.
WHERE_ADAGRAD_WAS_OTHERWISE = {
    "test_7_checkpoint_saved_with_fused_and_complex",
    "test_add_param_group",
    "test_asking_for_a_grad",
    "test_closure_may_change_anything",
    "test_containers_of_another_type",
    "test_data_swapped_for_another_size",
    "test_grads_after_the_step",
    "test_halves",
    "test_histories",
    "test_numbers_in_a_checkpoint",
    "test_params_list_edited",
    "test_scales_that_are_no_power_of_two",
    "test_state_edited",
    "test_states_edited",
    "test_subclass_with_its_own_constructor",
    "test_version_of_unscaled_grads",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what an old torch's Adagrad cannot do."""
    if "_step_supports_amp_scaling" in inspect.getsource(torch.optim.Adagrad.__init__):
        return
    for item in items:
        name = item.name.partition("[")[0]
        if "Adagrad" in item.name and name in WHERE_ADAGRAD_WAS_OTHERWISE:
            item.add_marker(pytest.mark.skip(reason="this torch's Adagrad is another"))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Any:
    """End a worker whose device is lost: xdist names the test, and begins another.

    After a wrong access nothing on the device works any more in its process, and every later test
    there would fail.
    """
    yield
    if call.excinfo is None or "CUDA error" not in str(call.excinfo.value):
        return
    if "PYTEST_XDIST_WORKER" not in os.environ or not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        sys.stderr.write(f"{item.nodeid}: {call.excinfo.value}\n{error}\n")
        sys.stderr.flush()
        os._exit(1)
