"""Shapes of published models: the stock classes of transformers at full size with random weights, and inputs for them.

Time and memory of a forward pass depend on shapes, not on what was learned. (What a method *keeps* does depend on it, so
nothing about accuracy can be read off these models.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import gcd, prod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vtprune.errors import InvalidOptionError

from ..shrink import Inputs

STD = 0.02  # of the matrices: `initializer_range` of all these configurations
FEWEST_LAYERS = 4  # of a cut language model: Qwen3-VL feeds its first three, and FastV needs one behind
WORDS = (1000, 30000)  # token ids that are plain text in all vocabularies here


class Parameters(NamedTuple):
    """Parameters of a model.

    Attributes:
        encoder: vision tower and projector or merger.
        language: language model with its embeddings and its head; 0 where there is none.
    """

    encoder: int
    language: int


@dataclass(frozen=True, eq=False)
class Shape:
    """A published model's shape, with one picture or video per sample.

    Attributes:
        name: key in `SHAPES`.
        title: name for people.
        what: what a sample is.
        grid: visual tokens of a sample as (frames, rows, columns); frames as the language model sees them.
        classes: names of the configuration and the model class in transformers.
        vision: arguments of the vision configuration.
        text: arguments of the language model's configuration; empty where there is none.
        rest: further arguments of the whole model's configuration.
        pixels: how the model takes pixels: [B, 3, H, W], [B, frames, 3, H, W], or packed patches with a grid.
        lead: token ids in front of the visual ones, as the chat template puts them.
        newline: placeholders behind the visual tokens that stand for no part of the picture.
        pad: token id of padding.
    """

    name: str
    title: str
    what: str
    grid: tuple[int, int, int]
    classes: tuple[str, str]
    vision: Mapping[str, Any]
    text: Mapping[str, Any] = field(default_factory=dict)
    rest: Mapping[str, Any] = field(default_factory=dict)
    pixels: Literal["picture", "video", "patches"] = "picture"
    lead: tuple[int, ...] = ()
    newline: int = 0
    pad: int = 0

    @property
    def tokens(self) -> int:
        """Visual tokens per sample that a method can prune."""
        return prod(self.grid)

    @property
    def encoder_only(self) -> bool:
        """Whether there is no language model."""
        return not self.text

    @property
    def layers(self) -> int:
        """Decoder layers of the real model; 0 where there is no language model."""
        return int(self.text.get("num_hidden_layers", 0))

    def build(
        self,
        device: torch.device | str,
        dtype: torch.dtype,
        layers: int | None = None,
        seed: int = 0,
        narrow: bool = False,
    ) -> nn.Module:
        """The stock model with random weights: evaluation mode, sdpa, no gradients, generation without an end.

        Weights are allocated once, on the device and in the dtype, and filled in place.

        Args:
            layers: decoder layers, if fewer than the real ones.
            seed: of the weights, per device.
            narrow: thin layers and a shallow encoder with the same token counts, for tests.

        Raises:
            InvalidOptionError: more layers than the real model has, or none.
        """
        import transformers
        from transformers.initialization import no_init_weights

        model_class: Any = getattr(transformers, self.classes[1])
        device = torch.device(device)
        with no_init_weights(), device:
            model: nn.Module = model_class._from_config(
                self._configuration(layers, narrow), dtype=dtype, attn_implementation="sdpa"
            )
        model.eval().requires_grad_(False)
        if device.type != "meta":
            _fill(model, torch.Generator(device).manual_seed(seed))
        if not self.encoder_only:
            self._settle(model)
        return model

    def _configuration(self, layers: int | None, narrow: bool) -> Any:
        import transformers

        config_class: Any = getattr(transformers, self.classes[0])
        vision, text = dict(self.vision), dict(self.text)
        if layers is not None:
            if not 1 <= layers <= self.layers and not layers == self.layers == 0:
                raise InvalidOptionError(
                    f"layers={layers} is outside {self.name}: give 1 to {self.layers} decoder layers"
                    if self.layers
                    else f"layers={layers}: {self.name} has no decoder layers"
                )
            text["num_hidden_layers"] = layers
        if narrow:
            vision, text = _narrow_vision(vision), _narrow_text(text)
        if self.encoder_only:
            return config_class(**vision)
        if "out_hidden_size" in vision:
            vision["out_hidden_size"] = text["hidden_size"]
        return config_class(vision_config=vision, text_config=text, **self.rest)

    def _settle(self, model: nn.Module) -> None:
        """Generation that neither ends nor yields a placeholder."""
        config: Any = model.config
        generation: Any = model.generation_config
        generation.eos_token_id = None
        generation.pad_token_id = self.pad
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        ids = (getattr(config, name, None) for name in names)
        generation.suppress_tokens = [i for i in ids if i is not None]

    def inputs(self, model: nn.Module, batch: int, text_tokens: Sequence[int], seed: int = 0) -> Inputs:
        """A batch as the model's processor would make it, of random pixels and random words, on the model's device.

        Args:
            model: from :meth:`build`.
            batch: rows, each with one picture or video.
            text_tokens: tokens of a row that are no visual placeholders, markers and chat template included; taken in
                turns if there are more rows. Shorter rows are padded on the left. Not looked at by encoders.
            seed: of pixels and words.

        Raises:
            InvalidOptionError: a row's text is shorter than the chat template.
        """
        first = next(model.parameters())
        random = torch.Generator(first.device).manual_seed(seed)
        config: Any = model.config
        out = self._random_pixels(getattr(config, "vision_config", config), batch, first, random)
        if self.encoder_only:
            return out
        is_video = self.grid[0] > 1
        placeholder = config.video_token_id if is_video else config.image_token_id
        visual = [placeholder] * (self.tokens + self.newline)
        if self.pixels == "patches":
            visual = [config.vision_start_token_id, *visual, config.vision_end_token_id]
        fixed = len(self.lead) + len(visual) - self.tokens - self.newline
        words = torch.Generator().manual_seed(seed)
        rows = []
        for i in range(batch):
            rest = text_tokens[i % len(text_tokens)] - fixed
            if rest < 1:
                raise InvalidOptionError(
                    f"{fixed + rest} text tokens are too few: {self.name} has {fixed} of chat template and markers, "
                    f"and a question needs one; give {fixed + 1} or more"
                )
            rows.append([*self.lead, *visual, *torch.randint(*WORDS, (rest,), generator=words).tolist()])
        width = max(map(len, rows))
        ids = torch.tensor([[self.pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        out |= {"input_ids": ids.to(first.device), "attention_mask": mask.to(first.device)}
        if self.pixels == "patches":
            out["mm_token_type_ids"] = (1 + is_video) * (out["input_ids"] == placeholder).int()
        return out

    def _random_pixels(self, vision: Any, batch: int, like: Tensor, random: torch.Generator) -> Inputs:
        def noise(*size: int) -> Tensor:
            return torch.randn(size, generator=random, device=like.device, dtype=like.dtype)

        frames, rows, cols = self.grid
        if self.pixels == "picture":
            return {"pixel_values": noise(batch, 3, vision.image_size, vision.image_size)}
        if self.pixels == "video":
            return {"pixel_values_videos": noise(batch, frames, 3, vision.image_size, vision.image_size)}
        merge = vision.spatial_merge_size
        grid = torch.tensor([[frames, merge * rows, merge * cols]] * batch, device=like.device)
        patch = 3 * vision.temporal_patch_size * vision.patch_size**2
        pixels = noise(batch * self.tokens * merge**2, patch)
        if frames == 1:
            return {"pixel_values": pixels, "image_grid_thw": grid}
        seconds = torch.ones(batch, device=like.device)
        return {"pixel_values_videos": pixels, "video_grid_thw": grid, "second_per_grid_ts": seconds}


def _narrow_vision(vision: Mapping[str, Any]) -> dict[str, Any]:
    out = {**vision, "hidden_size": 32, "intermediate_size": 32}
    for heads in {"num_heads", "num_attention_heads"} & set(out):
        out[heads] = 2
    for depth in {"depth", "num_hidden_layers"} & set(out):
        out[depth] = 4
    if "fullatt_block_indexes" in out:
        out["fullatt_block_indexes"] = [1, 3]
    if "deepstack_visual_indexes" in out:
        out["deepstack_visual_indexes"] = [0, 1, 2]
    return out


def _narrow_text(text: Mapping[str, Any]) -> dict[str, Any]:
    if not text:
        return {}
    grouped = text["num_key_value_heads"] < text["num_attention_heads"]
    out = {
        **text,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1 if grouped else 2,
    }
    rope, head = dict(text["rope_parameters"]), 16
    if "mrope_section" in rope:
        factor = gcd(*rope["mrope_section"])
        rope["mrope_section"] = [part // factor for part in rope["mrope_section"]]
        head = 2 * sum(rope["mrope_section"])
    if "head_dim" in out:
        out["head_dim"] = head
    return {**out, "rope_parameters": rope, "hidden_size": 2 * head}


@torch.no_grad()
def _fill(model: nn.Module, random: torch.Generator) -> None:
    """Random matrices and embeddings, norms of one, biases of zero, in place."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or not name.endswith((".weight", ".bias")):
            parameter.normal_(std=STD, generator=random)
        else:
            parameter.fill_(1.0 if name.endswith(".weight") else 0.0)


