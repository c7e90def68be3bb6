"""What an answer owes to the prompt's pictures: its log-ratio to the same model's, which sees them drowned in noise."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from transformers import PreTrainedModel

from stars_fast.methods.numbers import integer, shown
from stars_fast.rewards.base import RewardPrompt, check_model
from stars_fast.rewards.cache import TreeCache
from stars_fast.rewards.implicit import ImplicitReward
from stars_fast.rewards.render import Context
from stars_fast.text.media import Media

Distortion = Callable[[Mapping[str, Any]], Mapping[str, Any]]
_STEPS = 1000  # of VCD's diffusion
_GRIDS = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}


class GroundingReward(ImplicitReward):
    """``beta * sum_k (log pi(y_k | x, pictures, y_<k) - log pi(y_k | x, noised pictures, y_<k))`` of one model.

    That is the contrast of visual contrastive decoding (VCD, arXiv 2311.16922) as a reward of segments, and the second
    term of TARS (arXiv 2507.21584), both with the pictures at step 500 of a diffusion. An answer that the model
    would give without seeing anything is worth about 0. The noise is a function of the picture alone, so that a text
    does not depend on its batch. Prompts without pictures are refused. The model keeps two trees; a candidate costs its
    own tokens twice.

    Parameters
    ----------
    model : transformers model of pictures and text, with a language-model head
        It may be the policy.
    noise : int or function
        The step of the diffusion, 0 to 999; as in :func:`noised`. Or what makes other pictures of a processor's output,
        and of nothing else (a blank, say), and returns all that it was given beside them.
    tokenizer, beta, chat_template_kwargs, processor
        As those of :class:`ImplicitReward`.

    Raises
    ------
    ValueError, TypeError
        For what is no such model, and numbers out of their range.
    NotImplementedError
        For a model whose keys and values cannot be kept in a tree, by name.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        noise: int | Distortion = 500,
        tokenizer: Any = None,
        beta: float = 1.0,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        processor: Any = None,
    ) -> None:
        check_model("model", model, predicts=True)
        self.noise = noise if callable(noise) else integer("noise", noise, 0, _STEPS - 1)
        self._read_with(tokenizer, "tokenizer", model, processor=processor)
        self._compare(model, model, beta, "sum", None, chat_template_kwargs)
        drawn = getattr(noise, "__name__", type(noise).__name__) if callable(noise) else self.noise
        self._changed = {**self._changed, "noise": drawn}
        self._noised: WeakValueDictionary[int, _Noised] = WeakValueDictionary()  # by what they are made of

    def context(self, prompt: RewardPrompt) -> Context:
        context = super().context(prompt)
        if context.seen is None or context.seen.media is None or not _GRIDS.keys() & context.seen.media.inputs.keys():
            raise ValueError(f"{prompt.name} has no pictures, which is all that a GroundingReward looks for")
        return context

    def media(self, context: Context, cache: TreeCache) -> Media | None:
        media = super().media(context, cache)
        if media is None or cache is self.caches[0]:
            return media
        inputs = self._noised.get(id(media.inputs))
        if inputs is None:  # prompts of a batch are read in one pass for as long as they share an object
            inputs = self._noised[id(media.inputs)] = _Noised(media.inputs, self.noise)
        return replace(media, inputs=inputs)


class _Noised(dict[str, Any]):
    def __init__(self, inputs: Mapping[str, Any], noise: int | Distortion) -> None:
        if callable(noise):  # of tensors of its own: the policy and the other tree read these inputs, too
            made = noise(copy.deepcopy(dict(inputs)))
            if missing := [key for key in inputs if key not in made]:
                raise ValueError(f"noise={shown(noise)} returns no {', '.join(missing)}, which it was given")
        else:
            made = noised(inputs, noise)
        super().__init__(made)
        self.made_of = inputs  # whose identity is the key under which this is found


def noised(inputs: Mapping[str, Any], step: int = 500) -> dict[str, Any]:
    """A processor's output whose pictures are those of a step of VCD's diffusion, of which there are 1000.

    ``sqrt(a) x + sqrt(1 - a) e`` of each pixel x, as the processor scaled it, with e standard normal and a the product
    of ``1 - b_t``, t = 0 .. step; ``b_t`` rises from 1e-5 to 0.005 along a sigmoid over [-6, 6] (VCD's code). The noise
    of a picture is drawn from a seed made of the picture. Zeros behind its last pixel are padding, and stay.

    Parameters
    ----------
    inputs : mapping
        With ``pixel_values`` or ``pixel_values_videos``: pictures ``[..., C, H, W]``, patches ``[pictures, P, D]``, or
        ``[P, D]`` of all pictures together, whose numbers are the products of ``image_grid_thw`` (``video_grid_thw``).
    step : int
        0 to 999.

    Raises
    ------
    ValueError, TypeError
        For a step out of that range, and where there are no such pixels.
    """
    step = integer("step", step, 0, _STEPS - 1)
    made = dict(inputs)
    found = [key for key in _GRIDS if torch.is_tensor(made.get(key)) and made[key].is_floating_point()]
    if not found:
        raise ValueError(f"there are no pixels to put noise on: of {', '.join(made)} none is {' or '.join(_GRIDS)}")
    rates = torch.sigmoid(torch.linspace(-6, 6, _STEPS, dtype=torch.float32, device="cpu")) * (0.5e-2 - 1e-5) + 1e-5
    kept = float((1 - rates[: step + 1]).prod())
    for key in found:
        pixels = made[key] = made[key].clone(memory_format=torch.contiguous_format)
        for picture in _pictures(pixels, made.get(_GRIDS[key])):
            block = picture[tuple(slice(size) for size in _extent(picture))]
            seed = hashlib.blake2b(block.float().cpu().contiguous().numpy().tobytes(), digest_size=7).digest()
            drawn = torch.Generator("cpu").manual_seed(int.from_bytes(seed, "big"))
            noise = torch.randn(block.shape, generator=drawn, dtype=torch.float32, device="cpu").to(block)
            block.mul_(kept**0.5).add_(noise, alpha=(1 - kept) ** 0.5)
    return made


def _pictures(pixels: torch.Tensor, grid: torch.Tensor | None) -> Iterator[torch.Tensor]:
    """Views of each picture: ``[C, H, W]``, or ``[P, D]``."""
    if pixels.dim() == 2 and grid is not None:
        yield from pixels.split(grid.prod(-1).tolist())
    else:
        yield from pixels.view(-1, *pixels.shape[-3:]) if pixels.dim() > 3 else pixels


def _extent(picture: torch.Tensor) -> list[int]:
    """Of the smallest block at the picture's beginning outside of which there are but zeros; padding is such."""
    axes, sizes = range(picture.dim()), list[int]()
    for axis in axes:
        used = (picture != 0).any(dim=[other for other in axes if other != axis]).nonzero()
        sizes.append(int(used[-1]) + 1 if len(used) else 0)
    return sizes
