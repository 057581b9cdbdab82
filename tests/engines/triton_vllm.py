"""Runs the engine ``vllm`` of ``halfbyte deploy triton`` outside Triton, and vLLM's own parser on the arguments that
the other targets start it with. In vLLM's environment:

    python triton_vllm.py QUESTION.json ANSWER.json

QUESTION: ``{"files": folder of the engine's files, "checkpoint", "context", "prompts": [text, ...], "messages": [...],
"asked": [settings, ...], "arguments": {target: [argument, ...]}}``. ANSWER has, for each of "asked", the pieces and the
reason of every prompt; the tokens of "messages"; and for each target what vLLM has understood.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

WANTED = ("model", "served_model_name", "port", "max_model_len", "tensor_parallel_size", "pipeline_parallel_size")


def parsed(arguments: dict[str, list[str]]) -> dict[str, Any]:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    found = {}
    for target, listed in arguments.items():
        known = make_arg_parser(FlexibleArgumentParser()).parse_args(listed)
        found[target] = {name: getattr(known, name) for name in WANTED}
    return found


def generated(asked: dict[str, Any]) -> dict[str, Any]:
    sys.path.insert(0, asked["files"])
    from settings import Settings
    from vllm_engine import VllmEngine

    from engine import Job, Options

    options = Options(Path(asked["checkpoint"]), asked["context"], max_batch=4, dtype="float32", gpus=0)
    engine = VllmEngine(options)
    answers = []
    for wishes in asked["asked"]:
        wishes = dict(wishes)
        limit, gone = wishes.pop("limit"), wishes.pop("gone", False)
        settings = Settings(**wishes | {"stop": tuple(wishes.get("stop", ()))})
        pieces: list[list[str]] = [[] for _ in asked["prompts"]]
        reasons: list[str | None] = [None] * len(pieces)
        done = threading.Event()

        def taker(place: int, pieces: Any = pieces, reasons: Any = reasons, done: Any = done) -> Any:
            def take(piece: str, reason: str | None) -> None:
                pieces[place].append(piece)
                reasons[place] = reason
                if None not in reasons:
                    done.set()

            return take

        engine.submit(
            [
                Job(engine.encode(text), settings, limit, taker(i), lambda gone=gone: gone)
                for i, text in enumerate(asked["prompts"])
            ]
        )
        if not done.wait(300):
            raise RuntimeError(f"no answer to {wishes}: {pieces}")
        answers.append({"pieces": pieces, "reasons": reasons})
    found = {"answers": answers, "chat": engine.chat(asked["messages"]), "context": engine.context}
    engine.close()
    return found


def main(question: Path, answer: Path) -> None:
    asked = json.loads(question.read_text())
    understood = parsed(asked["arguments"])
    answer.write_text(json.dumps(generated(asked) | {"parsed": understood}))
    os._exit(0)  # what vLLM does when it is cleared away at an interpreter's end is not asked here


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main(Path(sys.argv[1]), Path(sys.argv[2]))
