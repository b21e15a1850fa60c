"""Frames shown to a model as one video: what the processors of six families make of them, and what is answered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import vtprune
from vtprune.errors import InvalidOptionError
from vtprune.eval.prompts import EvaluationError
from vtprune.eval.video_qa import ModelAnswerer, metadata
from vtprune.testing.zoo import LVLMS
from vtprune.testing.zoo_llava import OV_GRIDS, OV_MAX
from vtprune.video.answering import Places
from vtprune.video.reading import Frame

CHARACTERS = "0123456789.<> abcdefghijklmnopqrstuvwxyz?"
QUESTION = "what happens?"
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "llava_next_video", "video_llava")
# No tokens of the picture: a newline vector, [CLS] of every frame.
BESIDES = {"llava_onevision": 1, "video_llava": 4}
TIMES = (0.4, 1.2, 5.04, 9.96)


def tokenizer(image: str, video: str) -> PreTrainedTokenizerFast:
    """Characters, with the zoo's numbers for what stands for pictures."""
    words = ["<pad>", "<s>", "</s>", image, video, "<|vision_start|>", "<|vision_end|>", "<unk>", *CHARACTERS]
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    plain.decoder = decoders.Fuse()
    found = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    found.add_special_tokens({"additional_special_tokens": words[3:7]})
    return found


def template(image: str, video: str) -> str:
    return (
        "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}"
        + image
        + "{% elif c['type'] == 'video' %}"
        + video
        + "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    )


def qwen(kind: str) -> Any:
    import transformers as t

    image, video = "<|image_pad|>", "<|video_pad|>"
    wrap = "<|vision_start|>{}<|vision_end|>".format
    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    sizes["size"] = {"shortest_edge": 64, "longest_edge": 4096}
    family = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}[kind]
    cls = getattr(t, "Qwen3VLVideoProcessor" if kind == "qwen3_vl" else "Qwen2VLVideoProcessor")
    return getattr(t, f"{family}Processor")(
        t.Qwen2VLImageProcessor(**sizes),
        tokenizer(image, video),
        cls(**sizes),
        chat_template=template(wrap(image), wrap(video)),
    )


def llava(kind: str) -> Any:
    import transformers as t

    tokens, chat = tokenizer("<image>", "<video>"), template("<image>", "<video>")
    side = {"llava_onevision": 20, "llava_next_video": 16, "video_llava": 32}[kind]
    square = {"size": {"height": side, "width": side}}
    cropped = {"size": {"shortest_edge": side}, "crop_size": square["size"]}
    if kind == "llava_onevision":
        return t.LlavaOnevisionProcessor(
            t.LlavaOnevisionImageProcessor(**square, image_grid_pinpoints=OV_GRIDS),
            tokens,
            t.LlavaOnevisionVideoProcessor(**square),
            num_image_tokens=25,
            vision_feature_select_strategy="full",
            vision_aspect_ratio=f"anyres_max_{OV_MAX}",
            chat_template=chat,
        )
    if kind == "llava_next_video":
        return t.LlavaNextVideoProcessor(
            video_processor=t.LlavaNextVideoVideoProcessor(**cropped),
            image_processor=t.LlavaNextImageProcessor(**cropped),
            tokenizer=tokens,
            patch_size=4,
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
            chat_template=chat,
        )
    return t.VideoLlavaProcessor(
        image_processor=t.VideoLlavaImageProcessor(**cropped),
        video_processor=t.VideoLlavaVideoProcessor(**cropped),
        tokenizer=tokens,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=chat,
    )


def processor(kind: str) -> Any:
    return qwen(kind) if kind.startswith("qwen") else llava(kind)


