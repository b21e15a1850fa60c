"""How likely a frame shows what a question needs, for selectors that ask another model."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vtprune.errors import InvalidOptionError
from vtprune.video.clip import Clip, ClipError, checked, min_max
from vtprune.video.embedding import Array, Embedder

Relevance = Callable[[Array, str], Array]
"""(frames [N, h, w, 3] uint8 RGB, question) -> [N] in [0, 1]."""
Decoupling = Callable[[str], Sequence[str]]
"""Question -> what to look for; empty if that cannot be said."""

SUBSTITUTE = "relevance by an embedder's similarity, not by a vision-language model"
FUNCTION_WORDS = frozenset(
    [
        "a",
        "about",
        "after",
        "all",
        "am",
        "an",
        "and",
        "any",
        "anything",
        "appear",
        "appears",
        "appeared",
        "are",
        "at",
        "be",
        "been",
        "before",
        "being",
        "by",
        "can",
        "clip",
        "come",
        "comes",
        "did",
        "direction",
        "do",
        "does",
        "ever",
        "first",
        "for",
        "frame",
        "frames",
        "from",
        "go",
        "goes",
        "happen",
        "happens",
        "has",
        "have",
        "he",
        "her",
        "his",
        "how",
        "i",
        "in",
        "into",
        "is",
        "it",
        "its",
        "last",
        "long",
        "made",
        "make",
        "makes",
        "many",
        "me",
        "more",
        "most",
        "much",
        "my",
        "next",
        "of",
        "often",
        "on",
        "once",
        "or",
        "our",
        "seen",
        "see",
        "she",
        "show",
        "shown",
        "shows",
        "some",
        "someone",
        "something",
        "that",
        "the",
        "their",
        "them",
        "then",
        "there",
        "these",
        "they",
        "thing",
        "things",
        "this",
        "those",
        "time",
        "times",
        "to",
        "twice",
        "until",
        "video",
        "was",
        "we",
        "were",
        "what",
        "when",
        "where",
        "which",
        "while",
        "who",
        "whom",
        "whose",
        "why",
        "will",
        "with",
        "you",
        "your",
    ]
)
WITH_OBJECTS = "Is any of these visible in the image: {objects}? Answer with one letter.\nA. yes\nB. no"
WITHOUT_OBJECTS = "Does the image hold enough information to answer this question: {question}\nAnswer with one letter.\nA. yes\nB. no"
DECOUPLE = (
    "A question about a video: {question}\nWhich objects have to be seen to answer it? Answer with their names, "
    "separated by commas, or with: none"
)


def keywords(question: str) -> list[str]:
    """The runs of a question's words that are no function words: "when is the red car at the dog ?" -> red car, dog.

    Ours, a substitute for decoupling by a language model.
    """
    words = re.findall(r"[\w'-]+|[,.;:?!]", question.lower())
    runs: list[list[str]] = [[]]
    for word in words:
        if word in FUNCTION_WORDS or not word[0].isalnum():
            runs.append([])
        else:
            runs[-1].append(word)
    return [" ".join(run) for run in runs if run]


class EmbeddingRelevance:
    """The declared substitute for a vision-language model's yes: cosine of frame and text, min-max over the frames.

    Where decoupling gives several texts, a frame counts by the one that it fits best.

    Args:
        embedder: of frames and texts.
        decouple: gives the texts; the whole question where it gives none.
    """

    def __init__(self, embedder: Embedder, decouple: Decoupling = keywords) -> None:
        self.embedder = embedder
        self.decouple = decouple

    def __call__(self, frames: Array, question: str) -> Array:
        """[N] in [0, 1]; zeros where all frames fit alike."""
        return self.of(self.embedder.frames(frames), question)

    def of(self, embeddings: Array, question: str) -> Array:
        """The same from the frames' embeddings [N, D]."""
        texts = self.embedder.text(list(self.decouple(question)) or [question])
        return min_max((embeddings @ np.asarray(texts).T).max(1))


