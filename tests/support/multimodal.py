"""A tiny Gemma3nForConditionalGeneration with real (timm and conformer) towers, weights random.

timm's block arguments stand in config.json as strings, which transformers cannot read back:
`nestd.conversion.encoders.towers.decode_model_args` makes them timm's again, for whoever builds a
model of such a config.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import (
    Gemma3nAudioConfig,
    Gemma3nConfig,
    Gemma3nForConditionalGeneration,
    Gemma3nVisionConfig,
)

from nestd.conversion.encoders.towers import decode_model_args
from support.checkpoints import randomise, save_checkpoint, text_config
from support.tiny_media import (
    CHAT_TEMPLATE,
    HARD_IDS,
    SPECIAL_TOKENS,
    multimodal_tokenizer,
)

MODEL_ARGS = {
    "block_args": [["er_r1_k3_s2_e4_c32"], ["uir_r1_a3_k5_s2_e4_c64"]],
    "stem_size": 8,
    "msfa_output_resolution": 4,
}


def conditional_generation_model(
    tokens: Mapping[str, int] = SPECIAL_TOKENS,
    model_args: Mapping[str, Any] = MODEL_ARGS,
    **text: Any,
) -> Gemma3nForConditionalGeneration:
    """Return a random float32 model; its vision tower is MobileNet-V5 cut to two blocks.

    Args:
        tokens: ids of the tokens of media.
        model_args: of the vision tower.
        text: changes to the text decoder's config.
    """
    vision = Gemma3nVisionConfig(
        hidden_size=2048,
        vocab_size=HARD_IDS,
        vocab_offset=tokens["<end_of_image>"],
        model_args=decode_model_args(model_args),
    )
    audio = Gemma3nAudioConfig(
        vocab_size=HARD_IDS,
        vocab_offset=tokens["<end_of_audio>"],
        hidden_size=32,
        conf_num_attention_heads=2,
        conf_num_hidden_layers=2,
        sscp_conv_channel_size=(8, 4),
    )
    config = Gemma3nConfig(
        text_config=text_config(**text).to_dict(),
        vision_config=vision.to_dict(),
        audio_config=audio.to_dict(),
        vision_soft_tokens_per_image=16,
        boi_token_id=tokens["<start_of_image>"],
        image_token_id=tokens["<image_soft_token>"],
        eoi_token_id=tokens["<end_of_image>"],
        boa_token_id=tokens["<start_of_audio>"],
        audio_token_id=tokens["<audio_soft_token>"],
        eoa_token_id=tokens["<end_of_audio>"],
    )
    config._attn_implementation = "eager"
    model = Gemma3nForConditionalGeneration(config).eval()
    # timm has put functions into the block arguments, which config.json cannot hold.
    model.config.vision_config.model_args = dict(model_args)
    randomise(model)
    return model


def save_multimodal_checkpoint(model: Gemma3nForConditionalGeneration, path: Path) -> Path:
    """Save `model` as a checkpoint directory with tokenizer and chat template; return it."""
    save_checkpoint(model, path)
    multimodal_tokenizer().save(str(path / "tokenizer.json"))
    tokens = {"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": CHAT_TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(tokens))
    return path