def frames(times: Sequence[float] = TIMES, height: int = 32, width: int = 32) -> list[Frame]:
    """Frames of one colour each: 40, 80, ... on a darker left half."""
    found = []
    for number, time in enumerate(times, start=1):
        image = np.full((height, width, 3), 40 * number, np.uint8)
        image[:, : width // 2] //= 2
        found.append(Frame(time, image))
    return found


def answerer(kind: str, method: vtprune.Method | None = None, **options: Any) -> ModelAnswerer:
    model = LVLMS[kind].build()
    return ModelAnswerer(model, processor(kind), method, kind, new_tokens=4, **options)


ALL = Places((0, 1, 2, 3), 4)


@pytest.mark.parametrize("kind", FAMILIES)
def test_frames_are_one_video_and_stock_answers_the_same(kind: str) -> None:
    shown = answerer(kind, positions="dense")
    assert shown.as_video
    inputs = shown.inputs(frames(), QUESTION)
    video_tokens = int((inputs["input_ids"] == 4).sum())
    assert video_tokens > 0
    assert not (inputs["input_ids"] == 3).any()
    assert "pixel_values" not in inputs
    found = shown.answer(frames(), QUESTION, ALL)
    assert found.tokens_in == found.tokens_out == video_tokens - BESIDES.get(kind, 0)
    shown.close()
    stock = {k: v for k, v in inputs.items() if torch.is_tensor(v)}
    with torch.no_grad():
        output = LVLMS[kind].build().generate(**stock, do_sample=False, max_new_tokens=4)
    said = processor(kind).batch_decode(output[:, stock["input_ids"].shape[1] :], skip_special_tokens=True)
    assert found.text == said[0].strip()


def test_chosen_frames_keep_their_places_in_time() -> None:
    shown = answerer("qwen2_vl")
    given = shown.inputs(frames(), QUESTION)
    seen: list[Tensor] = []
    text = shown._model.model.language_model
    text.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    shown.answer(frames(), QUESTION, Places((4, 9, 20, 31), 32))
    (video,) = (given["input_ids"][0] == 4).nonzero(as_tuple=True)
    times = seen[0][-3, 0, video]
    half = len(video) // 2
    assert (times[half:] - times[:half] == 10 - 2).all()  # the second temporal patch begins with frame 20
    start, end = int(video[0]), int(video[-1])
    assert int(times[0]) == start + 2
    assert int(seen[0][-3, 0, end + 1]) == start + 16


def test_places_are_refused_where_they_cannot_be() -> None:
    for kind, options in (("qwen2_5_vl", {}), ("qwen2_vl", {"show": "pictures"})):
        with pytest.raises(EvaluationError, match="use positions='auto' or 'dense'"):
            answerer(kind, positions="original", **options)
    with pytest.raises(EvaluationError, match="positions='dance': choose one of auto, original, dense"):
        answerer("qwen2_vl", positions="dance")


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_video_is_pruned(kind: str) -> None:
    shown = answerer(kind, vtprune.methods.create("evs", keep=2))
    found = shown.answer(frames(), QUESTION, ALL)
    steps = 2 if kind.startswith("qwen") else 4
    assert found.tokens_in > found.tokens_out == 2 * steps


@pytest.mark.parametrize("kind", FAMILIES)
def test_frames_keep_what_is_allotted_to_them(kind: str) -> None:
    shown = answerer(kind, vtprune.methods.create("vtprune", keep=2), allot=True)
    merged = kind.startswith("qwen")  # two frames to a token
    for given, kept in (
        ((4, 2, 1, 1), [3, 1] if merged else [4, 2, 1, 1]),
        ((1, 1, 1, 3), [1, 2] if merged else [1, 1, 1, 3]),
    ):
        found = shown.answer(frames(), QUESTION, Places((0, 1, 2, 3), 4, given))
        assert found.tokens_out == sum(kept)
        assert found.notes == (f"tokens allotted to frames: {', '.join(map(str, kept))}",)
        by_frame = [len(next(reversed(image.kept.values()))) for image in shown._patch.report().images]
        assert by_frame == kept
    shown.close()
    shown.close()
    dense = answerer(kind)
    assert dense.about != shown.about
    assert dense.answer(frames(), QUESTION, Places((0, 1, 2, 3), 4, (1, 1, 1, 1))).notes == ()


def test_what_cannot_be_allotted_is_refused() -> None:
    method = vtprune.methods.create("vtprune", keep=2)
    with pytest.raises(EvaluationError, match="give a method"):
        answerer("qwen2_vl", allot=True)
    with pytest.raises(EvaluationError, match="here they are pictures"):
        answerer("qwen2_vl", method, allot=True, show="pictures")
    with pytest.raises(InvalidOptionError, match="no scores of its own"):
        answerer("qwen2_vl", vtprune.methods.create("evs", keep=2), allot=True)
    with pytest.raises(EvaluationError, match="allots no tokens"):
        answerer("qwen2_vl", method, allot=True).answer(frames(), QUESTION, ALL)


@pytest.mark.parametrize("kind", FAMILIES[3:])
def test_frames_are_in_their_order(kind: str) -> None:
    pixels = answerer(kind).inputs(frames(), QUESTION)["pixel_values_videos"]
    assert pixels.shape[:3] == (1, 4, 3)
    bright = pixels[0, :, :, :, -1].mean((1, 2))
    assert (bright.diff() > 0.1).all()
    assert (pixels[0, :, :, 0, 0] < pixels[0, :, :, 0, -1]).all()


def test_qwen3_is_told_the_times_of_the_frames() -> None:
    ids = answerer("qwen3_vl").inputs(frames(), QUESTION)["input_ids"]
    text = processor("qwen3_vl").tokenizer.decode(ids[0])
    # The middle of the two frames of each temporal patch.
    assert text.count("seconds>") == 2
    assert "<0.8 seconds>" in text
    assert "<7.5 seconds>" in text
    odd = answerer("qwen3_vl").inputs(frames((3.0, 4.0, 9.0)), QUESTION)["input_ids"]
    text = processor("qwen3_vl").tokenizer.decode(odd[0])
    assert "<3.5 seconds>" in text
    assert "<9.0 seconds>" in text


@pytest.mark.parametrize(
    ("times", "seconds"),
    [
        ((0.0, 2.5, 5.0, 7.5), 5.0),  # two frames per grid, evenly spaced
        ((1.0, 1.5), 1.0),
        (TIMES, 2 * (9.96 - 0.4) / 3),
        ((3.0,), 2.0),  # one frame: as if there was one a second
        ((3.0, 3.0), 2.0),
    ],
)
def test_qwen2_5_is_told_the_seconds_of_a_grid(times: tuple[float, ...], seconds: float) -> None:
    inputs = answerer("qwen2_5_vl").inputs(frames(times), QUESTION)
    assert float(inputs["second_per_grid_ts"][0]) == pytest.approx(seconds, rel=1e-3)
    assert inputs["video_grid_thw"][0, 0] == (len(times) + 1) // 2


def test_metadata_are_the_frames_own_times() -> None:
    from transformers.video_utils import VideoMetadata

    told = VideoMetadata(**metadata([0.4004, 1.2, 5.04]))
    assert told.timestamps == [0.4, 1.2, 5.04]
    assert told.sampled_fps == pytest.approx(2 / (5.04 - 0.4004), rel=1e-3)


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "video_llava"])
def test_pictures_if_asked_for(kind: str) -> None:
    shown = answerer(kind, show="pictures")
    assert not shown.as_video
    inputs = shown.inputs(frames(), QUESTION)
    assert not (inputs["input_ids"] == 4).any()
    assert int((inputs["input_ids"] == 3).sum()) == shown.answer(frames(), QUESTION, ALL).tokens_in


