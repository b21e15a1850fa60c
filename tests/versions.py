"""In what the supported versions of transformers differ, as far as tests have to know."""

from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer

# Whether generate() runs the vision encoder before the prefill. Where it does not (5.16), stock code mixes up the
# pictures of a row in beam search, drops pictures in chunked prefill, and knows no `mm_encoder_outputs`.
ENCODES_BEFOREHAND = hasattr(GenerationMixin, "_prepare_multimodal_encoder_kwargs_for_generation")
# Whether gradient checkpointing runs a layer's hooks again in the backward pass (until 5.20).
HOOKS_INSIDE_CHECKPOINTS = "__call__" in vars(GradientCheckpointingLayer)
