"""A `malloc` of one's own, loaded before all other libraries: all who want memory ask it.

A process started with the library in `LD_PRELOAD` has it. Python's own pool sees only some of what
Python asks for, unless `PYTHONMALLOC` is `malloc`.
"""

import os
import shutil
import subprocess
from pathlib import Path

# glibc's, each asking first. posix_memalign returns its error.
ALL = """
#include <errno.h>
#include <stddef.h>
static int refuses(void);
void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
void *__libc_memalign(size_t, size_t);
void *malloc(size_t n) { return refuses() ? NULL : __libc_malloc(n); }
void *calloc(size_t k, size_t n) { return refuses() ? NULL : __libc_calloc(k, n); }
void *realloc(void *p, size_t n) { return refuses() ? NULL : __libc_realloc(p, n); }
void *memalign(size_t a, size_t n) { return refuses() ? NULL : __libc_memalign(a, n); }
void *aligned_alloc(size_t a, size_t n) { return refuses() ? NULL : __libc_memalign(a, n); }
int posix_memalign(void **p, size_t a, size_t n) {
  *p = refuses() ? NULL : __libc_memalign(a, n);
  return *p ? 0 : ENOMEM;
}
"""

# It refuses nobody, and `allocations()` tells how many there were.
COUNTING = """
static long calls;
static int refuses(void) { __atomic_fetch_add(&calls, 1, __ATOMIC_RELAXED); return 0; }
long allocations(void) { return __atomic_load_n(&calls, __ATOMIC_RELAXED); }
"""


def library(refuses: str, folder: Path) -> Path | None:
    """Compile a `malloc` and its kin.

    Args:
        refuses: C code with `static int refuses(void)`, which is called whenever memory is asked
            for, and tells whether to return none.
        folder: Where to put it.

    Returns:
        The library; None where there is no C compiler, or no glibc.
    """
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler is None:
        return None
    source, made = folder / "malloc.c", folder / "malloc.so"
    source.write_text(ALL + refuses)
    command = [compiler, "-shared", "-fPIC", "-O2", "-fno-builtin", "-o", str(made), str(source)]
    done = subprocess.run(command, capture_output=True, check=False)
    return made if done.returncode == 0 else None
