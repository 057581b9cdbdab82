"""Programs that a card shows, each whole. Tests run them as they stand (vLLM's: `make test-vllm`)."""

from __future__ import annotations

from collections.abc import Sequence

TEXT_TRANSFORMERS = """\
from transformers import {auto}, AutoTokenizer

model_id = "{model}"
tokenizer = AutoTokenizer.from_pretrained(model_id)
model = {auto}.from_pretrained(model_id, dtype="auto", device_map="auto")
{prompt}
outputs = model.generate(**inputs.to(model.device), max_new_tokens=64)
print(tokenizer.decode(outputs[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
CHAT_PROMPT = """\
messages = [{"role": "user", "content": "Give me a short introduction to large language models."}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")"""
PLAIN_PROMPT = 'inputs = tokenizer("A large language model is", return_tensors="pt")'
PICTURE_TRANSFORMERS = """\
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model_id = "{model}"
processor = AutoProcessor.from_pretrained(model_id)
model = AutoModelForImageTextToText.from_pretrained(model_id, dtype="auto", device_map="auto")
picture = Image.open("picture.png")
content = [{{"type": "image", "image": picture}}, {{"type": "text", "text": "Describe this picture."}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
)
outputs = model.generate(**inputs.to(model.device), max_new_tokens=64)
print(processor.decode(outputs[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
VLLM_OFFLINE = """\
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(model="{model}", max_model_len=2048)
    sampling = SamplingParams(temperature=0.6, top_p=0.9, max_tokens=256)
    {call}
    print(outputs[0].outputs[0].text)
"""
VLLM_CHAT = """messages = [{"role": "user", "content": "Give me a short introduction to large language models."}]
    outputs = llm.chat(messages, sampling)"""
VLLM_PLAIN = 'outputs = llm.generate(["A large language model is"], sampling)'

LLAMACPP = """\
from llama_cpp import Llama

llm = {made}
{call}
"""
LLAMACPP_CHAT = """messages = [{"role": "user", "content": "Give me a short introduction to large language models."}]
output = llm.create_chat_completion(messages=messages, max_tokens=64)
print(output["choices"][0]["message"]["content"])"""
LLAMACPP_PLAIN = """output = llm.create_completion("A large language model is", max_tokens=64)
print(output["choices"][0]["text"])"""


def transformers_snippet(model: str, *, chat: bool, pictures: bool = False) -> str:
    """Text in, text out; most models that see pictures are no "causal LM" to transformers."""
    auto = "AutoModelForImageTextToText" if pictures else "AutoModelForCausalLM"
    return TEXT_TRANSFORMERS.format(model=model, auto=auto, prompt=CHAT_PROMPT if chat else PLAIN_PROMPT)


def picture_snippet(model: str) -> str:
    """A picture and a question."""
    return PICTURE_TRANSFORMERS.format(model=model)


def vllm_snippet(model: str, *, chat: bool) -> str:
    """vLLM without a server."""
    return VLLM_OFFLINE.format(model=model, call=VLLM_CHAT if chat else VLLM_PLAIN)


def llamacpp_snippet(model: str, file: str, *, local: bool, chat: bool) -> str:
    """llama.cpp without a server, by llama-cpp-python."""
    made = f'Llama(model_path="{model}/{file}", n_ctx=2048)'
    if not local:
        made = f'Llama.from_pretrained(repo_id="{model}", filename="{file}", n_ctx=2048)'
    return LLAMACPP.format(made=made, call=LLAMACPP_CHAT if chat else LLAMACPP_PLAIN)


def llamacpp_serve_snippet(model: str, files: Sequence[str], *, local: bool, chat: bool) -> str:
    """A server on llama.cpp, halfbyte's or its own, and a question to it."""
    options = {f"{'--mmproj' if 'mmproj' in f else '--model'} {model}/{f}" for f in (files[0], files[-1])}
    started = f"llama-server {' '.join(sorted(options, reverse=True))} --ctx-size 2048 --port 8000"
    if local:
        started = f"halfbyte serve {model}\n\n# or llama.cpp alone:\n{started}"
    else:
        started = f"llama-server --hf-repo {model} --hf-file {files[0]} --ctx-size 2048 --port 8000"
    return f"{started}\n\n{_question(model, chat=chat)}"


def serve_snippet(model: str, *, chat: bool) -> str:
    """vLLM's server, and a question to it."""
    return f"vllm serve {model} --max-model-len 2048\n\n{_question(model, chat=chat)}"


def _question(model: str, *, chat: bool) -> str:
    if chat:
        body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Who are you?"}}], "max_tokens": 64}}'
        path = "chat/completions"
    else:
        body, path = f'{{"model": "{model}", "prompt": "A large language model is", "max_tokens": 64}}', "completions"
    return f"curl http://localhost:8000/v1/{path} \\\n  -H 'Content-Type: application/json' \\\n  -d '{body}'"
