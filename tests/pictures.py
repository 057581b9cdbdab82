"""Processors of every vision-language family, as small as their configs allow, and pictures to put through them.

The files are written the way they lie on the hub (the names of classes are those without ``Pil``), so what loads them
has to choose a backend itself. Token ids 320 and up are each family's own special tokens: 320 the image placeholder,
321 and 322 what stands before and after a picture, 323 the video placeholder.
"""

from __future__ import annotations

import io
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from tokenizers import AddedToken, Tokenizer

import tiny

IMAGE, START, END, VIDEO = 320, 321, 322, 323  # ids
MEAN_STD = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


@dataclass(frozen=True)
class Pictured:
    """What a family's processor consists of.

    Attributes:
        processor: class name; image_processor: class name as in the hub's files.
        tokens: special tokens from id 320 on.
        placeholder: what stands for a picture in rendered text.
        options: of the processor; picture_options: of its image processor.
        attributes: named tokens of the tokenizer.
        parts_only: the chat template takes no plain strings as content.
        torchvision: the image processor exists for torchvision alone.
    """

    processor: str
    image_processor: str
    tokens: tuple[str, ...]
    placeholder: str
    picture_options: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, str] = field(default_factory=dict)
    parts_only: bool = False
    torchvision: bool = False


QWEN_TOKENS = ("<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>")
IDEFICS_TOKENS = (
    "<image>",
    "<fake_token_around_image>",
    "<global-img>",
    "<video>",
    "<end_of_utterance>",
    *(f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2)),
)
IDEFICS_PICTURES: dict[str, Any] = {
    "do_image_splitting": True,
    "do_convert_rgb": True,
    "size": {"longest_edge": 56},
    "max_image_size": {"longest_edge": 28},
    **MEAN_STD,
}


def _qwen(processor: str, image_processor: str, patch: int) -> Pictured:
    merged = 2 * patch  # sides are multiples of it; between 4 and 36 tokens a picture
    return Pictured(
        processor,
        image_processor,
        QWEN_TOKENS,
        "<|vision_start|><|image_pad|><|vision_end|>",
        {
            "patch_size": patch,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "min_pixels": 4 * merged**2,
            "max_pixels": 36 * merged**2,
            "size": {"shortest_edge": 4 * merged**2, "longest_edge": 36 * merged**2},
            **MEAN_STD,
        },
    )


FAMILIES = {
    # 28 x 28 pixels, 4 patches, 4 tokens
    "gemma3": Pictured(
        "Gemma3Processor",
        "Gemma3ImageProcessor",
        ("<image_soft_token>", "<start_of_image>", "<end_of_image>"),
        "<start_of_image>",
        {"size": {"height": 28, "width": 28}, "do_pan_and_scan": None, "do_convert_rgb": None, **MEAN_STD},
        {"image_seq_length": 4},
        {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
    ),
    # up to 112 x 112 pixels, a token for 28 x 28, one more at the end of each row
    "mistral3": Pictured(
        "PixtralProcessor",
        "PixtralImageProcessorFast",
        ("[IMG]", "[IMG_START]", "[IMG_END]", "[VIDEO]", "[IMG_BREAK]"),
        "[IMG]",
        {"patch_size": {"height": 14, "width": 14}, "size": {"longest_edge": 112}, "do_convert_rgb": True, **MEAN_STD},
        {
            "patch_size": 14,
            "spatial_merge_size": 2,
            "image_token": "[IMG]",
            "image_break_token": "[IMG_BREAK]",
            "image_end_token": "[IMG_END]",
        },
    ),
    "qwen2_vl": _qwen("Qwen2VLProcessor", "Qwen2VLImageProcessor", 14),
    "qwen2_5_vl": _qwen("Qwen2_5_VLProcessor", "Qwen2VLImageProcessor", 14),
    "qwen3_vl": _qwen("Qwen3VLProcessor", "Qwen2VLImageProcessorFast", 16),
    # 28 x 28 pixels, patches of 14 and a class token that is left out again: 4 tokens
    "llava": Pictured(
        "LlavaProcessor",
        "CLIPImageProcessor",
        ("<image>",),
        "<image>",
        {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}, "do_center_crop": True, **MEAN_STD},
        {
            "patch_size": 14,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
            "image_token": "<image>",
        },
    ),
    # the whole and tiles of 28 x 28 pixels, 4 tokens each, and one more at the end of each row of tokens
    "llava_next": Pictured(
        "LlavaNextProcessor",
        "LlavaNextImageProcessor",
        ("<image>",),
        "<image>",
        {
            "size": {"shortest_edge": 28},
            "crop_size": {"height": 28, "width": 28},
            "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]],
            **MEAN_STD,
        },
        {
            "patch_size": 14,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
            "image_token": "<image>",
        },
    ),
    # tiles of 28 x 28 pixels, at most 2 x 2 of them and the whole: 1 token a tile
    "idefics3": Pictured(
        "Idefics3Processor",
        "Idefics3ImageProcessor",
        IDEFICS_TOKENS,
        "<image>",
        IDEFICS_PICTURES,
        {"image_seq_len": 1},
        parts_only=True,
    ),
    "smolvlm": Pictured(
        "SmolVLMProcessor",
        "SmolVLMImageProcessor",
        IDEFICS_TOKENS,
        "<image>",
        IDEFICS_PICTURES,
        {"image_seq_len": 1},
        parts_only=True,
    ),
    # tiles of 28 x 28 pixels, 1 token a tile
    "internvl": Pictured(
        "InternVLProcessor",
        "GotOcr2ImageProcessorFast",
        ("<IMG_CONTEXT>", "<img>", "</img>", "<video>"),
        "<IMG_CONTEXT>",
        {"size": {"height": 28, "width": 28}, "crop_to_patches": True, "min_patches": 1, "max_patches": 4, **MEAN_STD},
        {"image_seq_length": 1},
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    ),
    "llama4": Pictured(
        "Llama4Processor",
        "Llama4ImageProcessorFast",
        (
            "<|patch|>",
            "<|image_start|>",
            "<|image_end|>",
            "<|video|>",
            "<|image|>",
            "<|tile_x_separator|>",
            "<|tile_y_separator|>",
        ),
        "<|image|>",
        {"size": {"height": 28, "width": 28}, "max_patches": 4, "resize_to_max_canvas": False, **MEAN_STD},
        {"patch_size": 14, "pixel_shuffle_ratio": 0.5, "fake_image_token": "<|image|>", "image_token": "<|image|>"},
        torchvision=True,
    ),
}


