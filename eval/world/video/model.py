"""The reference model for video: Qwen2-VL's architecture, its tokenizer and processor, and how it is written to disk.

No [CLS], M-RoPE, a patch merger, grouped-query attention with biases. A frame of 96 x 96 pixels has 8 x 8 patches of
12 pixels and, merged 2 x 2, 16 visual tokens. ``temporal_patch_size`` is 1 (published models: 2), so that a frame that
is chosen or left out never shares its tokens with another one.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers import models as token_models
from torch import Tensor
from transformers import (
    AddedToken,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from .. import models as picture_models
from ..models import BOS, EOS, PAD, UNK
from ..scenes import SIZE
from .questions import NEW_WORDS

PATCH = 12
MERGE = 2
PATCHES = SIZE // PATCH  # along one side of a frame
SIDE = PATCHES // MERGE  # tokens along one side of a frame
TOKENS = SIDE * SIDE  # visual tokens of a frame
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
MROPE_SECTION = (8, 4, 4)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}ASSISTANT: {% else %}{{ message['role'].upper() }}: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }} {% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\n"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>\n"
    "{% elif part['type'] == 'text' %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def vocabulary() -> dict[str, int]:
    """Every word the model knows, with its token id; the picture world's words keep theirs."""
    words = [
        *picture_models.vocabulary(),
        *NEW_WORDS,
        *(VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD),
    ]
    return {word: index for index, word in enumerate(dict.fromkeys(words))}


def tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer: lower case, split at spaces and punctuation, padded on the left."""
    ids = vocabulary()
    core = Tokenizer(token_models.WordLevel(ids, unk_token=UNK))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, ids[BOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        additional_special_tokens=[
            AddedToken(word, normalized=False, special=True)
            for word in (VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)
        ],
        padding_side="left",
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )


def config() -> Qwen2VLConfig:
    """The model: a ViT with 5 layers of width 128, and a decoder with 8 layers of width 128."""
    ids = vocabulary()
    return Qwen2VLConfig(
        vision_config={
            "depth": 5,
            "embed_dim": 128,
            "hidden_size": 128,
            "hidden_act": "gelu",
            "mlp_ratio": 4,
            "num_heads": 4,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 1,
        },
        text_config={
            "vocab_size": len(ids),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": list(MROPE_SECTION),
            },
            "bos_token_id": ids[BOS],
            "eos_token_id": ids[EOS],
            "pad_token_id": ids[PAD],
            "tie_word_embeddings": False,
        },
        image_token_id=ids[IMAGE_PAD],
        video_token_id=ids[VIDEO_PAD],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        tie_word_embeddings=False,
    )


def processor() -> Qwen2VLProcessor:
    """Pictures and frames are resized to about 96 x 96 pixels, which the world's own have already."""
    settings = {
        "size": {"shortest_edge": SIZE * SIZE, "longest_edge": SIZE * SIZE},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "patch_size": PATCH,
        "temporal_patch_size": 1,
        "merge_size": MERGE,
    }
    return Qwen2VLProcessor(
        Qwen2VLImageProcessorPil(**settings),
        tokenizer(),
        Qwen2VLVideoProcessor(**settings, do_sample_frames=False, cap_pixels_per_frame=False),
        chat_template=CHAT_TEMPLATE,
    )


def save(model: Qwen2VLForConditionalGeneration, folder: Path) -> None:
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
    processor().save_pretrained(folder)


def patches(pixels: Tensor) -> Tensor:
    """What the processor gives for frames of the world's size.

    Args:
        pixels: [N, 96, 96, 3] uint8.

    Returns:
        [N, 64, 432] float32 in -1..1; patches of a merged token follow each other.
    """
    values = pixels.float() / 127.5 - 1.0
    tiles = values.view(-1, SIDE, MERGE, PATCH, SIDE, MERGE, PATCH, 3)
    return tiles.permute(0, 1, 4, 2, 5, 7, 3, 6).reshape(-1, PATCHES * PATCHES, 3 * PATCH * PATCH)


def grid(frames: int) -> Tensor:
    """``image_grid_thw`` or ``video_grid_thw`` of one item: [1, 3]."""
    return torch.tensor([[frames, PATCHES, PATCHES]])
