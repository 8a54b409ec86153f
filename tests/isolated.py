"""Run a piece of Python in an interpreter of its own, where a crash or a hang harms nobody."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path


def run(code: str, *, timeout: float = 120, env: Mapping[str, str | None] | None = None) -> str:
    """Run ``code``; otherwise as :func:`python`."""
    return python("-c", textwrap.dedent(code), timeout=timeout, env=env)


def python(
    *arguments: str, timeout: float = 120, env: Mapping[str, str | None] | None = None
) -> str:
    """Run Python with arguments, the tests' modules importable; return what it printed.

    ``env`` says what is else in its environment; None takes a name away.

    Raises:
        AssertionError: It failed, crashed or took longer than ``timeout`` seconds.
    """
    paths = [str(Path(__file__).parent), *(p or os.getcwd() for p in sys.path)]
    wanted: dict[str, str | None] = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    if arguments[0] != "-c":
        wanted["PYTHONSAFEPATH"] = None  # a script finds what lies beside it
    wanted |= env or {}
    surroundings = {name: value for name, value in wanted.items() if value is not None}
    command = [sys.executable, *arguments]
    try:
        done = subprocess.run(
            command, env=surroundings, timeout=timeout, capture_output=True, text=True, check=False
        )
    except subprocess.TimeoutExpired as hang:
        raise AssertionError(f"did not end within {timeout} s: {hang.stdout!r}") from hang
    if done.returncode:
        raise AssertionError(
            f"ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    return done.stdout
