"""The video world: same seeds same clips, splits apart, answers true and balanced, files with the right pictures and times."""

import collections
import hashlib
import inspect
import itertools
import json
import math
import os
import resource
import subprocess
import sys
import threading
import tracemalloc

import numpy as np
import pytest
from hypothesis import example as always
from hypothesis import given, settings
from hypothesis import strategies as st

from vtprune.errors import VTPruneError
from vtprune.eval.world import video as v
from vtprune.eval.world.batches import words
from vtprune.eval.world.models import vocabulary
from vtprune.eval.world.scenes import atlas, seed_range
from vtprune.eval.world.video import __main__ as command
from vtprune.eval.world.video import files, questions
from vtprune.eval.world.video.stories import clip_seed

FEW = 32
OPEN_SPLITS = [split for split in v.SPLITS if split != "final"]


@pytest.fixture(scope="module")
def sets():
    return {split: v.examples(split, FEW * len(v.KINDS)) for split in OPEN_SPLITS}


@pytest.fixture(scope="module")
def many():
    """Examples of one split, 192 of every kind: four rounds of the things, 48 of the four answers."""
    return v.examples("train", 192 * len(v.KINDS))


@pytest.fixture
def pyav():
    return pytest.importorskip("av", reason="PyAV is not installed")


@pytest.fixture(params=sorted(files.CODECS))
def codec(request, pyav):
    if files.CODECS[request.param] not in pyav.codecs_available:
        pytest.skip(f"this PyAV has no encoder {files.CODECS[request.param]}")
    return request.param


# --- the same everywhere, and apart ---


def fingerprint(world):
    """Hash of everything some clips show, ask and answer."""
    digest = hashlib.sha256()
    for kind in world.KINDS:
        scene = world.clip("test", 7, kind, 24)
        digest.update(repr((scene, scene.questions, scene.events())).encode())
        for time, picture in scene.frames():
            digest.update(repr(time).encode() + picture.tobytes())
    return digest.hexdigest()


