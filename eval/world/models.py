"""The reference models: their configurations, tokenizers and processors, and how they are written to disk."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from .questions import RELATIONS
from .scenes import MAX_STICKERS, POSITIONS, SIZE, atlas

PATCH = 8
SIDE = SIZE // PATCH  # tokens along one side of the picture
TEXT_LENGTH = 40  # longest caption, in tokens
PAD, BOS, UNK, EOS, IMAGE = "<pad>", "<s>", "<unk>", "</s>", "<image>"
SPECIAL = (PAD, BOS, UNK, EOS, IMAGE)

_WORDS = (
    "? . , : user assistant system a an the and of at is are there it in on with what where which how many say says "
    "does sign sticker stickers picture relative to place photo background thing things this that i see look find "
    "yes no none answer question one two three four small read character characters"
)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}ASSISTANT: {% else %}{{ message['role'].upper() }}: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }} {% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% elif part['type'] == 'text' %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def vocabulary() -> dict[str, int]:
    """Every word the models know, with its token id; special tokens come first."""
    words = [
        *SPECIAL,
        *_WORDS.split(),
        *RELATIONS,
        *(word for position in POSITIONS for word in position.split()),
        *(str(number) for number in range(MAX_STICKERS + 1)),
        *atlas().names,
        *atlas().groups,
        *atlas().glyphs.lower(),
    ]
    return {word: index for index, word in enumerate(dict.fromkeys(words))}


def tokenizer(end: bool, padding_side: str) -> PreTrainedTokenizerFast:
    """Word-level tokenizer: lower case, split at spaces and punctuation.

    Args:
        end: whether an encoded text ends with ``</s>``; every text starts with ``<s>``.
        padding_side: ``"left"`` for generation, ``"right"`` for CLIP's text tower.
    """
    ids = vocabulary()
    core = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}" if end else f"{BOS} $A",
        special_tokens=[(BOS, ids[BOS]), (EOS, ids[EOS])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        padding_side=padding_side,
        model_max_length=TEXT_LENGTH if end else 1024,
        clean_up_tokenization_spaces=False,
        extra_special_tokens={"image_token": IMAGE},
    )


def image_processor() -> CLIPImageProcessorPil:
    """Only scales pixels to -1..1: pictures have their native size, so every backend gives the same values."""
    return CLIPImageProcessorPil(
        do_resize=False,
        do_center_crop=False,
        do_convert_rgb=True,
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def vision_config() -> CLIPVisionConfig:
    """The vision tower: 6 layers of width 128, 12 x 12 patches and [CLS]."""
    return CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
        projection_dim=64,
        hidden_act="gelu",
    )


def clip_config() -> CLIPConfig:
    """A small CLIP: the tower of `vision_config`, and a text tower with 3 layers of width 96."""
    ids = vocabulary()
    text = CLIPTextConfig(
        vocab_size=len(ids),
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        projection_dim=64,
        hidden_act="gelu",
        pad_token_id=ids[PAD],
        bos_token_id=ids[BOS],
        eos_token_id=ids[EOS],
    )
    return CLIPConfig(text_config=text.to_dict(), vision_config=vision_config().to_dict(), projection_dim=64)


def llava_config() -> LlavaConfig:
    """A small LLaVA: the tower of `vision_config` and a Llama decoder with 8 layers of width 128."""
    ids = vocabulary()
    text = LlamaConfig(
        vocab_size=len(ids),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        pad_token_id=ids[PAD],
        bos_token_id=ids[BOS],
        eos_token_id=ids[EOS],
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision_config().to_dict(),
        text_config=text.to_dict(),
        image_token_index=ids[IMAGE],
        image_seq_length=SIDE * SIDE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def save_clip(model: CLIPModel, folder: Path) -> None:
    """Write model and processor as a plain checkpoint folder."""
    model.save_pretrained(folder)
    processor = CLIPProcessor(image_processor(), tokenizer(end=True, padding_side="right"))
    processor.save_pretrained(folder)


def save_llava(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write model, generation settings and processor as a plain checkpoint folder."""
    ids = vocabulary()
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=8,
        pad_token_id=ids[PAD],
        bos_token_id=ids[BOS],
        eos_token_id=ids[EOS],
    )
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    # the names published LLaVA checkpoints have, which other engines read too
    tensors = {
        re.sub(r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model.", k): v
        for k, v in tensors.items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    processor = LlavaProcessor(
        image_processor(),
        tokenizer(end=False, padding_side="left"),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(folder)


def pixel_values(pixels: torch.Tensor) -> torch.Tensor:
    """What `image_processor` gives for a batch of pictures.

    Args:
        pixels: (batch, height, width, 3) uint8.

    Returns:
        (batch, 3, height, width) float32 in -1..1.
    """
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0
