"""Requests to the model `vtprune` as the real lmms-eval makes them."""

import pytest
from lmms.common import needs_lmms

import vtprune
from vtprune.errors import InvalidOptionError, UnsupportedMethodError
from vtprune.eval import world
from vtprune.eval.lmms import arguments, tally
from vtprune.eval.prompts import EvaluationError
from vtprune.eval.settings import Setting

# Where Hugging Face's caches are is read when lmms-eval is imported.
pytestmark = [needs_lmms, pytest.mark.usefixtures("folder")]


class Request:
    """A request as lmms-eval makes them."""

    def __init__(self, picture, question, generation_kwargs):
        message = [
            {
                "role": "user",
                "content": [{"type": "image", "url": picture}, {"type": "text", "text": question}],
            }
        ]
        self.args = ("", lambda doc: message, generation_kwargs, 0, "task", "test")
        self.task_name, self.metadata = "task", {}


def model_of(reference, setting, **other):
    from vtprune.eval.lmms.model import VTPruneChat

    lm = VTPruneChat.of(*reference, setting, arguments.ModelArguments("", **other))
    lm.task_dict["task"] = {"test": [None]}
    return lm


def test_generation_settings_are_honoured(reference, questions):
    lm = model_of(reference, Setting("vtc-cls", 64), batch_size=3)
    picture = questions[4].image
    ask_for = [
        {"max_new_tokens": 1},
        {"max_new_tokens": 6},
        {"max_new_tokens": 6, "num_beams": 3},
        {"max_new_tokens": 6, "until": ["e"]},
        {"max_new_tokens": 6, "do_sample": True, "temperature": 1e-4},
        {"max_new_tokens": 6},
    ]
    text = next(e for e in questions if e.kind == "text")
    requests = [Request(text.image, text.question, one) for one in ask_for]
    requests.append(Request(picture, questions[4].question, {"max_new_tokens": 6}))
    found = lm.generate_until(requests)
    assert found[0].token_counts.output_tokens == 1
    assert found[1].text == found[5].text == found[4].text
    assert world.score(found[1].text, text.answer)
    assert found[2].token_counts.visual.visual_tokens_out == 64
    assert found[3].text == found[1].text.split("e")[0].strip()
    assert lm.tally.requests == len(requests)
    with pytest.raises(InvalidOptionError, match="max_new_tokens"):
        lm.generate_until([Request(picture, "?", {"max_new_token": 3})])


def test_a_run_that_prunes_nothing_is_an_error(reference, questions):
    request = Request(questions[0].image, questions[0].question, {"max_new_tokens": 2})
    with pytest.raises(vtprune.InertPruningError, match="removed no visual token of 1 requests"):
        model_of(reference, Setting("vtc-cls", 144)).generate_until([request])
    model_of(reference, Setting("keep-all")).generate_until([request])
    model_of(reference, Setting("vtc-cls", 1.0)).generate_until([request])
    dense = model_of(reference, Setting("dense")).generate_until([request])
    assert dense[0].token_counts.visual == tally.Tokens(144, 144, 144, 144.0)


def test_tasks_of_several_rounds_are_refused(reference):
    with pytest.raises(vtprune.UnsupportedCallError, match="several rounds"):
        model_of(reference, Setting("dense")).generate_until_multi_round([])


def test_a_method_that_the_model_cannot_take_is_told_at_once():
    from vtprune.eval.lmms.model import VTPruneChat

    model = str(world.reference_dir("qwen2-vl"))
    with pytest.raises(UnsupportedMethodError):
        VTPruneChat(pretrained=model, method="fastervlm", keep=4, device="cpu")
    with pytest.raises(EvaluationError, match="cannot load"):
        VTPruneChat(pretrained="nowhere", device="cpu")
