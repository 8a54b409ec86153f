"""Everything that wants a CUDA device, in one command: `make gpu-check`.

The tests (every file, several at a time, the CUDA rows among them), compute-sanitizer over a short
run, and the benchmark. What each came to is printed and written to a dated file, to be committed.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import fastsgd
from fastsgd import info

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# These wait for other processes, or install things: they are for a machine that is built on.
LEFT_OUT = {
    f"test_{name}.py"
    for name in ("install", "demo", "lesson", "loops", "docs", "bench", "bench_my_model")
}
# What is not ours of the modules that tests import: a machine for them may lack it.
MAY_LACK = {"expecttest", "hypothesis", "numpy", "setuptools"}
NOT_COLLECTED = 2  # pytest's: the file could not be imported, and none of its tests ran
NOTHING_TO_RUN = 5  # pytest's: the whole file is skipped
TIMED_OUT = 124  # the command `timeout`'s
# Every kernel, over little memory: what a sanitizer can bear.
SHORT_RUN = """
import torch, fastsgd
sizes = [(), (0,), (3,), (131,), (33, 17), (4099,)]
for cls, options in (
    (fastsgd.SGD, {}), (fastsgd.SGD, {"momentum": 0.9}), (fastsgd.AdamW, {"amsgrad": True}),
    (fastsgd.Adam, {}), (fastsgd.RMSprop, {"centered": True, "momentum": 0.9}),
    (fastsgd.RMSprop, {}), (fastsgd.Adagrad, {}),
):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        params = [torch.randn(s, device="cuda").to(dtype).requires_grad_() for s in sizes]
        params.append(torch.randn(40, 30, device="cuda").to(dtype)[1:, 3:].requires_grad_())
        optimizer = cls(params, lr=0.01, **options)
        for _ in range(2):
            for p in params:
                p.grad = torch.randn(p.shape, device="cuda").to(dtype)
            assert fastsgd._C.step(optimizer)
        optimizer.zero_grad(set_to_none=False)
torch.cuda.synchronize()
"""


def run(*command: Any, timeout: float = 600, **variables: str) -> tuple[int, str]:
    """Run a command in the clone; its exit status, and the end of what it said."""
    try:
        done = subprocess.run(
            [str(word) for word in command],
            cwd=ROOT,
            env=os.environ | variables,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return TIMED_OUT, f"not done after {timeout:.0f} s"
    return done.returncode, done.stdout[-3000:]


def lacking(status: int, text: str) -> str | None:
    """Return the error of a run of pytest that could not start for want of a module not ours.

    A test that lacks a module has failed, and so has a file that lacks one of ours.
    """
    errors = re.findall(r"^E +(.*)", text, flags=re.M)
    if status != NOT_COLLECTED or not errors:
        return None
    # The last is what ended the import; before it are those that were handled.
    missing = re.fullmatch(r"ModuleNotFoundError: No module named '(\w+)[\w.]*'", errors[-1])
    return errors[-1] if missing and missing[1] in MAY_LACK else None


def tests() -> dict[str, str]:
    """Run each file of tests, several at a time; the last line of each, or why it was left out."""
    files = [p for p in sorted((ROOT / "tests").glob("test_*.py")) if p.name not in LEFT_OUT]
    slowest_first = sorted(files, key=lambda p: p.name != "test_device_tables.py")

    def test(path: Path) -> tuple[str, str]:
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--maxfail=20",
            "-p",
            "no:cacheprovider",
            path,
        ]
        marks = ["-m", ""] if path.name == "test_cuda.py" else []
        status, text = run(*command, *marks)
        if error := lacking(status, text):
            return path.name, f"left out: {error}"
        well = status in (0, NOTHING_TO_RUN)
        if not well:
            print(f"--- {path.name}\n{text}", flush=True)
        return path.name, ("" if well else "FAILED: ") + text.strip().splitlines()[-1]

    with ThreadPoolExecutor(max(2, (os.cpu_count() or 2) // 2)) as pool:
        return dict(pool.map(test, slowest_first))


def sanitizers() -> dict[str, str]:
    """Look for wrong accesses and for races."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    found = shutil.which("compute-sanitizer") or next(
        filter(None, (shutil.which("compute-sanitizer", path=f"{h}/bin") for h in homes)), None
    )
    if found is None:
        return {"compute-sanitizer": "left out: it is not there"}
    outcomes = {}
    for tool in ("memcheck", "racecheck"):
        command = [found, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SHORT_RUN]
        # Each tensor in memory of its own, or what lies beside it is the allocator's too.
        status, text = run(*command, timeout=180, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        outcomes[tool] = ("" if status == 0 else "FAILED: ") + text.strip().splitlines()[-1]
    return outcomes


def main() -> int:
    """Run all of it; 1 where something failed or a bar is missed."""
    if not fastsgd.cuda_available():
        print(f"There is nothing to check: CUDA {info.cuda()}.", file=sys.stderr)
        return 1
    start = time.monotonic()
    path = RESULTS / f"{time.strftime('%Y-%m-%d')}-cuda.json"
    path.unlink(missing_ok=True)
    # Times first, and alone: what runs beside them would be in them.
    status, text = run(sys.executable, "benchmarks/cuda.py", "--json", path)
    well = status == 0
    print(text, flush=True)
    facts = json.loads(path.read_text()) if path.exists() else {}
    facts |= {"info": info.facts(), "bars_met": well, "tests": tests(), "sanitizers": sanitizers()}
    facts["seconds"] = round(time.monotonic() - start)
    path.write_text(json.dumps(facts, indent=1) + "\n")
    for name, outcome in (facts["tests"] | facts["sanitizers"]).items():
        print(f"{name:28} {outcome}")
    failed = [o for o in (facts["tests"] | facts["sanitizers"]).values() if o.startswith("FAILED")]
    print(f"{path} after {facts['seconds']} s on {torch.cuda.get_device_name()}: commit it.")
    return int(bool(failed) or not well)


if __name__ == "__main__":
    raise SystemExit(main())