def test_another_process_makes_the_same_clips():
    code = f"import hashlib\nfrom vtprune.eval.world import video\n{inspect.getsource(fingerprint)}"
    there = subprocess.run(
        [sys.executable, "-c", f"{code}\nprint(fingerprint(video))"],
        env=dict(os.environ, PYTHONHASHSEED="123"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stdout.strip() == fingerprint(v)


def test_frames_can_be_made_in_any_order():
    scene = v.clip("val", 3, "order")
    pictures = [picture for _, picture in scene.frames()]
    for index in (scene.length - 1, 0, scene.length // 2):
        assert np.array_equal(v.clip("val", 3, "order").frame(index), pictures[index])


def test_examples_are_deterministic_and_a_smaller_limit_gives_the_first(sets):
    again = v.examples("test", 20)
    assert again == sets["test"][:20]
    assert [e.question for e in again] == [e.question for e in sets["test"][:20]]


def test_splits_kinds_and_seeds_share_no_clip(sets):
    seeds = collections.Counter(e.scene.seed for found in sets.values() for e in found)
    seeds.update(e.scene.seed for e in v.examples("test", 60, seed=1))
    assert max(seeds.values()) == 1
    for split, found in sets.items():
        assert all(e.split == split and e.scene.seed in seed_range(split) for e in found)
    ends = [
        (clip_seed(split, 0, kind), clip_seed(split, 99_999_999, kind))
        for split in v.SPLITS
        for kind in v.KINDS
    ]
    assert all(one[1] < two[0] for one, two in itertools.pairwise(ends))
    assert all(clip_seed(split, 99_999_999, v.KINDS[-1]) in seed_range(split) for split in v.SPLITS)


def test_the_held_out_style_and_backgrounds_stay_held_out(sets):
    for split, found in sets.items():
        assert not any(track.style == "twemoji" for e in found for track in e.scene.tracks)
        unseen = {e.scene.background for e in found} & {"rings", "weave"}
        assert bool(unseen) == (split == "test")


# --- the ground truth, read literally ---


def table_of(scene):
    """Frame by frame, the box of every thing by name; all that the literal readings below may look at."""
    table = []
    for index in range(scene.length):
        visible = scene.visible(index)
        table.append({track.name: track.box(index) for track in visible})
        assert len(table[-1]) == len(visible), "a name twice in one frame"
    return table


def shown(table, name):
    return [index for index, row in enumerate(table) if name in row]


def runs(frames):
    """[[first, last], ...] of ascending frames."""
    found = []
    for frame in frames:
        if found and frame == found[-1][1] + 1:
            found[-1][1] = frame
        else:
            found.append([frame, frame])
    return found


def all_runs(table):
    names = {name for row in table for name in row}
    return sorted((first, last, name) for name in names for first, last in runs(shown(table, name)))


def corner(table, index, name):
    return table[index][name][:2]


def moving(table, first, last, name):
    """Whether a thing leaves its place during a run."""
    return len({corner(table, index, name) for index in range(first, last + 1)}) > 1


def still_frames(table):
    """Frames that show something, and nothing of what they show belongs to a run with movement."""
    bad = set()
    for first, last, name in all_runs(table):
        if moving(table, first, last, name):
            bad.update(range(first, last + 1))
    return [index for index, row in enumerate(table) if row and index not in bad]


def literal(text, table):
    """(answer, relevant frames) of a question, from the table alone."""
    word = text.rstrip("?").split()
    everything = all_runs(table)
    if text == "what appears for a moment?":
        (needle,) = [run for run in everything if run[1] - run[0] + 1 <= 6]
        return needle[2], shown(table, needle[2])
    if text == "what is there while nothing moves?":
        frames = still_frames(table)
        (name,) = {name for index in frames for name in table[index]}
        return name, frames
    if text.startswith("what is there with the "):
        together = [index for index in shown(table, word[-1]) if len(table[index]) > 1]
        (name,) = {name for index in together for name in table[index]} - {word[-1]}
        return name, together
    if text.startswith("what comes "):
        side, name = word[2], word[-1]
        mine = shown(table, name)
        if side == "after":
            answer = min((run for run in everything if run[0] > mine[-1]), key=lambda run: run[0])
        else:
            answer = max((run for run in everything if run[1] < mine[0]), key=lambda run: run[1])
        relevant = sorted([*mine, *range(answer[0], answer[1] + 1)])
        assert all(len(table[index]) == 1 for index in relevant), "order is unclear with company"
        return answer[2], relevant
    if text.startswith("when does the "):
        frames = shown(table, word[3])
        quarters = {index * 4 // len(table) for index in frames}
        (quarter,) = quarters
        return ("first quarter", "second quarter", "third quarter", "last quarter")[quarter], frames
    if text.startswith("how often does the "):
        frames = shown(table, word[4])
        return str(len(runs(frames))), frames
    if text.startswith("which way does the "):
        frames = shown(table, word[4])
        (x0, y0), (x1, y1) = (corner(table, index, word[4]) for index in (frames[0], frames[-1]))
        if abs(x1 - x0) > abs(y1 - y0):
            return ("right" if x1 > x0 else "left"), frames
        return ("down" if y1 > y0 else "up"), frames
    if text.startswith("does a"):
        frames = shown(table, word[2])
        return ("yes" if frames else "no"), frames
    assert text.startswith("is the ")
    (choice,) = {word[4], word[7]} & {
        group for group, members in atlas().groups.items() if word[2] in members
    }
    return choice, []


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.sampled_from(OPEN_SPLITS),
    st.integers(0, 99_999_999),
    st.sampled_from(v.KINDS),
    st.one_of(st.none(), st.integers(8, 200)),
)
@always("train", 10_520, "often", 48)  # what appears for a moment is there for longer at another time
def test_every_answer_and_its_moment_follow_from_the_table_of_frames(split, index, kind, frames):
    scene = v.clip(split, index, kind, frames)
    assert frames in (None, scene.length)
    table = table_of(scene)
    assert (scene.question.kind, scene.question.text) == (kind, scene.asked)
    for question in scene.questions:
        answer, relevant = literal(question.text, table)
        assert question.answer == answer, question
        assert [frame for start, stop in question.spans for frame in range(start, stop)] == relevant, question
        assert question.answer in v.answers(question.kind)
    texts = [question.text for question in scene.questions]
    assert len(texts) == len(set(texts))
    for row in table:
        for x0, y0, x1, y1 in row.values():
            assert 0 <= x0 < x1 <= 96
            assert 0 <= y0 < y1 <= 96
        for one, two in itertools.combinations(row.values(), 2):
            assert one[2] <= two[0] or two[2] <= one[0] or one[3] <= two[1] or two[3] <= one[1]
    for first, last, name in all_runs(table):
        if moving(table, first, last, name):
            assert last - first >= 2
            for at in range(first, last):  # it never stops on its way
                assert corner(table, at, name) != corner(table, at + 1, name)


def test_events_tell_what_changes_between_frames(sets):
    for example in sets["val"][:27]:
        table = table_of(example.scene)
        changes = []
        for index in range(1, len(table)):
            time = index / example.scene.fps
            changes += [
                (time, index, "appears", name) for name in table[index].keys() - table[index - 1].keys()
            ]
            changes += [
                (time, index, "disappears", name) for name in table[index - 1].keys() - table[index].keys()
            ]
        found = [(event.time, event.frame, event.what, event.name) for event in example.scene.events()]
        assert found == sorted(changes, key=lambda change: change[1:])


def test_pictures_show_what_the_ground_truth_says(sets):
    clean = [e.scene for e in sets["test"] if not e.scene.noise and not e.scene.flicker][:60]
    for scene in clean:
        empty = np.clip(scene.canvas, 0, 255).astype(np.uint8)
        for index in {0, scene.length - 1, *(track.start for track in scene.tracks)}:
            differs = (scene.frame(index) != empty).any(2)
            owner = scene.owner(index)
            for number, track in enumerate(scene.visible(index)):
                x0, y0, x1, y1 = track.box(index)
                mine = owner == number
                assert mine[y0:y1, x0:x1].sum() == mine.sum() > 80
                assert differs[mine].mean() > 0.8
                differs[y0:y1, x0:x1] = False
            assert not differs.any()


def test_needles_are_short_and_their_clips_minutes_long(sets):
    for example in sets["train"]:
        if example.kind == "needle":
            ((start, stop),) = example.asked.spans
            assert 2 <= stop - start <= 6
            assert 60 <= example.scene.duration <= 240
            assert all(  # and everything else stays much longer
                track.length >= 4 * (stop - start)
                for track in example.scene.tracks
                if track.name != example.answer
            )
    lengths = [e.scene.length for e in sets["train"] if e.kind not in ("needle", "still")]
    assert min(lengths) <= 12
    assert max(lengths) >= 180


def test_relevance_marks_the_frames_that_hold_the_answer(sets):
    for example in sets["val"][:45]:
        scene = example.scene
        times = np.arange(scene.length) / scene.fps
        wanted = [
            any(start <= frame < stop for start, stop in example.asked.spans) for frame in range(scene.length)
        ]
        assert example.relevance(times).tolist() == wanted
        assert example.relevance(times + 0.4 / scene.fps).tolist() == wanted
        assert example.relevant == tuple(
            (start / scene.fps, stop / scene.fps) for start, stop in example.asked.spans
        )
        no_moment = example.kind == "known" or example.answer == "no"
        assert (not example.relevant) == no_moment


# --- balance ---


def test_every_answer_of_a_kind_is_equally_frequent(many):
    for kind in v.KINDS:
        found = collections.Counter(e.answer for e in many if e.kind == kind)
        assert set(found) == set(v.answers(kind))
        assert max(found.values()) - min(found.values()) <= 1
    table = command.floors(many)
    for kind in v.KINDS:
        if kind != "known":
            assert table[kind]["most frequent"] <= table[kind]["prior"] + 0.1


def guessed(train, test, features):
    """Right answers of a naive Bayes guesser that never sees a picture."""
    prior = collections.Counter(e.answer for e in train)
    seen = collections.Counter((e.answer, feature) for e in train for feature in features(e))

    def score(example, answer):
        terms = [math.log((seen[answer, f] + 0.1) / (prior[answer] + 1)) for f in features(example)]
        return math.log(prior[answer]) + sum(terms)

    return sum(max(sorted(prior), key=lambda answer: score(e, answer)) == e.answer for e in test)


@pytest.mark.parametrize("kind", [kind for kind in v.KINDS if kind != "known"])
def test_who_knows_only_question_and_length_cannot_beat_the_floor(many, kind):
    mine = [e for e in many if e.kind == kind]
    train, test = mine[: len(mine) // 2], mine[len(mine) // 2 :]

    def features(example):
        return [
            *words(example.question),
            f"fps {example.scene.fps}",
            f"length {example.scene.length.bit_length()}",
        ]

    right = guessed(train, test, features)
    floor = mine[0].prior
    assert right / len(test) <= floor + 3 * math.sqrt(floor * (1 - floor) / len(test))


def test_only_known_questions_need_no_vision(many):
    assert {e.kind for e in many if not e.needs_vision} == {"known"}
    for example in many:
        assert example.needs_vision == (example.prior < 1)
        if example.kind == "known":
            assert example.answer in words(example.question)


def test_new_words_are_exactly_those_the_picture_world_lacks(many):
    texts = [text for e in many for text in (e.question, e.answer, e.caption, e.scene.caption)]
    used = {word for text in texts for word in words(text)}
    assert used - set(vocabulary()) == set(v.NEW_WORDS)
    assert not {word for e in many for word in words(e.caption)} - set(vocabulary())


# --- the pictures and the files ---


def centres(pictures):
    """Centre of mass (x, y) of what differs from the usual picture of the clip, per picture."""
    usual = np.median(np.stack(pictures), axis=0)
    found = []
    for picture in pictures:
        mass = np.abs(picture.astype(float) - usual).sum(2)
        mass[mass < 90] = 0
        y, x = np.mgrid[0:96, 0:96]
        found.append(
            None if mass.sum() == 0 else ((mass * x).sum() / mass.sum(), (mass * y).sum() / mass.sum())
        )
    return found


def test_things_move_in_the_decoded_picture_the_way_the_answer_says(tmp_path, pyav):
    seen = collections.Counter()
    for example in v.examples("val", 200, ["motion"], frames=32):
        scene = example.scene
        ((start, stop),) = example.asked.spans
        alone = all(len(scene.visible(index)) == 1 for index in range(start, stop))
        if not alone or scene.noise or scene.flicker:
            continue
        found = centres([picture for _, picture in files.read(example.path(tmp_path))])
        (x0, y0), (x1, y1) = found[start], found[stop - 1]
        dx, dy = x1 - x0, y1 - y0
        assert max(abs(dx), abs(dy)) > 2 * min(abs(dx), abs(dy))
        way = ("right" if dx > 0 else "left") if abs(dx) > abs(dy) else ("down" if dy > 0 else "up")
        assert way == example.answer
        seen[way] += 1
    assert min(seen[way] for way in v.answers("motion")) >= 2, seen


def luma(picture):
    return picture.astype(float) @ [0.299, 0.587, 0.114]


def psnr(one, two):
    return 10 * math.log10(255**2 / max(np.mean((one - two) ** 2), 1e-9))


@pytest.mark.parametrize("kind", v.KINDS)
def test_a_file_holds_every_picture_at_its_time(tmp_path, codec, kind):
    """Brightness to 36 dB in every frame; colour, of which files hold half the resolution, to 30 dB at that resolution."""
    for index in range(2):
        scene = v.clip("test", index, kind, 40)
        found = list(files.read(scene.write(tmp_path / "clip.mp4", codec)))
        assert len(found) == scene.length
        for (wanted, picture), (time, decoded) in zip(scene.frames(), found, strict=True):
            assert abs(time - wanted) < 1e-4  # half a frame is 0.1 s
            assert decoded.shape == (96, 96, 3)
            assert psnr(luma(picture), luma(decoded)) > 36
            blocks = [p.reshape(48, 2, 48, 2, 3).mean((1, 3)) for p in (picture, decoded)]
            assert psnr(*blocks) > 30


def test_a_file_has_the_duration_rate_and_codec_it_should(tmp_path, codec, pyav):
    scene = v.clip("val", 5, "when", 30)
    with pyav.open(str(scene.write(tmp_path / "clip.mp4", codec))) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.codec_context.name) == (96, 96, codec)
        assert stream.average_rate == scene.fps
        assert container.duration / 1e6 == pytest.approx(scene.duration, abs=0.01)


def test_files_are_the_same_bytes_each_time(tmp_path, codec):
    one, two = (v.clip("val", 1, "order", 20).write(tmp_path / name, codec) for name in ("a.mp4", "b.mp4"))
    assert one.read_bytes() == two.read_bytes()


def test_a_clip_is_written_once_and_never_half(tmp_path, pyav, monkeypatch):
    example, other = v.examples("val", 2, ["order"], frames=16)
    path = example.path(tmp_path / "new")
    before = path.stat()
    assert example.path(tmp_path / "new") == path
    assert path.stat() == before
    assert other.path(tmp_path / "new") != path

    def broken(self, index):
        if index == 5:
            raise RuntimeError("stop")
        return np.zeros((96, 96, 3), np.uint8)

    monkeypatch.setattr(v.VideoScene, "frame", broken)
    with pytest.raises(RuntimeError, match="stop"):
        example.path(tmp_path / "broken")
    assert list((tmp_path / "broken").iterdir()) == []


def test_several_writers_of_one_clip_agree(tmp_path, pyav):
    (example,) = v.examples("val", 1, ["when"], frames=60)
    paths = []
    threads = [threading.Thread(target=lambda: paths.append(example.path(tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == 1
    assert list(tmp_path.iterdir()) == [paths[0]]
    assert len(list(files.read(paths[0]))) == 60


def test_clips_that_differ_have_files_that_differ():
    scenes = [v.clip("val", i, kind, n) for i in range(3) for kind in v.KINDS for n in (8, 9, None)]
    assert len({v.digest(scene) for scene in scenes}) == len(scenes)


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.cache_dir() == tmp_path / "vtprune" / "video-world"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert files.cache_dir() == tmp_path / "home" / ".cache" / "vtprune" / "video-world"


def test_a_three_minute_clip_needs_little_memory(tmp_path, pyav):
    """All pictures together are 25 MB; never more than a few are held."""
    scene = v.clip("val", 0, "needle", 900)
    scene.write(tmp_path / "first.mp4")  # loads what is loaded once
    high = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        for _ in scene.frames():
            pass
        scene.write(tmp_path / "clip.mp4")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * 2**20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - high < 32 * 2**10


# --- refusals ---


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: v.clip("tests", 0, "when"), "train, val, test, final"),
        (lambda: v.clip("unseen_style", 0, "when"), "unknown split"),
        (lambda: v.clip("val", 0, "where"), "needle"),
        (lambda: v.clip("val", -1, "when"), "index"),
        (lambda: v.clip("val", 10**8, "when"), "index"),
        (lambda: v.clip("val", 0, "when", 7), "8 to 3600"),
        (lambda: v.clip("val", 0, "when", 3601), "8 to 3600"),
        (lambda: v.clip("val", 0, "when", 20).frame(20), "frames 0 to 19"),
        (lambda: v.clip("val", 0, "when", 20).frame(-1), "frames 0 to 19"),
        (lambda: v.answers("how"), "unknown kind"),
        (lambda: v.examples("val", -1), "limit"),
        (lambda: v.examples("val", 1, []), "empty"),
        (lambda: v.examples("val", 1, seed=1000), "seed"),
        (lambda: v.clip("val", 0, "when", 20).tracks[0].box(10**6), "does not show"),
        (lambda: list(questions.ask(v.clip("val", 0, "when", 20), "how")), "unknown kind"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_unknown_codec_is_refused(tmp_path, pyav):
    with pytest.raises(ValueError, match="h264, mpeg4"):
        v.clip("val", 0, "when", 8).write(tmp_path / "clip.mp4", "vp8")


def test_a_missing_encoder_is_named_with_the_alternative(tmp_path, pyav, monkeypatch):
    monkeypatch.setattr(pyav, "codecs_available", {"mpeg4"})
    with pytest.raises(files.MissingCodecError, match="libx264; choose another codec: mpeg4"):
        v.clip("val", 0, "when", 8).write(tmp_path / "clip.mp4", "h264")
    assert list(tmp_path.iterdir()) == []


def test_without_pyav_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(VTPruneError, match=r"vtprune\[video\]"):
        v.clip("val", 0, "when", 8).write(tmp_path / "clip.mp4")


def test_the_sheet_frames_relevant_moments_in_green(sets):
    items = sets["val"][: len(v.KINDS)]
    sheet = np.asarray(command.contact_sheet(items))
    height = sheet.shape[0] // len(items)
    for row, item in enumerate(items):
        green = (sheet[row * height : (row + 1) * height] == (0, 170, 0)).all(2).sum() > 300
        assert green == bool(item.relevant)


def test_the_command_prints_a_line_per_kind(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["video", "floor", "--limit", "90"])
    command.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["kind"] for line in lines] == list(v.KINDS)
