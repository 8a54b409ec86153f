"""The user's own model, named as `module:factory`: its sizes, dtypes and groups are timed.

Nothing of the model is stepped or kept: random tensors of its sizes are.
"""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from operator import attrgetter
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from fastsgd.bench.errors import BenchError
from fastsgd.bench.shapes import DTYPES, Shape


def shape_of(name: str) -> Shape:
    """The shape of what a factory returns.

    Args:
        name: `module:factory`. The module may lie in the current folder. The factory is called
            without arguments, and returns a `torch.nn.Module`, or what `torch.optim` takes:
            parameters, or groups of them. Options in groups are left out, as each rule has its own.

    Raises:
        BenchError: If there is no such factory, or it raises, or returns something else.
    """
    groups = groups_of(name, returned(name))
    parameters = [p for group in groups for p in group]
    if not parameters:
        raise BenchError(f"{name}() returned no parameter that requires grad.")
    if any(is_lazy(p) for p in parameters):
        raise BenchError(
            f"{name}() returned lazy parameters, which have no size yet: let it run the model once."
        )
    dtypes = tuple(p.dtype for p in parameters)
    strange = set(dtypes).difference(DTYPES.values())
    if strange:
        raise BenchError(
            f"{name}() returned parameters of {', '.join(sorted(map(str, strange)))}: those that "
            f"can be timed are {', '.join(DTYPES)}."
        )
    return Shape(
        name.partition(":")[2],
        tuple(tuple(p.shape) for p in parameters),
        dtypes[0] if len(set(dtypes)) == 1 else dtypes,
        tuple(len(group) for group in groups),
    )


def returned(name: str) -> object:
    """What the factory returns."""
    with current_folder_on_path():
        factory = factory_of(name)
        try:
            return factory()
        except (Exception, SystemExit) as error:
            raise BenchError(f"{name}() raised {words(error)}") from error


@contextmanager
def current_folder_on_path() -> Iterator[None]:
    """Find modules in the current folder too, inside."""
    before = list(sys.path)
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path[:] = before


def factory_of(name: str) -> Callable[[], object]:
    """Import it."""
    module_name, _, attribute = name.partition(":")
    try:
        module = import_module(module_name)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module_name}.".startswith(f"{missing}."):
            raise BenchError(
                f"There is no module {missing!r}, neither in {os.getcwd()} nor installed."
            ) from error
        raise BenchError(f"Importing {module_name} raised {words(error)}") from error
    try:
        factory: Callable[[], object] = attrgetter(attribute)(module)
    except AttributeError as error:
        raise BenchError(f"The module {module_name} has no attribute {attribute!r}.") from error
    if not callable(factory):
        raise BenchError(f"{name} is {a(factory)}, which cannot be called: name a function.")
    return factory


def groups_of(name: str, found: Any) -> list[list[torch.Tensor]]:
    """The parameters that require grad, by group; groups without any are left out."""
    try:
        items = list(found.parameters() if isinstance(found, torch.nn.Module) else found)
        # It knows what parameters and groups can be, and writes into the groups that it gets.
        items = [dict(item) if isinstance(item, dict) else item for item in items]
        groups = torch.optim.SGD(items, lr=0.0).param_groups if items else []
    except Exception as error:
        raise BenchError(
            f"{name}() returned {a(found)}, and not a torch.nn.Module, parameters or groups of "
            f"them as torch.optim takes them ({type(error).__name__}: {error})."
        ) from error
    kept = ([p for p in group["params"] if p.requires_grad] for group in groups)
    return [group for group in kept if group]


def a(value: object) -> str:
    """A value's type, as a sentence has it."""
    return "None" if value is None else f"an object of type {type(value).__name__}"


def words(error: BaseException) -> str:
    """What was raised, and where: the end of a sentence."""
    *_, last = traceback.extract_tb(error.__traceback__)
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said} ({last.filename}, line {last.lineno})."
