"""A patched model on a GPU, where Triton kernels act, against the same model on the CPU; skipped without a GPU."""

from __future__ import annotations

import pytest
import torch

import vtprune
from vtprune import finite
from vtprune.errors import NonFiniteScoresError, UnsupportedMethodError
from vtprune.testing.zoo import LVLMS, Image, Video

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize(
    "method", ["vtprune", "divprune", "cdpruner", "fastv", "visionzip", "tome", "spatten"]
)
@pytest.mark.parametrize("name", LVLMS)
def test_same_tokens_and_answers_as_on_the_cpu(name: str, method: str) -> None:
    family = LVLMS[name]
    model = family.build()
    item = Video(1, 4) if family.has_video else Image(1)
    inputs = family.batch([[5, 6, item, 7, 8, 9], [5, item, 7]])
    outcomes = []
    for device in ("cpu", "cuda"):
        model.to(device)
        given = {key: value.to(device) for key, value in inputs.items()}
        try:
            patch = vtprune.patch(model, method, keep=0.5)
        except UnsupportedMethodError as reason:
            pytest.skip(str(reason)[:100])
        with torch.no_grad(), patch:
            logits = model(**given).logits[:, -1].cpu()
            tokens = model.generate(**given, max_new_tokens=4).cpu()
            kept = [next(reversed(image.kept.values())).tolist() for image in patch.report().images]
        outcomes.append((logits, tokens, kept))
    (logits, tokens, kept), (other_logits, other_tokens, other_kept) = outcomes
    assert other_kept == kept
    torch.testing.assert_close(other_logits, logits, atol=2e-4, rtol=2e-4)
    assert torch.equal(other_tokens, tokens)


def test_nan_scores_are_told_in_the_background() -> None:
    scores = torch.tensor([1.0, float("nan")], device="cuda")
    with finite.deferred() as checks:
        finite.check_finite(scores)
    with pytest.raises(NonFiniteScoresError, match="1 of 2 token scores"):
        finite.answer(checks, wait=True)
