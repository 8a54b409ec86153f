"""What ends a run."""


class BenchError(Exception):
    """Ends the run, which says it in one sentence."""


class WrongResultError(BenchError):
    """Our own result is wrong, and so its time means nothing."""