def test_what_takes_no_video_is_shown_pictures_or_refused() -> None:
    silent = processor("qwen2_vl")
    silent.chat_template = template("<|image_pad|>", "")
    build = LVLMS["qwen2_vl"].build
    assert not ModelAnswerer(build(), silent, None, "m").as_video
    with pytest.raises(EvaluationError, match="the chat template leaves videos out"):
        ModelAnswerer(build(), silent, None, "m", show="video")
    refusing = processor("qwen2_vl")
    refusing.chat_template = "{{ raise_exception('pictures only') }}"
    with pytest.raises(EvaluationError, match=r"refuses a video \(pictures only\)"):
        ModelAnswerer(build(), refusing, None, "m", show="video")
    without = processor("qwen2_vl")
    without.video_processor = None
    with pytest.raises(EvaluationError, match="Qwen2VLProcessor takes no videos"):
        ModelAnswerer(build(), without, None, "m", show="video")
    with pytest.raises(EvaluationError, match="has no video token"):
        ModelAnswerer(LVLMS["llava"].build(), processor("qwen2_vl"), None, "m", show="video")
    with pytest.raises(EvaluationError, match="show='film': choose one of auto, video, pictures"):
        ModelAnswerer(build(), processor("qwen2_vl"), None, "m", show="film")