def parameters(model: nn.Module) -> Parameters:
    """Parameters of a model from :meth:`Shape.build`, its encoder's and its language model's."""
    total = sum(p.numel() for p in model.parameters())
    decoder = getattr(getattr(model, "model", None), "language_model", None)
    if decoder is None:
        return Parameters(total, 0)
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    language = sum(p.numel() for part in (decoder, head) for p in part.parameters())
    return Parameters(total - language, language)


@cache
def counted(name: str, layers: int | None = None) -> Parameters:
    """Parameters of a shape, without allocating any.

    Args:
        name: key in `SHAPES`.
        layers: decoder layers, if fewer than the real ones.
    """
    return parameters(SHAPES[name].build("meta", torch.float32, layers))


def bytes_needed(shape: Shape, dtype: torch.dtype, layers: int | None = None) -> int:
    """Bytes of the weights; activations and caches come on top."""
    return sum(counted(shape.name, layers)) * dtype.itemsize


def fitting_layers(shape: Shape, dtype: torch.dtype, free_bytes: int) -> int | None:
    """Most decoder layers whose model's weights fit into so many bytes.

    Args:
        free_bytes: what weights may take; leave room for activations.

    Returns:
        `FEWEST_LAYERS` to `shape.layers`, 0 for an encoder that fits; None if it does not fit.
    """
    if shape.encoder_only:
        return 0 if bytes_needed(shape, dtype) <= free_bytes else None
    one, two = (bytes_needed(shape, dtype, layers) for layers in (1, 2))
    layers = min(shape.layers, 1 + (free_bytes - one) // (two - one))
    return layers if layers >= FEWEST_LAYERS else None


_CLIP_L: Mapping[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_LLAVA_REST: Mapping[str, Any] = {
    "image_token_index": 32000,
    "image_seq_length": 576,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
    "tie_word_embeddings": False,
}
_LLAVA_CLASSES = ("LlavaConfig", "LlavaForConditionalGeneration")
_LLAVA_LEAD = (1, 3148, 1001, 29901, 29871)  # <s> USER: _
_LLAVA_PAD = 32001
_QWEN_IDS: Mapping[str, Any] = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "tie_word_embeddings": False,
}
_QWEN_PAD = 151643
_USER = (151644, 872, 198)  # <|im_start|>user\n
# <|im_start|>system\nYou are a helpful assistant.<|im_end|>\n, which Qwen2.5-VL's template puts first
_SYSTEM = (151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198)


def _rope(theta: float, **sections: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **sections}


def _llava_7b() -> Shape:
    """CLIP ViT-L/14-336 with Vicuna 7B.

    Source: config.json of llava-hf/llava-1.5-7b-hf; what its text_config leaves out are the defaults of LlamaConfig
    (4096, 11008, 32 layers, 32 heads), and its vision_config is the default of LlavaConfig. The prompt starts at token 5, as
    in FastV's example for this checkpoint.
    """
    text = {
        "model_type": "llama",
        "vocab_size": 32064,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_parameters": _rope(10000.0),
        "pad_token_id": _LLAVA_PAD,
    }
    return Shape(
        "llava-1.5-7b",
        "LLaVA-1.5 7B",
        "a picture of 336 x 336 pixels",
        (1, 24, 24),
        _LLAVA_CLASSES,
        _CLIP_L,
        text,
        _LLAVA_REST,
        lead=_LLAVA_LEAD,
        pad=_LLAVA_PAD,
    )


def _llava_1b() -> Shape:
    """LLaVA-1.5's tower and projector with a language model of TinyLlama's shape, for machines with little memory.

    Source: config.json of TinyLlama/TinyLlama-1.1B-Chat-v1.0, with the vocabulary of LLaVA-1.5. No such checkpoint was
    published.
    """
    text = {
        "model_type": "llama",
        "vocab_size": 32064,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_parameters": _rope(10000.0),
        "pad_token_id": _LLAVA_PAD,
    }
    return Shape(
        "llava-1.5-1b",
        "LLaVA-1.5's encoder with a TinyLlama 1.1B",
        "a picture of 336 x 336 pixels",
        (1, 24, 24),
        _LLAVA_CLASSES,
        _CLIP_L,
        text,
        _LLAVA_REST,
        lead=_LLAVA_LEAD,
        pad=_LLAVA_PAD,
    )


def _llava_onevision_7b() -> Shape:
    """SigLIP so400m at 384 pixels with Qwen2 7B; 27 x 27 tokens per frame are resized to 14 x 14, one newline at the end.

    Source: config.json of llava-hf/llava-onevision-qwen2-7b-ov-hf, whose text is Qwen2-7B-Instruct's (its vocabulary
    of 152064 without the rows that revisions of the checkpoint append), and the default of LlavaOnevisionConfig for vision,
    which holds the 26 of 27 layers that are used. 196 tokens per frame: transformers' documentation.
    """
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 26,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
        "vision_use_head": False,
    }
    text = {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_parameters": _rope(1000000.0),
    }
    rest = {
        "image_token_index": 151646,
        "video_token_index": 151647,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "projector_hidden_act": "gelu",
        "vision_aspect_ratio": "anyres_max_9",
        "tie_word_embeddings": False,
    }
    return Shape(
        "llava-onevision-7b",
        "LLaVA-OneVision 7B",
        "a video of 32 frames",
        (32, 14, 14),
        ("LlavaOnevisionConfig", "LlavaOnevisionForConditionalGeneration"),
        vision,
        text,
        rest,
        pixels="video",
        lead=(151644, 872, 220),  # <|im_start|>user _
        newline=1,
        pad=_QWEN_PAD,
    )


