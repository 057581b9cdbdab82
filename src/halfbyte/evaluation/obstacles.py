"""What would end an evaluation after hours, found before a model is loaded: an engine that cannot answer, say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halfbyte.errors import HalfbyteError, UsageError
from halfbyte.evaluation.backends import Backend
from halfbyte.evaluation.suites import SuiteTask

TURNS = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]


def obstacle(
    task: SuiteTask,
    backend: Backend,
    *,
    kinds: set[str],
    answer_tokens: int,
    context: int | None,
    chat_template: bool,
) -> UsageError | None:
    """Why an engine cannot answer a task; ``None`` if it can.

    Args:
        kinds: of lm-eval's requests (``generate_until``, ``multiple_choice`` and so on).
        answer_tokens: how long an answer may be; context: of prompt and answer together.
        chat_template: whether prompts are conversations.
    """
    texts_alone = kinds <= {"generate_until"}
    if context is not None and "generate_until" in kinds and answer_tokens >= context:
        return UsageError(
            f"its answers may have {answer_tokens} tokens, which leaves nothing of a context of {context} for prompts",
            where=task.task,
            remedy="Raise it with --backend-args max_length=N if the model allows, or leave the task out.",
        )
    if backend.chat and not texts_alone:
        return UsageError(
            "it compares probabilities, which /chat/completions does not give",
            where=f"--chat-completions: {task.task}",
            remedy="Ask /completions, without --chat-completions.",
        )
    if backend.chat and not chat_template:
        return UsageError(
            "its prompts are plain texts, which /chat/completions does not take",
            where=f"--chat-completions: {task.task}",
            remedy="Add --chat-template (the checkpoint needs one), or leave --chat-completions out.",
        )
    if backend.name == "llamacpp" and "loglikelihood_rolling" in kinds:
        return UsageError(
            "perplexity of whole texts is not asked of llama.cpp",
            where=f"--backend llamacpp: {task.task}",
            remedy="Use --backend hf, or `halfbyte compare`.",
        )
    if not task.pictures:
        return None
    if backend.name == "llamacpp" or backend.serves_vllm or (backend.name == "openai-url" and not backend.chat):
        return UsageError(
            "pictures are not shown to this engine",
            where=f"--backend {backend.name}: {task.task}",
            remedy="Use --backend hf, vLLM in this environment, or a server with --chat-completions.",
        )
    if not texts_alone:
        return UsageError("with pictures only texts can be asked for, not probabilities of choices", where=task.task)
    return None


def require_same_template(folders: Mapping[str, Path]) -> None:
    """Raise :class:`HalfbyteError` where the models' chat templates make different prompts of one conversation."""
    base, value = (_conversation(folder) for folder in folders.values())
    if base != value:
        raise HalfbyteError(
            "baseline and checkpoint would not be asked the same prompts",
            where=" and ".join(map(str, folders.values())),
            why="their chat templates differ",
            remedy="Compare a checkpoint with the model that it was made from, or pass --no-chat-template.",
        )


def _conversation(folder: Path) -> Any:
    """A conversation as a model's template has it; the template itself where it takes no such conversation."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    try:
        return tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
    except Exception:  # templates raise what they like
        return tokenizer.chat_template
