"""Runs a command for so long at most, its output in a file, and printed, as it comes."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOT_FOUND, TIMED_OUT = 127, 124  # as a shell, and the command `timeout`, have it
GRACE = 20.0  # seconds for what is interrupted to say how far it came, as pytest does


def run(words: Sequence[object], log: Path, limit: float, variables: Mapping[str, str]) -> int:
    """Run a command in the source tree.

    Args:
        words: The command and its arguments.
        log: The file of its output.
        limit: Seconds after which it is interrupted, and killed with all that it started.
        variables: What is else in its environment.

    Returns:
        Its exit status.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"")
    # The file is the command's own, so nothing is lost if this process is killed.
    with log.open("ab") as out, log.open(encoding="utf-8", errors="replace") as seen:
        try:
            process = subprocess.Popen(
                [str(word) for word in words],
                cwd=ROOT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | variables,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            out.write(f"{error}\n".encode())
            return NOT_FOUND
        try:
            status = followed(process, limit, seen)
        finally:
            if process.returncode is None:
                stop(process)
                out.write(f"\nnot done after {limit:g} s\n".encode())
        print(seen.read(), end="", flush=True)
        return TIMED_OUT if status is None else status


def followed(process: subprocess.Popen, limit: float, seen) -> int | None:
    """Print what it writes until it ends; its exit status, None if the limit came first."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(0.2)
        print(seen.read(), end="", flush=True)
    return None


def stop(process: subprocess.Popen) -> None:
    """Interrupt it; then kill what is left of its group."""
    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
