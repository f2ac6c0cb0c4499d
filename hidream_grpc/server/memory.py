"""How the server keeps memory: freed buffers go back to the system, modules are no garbage."""

from __future__ import annotations

import ctypes
import gc

M_MMAP_THRESHOLD = -3
"""Source: glibc's malloc.h."""
MMAP_THRESHOLD_BYTES = 64 * 1024


def return_freed_buffers() -> None:
    """Map every buffer of the size of an image chunk on its own, so that freeing it unmaps it.

    Left alone, glibc raises this threshold with the first buffer that is freed and keeps what comes
    after in its arenas: 200 readers that had stalled and left still held 90 of 115 MB (measured by
    tests/e2e/test_slow_readers.py). Does nothing where the C library has no such setting.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)


def exclude_from_collection() -> None:
    """Leave all objects that there are out of later garbage collections.

    A full collection looks at all of them, and nothing else happens meanwhile: the 120,000 that the imports
    make take it 40 ms, and hardly one of them is ever freed.
    """
    gc.collect()
    gc.freeze()
