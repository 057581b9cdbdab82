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

# New objects before the collector looks at them, instead of 700. Self calibration, which drops a model, asks it to.
COLLECT_EVERY = 10_000


def collect_less() -> None:
    """From now on look for cyclic garbage less often; in this process, for good."""
    gc.set_threshold(COLLECT_EVERY, *gc.get_threshold()[1:])


def end_process(status: int) -> None:
    """End this process with a status: exit handlers run and output is flushed, modules are not taken apart.

    Output that cannot be written makes 2 of a status of 0, and a message; that nobody reads it any more does not.
    Where a thread still works, nothing is done; it is for the interpreter to wait for it.
    """
    if any(not t.daemon for t in threading.enumerate() if t is not threading.main_thread()):
        return
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None and not stream.closed:
                stream.flush()
        except BrokenPipeError:
            pass
        except OSError as e:
            status = status or 2
            with contextlib.suppress(OSError):
                os.write(2, f"halfbyte: output cannot be written: {e.strerror}\n".encode())
    os._exit(status)
