"""Where a patched model makes the host wait for a GPU: nowhere but in the places that are named here, with the reason."""

from __future__ import annotations

import pytest
import torch
from syncs import waits

import vtprune
from vtprune.testing.zoo import LVLMS, Image, Video

# Host tensors on a GPU too, or CPU only: the search cannot tell them from tensors of the device.
HOST = {
    "prompt.py:locate",  # works on the host's copy of the prompt
    "deciding.py:_check",  # looks at selections on CPU alone
    "finite.py:raise_if_found",  # on a GPU the answer is copied in the background
    "llava_next.py:_tiles",  # a probe that is made and packed on the host
}
# Copies that are needed, because a number of tokens is data. Once per prompt.
PROMPT = {
    "decoder.py:_begin",  # the prompt's ids: where placeholders are
    "sequence.py:open",  # the mask: where padding is; only with padding
}
# Stock code waits for the same values in the same call.
STOCK = {
    "towers.py:open",  # the grid of packed patches
    "towers.py:_lengths",  # borders of windows, once per kind of attention
    "qwen_vl.py:order",  # the grid, for the order of window attention
    "decoder.py:inject",  # deepstack adds features at a boolean mask
}


@pytest.mark.parametrize("method", ["vtprune", "fastv"])
@pytest.mark.parametrize(
    "name", ["llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl"]
)
def test_the_default_path_waits_only_where_it_must(name: str, method: str) -> None:
    family = LVLMS[name]
    item = Video(0, 4) if family.has_video else Image(0)
    model = family.build()
    for rows in ([[5, 6, item, 7, 8]], [[5, 6, item, 7, 8], [5, item, 7]]):
        inputs = family.batch(rows)
        with torch.no_grad(), vtprune.patch(model, method, keep=0.5):
            with waits() as prefill:
                model.generate(**inputs, max_new_tokens=1)
            with waits() as longer:
                model.generate(**inputs, max_new_tokens=4)
        assert set(prefill) <= HOST | PROMPT | STOCK, (
            f"{set(prefill) - HOST - PROMPT - STOCK} may wait for the device"
        )
        # Ragged or alone: decoding waits for nothing.
        assert longer == prefill


def test_the_search_finds_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    from vtprune.methods.own import VTPrune

    real = VTPrune.scores

    def slow(self: VTPrune, view: vtprune.View) -> torch.Tensor:
        scores = real(self, view)
        return scores * float(scores.max())

    monkeypatch.setattr(VTPrune, "scores", slow)
    family = LVLMS["llava"]
    model = family.build()
    with torch.no_grad(), vtprune.patch(model, "vtprune", keep=0.5), waits() as found:
        model.generate(**family.batch([[5, Image(0), 6]]), max_new_tokens=1)
    # This file is no part of vtprune: the caller is named.
    assert set(found) - HOST - PROMPT - STOCK == {"own.py:decide"}
