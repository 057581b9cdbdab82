"""llama.cpp's server, in a process of its own: a file that llama.cpp dislikes can end the process.

Runs in any interpreter that has xllamacpp and imports nothing of halfbyte's. The first line of standard input is its
settings (:func:`halfbyte.serving.engines.llamacpp`); when standard input closes, or at SIGTERM, it ends.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from typing import Any

import xllamacpp


def main() -> None:
    settings = json.loads(sys.stdin.readline())
    done = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: done.set())
    server = xllamacpp.Server(parameters(settings))
    print(f"llama.cpp listens at {server.listening_address}", flush=True)
    threading.Thread(target=wait_for_end, args=(done,), daemon=True).start()
    done.wait()
    # The server's own end waits for running sequences; whoever stops this process has waited long enough.
    os._exit(0)


def parameters(settings: dict[str, Any]) -> Any:
    """llama.cpp's parameters. ``n_ctx`` is that of all sequences together."""
    params = xllamacpp.CommonParams()
    params.model.path = settings["model"]
    params.model_alias = {settings["name"]}
    if settings["mmproj"]:
        params.mmproj.path = settings["mmproj"]
    params.n_parallel = settings["parallel"]
    params.n_ctx = settings["context"] * settings["parallel"]
    params.hostnames = ["127.0.0.1"]
    params.port = settings["port"]
    params.api_keys = [settings["key"]]
    params.endpoint_metrics = True
    params.endpoint_slots = False
    params.ui = False
    params.use_jinja = True
    for path, value in settings["set"].items():
        *parents, leaf = path.split(".")
        target = params
        for parent in parents:
            target = getattr(target, parent)
        setattr(target, leaf, value)
    return params


def wait_for_end(done: threading.Event) -> None:
    while sys.stdin.read(1024):
        pass
    done.set()


if __name__ == "__main__":
    main()
