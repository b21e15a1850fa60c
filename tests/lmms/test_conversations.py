"""Conversations, clips and likelihoods: batches say what single rows say, and the prompt is that of `vtprune eval`."""

import numpy as np
import pytest
import torch
from lmms.common import conversation_of, losses_of
from PIL import Image

import vtprune
from vtprune.eval.lmms import conversations, tally
from vtprune.eval.prompts import EvaluationError, Prompter

# ------------------------------------------------------------------------------------ conversations


@pytest.mark.parametrize("method", [None, "vtc-cls", "fastv"])
def test_rows_with_different_numbers_of_pictures_answer_as_alone(reference, questions, method):
    model, processor = reference
    prompter = conversations.ChatPrompter(model, processor)
    pictures = [example.image for example in questions]
    talks = [
        conversation_of(pictures[:1], questions[0].question),
        conversation_of(pictures[1:4], "what is at the top left ?"),
        conversation_of(pictures[4:6], questions[4].question),
        conversation_of([], "how many ?"),
    ]
    batches = list(conversations.alike(talks, 8))
    assert batches == [[0, 1, 2], [3]]

    def logits(numbers):
        inputs = prompter.rows([talks[number] for number in numbers])
        with torch.no_grad():
            return model(**inputs).logits[:, -1]

    patch = vtprune.patch(model, method or "keep-all", **({"keep": 20} if method else {}))
    with patch:
        together = logits([0, 1, 2])
        counts = tally.of_report(patch.report(), 3)
        alone = torch.cat([logits([number]) for number in (0, 1, 2)])
        logits([3])  # text only
        assert tally.of_report(patch.report(), 1) == [tally.Tokens(0, 0, 0, 0.0)]
    torch.testing.assert_close(together, alone, atol=2e-4, rtol=1e-4)
    assert [one.visual_tokens for one in counts] == [144, 432, 288]
    assert [one.visual_tokens_out for one in counts] == ([20, 60, 40] if method else [144, 432, 288])


def test_the_prompt_is_that_of_vtprune_eval(reference, questions):
    model, processor = reference
    ours = Prompter(model, processor).inputs(
        [e.image for e in questions[:6]], [e.question for e in questions[:6]]
    )
    theirs = conversations.ChatPrompter(model, processor).rows(
        [conversation_of([e.image], e.question) for e in questions[:6]]
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_what_cannot_be_shown_is_refused(reference):
    model, processor = reference
    prompter = conversations.ChatPrompter(model, processor)
    picture = Image.new("RGB", (96, 96))
    with pytest.raises(EvaluationError, match="'audio'"):
        conversations.conversation([{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}])
    with pytest.raises(EvaluationError, match="2 places <image> for 1 images"):
        prompter.rows([conversation_of([picture], "what is in <image> ?")])
    film = conversations.conversation(
        [
            {
                "role": "user",
                "content": [{"type": "video", "url": [picture] * 3}, {"type": "text", "text": "?"}],
            }
        ]
    )
    with pytest.raises(EvaluationError, match="video_as=pictures"):
        prompter.rows([film])
    shown = conversations.ChatPrompter(model, processor, max_frames=2, video_as="pictures").rows([film])
    assert shown["pixel_values"].shape[0] == 2


def test_frames_of_files_folders_and_spans(tmp_path):
    pytest.importorskip("av", reason="video files need PyAV")
    from vtprune.eval.world.video.files import write

    frames = [np.full((96, 96, 3), 10 * second, np.uint8) for second in range(20)]
    path = write(tmp_path / "a.mp4", frames, 1)
    whole = conversations.frames_of(str(path), 4)
    part = conversations.frames_of({"url": str(path), "start_time": 10, "end_time": 14}, 4)
    assert [round(float(f.mean()) / 10) for f in whole.frames] == [2, 7, 12, 17]
    assert [round(float(f.mean()) / 10) for f in part.frames] == [10, 11, 12, 13]
    (tmp_path / "frames").mkdir()
    for place, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / "frames" / f"{place:03}.png")
    assert [int(f.mean()) for f in conversations.frames_of(str(tmp_path / "frames"), 4).frames] == [
        20,
        70,
        120,
        170,
    ]
    with pytest.raises(EvaluationError, match="no part of it"):
        conversations.frames_of({"url": str(path), "start_time": 14, "end_time": 10}, 4)
    with pytest.raises(EvaluationError, match="int"):
        conversations.frames_of(3, 4)


# ------------------------------------------------------------------------------------ likelihood


def test_losses_are_those_of_one_unpadded_pass(reference, questions):
    """Judge: prompt and continuation in one sequence, one row, no cache."""
    model, processor = reference
    prompter = conversations.ChatPrompter(model, processor)
    talks = [conversation_of([e.image], e.question) for e in questions[:4]]
    ends = [" " + questions[0].answer, " " + questions[1].answer, " pizza dog", " no"]
    found = losses_of(reference, talks, ends)
    for talk, end, (loss, greedy) in zip(talks, ends, found, strict=True):
        inputs = prompter.rows([talk])
        target = torch.tensor([processor.tokenizer(end, add_special_tokens=False)["input_ids"]])
        ids = torch.cat([inputs["input_ids"], target], 1)
        with torch.no_grad():
            logits = model(
                input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=inputs["pixel_values"]
            ).logits[0, -target.shape[1] - 1 : -1]
        log = logits.log_softmax(-1).gather(-1, target[0][:, None])
        assert loss == pytest.approx(-float(log.mean()), abs=1e-4)
        assert greedy == bool((logits.argmax(-1) == target[0]).all())
    assert found[0][1] or found[1][1], "a trained model finds a right answer most likely"
    assert not found[2][1]


@pytest.mark.parametrize("method", ["vtc-cls", "fastv"])
def test_losses_under_pruning_depend_on_neither_the_batch_nor_the_answer(reference, questions, method):
    model, _ = reference
    talks = [conversation_of([e.image], e.question) for e in questions[:3]]
    ends = [" yes", " pizza dog", " three"]
    with vtprune.patch(model, method, keep=12) as patch:
        together = losses_of(reference, talks, ends)
        alone = [losses_of(reference, [t], [e])[0] for t, e in zip(talks, ends, strict=True)]
        kept = []
        for end in (" yes", " pizza dog"):
            losses_of(reference, talks[:1], [end])
            kept.append(next(iter(patch.report().images[0].kept.values())).tolist())
    assert kept[0] == kept[1]
    assert [loss for loss, _ in together] == pytest.approx([loss for loss, _ in alone], abs=1e-4)
    assert [loss for loss, _ in together] != pytest.approx(
        [loss for loss, _ in losses_of(reference, talks, ends)], abs=1e-4
    )


def test_an_empty_continuation_is_refused(reference, questions):
    with pytest.raises(EvaluationError, match="no tokens"):
        losses_of(reference, [conversation_of([questions[0].image], "?")], [""])
