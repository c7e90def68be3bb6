"""A decoder's position embedding that counts by itself, told other positions."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class PositionTable:
    """The rows of a decoder's ``embed_positions``, by position.

    They are asked of it anew for each session, since its weights may change between them.

    Parameters
    ----------
    decoder : nn.Module
    most : int
        Positions that there are.
    """

    def __init__(self, decoder: Any, most: int) -> None:
        self._decoder, self._most = decoder, most
        self._one: _Arguments = ((), {})  # it is called with for one token
        self._rows: torch.Tensor | None = None  # [most, H]

    def refresh(self, token: int, source: torch.Tensor) -> None:
        """Ask for the rows: of a text of this token, behind any source ``[1, S, H]``."""
        self._one, _ = self._asked(torch.full((1, 1), token, device=source.device), source)
        _, rows = self._asked(torch.full((1, self._most), token, device=source.device), source)
        if self._rows is None:
            self._rows = rows.reshape(self._most, -1).clone()
        else:
            self._rows.copy_(rows.reshape(self._most, -1))  # where a graph has seen them

    def _asked(self, ids: torch.Tensor, source: torch.Tensor) -> tuple[_Arguments, torch.Tensor]:
        """What the embedding is called with in a pass over these ids ``[1, T]``, and its answer."""
        here = threading.get_ident()

        def look(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> None:
            if threading.get_ident() == here:
                kwargs, output = rest
                raise _Found((args, kwargs), output)

        handle = self._decoder.embed_positions.register_forward_hook(look, with_kwargs=True)
        try:
            self._decoder(input_ids=ids, encoder_hidden_states=source, use_cache=False)
        except _Found as found:
            return found.arguments, found.output
        finally:
            handle.remove()
        raise NotImplementedError(f"{type(self._decoder).__name__} does not call its embed_positions")

    @contextmanager
    def told(self, positions: torch.Tensor) -> Iterator[None]:
        """On this thread the embedding answers with the rows of these positions ``[T]`` inside.

        It is called for one token, since it may have no rows for as many as are packed.
        """
        here, one, rows = threading.get_ident(), self._one, self._rows
        assert rows is not None

        # torch leaves keywords out for another thread that had begun to call hooks when this one was removed.
        def ask_less(module: nn.Module, args: Any, kwargs: Any = None) -> _Arguments | None:
            return one if threading.get_ident() == here else None

        def answer(module: nn.Module, args: Any, output: Any) -> torch.Tensor | None:
            return rows[positions][None] if threading.get_ident() == here else None

        embedding = self._decoder.embed_positions
        handles = (
            embedding.register_forward_pre_hook(ask_less, with_kwargs=True),
            embedding.register_forward_hook(answer),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Found(Exception):
    """Ends a pass that has shown what was looked for."""

    def __init__(self, arguments: _Arguments, output: torch.Tensor) -> None:
        self.arguments, self.output = arguments, output
