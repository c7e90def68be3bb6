"""Tiny random vision-language models, and what their processors would make of prompts with pictures.

Every family has two prompts: of pictures of different sizes or, where all have one size, of one picture and of two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

VOCAB, IMAGE = 104, 100
TEXT = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
LAYERS = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
TILES = dict(LAYERS, image_size=32, patch_size=8)  # 16 patches
CLIP = dict(TILES, model_type="clip_vision_model", projection_dim=16)
SIGLIP = dict(TILES, model_type="siglip_vision_model", vision_use_head=False)
LLAMA, QWEN2, MISTRAL, COHERE2 = (dict(TEXT, model_type=name) for name in ("llama", "qwen2", "mistral", "cohere2"))
MIXED = dict(sliding_window=12, layer_types=["sliding_attention", "full_attention"])
PINPOINTS = [[32, 64], [64, 32], [64, 64]]
GRIDS = dict(num_heads=2, patch_size=4, temporal_patch_size=2, spatial_merge_size=2, in_channels=3)
MROPE = dict(rope_type="default", mrope_section=[2, 3, 3], rope_theta=10000.0)

Inputs = dict[str, torch.Tensor]
Picture = Callable[[PreTrainedModel, int], tuple[list[int], Inputs]]  # which of two -> its ids, and the other inputs


class Family(NamedTuple):
    """How to make a model and its prompts."""

    config: str
    fields: dict[str, Any]
    picture: Picture
    offsets: tuple[int, int] = (0, 0)  # of positions behind each prompt
    types: str | None = None  # the argument that says whose an id is: 1 for a picture's
    answer_type: int = 0
    before: int = 5  # ids of text in front of the picture


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def tiles(slots: int) -> Picture:
    """One picture or two of 32 x 32 pixels, which take so many slots each."""
    return lambda model, which: (
        [IMAGE] * slots * (1 + which),
        {"pixel_values": noise(3, 3, 32, 32)[which : 2 * which + 1]},
    )


def nested(slots: int) -> Picture:
    """As :func:`tiles`, but all of a prompt in one row."""
    return lambda model, which: (
        [IMAGE] * slots * (1 + which),
        {"pixel_values": noise(1, 3, 3, 32, 32)[:, which : 2 * which + 1]},
    )


def patches(model: PreTrainedModel, which: int) -> tuple[list[int], Inputs]:
    """A large picture or a wide one, cut into tiles beside a small copy: how many slots it takes the model says."""
    height, width = [(64, 64), (32, 64)][which]
    pixels, sizes = noise(1, 1 + height * width // 32**2, 3, 32, 32), torch.tensor([[height, width]])
    features = model.model.get_image_features(pixels, sizes)
    features = getattr(features, "pooler_output", features)
    return [IMAGE] * sum(len(one) for one in features), {"pixel_values": pixels, "image_sizes": sizes}


def grid(model: PreTrainedModel, which: int) -> tuple[list[int], Inputs]:
    """A picture of 8 x 12 patches or of 4 x 8, of which four share a slot."""
    height, width = [(8, 12), (4, 8)][which]
    vision = model.config.vision_config
    size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    ids = [102, *[IMAGE] * (height * width // 4), 103]
    return ids, {"pixel_values": noise(height * width, size), "image_grid_thw": torch.tensor([[1, height, width]])}


def sized(model: PreTrainedModel, which: int) -> tuple[list[int], Inputs]:
    """A square picture or half of one, padded to the size of the largest of its batch."""
    height, width = [(32, 32), (32, 16)][which]
    inputs = {"pixel_values": noise(1, 3, height, width), "image_sizes": torch.tensor([[height, width]])}
    return [IMAGE] * (height * width // 64), inputs


def located(model: PreTrainedModel, which: int) -> tuple[list[int], Inputs]:
    """One picture or two of 4 x 4 patches, each with its place; four share a slot."""
    places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(1)[None]
    count = 1 + which
    pixels = noise(3, 16, 48)[which : which + count]
    return [IMAGE] * 4 * count, {"pixel_values": pixels, "image_position_ids": places.repeat(count, 1, 1)}


def mrope(config: str, vision: dict[str, Any], text: dict[str, Any], **rope: Any) -> Family:
    """A family whose positions have three parts: a picture takes as many as its longer side."""
    special = dict(image_token_id=IMAGE, video_token_id=101)
    if config == "Glm4vConfig":
        special |= dict(image_start_token_id=102, image_end_token_id=103)
        special |= dict(video_start_token_id=98, video_end_token_id=99)
    else:
        special |= dict(vision_start_token_id=102, vision_end_token_id=103)
    text = dict(TEXT, rope_parameters=MROPE | rope, **text)
    fields = dict(special, text_config=text, vision_config=dict(GRIDS, **vision))
    return Family(config, fields, grid, (6 - 24, 4 - 8), "mm_token_type_ids", before=4)


def gemma4(*layers: str, **text: Any) -> Family:
    kinds = [f"{kind}_attention" for kind in layers]
    fields = dict(TEXT, head_dim=16, global_head_dim=16, sliding_window=12)
    fields |= dict(num_hidden_layers=len(layers), layer_types=kinds)
    fields |= dict(hidden_size_per_layer_input=0, vocab_size_per_layer_input=VOCAB, num_kv_shared_layers=0) | text
    vision = dict(LAYERS, num_key_value_heads=2, head_dim=8, global_head_dim=8, patch_size=4, pooling_kernel_size=2)
    vision |= dict(position_embedding_size=64, default_output_length=4)
    whole = dict(text_config=fields, vision_config=vision, audio_config=None, image_token_id=IMAGE)
    return Family("Gemma4Config", whole, located, types="mm_token_type_ids")


def paligemma(text: str, **fields: Any) -> Family:
    """Positions begin at 1, and a prompt's tokens all see each other."""
    whole = dict(text_config=dict(TEXT, model_type=text, head_dim=16, **fields), vision_config=SIGLIP)
    whole |= dict(projection_dim=32, hidden_size=32, image_token_id=IMAGE)
    return Family("PaliGemmaConfig", whole, tiles(16), (1, 1), "token_type_ids", answer_type=1, before=0)


