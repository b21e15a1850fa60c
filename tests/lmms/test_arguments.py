"""Model arguments and generation settings of a task give what they say, or an error that helps."""

import pytest

from vtprune.errors import InvalidOptionError, UnknownMethodError, UnsupportedMethodError, VTPruneError
from vtprune.eval.lmms import arguments, generation
from vtprune.eval.settings import Setting


def test_model_arguments_give_a_setting():
    plan, setting = arguments.parse(
        {"pretrained": "x", "method": "fastv:layer=3", "keep": 0.25, "batch_size": "4", "device": None}
    )
    assert (plan.pretrained, plan.batch_size, plan.device) == ("x", 4, None)
    assert setting == Setting("fastv", 0.25, (("layer", 3),))
    assert arguments.parse({"pretrained": "x"})[1] == Setting("dense")
    assert arguments.parse({"pretrained": "x", "method": "fastv", "keep": 8, "layer": "0.5"})[1] == Setting(
        "fastv", 8, (("layer", 0.5),)
    )
    assert arguments.parse({"pretrained": "x", "method": "prumerge"})[1] == Setting("prumerge")


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"method": "fastv", "keep": 8}, InvalidOptionError, "needs pretrained="),
        ({"pretraned": "x"}, InvalidOptionError, "not 'pretraned'"),
        ({"pretrained": "x", "method": "fastvv", "keep": 8}, UnknownMethodError, "fastv"),
        ({"pretrained": "x", "method": "vtc-cls"}, VTPruneError, "keep"),
        (
            {"pretrained": "x", "method": "fastv", "keep": 8, "layr": 2},
            InvalidOptionError,
            "Did you mean 'layer'",
        ),
        (
            {"pretrained": "x", "method": "fastv", "keep": 8, "batchsize": 2},
            InvalidOptionError,
            "'batch_size'",
        ),
        ({"pretrained": "x", "method": "fastv:layer=2", "keep": 8, "layer": 3}, InvalidOptionError, "twice"),
        ({"pretrained": "x", "keep": 8}, InvalidOptionError, "without a method"),
        ({"pretrained": "x", "scorer": "cls"}, InvalidOptionError, "without a method"),
        ({"pretrained": "x", "method": "keep-all", "keep": 8}, InvalidOptionError, "takes no keep"),
        ({"pretrained": "x", "method": "downsample"}, InvalidOptionError, "needs keep"),
        ({"pretrained": "x", "method": "no-image", "layer": 1}, InvalidOptionError, "takes no options"),
        ({"pretrained": "x", "method": "fastv", "keep": -1}, VTPruneError, "-1"),
        ({"pretrained": "x", "method": "random-ltd", "keep": 0.5}, UnsupportedMethodError, "training"),
        ({"pretrained": "x", "batch_size": "auto"}, InvalidOptionError, "batch_size='auto'"),
        ({"pretrained": "x", "max_batch_size": 4}, InvalidOptionError, "max_batch_size"),
        ({"pretrained": "x", "video_as": "sound"}, InvalidOptionError, "video or pictures"),
    ],
)
def test_wrong_model_arguments_say_what_to_do(given, error, words):
    with pytest.raises(error, match=words):
        arguments.parse(given)


def test_generation_settings_of_a_task():
    greedy = generation.wanted(
        {"until": ["\n\n", "END"], "max_new_tokens": 16, "temperature": 0, "top_p": 1.0, "do_sample": False}
    )
    assert greedy.options == {
        "num_beams": 1,
        "max_new_tokens": 16,
        "temperature": None,
        "top_p": None,
        "top_k": None,
        "do_sample": False,
    }
    assert greedy.cut("a END b\n\nc") == "a "
    hot = generation.wanted({"temperature": 0.7, "num_beams": 2, "image_aspect_ratio": "original"})
    assert hot.options["do_sample"]
    assert hot.options["temperature"] == 0.7
    assert hot.options["num_beams"] == 2
    assert hot.options["max_new_tokens"] == generation.NEW_TOKENS
    assert hot.ignored == ("image_aspect_ratio",)
    assert not generation.wanted({"temperature": 0.7, "do_sample": False}).options["do_sample"]
    with pytest.raises(InvalidOptionError, match="Did you mean 'max_new_tokens'"):
        generation.wanted({"max_new_token": 3})
    with pytest.raises(InvalidOptionError, match="until=3"):
        generation.wanted({"until": 3})
    assert generation.same([{"a": 1, "b": 2}, {"a": 2}, {"b": 2, "a": 1}]) == [[0, 2], [1]]
