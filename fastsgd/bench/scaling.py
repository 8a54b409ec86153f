"""How a step's time grows: with the number of tensors, and with the elements of one."""

from fastsgd.bench.shapes import Shape

# A tensor so small that its own cost shows. The two series have equal numbers of elements, and
# begin with the same shape.
WIDTH = 64
RULE_NAMES = ["adamw"]


def shapes(quick: bool) -> list[Shape]:
    """1, 10, 100 ... tensors of WIDTH elements, and one of as many and more, by their elements."""
    tensors, elements = (
        [10**power for power in range(last)] for last in ((4, 6) if quick else (5, 7))
    )
    many = [Shape(f"{n}x{WIDTH}", ((WIDTH,),) * n) for n in tensors]
    one = [Shape(f"1x{WIDTH * n}", ((WIDTH * n,),)) for n in elements[1:]]
    return sorted(many + one, key=lambda shape: shape.elements)
