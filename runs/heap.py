"""What a process makes while it starts stays until its end: the garbage collector need not look at it.

A full collection looks at every object. A GPU worker has 440,000 after its imports, which is a third of a second in
which nothing computes, and importing them alone sets off collections that take a sixth of the start.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lasting() -> Iterator[None]:
    """Collect nothing meanwhile, and leave what is there at the end out of every later collection.

    For the start of a process, before a second thread makes garbage.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
