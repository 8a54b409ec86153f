"""The build backend: setuptools', and which torch to build against.

An extension fits one release of torch, so fastsgd is compiled against the torch of the environment
that it is being installed into. pip's build isolation hides that environment by ``PYTHONPATH`` and
a ``sitecustomize`` found there; the same interpreter run with ``-E`` sees past both. Tools that
isolate in a real environment (uv, ``python -m build``) leave nothing to see.
"""

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from dataclasses import dataclass

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks that need no change)

# From the oldest release run to the first not yet run.
TORCH_RANGE = "torch>=2.11,<2.16"

_LOOK = """
import importlib.util, json, sys
spec = importlib.util.find_spec("torch")
print(json.dumps([spec.origin, sys.path[1:]] if spec else None))
"""


@dataclass
class Torch:
    """A torch that was found but not imported.

    Attributes:
        version: Its version without the local part, ``"2.13.0"``.
        cuda: The CUDA release that it was built with, ``"13.0"``; ``None`` for a CPU build.
        path: What ``sys.path`` lacks for importing it and what it depends on.
    """

    version: str
    cuda: str | None
    path: list[str]

    @property
    def requirement(self) -> str:
        """Exactly this release; a local part such as ``+cpu`` is free."""
        return f"torch=={self.version}"

    def make_importable(self) -> None:
        """Put it last on ``sys.path``, so that the build's own tools still come first."""
        sys.path += [entry for entry in self.path if entry not in sys.path]


def find_torch() -> Torch | None:
    """Return the torch at hand, else that of the environment behind pip's isolation, if any."""
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin is not None:
        return _read(spec.origin, [])
    command = [sys.executable, "-E", "-c", _LOOK]
    found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return _read(*found) if found else None


def _read(init: str, path: list[str]) -> Torch:
    package = os.path.dirname(init)
    version = runpy.run_path(os.path.join(package, "version.py"))
    release = version["__version__"].partition("+")[0]
    return Torch(release, version["cuda"], [*path, os.path.dirname(package)])


def _build_requires() -> list[str]:
    """What an isolated build still lacks; nothing where torch can be imported as it is."""
    if importlib.util.find_spec("torch") is not None:
        return []
    return ["ninja"] if find_torch() else ["ninja", TORCH_RANGE]


def get_requires_for_build_wheel(config_settings=None) -> list[str]:
    """Add torch where there is none to what setuptools asks for."""
    return build_meta.get_requires_for_build_wheel(config_settings) + _build_requires()


def get_requires_for_build_editable(config_settings=None) -> list[str]:
    """Add torch where there is none to what setuptools asks for."""
    return build_meta.get_requires_for_build_editable(config_settings) + _build_requires()
