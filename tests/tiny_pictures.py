"""Tiny random vision-language models, processors made in memory, and pictures."""

import numpy as np
import torch
from PIL import Image
from tiny_vision import IMAGE, VOCAB, Inputs, family_config, new_model, together, typed
from tokenizers import Tokenizer, decoders, models
from transformers import (
    CLIPImageProcessor,
    Gemma3ImageProcessor,
    Gemma3Processor,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

CHARACTERS = [*map(chr, range(32, 127)), "\n"]
_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}PICTURE{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def picture(seed: int, width: int = 56, height: int = 40) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def asked(*images, text: str = "what is it?") -> list[dict]:
    """A chat with these pictures, before its text."""
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def _tokenizer(**special: str) -> PreTrainedTokenizerFast:
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *CHARACTERS])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=special, **named)


def llava_processor() -> LlavaProcessor:
    eyes = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return LlavaProcessor(
        eyes,
        _tokenizer(image_token="<image>"),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE.replace("PICTURE", "<image>\n"),
    )


def gemma3_processor() -> Gemma3Processor:
    special = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    return Gemma3Processor(
        Gemma3ImageProcessor(size={"height": 32, "width": 32}),
        _tokenizer(**special),
        image_seq_length=4,
        chat_template=_TEMPLATE.replace("PICTURE", "<start_of_image>"),
    )


def llava(seed: int = 0, vocab: int = VOCAB, image: int = IMAGE) -> PreTrainedModel:
    config = family_config("llava")
    config.image_token_id, config.text_config.vocab_size = image, vocab
    return new_model(config, seed)


def gemma3(seed: int = 0, image: int = IMAGE) -> PreTrainedModel:
    config = family_config("gemma3")
    config.image_token_id = image
    return new_model(config, seed)


def paligemma(seed: int = 0) -> PreTrainedModel:
    return new_model(family_config("paligemma"), seed)


def qwen2_5_vl(seed: int = 0) -> PreTrainedModel:
    return new_model(family_config("qwen2_5_vl"), seed)


def processed(processor, chat, **form):
    """What a processor makes of a chat."""
    form = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"} | form
    return processor.apply_chat_template(chat, **form)


def qwen_inputs(*grids: tuple[int, int], seed: int = 0, padding_side: str = "left") -> Inputs:
    """What Qwen's processor, which needs torchvision, would make of prompts with a picture of so many patches each."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for height, width in grids:
        before, after = (torch.randint(4, 100, (n,), generator=generator).tolist() for n in (4, 7))
        pixels = torch.randn(height * width, 3 * 2 * 4**2, generator=generator)
        pictures = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, height, width]])}
        ids = [*before, 102, *[IMAGE] * (height * width // 4), 103, *after]
        rows.append(typed("qwen2_5_vl", ids, pictures))
    return together(rows, padding_side)