def chat_template(family: str) -> str:
    """Turns as in ``tiny.TEMPLATE``; content is a string or a list of parts (for some families, only the latter)."""
    made = FAMILIES[family]
    parts = (
        "{% for p in m['content'] %}{% if p['type'] == 'image' %}{{ '" + made.placeholder + "' }}"
        "{% elif p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}"
    )
    either = "{% if m['content'] is string %}{{ m['content'] }}{% else %}" + parts + "{% endif %}"
    refusal = "{% if m['content'] is string %}{{ raise_exception('content must be a list of parts') }}{% endif %}"
    return (
        "{{ '<s>' }}{% for m in messages %}{{ '<' + m['role'] + '>' }}"
        + (refusal + parts if made.parts_only else either)
        + "{{ '</s>' }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
    )


def save_processor(folder: Path, family: str) -> None:
    """Tokenizer, image processor, processor and chat template of a family (a key of :data:`FAMILIES`)."""
    made = FAMILIES[family]
    tiny.save_tokenizer(folder)
    file = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    assert tokenizer.get_vocab_size() == tiny.VOCAB == IMAGE
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in made.tokens])
    tokenizer.save(str(file))
    described = json.loads((folder / "tokenizer_config.json").read_text())
    described |= made.attributes | {"processor_class": made.processor}
    described["extra_special_tokens"] = made.attributes
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    (folder / "chat_template.jinja").write_text(chat_template(family))
    pictures = {
        "image_processor_type": made.image_processor,
        "processor_class": made.processor,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_resize": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures | made.picture_options))
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": made.processor, **made.options}))


def picture(width: int, height: int, *, seed: int = 0) -> Image.Image:
    """A smooth picture with a coloured frame, different for every seed."""
    chosen = random.Random(seed)
    corners = Image.new("RGB", (2, 2))
    corners.putdata([tuple(chosen.randrange(256) for _ in range(3)) for _ in range(4)])
    made = corners.resize((width, height), Image.Resampling.BICUBIC)
    if min(width, height) > 4:
        frame = Image.new("RGB", (width, height), tuple(chosen.randrange(256) for _ in range(3)))
        frame.paste(made.crop((2, 2, width - 2, height - 2)), (2, 2))
        made = frame
    return made


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    """A picture as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def save_picture(path: Path, width: int = 40, height: int = 30, *, seed: int = 0) -> Path:
    """A PNG or JPEG file, by its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(picture(width, height, seed=seed), "JPEG" if path.suffix in (".jpg", ".jpeg") else "PNG"))
    return path


def save_pictured_rows(path: Path, count: int = 6, *, seed: int = 0) -> Path:
    """A JSON-lines file of picture-and-text rows, with its pictures beside it: sizes, formats and turns vary."""
    rows: list[dict[str, Any]] = []
    for i in range(count):
        width, height = ((40, 30), (30, 60), (80, 50))[i % 3]
        name = f"pictures/{i}{('.png', '.jpg')[i % 2]}"
        save_picture(path.parent / name, width, height, seed=seed + i)
        said = tiny.TEXT.split(". ")[i % 12]
        if i % 2:
            parts = [{"type": "image", "path": name}, {"type": "text", "text": "What does the captain see?"}]
            rows.append({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": said}]})
        else:
            rows.append({"image": name, "text": said})
    path.write_text("\n".join(json.dumps(r) for r in rows))
    return path
