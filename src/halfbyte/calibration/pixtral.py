"""Pixtral's processor (Mistral 3) in Pillow alone.

transformers has its image processor for Pillow, but the class that puts pictures and text together asks for
torchvision. What it does is little: a picture of ``r`` by ``c`` merged patches takes the tokens
``[IMG] * c + [IMG_BREAK]`` for each row, and the last of these is ``[IMG_END]``.
"""

from __future__ import annotations

from typing import Any

from transformers import ProcessorMixin


class PixtralInPillow(ProcessorMixin):  # type: ignore[misc]
    """Options and results are those of transformers' ``PixtralProcessor``."""

    text_kwargs: dict[str, Any] = {"return_tensors": "pt"}  # noqa: RUF012 (read by the base class, never changed)
    images_kwargs: dict[str, Any] = {"return_tensors": "pt"}  # noqa: RUF012

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int = 16,
        spatial_merge_size: int = 1,
        chat_template: Any = None,
        image_token: str = "[IMG]",
        image_break_token: str = "[IMG_BREAK]",
        image_end_token: str = "[IMG_END]",
        **_: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.token_pixels = patch_size * spatial_merge_size
        self.image_token = image_token
        self.image_break_token = image_break_token
        self.image_end_token = image_end_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)

    def _process_images(self, images: Any, **options: Any) -> Any:
        return super()._process_images(images, **{**options, "patch_size": self.token_pixels})

    def replace_image_token(self, image_inputs: Any, image_idx: int, **_: Any) -> str:
        """The text that stands for a picture once its size is known."""
        height, width = (int(n) for n in image_inputs["image_sizes"][image_idx])
        row = self.image_token * (width // self.token_pixels) + self.image_break_token
        rows = row * (height // self.token_pixels)
        return rows.removesuffix(self.image_break_token) + self.image_end_token
