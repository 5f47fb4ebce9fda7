"""A tiny Gemma3nForConditionalGeneration with real (timm and conformer) towers, weights random.

timm's block arguments stand in config.json as strings, which transformers cannot read back:
`nestd.conversion.encoders.towers.decode_model_args` makes them timm's again, for whoever builds a
model of such a config.
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers import (
    Gemma3nAudioConfig,
    Gemma3nConfig,
    Gemma3nForConditionalGeneration,
    Gemma3nVisionConfig,
)

from nestd.conversion.encoders.towers import decode_model_args
from support.checkpoints import randomise, save_checkpoint, text_config
from support.tiny_media import (
    AUDIO_OFFSET,
    CHAT_TEMPLATE,
    HARD_IDS,
    SPECIAL_TOKENS,
    VISION_OFFSET,
    multimodal_tokenizer,
)

MODEL_ARGS = {
    "block_args": [["er_r1_k3_s2_e4_c32"], ["uir_r1_a3_k5_s2_e4_c64"]],
    "stem_size": 8,
    "msfa_output_resolution": 4,
}


def conditional_generation_model() -> Gemma3nForConditionalGeneration:
    """Return a random float32 model; its vision tower is MobileNet-V5 cut to two blocks."""
    vision = Gemma3nVisionConfig(
        hidden_size=2048,
        vocab_size=HARD_IDS,
        vocab_offset=VISION_OFFSET,
        model_args=decode_model_args(MODEL_ARGS),
    )
    audio = Gemma3nAudioConfig(
        vocab_size=HARD_IDS,
        vocab_offset=AUDIO_OFFSET,
        hidden_size=32,
        conf_num_attention_heads=2,
        conf_num_hidden_layers=2,
        sscp_conv_channel_size=(8, 4),
    )
    config = Gemma3nConfig(
        text_config=text_config().to_dict(),
        vision_config=vision.to_dict(),
        audio_config=audio.to_dict(),
        vision_soft_tokens_per_image=16,
        boi_token_id=SPECIAL_TOKENS["<start_of_image>"],
        image_token_id=SPECIAL_TOKENS["<image_soft_token>"],
        eoi_token_id=SPECIAL_TOKENS["<end_of_image>"],
        boa_token_id=SPECIAL_TOKENS["<start_of_audio>"],
        audio_token_id=SPECIAL_TOKENS["<audio_soft_token>"],
        eoa_token_id=SPECIAL_TOKENS["<end_of_audio>"],
    )
    config._attn_implementation = "eager"
    model = Gemma3nForConditionalGeneration(config).eval()
    # timm has put functions into the block arguments, which config.json cannot hold.
    model.config.vision_config.model_args = MODEL_ARGS
    randomise(model)
    return model


def save_multimodal_checkpoint(model: Gemma3nForConditionalGeneration, path: Path) -> Path:
    """Save `model` as a checkpoint directory with tokenizer and chat template; return it."""
    save_checkpoint(model, path)
    multimodal_tokenizer().save(str(path / "tokenizer.json"))
    tokens = {"bos_token": "<bos>", "eos_token": "<eos>", "chat_template": CHAT_TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(tokens))
    return path
