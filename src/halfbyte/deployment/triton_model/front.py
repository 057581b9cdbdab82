"""NAME: the model that answers in one piece. The engine is NAME_stream's, so the weights are in memory once.

Every request goes on to it as it is; whole answers come back. An answer is sent from a thread of its own, so that
requests that come meanwhile are passed on too and share the engine's batches.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        self._name = args["model_name"]
        self._engine = config["parameters"]["engine_model"]["string_value"]
        self._inputs = [i["name"] for i in config["input"]]
        self._threads = ThreadPoolExecutor(int(config["parameters"]["max_requests"]["string_value"]))

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            self._threads.submit(self._answer, self._read(request), request.request_id(), request.get_response_sender())

    def finalize(self) -> None:
        self._threads.shutdown(wait=True)

    def _read(self, request: Any) -> dict[str, Any]:
        """The inputs, copied: they are gone once the request is."""
        found = {name: pb_utils.get_input_tensor_by_name(request, name) for name in self._inputs}
        return {name: np.array(tensor.as_numpy()) for name, tensor in found.items() if tensor is not None}

    def _answer(self, inputs: dict[str, Any], number: str, sender: Any) -> None:
        try:
            response = self._ask(inputs, number)
        except Exception as e:
            response = refused(f"{self._name}: {e}")
        sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _ask(self, inputs: dict[str, Any], number: str) -> Any:
        stream = inputs.pop("stream", None)
        if stream is not None and bool(stream.reshape(-1)[0]):
            return refused(f"{self._name}: answers in one piece; ask {self._engine} where stream is to be true")
        tensors = [pb_utils.Tensor(name, value) for name, value in inputs.items()]
        tensors.append(pb_utils.Tensor("stream", np.array([False])))
        asked = pb_utils.InferenceRequest(
            model_name=self._engine,
            requested_output_names=["text_output"],
            inputs=tensors,
            request_id=number,
        )
        answer = refused(f"{self._name}: {self._engine} ended without an answer")
        for part in asked.exec(decoupled=True):  # to its end: Triton waits for that when it stops
            if part.has_error():
                answer = refused(part.error().message().replace(f"{self._engine}: ", f"{self._name}: ", 1))
            elif (output := pb_utils.get_output_tensor_by_name(part, "text_output")) is not None:
                texts = np.array(output.as_numpy(), dtype=np.object_)
                answer = pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("text_output", texts)])
        return answer


def refused(message: str) -> Any:
    return pb_utils.InferenceResponse(output_tensors=[], error=pb_utils.TritonError(message))
