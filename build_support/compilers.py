"""What the C++ compiler's trial and nvcc's have in common."""


def first_error(output: str) -> str:
    """Return the first line that has an error, which the others are about; "" if none has."""
    return next((line.strip() for line in output.splitlines() if "error" in line), "")
