"""A process's first and last second, which Python spends on objects that live as long as the process does.

Importing torch and transformers makes about a million of them. The garbage collector looks through all that it has
whenever their number has grown by a quarter, and an interpreter that ends takes them apart one by one (docs/log.md).
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import sys
import threading

# New objects before the collector looks at them, instead of 700. What holds tensors is freed by reference counts.
COLLECT_EVERY = 100_000


def collect_less() -> None:
    """From now on look for cyclic garbage less often; in this process, for good."""
    gc.set_threshold(COLLECT_EVERY, *gc.get_threshold()[1:])


def end_process(status: int) -> None:
    """End this process with a status: exit handlers run and output is flushed, modules are not taken apart.

    Where a thread still works, nothing is done; it is for the interpreter to wait for it.
    """
    if any(not t.daemon for t in threading.enumerate() if t is not threading.main_thread()):
        return
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or nobody reads it any more
            stream.flush()
    os._exit(status)
