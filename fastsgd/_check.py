"""Is the torch found the one that ``fastsgd._C`` was compiled against?

An extension fits one release of torch. Loaded beside another, it fails on an undefined symbol, or
worse, does not fail; so the two are compared before it loads.
"""

import fnmatch
import importlib
import importlib.util
import json
import os
import shlex
import sys
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES, PathFinder
from urllib.parse import urlsplit
from urllib.request import url2pathname

_PACKAGE = os.path.dirname(os.path.abspath(__file__))


def check() -> None:
    """Raise ImportError, in one sentence with the cure, where ``fastsgd._C`` cannot load."""
    if importlib.util.find_spec("torch") is None:
        raise ImportError(
            "fastsgd needs PyTorch, and there is none in this environment: install torch, then "
            f"build fastsgd against it with {rebuild_command()}."
        )
    if not (_is_beside("_C") and _is_beside("_build_info")):
        raise ImportError(_not_built())

    import torch

    info = importlib.import_module("fastsgd._build_info")
    release = torch.__version__.partition("+")[0]
    found = f"torch {release} ({_build_of(torch.version.cuda)})"
    compiled = f"torch {info.TORCH_VERSION} ({_build_of(info.TORCH_CUDA)})"
    if found != compiled:
        raise ImportError(
            f"fastsgd was compiled against {compiled} and finds {found}: "
            f"rebuild it with {rebuild_command()}."
        )


def _build_of(cuda: str | None) -> str:
    return "CPU build" if cuda is None else "CUDA build"


def _is_beside(name: str) -> bool:
    """Look in this folder alone: an editable install elsewhere would answer for its own."""
    return PathFinder.find_spec(f"fastsgd.{name}", [_PACKAGE]) is not None


def _not_built() -> str:
    """Say why there is no extension for this interpreter in this folder."""
    if fnmatch.filter(os.listdir(_PACKAGE), "_C.*.so") and not _is_beside("_C"):
        wanted = EXTENSION_SUFFIXES[0]
        return (
            f"fastsgd in {_PACKAGE} was compiled for another Python (this one loads _C{wanted}): "
            f"rebuild it with {rebuild_command()}."
        )
    root = os.path.dirname(_PACKAGE)
    if os.path.exists(os.path.join(root, "setup.py")):
        return (
            f"{root} is fastsgd's source and was not built: run Python from another folder to use "
            f"an installed fastsgd, or build this one with `pip install -e {shlex.quote(root)}`."
        )
    return (
        f"fastsgd in {_PACKAGE} lacks its compiled extension: rebuild it with {rebuild_command()}."
    )


def rebuild_command() -> str:
    """Return the command that compiles fastsgd again, past any cached wheel, in quotes."""
    python = shlex.quote(sys.executable)
    if importlib.util.find_spec("pip") is not None:
        command = f"{python} -m pip install --force-reinstall --no-deps --no-cache-dir"
    else:  # Isolated by uv, the build would not see this torch.
        command = f"uv pip install --python {python} --reinstall --no-deps --no-cache"
        command += " --no-build-isolation"
    source = _source()
    return f"`{command} {source}`" if source else f"`{command} .` in a clone of fastsgd"


def _source() -> str | None:
    """Return what pip installed this fastsgd from, as it is written after ``pip install``."""
    try:
        noted = metadata.distribution("fastsgd").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return None
    origin = json.loads(noted or "{}")
    if "vcs_info" in origin:
        vcs = origin["vcs_info"]
        return f"{vcs['vcs']}+{origin['url']}@{vcs['commit_id']}"
    folder = url2pathname(urlsplit(origin.get("url", "")).path)
    if "dir_info" not in origin or not os.path.isdir(folder):
        return None
    return ("-e " if origin["dir_info"].get("editable") else "") + shlex.quote(folder)
