"""What pyproject.toml cannot say: the extension, and the torch release it is compiled against."""

import sys

from setuptools import setup

from build_support.backend import TORCH_RANGE, find_torch

asked = set(sys.argv)

# A source distribution is tied to no torch, and egg_info runs before an isolated build has one.
torch = None if "sdist" in asked else find_torch()
if torch is None and asked.isdisjoint({"sdist", "egg_info"}):
    raise SystemExit(f"fastsgd compiles against torch and finds none: install {TORCH_RANGE}")

options = {"install_requires": [torch.requirement if torch else TORCH_RANGE]}

if torch is not None and asked.isdisjoint({"egg_info", "dist_info"}):
    torch.make_importable()
    from build_support.extension import BuildExtension, extension

    options |= {"ext_modules": [extension()], "cmdclass": {"build_ext": BuildExtension}}

setup(**options)
