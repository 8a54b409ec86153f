"""Builds for those who test fastsgd; ``FASTSGD_BUILD`` names one. Unset, it is what users get."""

import os

from setuptools.errors import CompileError

# Reports name lines and every call: more optimization would join calls, and lines with others.
_WATCHED = ["-O1", "-g1", "-fno-omit-frame-pointer"]

VARIANTS = {
    "": [],
    "strict": ["-Werror"],
    "sanitize": ["-fsanitize=address,undefined", *_WATCHED],
    "threads": ["-fsanitize=thread", *_WATCHED],
    "coverage": ["--coverage", "-fprofile-update=atomic", "-DFASTSGD_COVERAGE", *_WATCHED],
}


def variant() -> str:
    """Return its name.

    Raises:
        CompileError: There is none of that name.
    """
    name = os.environ.get("FASTSGD_BUILD", "").strip()
    if name not in VARIANTS:
        known = ", ".join(filter(None, VARIANTS))
        raise CompileError(f"FASTSGD_BUILD is {name!r}: it is one of {known}, or unset.")
    return name


def flags() -> list[str]:
    """Return the flags of its compiler."""
    return VARIANTS[variant()]


def linker_flags() -> list[str]:
    """Return those that its linker takes too."""
    return [flag for flag in flags() if flag.startswith(("-fsanitize=", "--coverage"))]