class ChatRelevance:
    """The probability with which a vision-language model answers yes, frame by frame.

        p_t = softmax(last logits over the whole vocabulary)[id of `yes`]

    Source: QuoTA (MAC-AutoML/QuoTA ec194d7, arXiv 2503.08689): the two forms of the question, two options "A" and
    "B", no renormalisation over the two. The wording is ours.

    Args:
        model: an unpatched image-text-to-text model of transformers.
        processor: its processor, with a chat template.
        decouple: question -> objects to look for, such as :class:`ChatDecoupling`; none by default.
        with_objects: prompt with `{objects}` (and `{question}` if wanted), where there are any.
        without_objects: prompt with `{question}`, where there are none.
        yes: the answer that counts; a single token of the model.
        batch_size: frames per forward pass.

    Raises:
        InvalidOptionError: `yes` is not one token, or `batch_size` is below 1.
        EvaluationError: the processor has no chat template.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        decouple: Decoupling | None = None,
        with_objects: str = WITH_OBJECTS,
        without_objects: str = WITHOUT_OBJECTS,
        yes: str = "A",
        batch_size: int = 8,
    ) -> None:
        from vtprune.eval.prompts import Prompter

        ids = processor.tokenizer(yes, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == processor.tokenizer.unk_token_id:
            raise InvalidOptionError(f"yes={yes!r} is not one token of this model; give an answer that is.")
        if batch_size < 1:
            raise InvalidOptionError(f"batch_size={batch_size}: give an int >= 1.")
        self.model = model
        self.prompter = Prompter(model, processor)
        self.decouple = decouple
        self.with_objects = with_objects
        self.without_objects = without_objects
        self.yes: int = ids[0]
        self.batch_size = batch_size

    def prompt(self, question: str) -> str:
        """What the model is asked about each frame."""
        objects = list(self.decouple(question)) if self.decouple else []
        if objects:
            return self.with_objects.format(objects=", ".join(objects), question=question)
        return self.without_objects.format(question=question)

    def __call__(self, frames: Array, question: str) -> Array:
        """[N] probabilities."""
        import torch
        from PIL import Image

        prompt = self.prompt(question)
        found: list[float] = []
        for start in range(0, len(frames), self.batch_size):
            images = [Image.fromarray(frame) for frame in frames[start : start + self.batch_size]]
            inputs = self.prompter.inputs(images, [prompt] * len(images))
            with torch.inference_mode():
                logits = self.model(**inputs, logits_to_keep=1).logits[:, -1]
            found += logits.float().softmax(-1)[:, self.yes].tolist()
        return np.array(found)


class ChatDecoupling:
    """Asks a chat model which objects a question is about.

    Source: QuoTA (MAC-AutoML/QuoTA ec194d7), which asks in several steps; one prompt here, and its wording, are ours.

    Args:
        model: a generating model of transformers.
        processor: its processor, with a chat template.
        prompt: with `{question}`; has to ask for names separated by commas, or "none".
        max_new_tokens: of the answer.
    """

    def __init__(self, model: Any, processor: Any, prompt: str = DECOUPLE, max_new_tokens: int = 64) -> None:
        self.model = model
        self.processor = processor
        self.prompt = prompt
        self.max_new_tokens = max_new_tokens

    def __call__(self, question: str) -> list[str]:
        """The objects; empty where the answer is "none"."""
        import torch

        content = [{"type": "text", "text": self.prompt.format(question=question)}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = self.processor.tokenizer(text, return_tensors="pt", add_special_tokens=False)
        ids = inputs["input_ids"].to(next(self.model.parameters()).device)
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
            )
        answer = self.processor.tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        return listed(answer)


def listed(answer: str) -> list[str]:
    """The names in the last line of an answer, separated by commas; empty for "none"."""
    lines = answer.strip().splitlines()
    names = [name.strip(" .*-\t") for name in (lines[-1].split(",") if lines else [])]
    return [] if [name.lower() for name in names] == ["none"] else [name for name in names if name]


def relevance_of(clip: Clip, relevance: Relevance | None) -> tuple[Array, tuple[str, ...]]:
    """What a relevance says of a clip's frames, and notes for the selection.

    Args:
        clip: with a question, and an embedder if there is no relevance.
        relevance: None for the substitute, :class:`EmbeddingRelevance` with the clip's embedder.

    Returns:
        [N] in [0, 1].

    Raises:
        ClipError: there is no question or nothing to score with, or the relevance gives another shape or range.
        NonFiniteScoresError: a score is NaN.
    """
    if not clip.question:
        raise ClipError("the clip has no question, so no frame is more relevant than another; give one.")
    if relevance is None:
        return EmbeddingRelevance(clip.given_embedder).of(clip.embeddings, clip.question), (SUBSTITUTE,)
    scores = checked(relevance(clip.frames, clip.question))
    if scores.shape != (clip.n,) or scores.min() < 0 or scores.max() > 1:
        raise ClipError(
            f"the relevance gave shape {scores.shape} and values {scores.min()} to {scores.max()}; "
            f"it has to give [{clip.n}] numbers in [0, 1]."
        )
    return scores, ()
