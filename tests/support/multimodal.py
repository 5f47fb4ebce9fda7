"""A tiny Gemma3nForConditionalGeneration with real (timm and conformer) towers, weights random."""

from __future__ import annotations

import copy

from timm.models._efficientnet_builder import decode_arch_def
from transformers import (
    Gemma3nAudioConfig,
    Gemma3nConfig,
    Gemma3nForConditionalGeneration,
    Gemma3nVisionConfig,
)

from support.checkpoints import randomise, text_config
from support.tiny import VOCABULARY


def conditional_generation_model() -> Gemma3nForConditionalGeneration:
    """Return a random float32 model; its vision tower is MobileNet-V5 cut to two blocks."""
    blocks = decode_arch_def([["er_r1_k3_s2_e4_c32"], ["uir_r1_a3_k5_s2_e4_c64"]])
    vision = Gemma3nVisionConfig(
        hidden_size=2048,
        vocab_size=10,
        vocab_offset=VOCABULARY - 20,
        model_args={
            "block_args": copy.deepcopy(blocks),
            "stem_size": 8,
            "msfa_output_resolution": 4,
        },
    )
    audio = Gemma3nAudioConfig(
        vocab_size=10,
        vocab_offset=VOCABULARY - 10,
        hidden_size=32,
        conf_num_attention_heads=2,
        conf_num_hidden_layers=1,
        sscp_conv_channel_size=(8, 4),
    )
    config = Gemma3nConfig(
        text_config=text_config().to_dict(),
        vision_config=vision.to_dict(),
        audio_config=audio.to_dict(),
    )
    config._attn_implementation = "eager"
    model = Gemma3nForConditionalGeneration(config).eval()
    # timm has put functions into the block arguments, which config.json cannot hold.
    model.config.vision_config.model_args = {}
    randomise(model)
    return model
