"""Programs that a card shows, each whole. Tests run those for transformers as they stand, and compile vLLM's."""

from __future__ import annotations

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


def serve_snippet(model: str, *, chat: bool) -> str:
    """vLLM's server, and a question to it."""
    if chat:
        body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "Who are you?"}}], "max_tokens": 64}}'
        path = "chat/completions"
    else:
        body, path = f'{{"model": "{model}", "prompt": "A large language model is", "max_tokens": 64}}', "completions"
    return (
        f"vllm serve {model} --max-model-len 2048\n\n"
        f"curl http://localhost:8000/v1/{path} \\\n  -H 'Content-Type: application/json' \\\n  -d '{body}'"
    )
