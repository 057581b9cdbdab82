"""Tiny random models of every family (:mod:`zoo`), complete with tokenizer, chat template and generation config.

They are small enough to be quantised in a second, and odd enough to matter: biases where the family has them, norms
that are not all ones, sliding windows shorter than the calibration text, tied and untied heads.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

import zoo
from halfbyte import reference
from halfbyte.schemes import WeightFormat
from zoo import VOCAB

TEXT = """\
The ferry that crosses the bay leaves every morning at six, before the fog has lifted from the water. Its captain has
made the journey more than nine thousand times, and she says that no two of them were alike. In spring the ice breaks
with a sound like distant cannon; in autumn the geese pass low overhead, and the children on the upper deck count them
aloud until they lose their place and begin again from one.

There are forty seats below and twelve above. The seats below are warm and smell of coffee. The seats above are cold,
and they are always taken first, because from there one can see the lighthouse, the two churches, and the long grey
line of the breakwater that was built by prisoners in the year of the great storm. Nobody remembers their names. A
small plate on the wall says only how many stones they carried, and how far, and that the work took eleven winters.

When the engine stops in the middle of the bay, which happens about once a year, the passengers do not complain. They
share what they have brought: bread, apples, a thermos of soup. Somebody tells a story. The captain climbs down with
a lamp and a hammer, and after a while there is a cough, and a second cough, and then the steady beat that everyone has
been listening for without saying so. "Well," says the old postman then, as he says each time, "that is that." And the
bow turns slowly towards the town, where the bells are ringing for half past seven, and the bakers open their doors.

A visitor once asked how deep the water was. Deep enough, the captain answered, and shallow enough. She had measured it
as a girl with a stone on a rope: seventeen fathoms by the red buoy, nine at the sand bank, four where the river comes
in. The numbers have changed since then, she said, but not the order, and it is the order that one has to know.
"""
TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
# Sizes of which blocks of 128 x 128 can be cut, also where engines fuse.
WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4, "head_dim": 32}

# The families that every test which is not about families is run on.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3")


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE trained on :data:`TEXT`, with a BOS before every text and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", "<s>", "</s>", "<user>", "<assistant>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<pad>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(folder)


def build(
    folder: Path,
    family: str = "llama",
    *,
    tied: bool | None = None,
    shard: str | int = "5GB",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 11,
    **extra: Any,
) -> Path:
    """Save a random model of a family, with everything that a checkpoint on a hub has; returns the folder."""
    kind = zoo.FAMILIES[family]
    torch.manual_seed(seed)
    model = kind.made(**({} if tied is None else {"tie_word_embeddings": tied}) | extra)
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            # Norms, biases and a few more start as ones and zeros, which would hide mistakes.
            constant = parameter.requires_grad and (parameter.dim() == 1 or bool((parameter == 0).all()))
            if constant or name.endswith("bias"):
                parameter += 0.2 * torch.randn_like(parameter)
    model.generation_config.update(do_sample=True, temperature=0.7, top_k=20)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Casting complex values")  # Llama 4's rope table, which is not saved
        model.to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    zoo.publish(folder, kind)
    if kind.pictures:
        import pictures  # which builds on this module

        pictures.save_processor(folder, kind.pictures)
    else:
        save_tokenizer(folder)
    for file in folder.iterdir():
        os.chmod(file, 0o644)
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, read with the safetensors library."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as f:
            tensors |= {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    return tensors


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def load(folder: Path, **options: Any) -> Any:
    """What transformers makes of a checkpoint, in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what other libraries say about themselves
        return transformers.AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32} | options).eval()


def token_ids(folder: Path, count: int = 48) -> torch.Tensor:
    """The first tokens of :data:`TEXT`, ``[1, count]``."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return torch.tensor([tokenizer(TEXT).input_ids[:count]])


def windows(folder: Path, count: int) -> torch.Tensor:
    """What ``text:FILE`` of :data:`TEXT` makes with 40 tokens in a sequence, ``[count, 40]``: BOS and the next 39."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(TEXT, add_special_tokens=False).input_ids
    return torch.tensor([[1, *ids[i * 39 : (i + 1) * 39]] for i in range(count)])


def decoded(out: Path) -> dict[str, torch.Tensor]:
    """Dense float32 weights by the independent decoder."""
    tensors = {t.name: t for f in sorted(out.glob("*.safetensors")) for t in reference.read_header(f).tensors}
    groups = list(config_of(out)["quantization_config"]["config_groups"].values())
    dense = {}
    for name in tensors:
        module, _, leaf = name.rpartition(".")
        if leaf == "weight_scale":
            parts = {n.rpartition(".")[2]: t for n, t in tensors.items() if n.rpartition(".")[0] == module}
            fmt = format_of(next(g for g in groups if any(covers(t, module) for t in g["targets"])))
            dense[f"{module}.weight"] = torch.from_numpy(reference.decode(parts, fmt).copy())
        elif leaf not in ("weight", "weight_packed", "weight_shape", "weight_zero_point") or (
            f"{module}.weight_scale" not in tensors
        ):
            dense[name] = torch.from_numpy(reference.to_float32(tensors[name].rows(), tensors[name].dtype).copy())
    return dense


def covers(target: str, module: str) -> bool:
    """Whether a target of a config group is meant for a module."""
    return re.match(target[3:], module) is not None if target.startswith("re:") else target in ("Linear", module)


def format_of(group: dict[str, Any]) -> WeightFormat:
    """The weight format of a ``config_groups`` entry."""
    w = group["weights"]
    return WeightFormat(
        num_bits=w["num_bits"],
        kind=w["type"],
        symmetric=w["symmetric"],
        group_size=w["group_size"],
        block=tuple(w["block_structure"]) if w["block_structure"] else None,
    )
