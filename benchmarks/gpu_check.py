"""Everything that wants a CUDA device, in one command: `make gpu-check`.

    python benchmarks/gpu_check.py [tests] [bench] [sanitizers] [--within SECONDS] [--results DIR]

Those of the tests that run on a device; the benchmark, alone; and compute-sanitizer over a short
run. What each came to goes into one file a day and card, as soon as it is known, to be
committed; all that each printed is beside it.
"""

import argparse
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from command import GRACE, ROOT, TIMED_OUT, run
from kept import keep

import fastsgd
from fastsgd import info

FILES = ["cuda", "device", "device_one_pass", "bench_command", "docs", "loops"]
# Those whose place is a device, and what is documented for one. An example is not to tell of one
# bit's difference there, as it allows more.
ON_A_DEVICE = "cuda or on_a_device or (amp.py and not difference)"
MOST_WORKERS = 12  # each has a context on the device


@dataclass(frozen=True)
class Check:
    """A command that is run.

    Attributes:
        words: The command.
        limit: How many seconds it may take.
        says: A pattern in what it prints if all is well.
        cannot: What it says where it cannot be had,
        found: and a pattern in what it prints if it could, and found something.
        variables: What is else in its environment.
    """

    words: Sequence[object]
    limit: float
    says: str = ""
    cannot: str = ""
    found: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)


def bench(path: Path) -> dict[str, Check]:
    """Times and bars; it adds its lines to the file itself."""
    words = [sys.executable, "benchmarks/on_cuda.py", "--json", path.absolute()]
    return {"bench": Check(words, limit=150)}


def tests(path: Path) -> dict[str, Check]:
    """One run of pytest. A test that takes a minute shows where it is."""
    words: list[object] = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short"]
    words += ["--continue-on-collection-errors", "-o", "faulthandler_timeout=60"]
    words += ["-p", "no:cacheprovider", "--durations=10", "-m", "", "-k", ON_A_DEVICE]
    if find_spec("xdist"):
        words += ["-n", min(MOST_WORKERS, os.cpu_count() or 1)]
    words += [f"tests/test_{name}.py" for name in FILES]
    # As wide as a test's name and error are.
    variables = {"OMP_NUM_THREADS": "2", "COLUMNS": "240"}
    return {"tests": Check(words, limit=210, variables=variables)}


def sanitizers(path: Path) -> dict[str, Check]:
    """Wrong accesses and races of our kernels, both looked for at the same time."""
    places = ["/usr/local/cuda"] + [os.environ[n] for n in ("CUDA_HOME",) if n in os.environ]
    search = [os.environ.get("PATH", os.defpath), *(f"{place}/bin" for place in places)]
    name = "compute-sanitizer"
    words = [shutil.which(name, path=os.pathsep.join(search)) or name, "--error-exitcode", "9"]
    # torch asks of the driver what it may not have; its kernels are not ours to judge.
    words += ["--report-api-errors", "no", "--kernel-name", "kns=fastsgd"]
    # Each tensor in memory of its own, or what lies beside it is the allocator's too.
    alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return {
        tool: Check(
            [*words, "--tool", tool, sys.executable, "benchmarks/sanitized.py"],
            limit=120,
            says="(?s)all in the kernels.*SUMMARY: 0 ",
            cannot="Device not supported",
            found="Invalid |Race |[1-9][0-9]* hazards?",
            variables=alone,
        )
        for tool in ("memcheck", "racecheck")
    }


# In this order, one after the other: what ran beside the benchmark would be in its times.
PARTS: dict[str, Callable[[Path], dict[str, Check]]] = {
    "tests": tests,
    "bench": bench,
    "sanitizers": sanitizers,
}


def outcome(check: Check, log: Path, end: float) -> dict[str, Any]:
    """Run it; what it came to in a line, the tests that failed, and how long it took."""
    start = time.monotonic()
    limit = min(check.limit, end - start - GRACE)
    if limit <= 0:
        return {"outcome": "FAILED: there was no time left for it", "seconds": 0, "output": None}
    status = run(check.words, log, limit, check.variables)
    text = log.read_text(encoding="utf-8", errors="replace")
    last = ([line.strip() for line in text.splitlines() if line.strip()] or ["nothing printed"])[-1]
    well = status == 0 and re.search(check.says, text)
    found: dict[str, Any] = {"outcome": last}
    if not well:
        found["outcome"] = f"FAILED ({status}): {last}"
        # What it says of itself is in its count of errors.
        found_any = check.found and re.search(check.found, text)
        if check.cannot and check.cannot in text and not found_any:
            why = next(line for line in text.splitlines() if check.cannot in line)
            found["outcome"] = f"cannot be had here: {why.strip()}"
    if failed := re.findall(r"^(?:FAILED|ERROR) (\S+::.*|\S+\.py.*)", text, re.MULTILINE):
        found["failed"] = failed
    return found | {"seconds": round(time.monotonic() - start), "output": log.name}


def do(part: str, path: Path, end: float) -> dict[str, dict[str, Any]]:
    """Do a part, until a time at most, and keep what it came to.

    The file knows of it from its beginning on.
    """
    checks = PARTS[part](path)
    keep(path, {name: {"outcome": f"FAILED ({TIMED_OUT}): begun, not ended"} for name in checks})
    logs = [path.with_name(f"{path.stem}-{name}.txt") for name in checks]
    with ThreadPoolExecutor(len(checks)) as pool:
        found = pool.map(outcome, checks.values(), logs, [end] * len(checks))
        outcomes = dict(zip(checks, found, strict=True))
    keep(path, outcomes)
    return outcomes


def slug(card: str) -> str:
    """Return a card's name for a file's: `NVIDIA H100 80GB HBM3` is `h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower().replace("nvidia", "")).strip("-")


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what is named, or all; 1 where something failed or a bar is missed."""
    parser = argparse.ArgumentParser(description="Check what wants a CUDA device.")
    parser.add_argument("parts", nargs="*", default="all", choices=[*PARTS, "all"], metavar="PART")
    parser.add_argument("--within", type=float, default=480, help="seconds in all (480)")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.within
    if not fastsgd.cuda_available():
        print(f"There is nothing to check: CUDA {info.cuda()}.", file=sys.stderr)
        return 1
    card, date = torch.cuda.get_device_name(), time.strftime("%Y-%m-%d")
    path = options.results / f"{date}-cuda-{slug(card)}.json"
    keep(path, {"device": card, "date": date, "info": info.facts()})
    outcomes: dict[str, dict[str, Any]] = {}
    for part in PARTS:
        if part in options.parts or "all" in options.parts:
            print(f"--- {part}, {time.strftime('%H:%M:%S')}", flush=True)
            outcomes |= do(part, path, end)
    print()
    for name, found in outcomes.items():
        print(f"{name:10} {found['seconds']:4} s  {found['outcome']}")
    print(f"{path} on {card}: commit it.")
    return int(any(found["outcome"].startswith("FAILED") for found in outcomes.values()))


if __name__ == "__main__":
    raise SystemExit(main())
