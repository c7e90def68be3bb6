"""Policies whose prompts are sources: an encoder reads them, and a decoder writes answers that attend to them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel

from stars_fast.policy.policy import Policy
from stars_fast.tree import cross
from stars_fast.tree.attention import NAME, ShapeRecorder, TreeContext, active, causal_probe, own_dtypes, plugged
from stars_fast.tree.positions import PositionTable
from stars_fast.tree.support import is_encoder_decoder, max_positions, unwrapped


class EncoderDecoder(Policy):
    """An encoder-decoder on a tree (:mod:`stars_fast.tree.cross`).

    A prompt takes the slots of its source and of what its target begins with, such as the id of a language. Layers do
    not run compiled. The id that pads is never drawn: some decoders give it no position, and so others to what follows.

    Attributes
    ----------
    start : int
        What targets began with when it was made.
    cross : dict of nn.Module to int
        The modules of cross-attention, and their layers.
    """

    from_source = True

    def __init__(
        self, model: PreTrainedModel, cuda_graphs: bool = True, torch_compile: bool = True, role: str = "policy"
    ) -> None:
        super().__init__(model, cuda_graphs, torch_compile, role)
        pad, ends = (getattr(model.config, name, None) for name in ("pad_token_id", "eos_token_id"))
        if pad is not None and pad not in (ends if isinstance(ends, list) else [ends]):
            self.bar([pad])

    @property
    def prompt_positions(self) -> int | None:
        return max_positions(self.model.config.get_text_config(encoder=True))

    @property
    def longest(self) -> int | None:
        source, target = self.prompt_positions, self.max_positions
        return None if source is None or target is None else source + target

    def accelerate(self, cuda_graphs: bool, torch_compile: bool) -> None:
        super().accelerate(cuda_graphs, False)

    @own_dtypes()
    def _record_shapes(self) -> ShapeRecorder:
        if self.model.main_input_name != "input_ids":
            raise NotImplementedError(f"the {self.name}, whose encoder reads {self.model.main_input_name} and no ids")
        self.start = target_start(self.model)
        model: Any = unwrapped(self.model)
        decoder = model.get_decoder()
        takes_positions = "decoder_position_ids" in inspect.signature(model.forward).parameters
        most = self.max_positions if hasattr(decoder, "embed_positions") and not takes_positions else None
        self._table = None if most is None else PositionTable(decoder, most)
        recorder = cross.CallRecorder()
        source = causal_probe(cross.SOURCE, self.vocab_size, self.device)[None]
        target = torch.full((1, cross.TARGET), self.start, device=self.device)
        with torch.no_grad(), plugged(self.model):
            if self.model.config._attn_implementation == NAME:
                with active(recorder):
                    encoded = model.get_encoder()(input_ids=source)
                    self.body(encoder_outputs=encoded, decoder_input_ids=target, use_cache=False)
                # In a source's place where cross-attention looks at slots: one token of nothing.
                self._no_source = type(encoded)(last_hidden_state=torch.zeros_like(encoded.last_hidden_state[:, :1]))
        own, self.cross = cross.recorded(recorder, self.name)
        if not takes_positions and self._table is None:
            raise NotImplementedError(f"the {self.name}, whose decoder can be told no positions")
        rows = decoder.get_input_embeddings().weight.shape[0]
        if rows != self.vocab_size:
            raise NotImplementedError(
                f"the {self.name} reads {self.vocab_size} ids and writes {rows}: source and target have one vocabulary"
            )
        return own

    @own_dtypes()
    @torch.no_grad()
    def allocate(self, tokens: int, longest: int = 1) -> None:
        super().allocate(tokens, longest)
        if self._table is not None:
            token = int(getattr(self.model.config, "pad_token_id", None) == 0)  # any but the one that pads
            self._table.refresh(token, self._no_source.last_hidden_state)

    def call_body(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        context: TreeContext,
        logits_to_keep: Any = None,
        **kwargs: Any,
    ) -> Any:
        told = {"decoder_position_ids": positions[None]} if self._table is None else {}
        with (
            active(cross.CrossContext(context, self.cross)),
            self._table.told(positions) if self._table else nullcontext(),
        ):
            output = self.body(
                decoder_input_ids=ids[None],
                decoder_attention_mask=self._mask,
                encoder_outputs=self._no_source,
                use_cache=False,
                **told,
                **kwargs,
            )
        if isinstance(logits_to_keep, torch.Tensor):  # which not every family has an argument for
            output.logits = output.logits.index_select(1, logits_to_keep)
        return output

    def read_media(
        self, inputs: Mapping[str, Any], rows: Sequence[int] = (0,), lag: int = 0, **kwargs: Any
    ) -> tuple[list[int], list[torch.Tensor]]:
        """Read sources, and what their targets begin with: ``decoder_input_ids`` ``[B, N]``, the start by default.

        Returns new nodes and the logits ``[V]`` after the last of these in each row.
        """
        start = torch.full((len(inputs["input_ids"]), 1), self.start, device="cpu")
        begun = inputs.get("decoder_input_ids", start)
        mask = torch.ones_like(begun)  # the id that pads may be the one that begins
        targets = {"decoder_input_ids": begun, "decoder_attention_mask": mask}
        nodes, output = cross.read(self, {**inputs, **targets}, rows)
        return nodes, [output.logits[row, -1] for row in rows]


def policy_of(model: PreTrainedModel, cuda_graphs: bool = True, torch_compile: bool = True) -> Policy:
    """The policy that a model makes."""
    return (EncoderDecoder if is_encoder_decoder(model) else Policy)(model, cuda_graphs, torch_compile)


def target_start(model: PreTrainedModel, own: Any = None) -> int:
    """What targets begin with: of the generation_config ``own``, by default the model's, ``decoder_start_token_id`` or,
    as transformers has it, ``bos_token_id``; else of the model's config.
    """
    for source in (own or getattr(model, "generation_config", None), model.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            if isinstance(start := getattr(source, name, None), list):
                raise ValueError(f"{name}={start}: one start for all prompts; give each its own as decoder_input_ids")
            if start is not None:
                return int(start)
    raise ValueError(f"the policy, a {type(model).__name__}, has no decoder_start_token_id: set it in its config")
