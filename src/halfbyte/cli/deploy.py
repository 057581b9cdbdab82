"""``halfbyte deploy``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console

from halfbyte.cli.console import emit, json_option, reporter, size
from halfbyte.records import DeployRecord


@click.command("deploy")
@click.argument("target")
@click.argument("checkpoint")
@click.option(
    "-o", "--out", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Folder to write; new."
)
@click.option("--name", metavar="NAME", help="What the model is called there.  [default: made of CHECKPOINT]")
@click.option(
    "--engine",
    default="auto",
    show_default=True,
    metavar="ENGINE",
    help="vllm, llamacpp or, with triton, transformers. auto: llamacpp for GGUF, transformers with triton, else vllm.",
)
@click.option("--image", metavar="IMAGE", help="Container image.  [default: the engine's]")
@click.option("--host", default="127.0.0.1", show_default=True, help="podman, compose: address to listen on.")
@click.option("--port", type=int, metavar="PORT", help="Of the OpenAI API.  [default: 8000; kserve 8080]")
@click.option("--gpus", type=int, default=1, show_default=True, metavar="N", help="Of each node; 0 is the CPU.")
@click.option("--nodes", type=int, default=1, show_default=True, metavar="N", help="kserve: that share the model.")
@click.option(
    "--gpu-memory", "gpu_memory_gb", type=float, metavar="GB", help="Of one GPU: stop where the model would not fit."
)
@click.option(
    "--max-model-len",
    type=int,
    metavar="TOKENS",
    help="Prompt and answer, at most.  [default: what the model was made for, up to 32768]",
)
@click.option(
    "--sequences", type=int, default=1, show_default=True, metavar="N", help="Of full length to reckon memory for."
)
@click.option("--max-batch", type=int, default=8, show_default=True, metavar="N", help="triton: prompts at once.")
@click.option(
    "--storage",
    metavar="URI",
    help="Where a cluster finds the weights: oci://, hf://, pvc://, s3:// (kserve); rhel-ai: docker://, hf://.",
)
@click.option("--mode", default="standard", show_default=True, metavar="MODE", help="kserve: standard, or raw (older).")
@click.option("--replicas", type=int, default=1, show_default=True, metavar="N", help="kserve, kubernetes: servers.")
@click.option(
    "--weights",
    default="copy",
    show_default=True,
    metavar="HOW",
    help="triton: copy them into the repository, link (hard) or none.",
)
@click.option("--trace", is_flag=True, help="triton: log every request with its answer.")
@json_option
def command(target: str, checkpoint: str, out: Path, name: str | None, as_json: bool, **options: Any) -> None:
    """Write the files that put CHECKPOINT (a folder, a GGUF file or a hub id) into service on TARGET.

    TARGET is triton, kserve, kubernetes, podman, compose or rhel-ai. Everything that can be wrong is said before
    anything is written; no secret is.
    """
    from halfbyte.deployment.options import Wishes
    from halfbyte.deployment.run import deploy

    progress = reporter()
    try:
        record = deploy(target, checkpoint, out, name=name, wishes=Wishes(**options), reporter=progress)
    finally:
        progress.finish()
    emit(record, as_json=as_json, render=lambda console: _render(console, record, out))


def _render(console: Console, record: DeployRecord, out: Path) -> None:
    console.print(
        f"wrote {out}: {record.name} for {record.target}, engine {record.engine}, {record.context} tokens, "
        f"port {record.port}",
        markup=False,
    )
    for label, estimate in record.estimates.items():
        console.print(f"{label.replace('_', ' ')}: {size(estimate.value)} ({estimate.how})", markup=False)
    for file in record.files:
        console.print(f"  {file}", markup=False)
    for note in record.notes:
        console.print(f"note: {note}", markup=False)
    console.print(f"next: {out}/README.md", markup=False)