QWEN = dict(depth=2, hidden_size=16, out_hidden_size=32, intermediate_size=32)
QWEN3 = dict(QWEN, depth=3, num_position_embeddings=64, deepstack_visual_indexes=[0, 1])
LLAVA = dict(image_token_id=IMAGE, vision_config=CLIP)
FAMILIES = {
    "llava": Family("LlavaConfig", dict(LLAVA, text_config=LLAMA, vision_feature_layer=-2), tiles(16)),
    "llava_next": Family(
        "LlavaNextConfig",
        dict(LLAVA, text_config=LLAMA, image_grid_pinpoints=PINPOINTS, vision_feature_layer=-2),
        patches,
    ),
    "llava_onevision": Family(
        "LlavaOnevisionConfig",
        LLAVA | dict(vision_config=SIGLIP, text_config=QWEN2, image_grid_pinpoints=PINPOINTS, vision_feature_layer=-1),
        patches,
    ),
    "vipllava": Family("VipLlavaConfig", dict(LLAVA, text_config=LLAMA, vision_feature_layers=[-2, -1]), tiles(16)),
    "qwen2_vl": mrope("Qwen2VLConfig", dict(depth=2, embed_dim=16, hidden_size=32, mlp_ratio=2), {}),
    "qwen2_5_vl": mrope(
        "Qwen2_5_VLConfig", dict(QWEN, window_size=16, fullatt_block_indexes=[1], tokens_per_second=2), {}
    ),
    "qwen3_vl": mrope("Qwen3VLConfig", QWEN3, dict(head_dim=16), mrope_interleaved=True),
    "qwen3_vl_moe": mrope(
        "Qwen3VLMoeConfig",
        QWEN3,
        dict(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
        mrope_interleaved=True,
    ),
    "glm4v": mrope("Glm4vConfig", dict(QWEN, hidden_size=32, image_size=64), {}, partial_rotary_factor=1.0),
    "idefics2": Family(
        "Idefics2Config",
        dict(
            vision_config=TILES,
            perceiver_config=dict(
                hidden_size=32,
                resampler_n_latents=6,
                resampler_depth=2,
                resampler_n_heads=2,
                resampler_head_dim=16,
                num_key_value_heads=1,
            ),
            text_config=MISTRAL,
            image_token_id=IMAGE,
        ),
        nested(6),
    ),
    "idefics3": Family(
        "Idefics3Config", dict(vision_config=TILES, text_config=LLAMA, image_token_id=IMAGE, scale_factor=2), nested(4)
    ),
    "smolvlm": Family(
        "SmolVLMConfig", dict(vision_config=TILES, text_config=LLAMA, image_token_id=IMAGE, scale_factor=2), nested(4)
    ),
    "gemma3": Family(
        "Gemma3Config",
        dict(
            text_config=dict(TEXT, **MIXED, head_dim=16, query_pre_attn_scalar=16),
            vision_config=SIGLIP,
            mm_tokens_per_image=4,
            image_token_id=IMAGE,
            boi_token_index=101,
            eoi_token_index=102,
        ),
        tiles(4),
        types="token_type_ids",
    ),
    "gemma4": gemma4("sliding", "full"),
    "gemma4_shared_kv": gemma4("sliding", "full", "full", num_kv_shared_layers=1, hidden_size_per_layer_input=8),
    "gemma4_keys_as_values": gemma4("sliding", "full", attention_k_eq_v=True, num_global_key_value_heads=1),
    "paligemma": paligemma("gemma"),
    "paligemma2": paligemma("gemma2", **MIXED, query_pre_attn_scalar=16),
    "internvl": Family(
        "InternVLConfig",
        dict(
            vision_config=dict(LAYERS, image_size=[32, 32], patch_size=[4, 4]),
            text_config=QWEN2,
            image_token_id=IMAGE,
            image_seq_length=16,
            downsample_ratio=0.5,
        ),
        tiles(16),
    ),
    "mistral3": Family(
        "Mistral3Config",
        dict(
            vision_config=dict(LAYERS, model_type="pixtral", image_size=32, patch_size=4, head_dim=8),
            text_config=dict(MISTRAL, head_dim=16),
            image_token_id=IMAGE,
            spatial_merge_size=2,
            vision_feature_layer=-1,
        ),
        sized,
    ),
    "aya_vision": Family(
        "AyaVisionConfig",
        dict(
            LLAVA | dict(vision_config=SIGLIP, text_config=dict(COHERE2, **MIXED)),
            downsample_factor=2,
            adapter_layer_norm_eps=1e-5,
            alignment_intermediate_size=32,
            vision_feature_layer=-1,
        ),
        tiles(4),
    ),
    "cohere2_vision": Family(
        "Cohere2VisionConfig",
        dict(
            vision_config=SIGLIP,
            text_config=dict(COHERE2, **MIXED),
            image_token_id=IMAGE,
            downsample_factor=2,
            alignment_intermediate_size=32,
        ),
        tiles(4),
    ),
    "ovis2": Family(
        "Ovis2Config",
        dict(
            vision_config=dict(TILES, vocab_size=40, hidden_stride=1, num_visual_indicator_tokens=5),
            text_config=QWEN2,
            image_token_id=IMAGE,
            visual_indicator_token_ids=[98, 99, 101, 102, 103],
            vocab_size=VOCAB,
            hidden_size=32,
        ),
        tiles(16),
    ),
}


def randomised(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The model with random weights that matter, as those that transformers draws do not."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.12)
    return model.float().eval()


def family_config(name: str) -> PreTrainedConfig:
    return getattr(transformers, FAMILIES[name].config)(**FAMILIES[name].fields)


def new_model(config: PreTrainedConfig, seed: int = 0, **options: Any) -> PreTrainedModel:
    with torch.random.fork_rng():  # of what is not drawn again below
        torch.manual_seed(seed)
        return randomised(AutoModelForImageTextToText.from_config(config, **options), seed)


@functools.cache
def family_model(name: str) -> PreTrainedModel:
    """One for all who ask: nobody changes it."""
    eager = {"attn_implementation": "eager"} if name == "paligemma2" else {}  # transformers refuses sdpa's soft caps
    return new_model(family_config(name), **eager)


@torch.no_grad()
def family_prompt(name: str, which: int) -> Inputs:
    """The first or the second prompt: a processor's output of a batch of one."""
    family = FAMILIES[name]
    picture, inputs = family.picture(family_model(name), which)
    text = torch.randint(
        4, 98, (family.before + 9 - 2 * which,), generator=torch.Generator().manual_seed(which)
    ).tolist()
    return typed(name, [*text[: family.before], *picture, *text[family.before :]], inputs)


def typed(name: str, ids: Sequence[int], inputs: Inputs) -> Inputs:
    """Inputs of these ids and pictures, with what says whose the ids are."""
    row = torch.tensor([ids])
    types = FAMILIES[name].types
    named = {} if types is None else {types: (row == IMAGE).long() * (name[:4] != "pali")}
    return {"input_ids": row, "attention_mask": torch.ones_like(row), **inputs, **named}


def answered(inputs: Inputs, answer: Sequence[int], kind: int = 0) -> Inputs:
    """A prompt's inputs with an answer behind it, whose token types are ``kind``."""
    longer, ids = dict(inputs), torch.tensor([answer], dtype=torch.int64)
    behind = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    behind |= dict.fromkeys(("token_type_ids", "mm_token_type_ids"), torch.full_like(ids, kind))
    return longer | {key: torch.cat([inputs[key], value], 1) for key, value in behind.items() if key in inputs}


@torch.no_grad()
def answer_logits(model: torch.nn.Module, inputs: Inputs, answer: Sequence[int], kind: int = 0) -> torch.Tensor:
    """Of the answer's tokens ``[T, V]``, by the untouched model's one pass over prompt, pictures and answer."""
    logits = model(**answered(inputs, answer, kind), use_cache=False).logits[0]
    return logits[inputs["input_ids"].shape[1] - 1 : -1]


def answer_logprobs(model: torch.nn.Module, inputs: Inputs, answer: Sequence[int], kind: int = 0) -> torch.Tensor:
    """``[T]``"""
    laws = answer_logits(model, inputs, answer, kind).log_softmax(1)
    return laws.gather(1, torch.tensor(answer, dtype=torch.int64)[:, None])[:, 0]


def together(prompts: Sequence[Inputs], side: str) -> Inputs:
    """One batch of several prompts, padded on the left or the right, as a processor makes it."""
    batch: Inputs = {}
    for key in prompts[0]:
        sizes = [prompt[key].shape for prompt in prompts]
        largest = [max(size[i] for size in sizes) for i in range(len(sizes[0]))]
        rows = []
        for prompt in prompts:
            lacking = [most - there for most, there in zip(largest[1:], prompt[key].shape[1:], strict=True)]
            padding = [(0, one) if side == "right" or prompt[key].dim() > 2 else (one, 0) for one in reversed(lacking)]
            rows.append(F.pad(prompt[key], [end for both in padding for end in both]))
        batch[key] = torch.cat(rows)
    return batch