def _qwen2_5_vl_7b(name: str = "qwen2.5-vl-7b", frames: int = 1) -> Shape:
    """Windowed vision transformer with Qwen2.5 7B; 28 pixels per token, two frames of a video make one.

    Source: config.json of Qwen/Qwen2.5-VL-7B-Instruct as copied by its derivatives (text and ids in full; of vision
    the hidden size 1280 and tokens_per_second 2); the rest of vision are the defaults of Qwen2_5_VLVisionConfig.
    """
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "out_hidden_size": 3584,
        "tokens_per_second": 2,
    }
    text = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_parameters": _rope(1000000.0, mrope_section=[16, 24, 24]),
    }
    what = "a picture of 896 x 896 pixels" if frames == 1 else "a video of 32 frames of 448 x 448 pixels"
    return Shape(
        name,
        "Qwen2.5-VL 7B",
        what,
        (1, 32, 32) if frames == 1 else (frames // 2, 16, 16),
        ("Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration"),
        vision,
        text,
        _QWEN_IDS,
        pixels="patches",
        lead=(*_SYSTEM, *_USER),
        pad=_QWEN_PAD,
    )


def _qwen2_5_vl_7b_video() -> Shape:
    """The same with a video."""
    return _qwen2_5_vl_7b("qwen2.5-vl-7b-video", 32)


def _qwen3_vl_8b() -> Shape:
    """Vision transformer of SigLIP's shape with Qwen3 8B, fed after three layers; 32 pixels per token.

    Source: config.json of Qwen/Qwen3-VL-8B-Instruct as copied by its derivatives (text and ids), defaults of
    Qwen3VLVisionConfig for vision but for out_hidden_size, which is the text's.
    """
    vision = {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
        "out_hidden_size": 4096,
    }
    text = {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "rope_parameters": _rope(5000000.0, mrope_section=[24, 20, 20], mrope_interleaved=True),
    }
    return Shape(
        "qwen3-vl-8b",
        "Qwen3-VL 8B",
        "a picture of 1024 x 1024 pixels",
        (1, 32, 32),
        ("Qwen3VLConfig", "Qwen3VLForConditionalGeneration"),
        vision,
        text,
        _QWEN_IDS,
        pixels="patches",
        lead=_USER,
        pad=_QWEN_PAD,
    )


def _vit_l() -> Shape:
    """CLIP ViT-L/14 at 336 pixels alone, [CLS] and 576 tokens.

    Source: the default vision_config of LlavaConfig, which is openai/clip-vit-large-patch14-336's.
    """
    return Shape(
        "vit-l",
        "CLIP ViT-L/14",
        "a picture of 336 x 336 pixels",
        (1, 24, 24),
        ("CLIPVisionConfig", "CLIPVisionModel"),
        {name: value for name, value in _CLIP_L.items() if name != "model_type"},
    )


_MAKERS: tuple[Callable[[], Shape], ...] = (
    _llava_7b,
    _llava_1b,
    _llava_onevision_7b,
    _qwen2_5_vl_7b,
    _qwen2_5_vl_7b_video,
    _qwen3_vl_8b,
    _vit_l,
)
SHAPES: Mapping[str, Shape] = {shape.name: shape for shape in (make() for make in _MAKERS)}
