"""What a process that maps in real time sets up before torch is loaded."""

from __future__ import annotations

import ctypes
import os
import sys

TURN_S = 5e-4
"""longest time that a thread keeps Python's lock from another one that wants it, s"""
LARGEST_MAPPED = 32 << 20
"""bytes; glibc takes no higher limit"""
KEPT = 1 << 30
"""bytes of free memory that are not given back"""
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h of glibc


def prepare_process() -> None:
    """Make this process fit for frames that must be answered in time. Safe to call twice.

    * The tensors of a frame are of the same sizes each time. By default glibc gives their memory back to the system
      and asks for it again, 15,000 pages and a tenth of the time of a frame; here it is kept.
    * Callbacks hold Python's lock for up to 5 ms after the network has asked for it back; here for a tenth of that.
    * The products of numpy here are of 4 x 4 matrices; its library would start threads for them all the same, unless
      the environment says how many (``OPENBLAS_NUM_THREADS``).
    """
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    sys.setswitchinterval(TURN_S)
    keep_memory()


def keep_memory() -> bool:
    """Have malloc keep what is freed; False where the C library is another than glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    wanted = ((_M_MMAP_THRESHOLD, LARGEST_MAPPED), (_M_TRIM_THRESHOLD, KEPT), (_M_TOP_PAD, LARGEST_MAPPED))
    return all(mallopt(option, value) == 1 for option, value in wanted)


def give_memory_back() -> bool:
    """Return to the system what lies free between what is in use; False where nothing was, or where nobody can.

    What is kept falls to pieces slowly: messages and pictures come in any size, from many threads. Some milliseconds,
    and the next frame has to ask for its memory again.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim is not None and trim(0) == 1
