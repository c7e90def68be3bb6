"""Tiny random vision-language models, processors made in memory, and pictures."""

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    Gemma3Config,
    Gemma3ImageProcessor,
    Gemma3Processor,
    LlavaConfig,
    LlavaProcessor,
    PaliGemmaConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
)

CHARACTERS = [*map(chr, range(32, 127)), "\n"]
IMAGE = 100  # id of the placeholder, behind four special tokens and the characters
VOCAB = 104
_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EYES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}PICTURE{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def picture(seed: int, width: int = 56, height: int = 40) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def asked(*images, text: str = "what is it?", **part) -> list[dict]:
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


def _made(config, seed: int = 0) -> torch.nn.Module:
    """A model whose random weights matter: transformers' own are tiny."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config).float().eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.12)
    return model


def llava(seed: int = 0, vocab: int = VOCAB, image: int = IMAGE) -> torch.nn.Module:
    return _made(
        LlavaConfig(
            vision_config={"model_type": "clip_vision_model", "projection_dim": 16, **_EYES},
            text_config={"model_type": "llama", **_TEXT, "vocab_size": vocab},
            image_token_id=image,
            vision_feature_select_strategy="default",
            vision_feature_layer=-2,
        ),
        seed,
    )


def gemma3(seed: int = 0, image: int = IMAGE) -> torch.nn.Module:
    text = {**_TEXT, "head_dim": 16, "sliding_window": 12, "query_pre_attn_scalar": 16}
    return _made(
        Gemma3Config(
            text_config={**text, "layer_types": ["sliding_attention", "full_attention"]},
            vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **_EYES},
            mm_tokens_per_image=4,
            image_token_id=image,
            boi_token_index=101,
            eoi_token_index=102,
        ),
        seed,
    )


def paligemma(seed: int = 0) -> torch.nn.Module:
    return _made(
        PaliGemmaConfig(
            text_config={"model_type": "gemma", "head_dim": 16, **_TEXT},
            vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **_EYES},
            image_token_id=IMAGE,
            projection_dim=32,
            hidden_size=32,
        ),
        seed,
    )


def qwen2_5_vl(seed: int = 0) -> torch.nn.Module:
    eyes = {"depth": 2, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
    patches = {"patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2, "in_channels": 3, "window_size": 16}
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    return _made(
        Qwen2_5_VLConfig(
            text_config={**_TEXT, "rope_parameters": rope},
            vision_config={**eyes, **patches, "fullatt_block_indexes": [1], "tokens_per_second": 2},
            image_token_id=IMAGE,
            video_token_id=101,
            vision_start_token_id=102,
            vision_end_token_id=103,
        ),
        seed,
    )


def qwen_inputs(*grids: tuple[int, int], seed: int = 0, padding_side: str = "left") -> dict[str, torch.Tensor]:
    """What Qwen's processor, which needs torchvision, would make of prompts with a picture of so many patches each."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for height, width in grids:
        before, after = (torch.randint(4, 100, (n,), generator=generator).tolist() for n in (4, 7))
        rows.append([*before, 102, *[IMAGE] * (height * width // 4), 103, *after])
    longest = max(map(len, rows))
    pads = [[0] * (longest - len(row)) for row in rows]
    left = padding_side == "left"
    ids = torch.tensor([pad + row if left else row + pad for row, pad in zip(rows, pads, strict=True)])
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "mm_token_type_ids": (ids == IMAGE).int(),
        "pixel_values": torch.randn(sum(h * w for h, w in grids), 3 * 2 * 4**2, generator=generator),
        "image_grid_thw": torch.tensor([[1, height, width] for height, width in grids]),
    }
