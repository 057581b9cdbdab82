"""What podman and compose have in common: one container on one machine, its weights in a folder there."""

from __future__ import annotations

from typing import Any

from halfbyte.deployment.memory import gib, shared_bytes
from halfbyte.deployment.options import Options
from halfbyte.deployment.server import CACHE_PATH, MODEL_PATH, RED_HAT, server_of
from halfbyte.deployment.subject import Subject


def values(subject: Subject, options: Options) -> dict[str, Any]:
    """For the templates: the server, and what is mounted where. Without a folder the server fetches from the hub."""
    local = subject.folder is not None
    server = server_of(subject, options, model=MODEL_PATH if local else subject.source)
    return {
        "server": server,
        "baked_args": list(server_of(subject, options).args),  # with the weights in the image
        "folder": str(subject.folder) if local else "",
        "model_path": MODEL_PATH,
        "cache_path": CACHE_PATH,
        "publish": f"{bracketed(options.host)}:{options.port}:{options.port}",
        "shared_gib": gib(shared_bytes(options)),
        "red_hat": server.image == RED_HAT,
        "secret": f"{options.name}-api-key",
        "called_at": f"http://localhost:{options.port}",
    }


def bracketed(host: str) -> str:
    """An address as it stands before a port."""
    return f"[{host}]" if ":" in host else host
