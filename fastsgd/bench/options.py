"""The options of `python -m fastsgd bench`, and which sections of the report they speak of."""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

import fastsgd
from fastsgd.bench.contestants import CPU
from fastsgd.bench.opponents import OPPONENTS
from fastsgd.bench.rules import RULES
from fastsgd.bench.schedule import SECTIONS
from fastsgd.bench.shapes import DTYPES, SHAPES

MODES = ["default", "foreach", "fused"]
AGAINST = [*MODES, *(opponent.name for opponent in OPPONENTS)]
PICTURE_FORMATS = (".svg", ".png")
DRAWN = {"steps", "scaling"}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; argparse ends the program with a message when one is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m fastsgd bench",
        description="Time fastsgd against torch.optim: ratios, from runs in turn.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="end within a minute")
    add("--model", nargs="+", choices=SHAPES, metavar="NAME", help=names(SHAPES))
    add(
        "--my-model",
        type=factory,
        metavar="MODULE:FACTORY",
        help="time the model that this function returns, or its parameters, or groups of them",
    )
    add("--optimizer", nargs="+", choices=RULES, metavar="NAME", help=names(RULES))
    add("--dtype", choices=DTYPES, help="of the models; their own by default")
    add("--device", type=device, default=CPU, help="cpu, the default, or cuda, cuda:1, ...")
    add("--threads", type=threads, help="ours, and the most of stock's; torch's by default")
    add(
        "--against",
        nargs="+",
        choices=AGAINST,
        metavar="NAME",
        help=f"{names(AGAINST)}; all that are installed by default",
    )
    add("--sections", nargs="+", choices=SECTIONS, metavar="NAME", help=names(SECTIONS))
    add(
        "--seconds-per-case",
        type=seconds,
        metavar="SECONDS",
        help="a row of the table takes at least this long, large shapes longer (4; quick 0.6)",
    )
    add("--json", type=new_file, metavar="PATH", help="write everything there too")
    add("--plot", type=picture, metavar="PATH", help="draw the picture there, SVG or PNG")
    add("--from", dest="results", type=Path, metavar="PATH", help="draw that JSON; measure nothing")
    options = parser.parse_args(argv)
    if options.results:
        look_at_from(parser, options)
    else:
        options.sections = sections_of(parser, options)
    return options


def look_at_from(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse options that mean nothing where nothing is measured."""
    if not options.plot:
        parser.error("--from goes with --plot, which says where to draw")
    for name, value in vars(options).items():
        if name not in ("results", "plot") and value != parser.get_default(name):
            flag = "--" + name.replace("_", "-")
            parser.error(f"--from measures nothing: {flag} means nothing with it")


def sections_of(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[str]:
    """The sections named, or all those of which every option speaks, in the order of the run."""
    in_scaling = {"steps", "scaling"}
    speaks_of = {
        "--model": (options.model, {"steps", "one-pass"}),
        "--my-model": (options.my_model, {"steps"}),
        "--optimizer": (options.optimizer, in_scaling),
        "--dtype": (options.dtype, in_scaling),
        "--device": (options.device != CPU, in_scaling),
        "--against": (options.against, in_scaling if stock_modes(options) else {"steps"}),
    }
    given = {flag: sections for flag, (value, sections) in speaks_of.items() if value}
    for name in options.sections or []:
        for flag, sections in given.items():
            if name not in sections:
                of = " and ".join(sorted(sections, reverse=True))
                parser.error(f"{flag} speaks of {of}, not of the section {name}")
    if options.plot and options.sections and DRAWN.isdisjoint(options.sections):
        parser.error("--plot draws the sections steps and scaling, of which none is named")
    if options.sections:
        return [name for name in SECTIONS if name in options.sections]
    return [name for name in SECTIONS if all(name in sections for sections in given.values())]


def stock_modes(options: argparse.Namespace) -> list[str]:
    """The modes of stock's that are raced."""
    return [name for name in MODES if options.against is None or name in options.against]


def names(of: Iterable[str]) -> str:
    """The help of an option that takes names."""
    return f"of {', '.join(of)}"


def factory(text: str) -> str:
    """The name of a function in a module."""
    module, colon, name = text.partition(":")
    if not (module and colon and name):
        raise argparse.ArgumentTypeError(f"{text!r} is not module:factory")
    return text


def device(text: str) -> torch.device:
    """A device that is there, with kernels for it."""
    try:
        found = torch.device(text)
    except RuntimeError:
        found = torch.device("meta")
    if found.type == "cpu":
        return CPU
    if found.type != "cuda":
        raise argparse.ArgumentTypeError(f"{text!r} is not cpu, cuda or cuda:N")
    if torch.cuda.device_count() <= (found.index or 0):
        raise argparse.ArgumentTypeError(
            f"there is no {text}: torch finds {torch.cuda.device_count()} CUDA devices"
        )
    if not fastsgd.cuda_available():
        raise argparse.ArgumentTypeError(
            "this build has no CUDA kernels: `python -m fastsgd info` says why"
        )
    return found


def threads(text: str) -> int:
    """A positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of threads")
    return int(text)


def seconds(text: str) -> float:
    """A positive number."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def picture(text: str) -> Path:
    """A file that matplotlib can write."""
    if Path(text).suffix.lower() not in PICTURE_FORMATS:
        raise argparse.ArgumentTypeError(f"{text!r} does not end in {' or '.join(PICTURE_FORMATS)}")
    return new_file(text)


def new_file(text: str) -> Path:
    """A file in a folder that exists: a long run should not end in a bad name."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r}")
    return path
