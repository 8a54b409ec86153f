"""PyTorch's own ``test/test_optim.py``, run with our classes where stock's were.

Usage: ``python tests/upstream.py PATH/TO/pytorch/test/test_optim.py [--stock] [pytest options]``

Every name of stock's classes in ``torch.optim`` and every row of torch's database of optimizers is
ours before the file is imported, so its tests need no changes; rows of optimizers that we do not
have are taken out. With ``--stock`` the same tests run on stock, which says what has to pass.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.testing._internal.common_optimizers as database

import fastsgd

NAMES = [name for name in fastsgd.__all__ if isinstance(getattr(torch.optim, name, None), type)]


def put_ours_in_place() -> None:
    """Make our classes those that the tests find, in ``torch.optim`` and in the database."""
    ours = {getattr(torch.optim, name): getattr(fastsgd, name) for name in NAMES}
    for info in database.optim_db:
        info.optim_cls = ours[info.optim_cls]
    for name in NAMES:
        setattr(torch.optim, name, getattr(fastsgd, name))


def main(arguments: list[str]) -> int:
    """Run the tests of the file that the first argument names; return pytest's exit status."""
    if not arguments or not Path(arguments[0]).is_file():
        print(__doc__, file=sys.stderr)
        return 2
    path = Path(arguments[0]).resolve()
    rest = [a for a in arguments[1:] if a != "--stock"]
    known = {getattr(torch.optim, name) for name in NAMES}
    database.optim_db[:] = [info for info in database.optim_db if info.optim_cls in known]
    if len(rest) == len(arguments) - 1:
        put_ours_in_place()
    # The file imports its neighbours, and its tests are unittest's: none of our fixtures apply.
    os.chdir(path.parent)
    sys.path.insert(0, str(path.parent))
    return int(pytest.main([str(path), "-p", "no:cacheprovider", "--noconftest", "-q", *rest]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
