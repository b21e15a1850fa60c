"""Spares the vision tower frames that it has seen already."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from ..memo import remembered


@contextmanager
def frames_remembered(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Inside, Qwen2-VL's tower encodes every frame once, whatever frames stand around it.

    Its attention never crosses frames, so a frame's encoding does not depend on the others; that of a frame seen before may
    differ by rounding from what a batch of another size would give. Where a method reads or changes something inside the
    tower, the tower runs, with what :func:`vtprune.eval.memo.remembered` spares; other towers always do. Only for
    accuracy; nothing may be timed inside.

    Args:
        model: an unpatched model in evaluation mode; it may be patched and unpatched inside.

    Yields:
        A function that forgets what single layers did, to be called when the frames change; encodings of frames stay.
    """
    tower = getattr(getattr(model, "model", None), "visual", None)
    known: dict[bytes, tuple[Tensor, Tensor]] = {}
    with remembered(model) as forget_layers:
        if not isinstance(tower, Qwen2VisionTransformerPretrainedModel):
            yield forget_layers
            return
        stock = tower.forward
        merged = tower.spatial_merge_size**2

        def forward(hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> Any:
            if torch.is_grad_enabled() or _watched(tower):
                return stock(hidden_states, grid_thw=grid_thw, **kwargs)
            shapes = [(int(h), int(w)) for t, h, w in grid_thw for _ in range(int(t))]
            pieces = hidden_states.split([h * w for h, w in shapes])
            keys = [_digest(piece, shape) for piece, shape in zip(pieces, shapes, strict=True)]
            new = {key: number for number, key in enumerate(keys) if key not in known}
            if new:
                chosen = list(new.values())
                grid = torch.tensor([(1, *shapes[n]) for n in chosen], device=grid_thw.device)
                found = stock(torch.cat([pieces[n] for n in chosen]), grid_thw=grid)
                sizes = [shapes[n][0] * shapes[n][1] for n in chosen]
                states = found.last_hidden_state.split(sizes)
                pooled = found.pooler_output.split([size // merged for size in sizes])
                known.update(zip(new, zip(states, pooled, strict=True), strict=True))
            return BaseModelOutputWithPooling(
                last_hidden_state=torch.cat([known[key][0] for key in keys]),
                pooler_output=torch.cat([known[key][1] for key in keys]),
            )

        tower.forward = forward
        try:
            yield forget_layers
        finally:
            del tower.forward


def _watched(tower: nn.Module) -> bool:
    """Whether anything reads or changes what happens inside."""
    return any(
        module._forward_hooks or module._forward_pre_hooks
        for module in tower.modules()
        if module is not tower
    )


def _digest(piece: Tensor, shape: tuple[int, int]) -> bytes:
    values = piece.detach().float().cpu().contiguous().numpy()
    return blake2b(values.data, digest_size=16, salt=bytes(f"{shape}"[:16], "ascii")).digest()
