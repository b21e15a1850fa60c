"""Tiny random models as folders that transformers and vLLM both load, with processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WORDS = (
    "what",
    "is",
    "at",
    "the",
    "top",
    "left",
    "right",
    "red",
    "blue",
    "user",
    "assistant",
    ":",
    "?",
    "a",
    "b",
    "c",
    "one",
    "two",
)
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 3,
}
VISION = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
GRIDS = [[32, 64], [64, 32], [64, 64]]


def _tokenizer(specials: dict[str, str]) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "<unk>", "</s>", *specials.values(), *WORDS]
    inner = Tokenizer(
        models.WordLevel({name: i for i, name in enumerate(dict.fromkeys(names))}, unk_token="<unk>")
    )
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=specials,
    )
    tokenizer.add_special_tokens(
        {"additional_special_tokens": list(specials.values())}, replace_extra_special_tokens=False
    )
    return tokenizer


def _save(model: Any, processor: Any, folder: Path) -> Path:
    for parameter in model.parameters():  # wide, so that different tokens give clearly different answers
        with torch.no_grad():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def llava_next_config() -> Any:
    """Tiles of 4 x 4 tokens, two to four of them and the whole picture."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig

    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION, image_size=32, patch_size=8, projection_dim=64),
        text_config=LlamaConfig(**TEXT),
        image_token_index=4,
        image_grid_pinpoints=GRIDS,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )


def llava_next(folder: Path) -> Path:
    """LLaVA-NeXT."""
    from transformers import LlavaNextForConditionalGeneration, LlavaNextImageProcessor, LlavaNextProcessor

    torch.manual_seed(1)
    model = LlavaNextForConditionalGeneration(llava_next_config())
    images = LlavaNextImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_grid_pinpoints=GRIDS
    )
    processor = LlavaNextProcessor(
        images,
        _tokenizer({"image_token": "<image>"}),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return _save(model, processor, folder)


def llava_siglip_config() -> Any:
    """36 tokens, no [CLS]."""
    from transformers import LlamaConfig, LlavaConfig, SiglipVisionConfig

    return LlavaConfig(
        vision_config=SiglipVisionConfig(**VISION, image_size=48, patch_size=8, vision_use_head=False),
        text_config=LlamaConfig(**TEXT),
        image_token_index=4,
        vision_feature_select_strategy="full",
        vision_feature_layer=-2,
    )


def llava_siglip(folder: Path) -> Path:
    """LLaVA with a SigLIP tower."""
    from transformers import LlavaForConditionalGeneration, LlavaProcessor, SiglipImageProcessor

    torch.manual_seed(2)
    model = LlavaForConditionalGeneration(llava_siglip_config())
    processor = LlavaProcessor(
        SiglipImageProcessor(size={"height": 48, "width": 48}),
        _tokenizer({"image_token": "<image>"}),
        patch_size=8,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
    )
    return _save(model, processor, folder)


def internvl_config() -> Any:
    """Tiles of 3 x 3 tokens, up to four of them and a thumbnail."""
    from transformers import InternVLConfig, InternVLVisionConfig, Qwen2Config

    return InternVLConfig(
        vision_config=InternVLVisionConfig(
            **VISION, image_size=[24, 24], patch_size=[4, 4], layer_scale_init_value=0.5, use_qk_norm=True
        ),
        text_config=Qwen2Config(**{k: v for k, v in TEXT.items() if k != "head_dim"}),
        image_token_id=4,
        image_seq_length=9,
        downsample_ratio=0.5,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )


def internvl(folder: Path) -> Path:
    """InternVL."""
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
    )

    torch.manual_seed(3)
    model = InternVLForConditionalGeneration(internvl_config())
    tokenizer = _tokenizer(
        {
            "context_image_token": "<IMG_CONTEXT>",
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "video_token": "<video>",
        }
    )
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(
            size={"height": 24, "width": 24}, crop_to_patches=True, min_patches=1, max_patches=4
        ),
        tokenizer,
        InternVLVideoProcessor(size={"height": 24, "width": 24}),
        image_seq_length=9,
    )
    return _save(model, processor, folder)


def llava_wide(folder: Path) -> Path:
    """LLaVA with random weights and shapes nearer to LLaVA-1.5's: 576 tokens per picture, 8 decoder layers of width 512."""
    from transformers import (
        AutoProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    from vtprune.eval.world import reference_dir

    old = LlavaConfig.from_pretrained(reference_dir("llava"))
    vision = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4}
    text = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
    ids = {
        name: getattr(old.text_config, name)
        for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, image_size=336, patch_size=14),
        text_config=LlamaConfig(**text, **ids, max_position_embeddings=2048),
        image_token_index=old.image_token_id,
        image_seq_length=576,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )
    processor = AutoProcessor.from_pretrained(reference_dir("llava"))
    images = processor.image_processor
    images.do_resize, images.size, images.crop_size = (
        True,
        {"shortest_edge": 336},
        {"height": 336, "width": 336},
    )
    processor.patch_size = 14
    torch.manual_seed(4)
    _save(LlavaForConditionalGeneration(config), processor, folder)
    # Stock vLLM 0.32 knows the tower by its names of transformers 4.
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    named = {
        name.replace("vision_tower.", "vision_tower.vision_model."): value for name, value in weights.items()
    }
    save_file(named, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
