"""The picture world: same seeds same scenes, splits apart, answers balanced and true, checkpoints loadable."""

import collections
import itertools
import re

import numpy as np
import pytest

from vtprune.eval import world
from vtprune.eval.world import questions as q
from vtprune.eval.world import scenes as s

FEW = 36


@pytest.fixture(scope="module")
def sets():
    return {split: world.examples(split, FEW) for split in world.SPLITS if split != "final"}


def scene_of(example):
    return s.make_scene(example.scene_seed)


def test_examples_are_deterministic(sets):
    again = world.examples("test", FEW)
    for first, second in zip(sets["test"], again, strict=True):
        assert np.array_equal(np.asarray(first.image), np.asarray(second.image))
        assert (first.question, first.answer, first.boxes) == (second.question, second.answer, second.boxes)


def test_fewer_examples_are_the_first_of_more(sets):
    fewer = world.examples("test", 5)
    assert [e.question for e in fewer] == [e.question for e in sets["test"][: len(fewer)]]


def test_another_seed_gives_other_scenes(sets):
    other = {e.scene_seed for e in world.examples("test", 5, seed=1)}
    assert not other & {e.scene_seed for e in sets["test"]}


def test_splits_share_no_seed(sets):
    ranges = [s.seed_range(split) for split in world.SPLITS]
    for one, two in itertools.pairwise(ranges):
        assert one.stop <= two.start
    for split, examples in sets.items():
        assert all(e.split == split and e.scene_seed in s.seed_range(split) for e in examples)


def test_unknown_split_names_the_known_ones():
    with pytest.raises(ValueError, match="unseen_style"):
        world.examples("tests", 1)


@pytest.mark.parametrize(("count", "seed"), [(-1, 0), (1, -1), (1, 1001)])
def test_numbers_out_of_range_are_refused(count, seed):
    with pytest.raises(ValueError, match="must"):
        world.examples("test", count, seed)


def test_kinds_are_balanced(sets):
    for examples in sets.values():
        assert collections.Counter(e.kind for e in examples) == dict.fromkeys(world.KINDS, FEW)


def test_answers_are_balanced(sets):
    for examples in sets.values():
        for kind in world.KINDS:
            counts = collections.Counter(e.answer for e in examples if e.kind == kind)
            wanted = q.answers(kind)
            if wanted is None:
                assert max(counts.values()) <= FEW // 4
            else:
                assert set(counts) == set(wanted)
                assert max(counts.values()) - min(counts.values()) <= 1


def test_pictures_are_small_things_on_much_background(sets):
    for example in sets["test"]:
        scene = scene_of(example)
        assert example.image.size == (s.SIZE, s.SIZE)
        assert example.image.mode == "RGB"
        assert 1 <= len(scene.stickers) <= s.MAX_STICKERS
        assert (scene.owner >= 0).mean() < 0.35


def test_boxes_lie_inside_the_picture_and_hold_something(sets):
    for examples in sets.values():
        for example in examples:
            assert bool(example.boxes) == (example.answer != "no")
            for x0, y0, x1, y1 in example.boxes:
                assert 0 <= x0 < x1 <= s.SIZE
                assert 0 <= y0 < y1 <= s.SIZE
                assert (scene_of(example).owner[y0:y1, x0:x1] >= 0).any()


def answer_again(example):
    """The answer, worked out from the scene's data and the wording of the question alone."""
    scene = scene_of(example)
    by_name = {sticker.name: sticker for sticker in scene.stickers}
    if match := re.fullmatch(r"what is at the (.+)\?", example.question):
        (name,) = (t.name for t in scene.stickers if s.POSITIONS[t.position] == match[1])
        return name
    if match := re.fullmatch(r"is there an? (.+)\?", example.question):
        return "yes" if match[1] in by_name else "no"
    if match := re.fullmatch(r"how many (.+) stickers are there\?", example.question):
        return str(scene.count(match[1]))
    if match := re.fullmatch(r"where is the (.+) relative to the (.+)\?", example.question):
        (ax, ay), (bx, by) = (
            (box[0] + box[2], box[1] + box[3]) for box in (by_name[n].box for n in match.groups())
        )
        if abs(ax - bx) > abs(ay - by):
            return "left" if ax < bx else "right"
        return "above" if ay < by else "below"
    if match := re.fullmatch(r"at which place is the (.+)\?", example.question):
        return s.POSITIONS[by_name[match[1]].position]
    assert example.question == "what does the sign say?"
    return " ".join(scene.sign.text.lower())


def test_questions_are_answered_by_the_scene(sets):
    for examples in sets.values():
        for example in examples:
            assert answer_again(example) == example.answer


def test_training_never_shows_what_is_held_out():
    for seed in range(300):
        scene = s.make_scene(s.seed_range("train").start + seed)
        names = {t.name for t in scene.stickers}
        assert scene.background not in s.UNSEEN_BACKGROUNDS
        assert not any(
            t.style == s.UNSEEN_STYLE or s.unseen_position(t.name, t.position) for t in scene.stickers
        )
        assert not any(s.unseen_pair(a, b) for a in names for b in names)


def test_unseen_splits_show_what_is_held_out(sets):
    for example in sets["unseen_style"]:
        assert {t.style for t in scene_of(example).stickers} == {s.UNSEEN_STYLE}
    for example in sets["unseen_combination"]:
        assert any(s.unseen_position(t.name, t.position) for t in scene_of(example).stickers)


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        ("Pizza.", "pizza", True),
        (" top  left", "top left", True),
        ("k 7 b", "k 7 b", True),
        ("a pizza", "pizza", False),
        ("", "no", False),
    ],
)
def test_score_ignores_case_punctuation_and_spacing(prediction, answer, right):
    assert world.score(prediction, answer) is right


def test_unknown_reference_names_the_shipped_ones():
    with pytest.raises(FileNotFoundError, match="'clip', 'llava', 'qwen2-vl'"):
        world.reference_dir("nothing")


def test_reference_llava_answers_from_a_plain_folder():
    transformers = pytest.importorskip("transformers")
    folder = world.reference_dir("llava")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    assert processor.tokenizer.padding_side == "left"
    examples = world.examples("val", 4)
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": e.question}]}],
            add_generation_prompt=True,
        )
        for e in examples
    ]
    inputs = processor(text=prompts, images=[e.image for e in examples], padding=True, return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist() == [144] * len(examples)
    output = model.generate(**inputs)
    texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = sum(world.score(text, e.answer) for text, e in zip(texts, examples, strict=True))
    assert right >= 0.7 * len(examples)


def test_reference_clip_shares_the_vision_tower_and_knows_names():
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    clip = transformers.CLIPModel.from_pretrained(world.reference_dir("clip")).eval()
    processor = transformers.AutoProcessor.from_pretrained(world.reference_dir("clip"))
    llava = transformers.LlavaForConditionalGeneration.from_pretrained(world.reference_dir("llava"))
    tower = llava.model.vision_tower.state_dict()
    assert all(torch.equal(value, tower[key]) for key, value in clip.vision_model.state_dict().items())
    examples = [e for e in world.examples("val", 20) if e.kind == "where"]
    names = list(s.atlas().names)
    with torch.inference_mode():
        output = clip(
            **processor(text=names, images=[e.image for e in examples], padding=True, return_tensors="pt")
        )
    best = [names[index] for index in output.logits_per_image.argmax(1).tolist()]
    right = sum(
        name in {t.name for t in scene_of(e).stickers} for name, e in zip(best, examples, strict=True)
    )
    assert right >= 0.7 * len(examples)
