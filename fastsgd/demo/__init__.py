"""The lesson, what a training loop is and what fastsgd changes: `python -m fastsgd demo`.

`lesson` holds parts (a) to (c), which need only torch; `digits` and `picture` hold part (d), which
needs the extra `demo`.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import fastsgd
from fastsgd.demo import lesson

PICTURE_FORMATS = (".pdf", ".png", ".svg")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the four parts in order.

    Args:
        argv: Options; `sys.argv[1:]` by default.

    Returns:
        The exit code: 0, or 1 if part (d) could not run or its two trainings differ in any bit.
    """
    options = parse(argv)
    print(f"fastsgd {fastsgd.__version__}: what a training loop is, in four parts")
    lesson.gradients_add_up()
    lesson.by_hand(options.seed)
    lesson.as_a_module(options.seed)
    try:
        from fastsgd.demo import digits, picture
    except ModuleNotFoundError as error:
        return fail(
            f"Part (d) needs the Python module {error.name!r}, which is not installed: "
            'run `pip install "fastsgd[demo]"`.'
        )
    stock, ours = digits.race(options.seed, options.epochs)
    same = digits.report(stock, ours)
    try:
        picture.save(options.out, stock, ours, same)
    except OSError as error:
        return fail(f"The picture could not be saved: {error}; choose another place with --out.")
    print(f"\n    The picture of both is {options.out}.")
    return 0 if same else 1


def fail(sentence: str) -> int:
    """Say on stderr what went wrong, after all that was printed before it; return exit code 1."""
    sys.stdout.flush()
    print(f"\n{sentence}", file=sys.stderr)
    return 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; argparse ends the program with a message when one is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m fastsgd demo",
        description="A lesson in four parts: gradients, a training loop, a module, and a network "
        "trained by torch.optim.SGD and by fastsgd.SGD at once.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--seed", type=seed, default=0, help="where the random numbers begin")
    parser.add_argument("--epochs", type=epochs, default=20, help="epochs of part (d)")
    parser.add_argument(
        "--out", type=picture_path, default="fastsgd-demo.png", help="the picture of part (d)"
    )
    return parser.parse_args(argv)


def seed(text: str) -> int:
    """An integer that `torch.manual_seed` takes."""
    value = integer(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2**63 - 1")
    return value


def epochs(text: str) -> int:
    """A positive integer."""
    value = integer(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def integer(text: str) -> int:
    """An integer."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer") from None


def picture_path(text: str) -> Path:
    """A file to be written, in a folder that exists: a long run should not end in a bad name."""
    path = Path(text)
    if path.suffix.lower() not in PICTURE_FORMATS:
        raise argparse.ArgumentTypeError(
            f"{text!r} does not end in {', '.join(PICTURE_FORMATS[:-1])} or {PICTURE_FORMATS[-1]}"
        )
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r}")
    return path
