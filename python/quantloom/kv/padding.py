"""Attention masks of transformers as numbers of padding tokens."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["Padding"]

_WRONG = (
    "attention_mask: row {} has zeros that are not padding on the left, or other ones than in earlier calls;"
    " the cache takes left padding only"
)


class Padding:
    """Where the tokens of each sequence of a batch start, found once for all layers of a call.

    The mask of a prompt is looked at. Once every sequence has tokens, masks on a CUDA device are compared
    with what is expected without waiting for it: the error of a wrong one comes with a later call.
    """

    def __init__(self) -> None:
        self.columns = 0  # of the first layer with the tokens of this call
        self._mask: torch.Tensor | None = None
        self._found: tuple[Any, list[int]] | None = None
        self._before: torch.Tensor | None = None  # padding of each sequence, on the device
        self._counts: list[int] = []
        self._wrong: torch.Tensor | None = None  # whether any mask was, on the device
        self._seen: torch.Tensor | None = None  # the same on the host, once `_event` has come
        self._event: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Padding:
        return Padding()

    def starts(
        self, mask: torch.Tensor | None, lengths: list[int], past: int, count: int, first: bool
    ) -> list[int] | None:
        """For each sequence the first of the `count` new tokens that is no padding; None: all.

        `mask` ``[sequences, past + count]``: True for tokens. `lengths`: tokens of each sequence so far, of
        `past` with padding. `first`: this is the first layer of a call. Raises ValueError.
        """
        if mask is None:
            if any(length != past for length in lengths):
                raise ValueError("attention_mask: got none, expected the mask of earlier calls, extended")
            return None
        if mask.shape != (len(lengths), past + count):
            raise ValueError(
                f"attention_mask: got shape {list(mask.shape)}, expected [{len(lengths)}, {past + count}]"
            )
        if mask.is_cuda and all(lengths):
            if first:
                self._compare(mask, [past - length for length in lengths])
            return None
        key = (lengths, past, count)
        if first or mask is not self._mask or self._found is None or self._found[0] != key:
            self._mask, self._found = mask, (key, self._look(mask.bool().cpu(), *key))
        return self._found[1]

    def _look(self, mask: torch.Tensor, lengths: list[int], past: int, count: int) -> list[int]:
        starts = (past + count - mask.sum(dim=1) - (past - torch.tensor(lengths, dtype=torch.long))).tolist()
        for s, (start, length) in enumerate(zip(starts, lengths)):
            pads = past - length + start
            if start < 0 or start > count or bool(mask[s, :pads].any()) or (start and length):
                raise ValueError(_WRONG.format(s))
        return starts

    def _compare(self, mask: torch.Tensor, counts: list[int]) -> None:
        if torch.cuda.is_current_stream_capturing():
            return
        self.raise_if_wrong()
        if self._before is None or self._counts != counts or self._before.device != mask.device:
            self._counts, self._before = counts, torch.tensor(counts, device=mask.device)[:, None]
            self._wrong = torch.zeros(len(counts), dtype=torch.bool, device=mask.device)
            self._seen = torch.zeros(len(counts), dtype=torch.bool, pin_memory=True)
        expected = torch.arange(mask.shape[1], device=mask.device) >= self._before
        self._wrong |= (mask.bool() != expected).any(dim=1)
        self._seen.copy_(self._wrong, non_blocking=True)
        if self._event is None:  # else wait for the earlier copy: what was wrong stays so
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(mask.device))

    def raise_if_wrong(self, wait: bool = False) -> None:
        """Raises the error of an earlier mask, if it is known; with `wait` if there is one."""
        if self._event is None or not (wait or self._event.query()):
            return
        if wait:
            self._event.synchronize()
        self._event = None
        if bool(self._seen.any()):
            row = int(self._seen.int().argmax())
            self._before = None
            raise ValueError(_WRONG.format(row))
