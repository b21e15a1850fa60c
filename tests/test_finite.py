"""NaN scores on a device that answers later."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtprune
from vtprune import finite
from vtprune.errors import NonFiniteScoresError
from vtprune.method import Scored
from vtprune.testing.zoo import LVLMS, Image


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """Makes checks answer when `arrived` says so, as on a GPU."""
    state = {"arrived": False}
    monkeypatch.setattr(finite.Check, "ready", property(lambda self: state["arrived"]))
    return state


FAMILY = LVLMS["llava"]
PROMPT = FAMILY.batch([[5, 6, Image(0), 7]])


class Broken(Scored):
    key = "broken"
    nan = True

    def site(self, facts: Any) -> vtprune.Site:
        return vtprune.Site("projector")

    def needs(self, facts: Any) -> tuple[()]:
        return ()

    def scores(self, view: vtprune.View) -> torch.Tensor:
        scores = torch.zeros(view.features.shape[:2])
        return scores.fill_(float("nan")) if self.nan else scores


def test_outside_a_model_it_raises_at_once(late: dict[str, bool]) -> None:
    with pytest.raises(NonFiniteScoresError, match="1 of 3 token scores"):
        finite.check_finite(torch.tensor([1.0, float("nan"), 2.0]))


def test_the_report_waits_for_the_answer(late: dict[str, bool]) -> None:
    model = FAMILY.build()
    with torch.no_grad(), vtprune.patch(model, Broken(keep=4)) as patch:
        model(**PROMPT)
        with pytest.raises(NonFiniteScoresError, match="token scores are NaN"):
            patch.report()


@pytest.mark.parametrize("arrived", [False, True])
def test_decoding_and_the_next_call_raise_what_has_arrived(late: dict[str, bool], arrived: bool) -> None:
    model = FAMILY.build()
    method = Broken(keep=4)
    with torch.no_grad(), vtprune.patch(model, method) as patch:
        output = model(**PROMPT, use_cache=True)
        late["arrived"] = arrived
        if arrived:
            with pytest.raises(NonFiniteScoresError):
                model(input_ids=torch.tensor([[5]]), past_key_values=output.past_key_values)
        else:
            model(input_ids=torch.tensor([[5]]), past_key_values=output.past_key_values)
            late["arrived"] = True
            Broken.nan = False
            try:
                with pytest.raises(NonFiniteScoresError):
                    model(**PROMPT)
            finally:
                Broken.nan = True
        assert patch.active
