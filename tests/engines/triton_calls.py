"""Calls Triton with tritonclient. Runs in Triton's environment and talks JSON, a line a question:

    {"calls": [{"protocol": "http" | "grpc" | "stream", "model": NAME, "inputs": {name: value}}, ...], "at_once": bool}

answered by a line ``[{"responses": [[text, ...], ...], "error": message or null}, ...]``. "stream" is a gRPC stream. A
value is a list or a scalar; ``{"base64": ...}`` stands for bytes that are no UTF-8, ``{"type": T, "value": ...}`` for a
value of another type than the model wants.
"""

from __future__ import annotations

import base64
import json
import queue
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import tritonclient.grpc as over_grpc
import tritonclient.http as over_http
from tritonclient.utils import InferenceServerException

TYPES = {
    "text_input": "BYTES",
    "stop": "BYTES",
    "max_length": "INT32",
    "max_new_tokens": "INT32",
    "top_k": "INT32",
    "seed": "INT64",
    "top_p": "FP32",
    "temperature": "FP32",
    "repetition_penalty": "FP32",
    "do_sample": "BOOL",
    "stream": "BOOL",
}
NUMPY: dict[str, Any] = {
    "BYTES": np.object_,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP32": np.float32,
    "BOOL": np.bool_,
}
TIMEOUT_S = 600.0


def tensors(client: Any, inputs: dict[str, Any]) -> list[Any]:
    made = []
    for name, value in inputs.items():
        kind = TYPES[name]
        if isinstance(value, dict) and "type" in value:
            kind, value = value["type"], value["value"]
        listed = value if isinstance(value, list) else [value]
        if kind == "BYTES":
            listed = [base64.b64decode(v["base64"]) if isinstance(v, dict) else v.encode() for v in listed]
        array = np.array(listed, dtype=NUMPY[kind])
        tensor = client.InferInput(name, list(array.shape), kind)
        tensor.set_data_from_numpy(array)
        made.append(tensor)
    return made


def texts(result: Any) -> list[str]:
    output = result.as_numpy("text_output")
    return [] if output is None else [t.decode() for t in output.reshape(-1)]


def whole(client: Any, address: str, call: dict[str, Any]) -> list[list[str]]:
    server = client.InferenceServerClient(address, **({"network_timeout": TIMEOUT_S} if client is over_http else {}))
    try:
        return [texts(server.infer(call["model"], tensors(client, call["inputs"])))]
    finally:
        server.close()


def streamed(address: str, call: dict[str, Any]) -> list[list[str]]:
    got: queue.Queue[Any] = queue.Queue()
    server = over_grpc.InferenceServerClient(address)
    try:
        server.start_stream(callback=lambda result, error: got.put(error or result))
        server.async_stream_infer(call["model"], tensors(over_grpc, call["inputs"]), enable_empty_final_response=True)
        found: list[list[str]] = []
        while True:
            result = got.get(timeout=TIMEOUT_S)
            if isinstance(result, Exception):
                raise result
            if piece := texts(result):
                found.append(piece)
            if result.get_response().parameters["triton_final_response"].bool_param:
                return found
    finally:
        server.stop_stream()
        server.close()


def answer(http: str, grpc: str, call: dict[str, Any]) -> dict[str, Any]:
    ways = {
        "http": partial(whole, over_http, http),
        "grpc": partial(whole, over_grpc, grpc),
        "stream": partial(streamed, grpc),
    }
    try:
        return {"responses": ways[call["protocol"]](call), "error": None}
    except InferenceServerException as e:
        return {"responses": [], "error": e.message()}


def main(http: str, grpc: str) -> None:
    for line in sys.stdin:
        asked = json.loads(line)
        with ThreadPoolExecutor(len(asked["calls"]) if asked["at_once"] else 1) as threads:
            answers = list(threads.map(partial(answer, http, grpc), asked["calls"]))
        print(json.dumps(answers), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
