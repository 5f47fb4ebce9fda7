"""pocket with eyes and ears: the real `Gemma3nForConditionalGeneration`, small.

The towers are timm's MobileNet-V5 and transformers' conformer, cut down. timm wants its blocks
decoded and writes functions into them, so config.json keeps them as timm's strings and `load` and
`save` translate.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Final

import torch
from timm.models._efficientnet_builder import decode_arch_def
from tokenizer import (
    AUDIO_IDS,
    AUDIO_TOKENS,
    BOS,
    CHECKPOINT,
    END_OF_TURN,
    EOS,
    IMAGE_IDS,
    IMAGE_TOKENS,
    MEDIA_TOKENS,
    PAD,
    VOCAB_SIZE,
)
from torch import nn
from train import answer_logits, tensors
from transformers import (
    Gemma3nAudioConfig,
    Gemma3nConfig,
    Gemma3nForCausalLM,
    Gemma3nForConditionalGeneration,
    Gemma3nTextConfig,
    Gemma3nVisionConfig,
    GenerationConfig,
)

# The towers as far as they are trained, and the codes that they were trained with.
# 256 x 256 pixels become 8 x 8 features and 4 x 4 soft tokens.
BLOCKS: Final = [
    ["er_r1_k3_s2_e2_c16"],
    ["er_r1_k3_s2_e4_c32"],
    ["er_r1_k3_s2_e4_c64"],
    ["er_r1_k3_s2_e2_c96"],
    ["mqa_r1_k3_h4_s1_d32_c96", "uir_r1_a3_k3_s1_e4_c96"],
]
GROUP: Final = AUDIO_IDS - IMAGE_IDS  # ids of each medium


def media_config(text: Gemma3nTextConfig) -> Gemma3nConfig:
    """The configuration around pocket's text model, as config.json has it."""
    text_config = text.to_dict()
    text_config.pop("_name_or_path", None)  # a path of the machine that trained it
    text_config["vocab_size"] = VOCAB_SIZE + len(MEDIA_TOKENS)
    vision = Gemma3nVisionConfig(
        hidden_size=2048,  # timm's MobileNet-V5 knows no other
        vocab_size=GROUP,
        vocab_offset=IMAGE_IDS,
        model_args={"block_args": BLOCKS, "stem_size": 8, "msfa_output_resolution": 4},
    )
    audio = Gemma3nAudioConfig(
        hidden_size=128,
        vocab_size=GROUP,
        vocab_offset=AUDIO_IDS,
        conf_num_attention_heads=4,
        conf_num_hidden_layers=3,
        sscp_conv_channel_size=(8, 16),
    )
    return Gemma3nConfig(
        text_config=text_config,
        vision_config=vision.to_dict(),
        audio_config=audio.to_dict(),
        vision_soft_tokens_per_image=IMAGE_TOKENS,
        audio_soft_tokens_per_image=AUDIO_TOKENS,
        boi_token_id=IMAGE_IDS,
        image_token_id=IMAGE_IDS + 1,
        eoi_token_id=IMAGE_IDS + 2,
        boa_token_id=AUDIO_IDS,
        audio_token_id=AUDIO_IDS + 1,
        eoa_token_id=AUDIO_IDS + 2,
        architectures=["Gemma3nForConditionalGeneration"],
        eos_token_id=[EOS, END_OF_TURN],
        bos_token_id=BOS,
        pad_token_id=PAD,
    )


def decoded(config: Gemma3nConfig) -> Gemma3nConfig:
    """A copy whose vision blocks are what timm's constructor takes."""
    config = copy.deepcopy(config)
    arguments = config.vision_config.model_args
    arguments["block_args"] = decode_arch_def(arguments["block_args"])
    return config


def grown(lm: Gemma3nForCausalLM) -> Gemma3nForConditionalGeneration:
    """The trained language model with new towers around it, float32."""
    model = Gemma3nForConditionalGeneration(decoded(media_config(lm.config)))
    weights = dict(lm.model.state_dict())
    # The head's rows of the media's ids are copies of <pad>'s: no answer ever has that token.
    rows = weights["embed_tokens.weight"]
    weights["embed_tokens.weight"] = torch.cat([rows, rows[PAD].repeat(len(MEDIA_TOKENS), 1)])
    model.model.language_model.load_state_dict(weights)
    model.tie_weights()
    for name, weight in model.model.vision_tower.named_parameters():
        if name.endswith("layer_scale.gamma"):  # timm's 1e-5 is for towers far deeper than this
            nn.init.ones_(weight)
    return model.requires_grad_(False).eval()


def load_or_grow() -> Gemma3nForConditionalGeneration:
    """The checkpoint; one of train.py's, which has no towers, with new ones."""
    if "vision_config" in json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8")):
        return load()
    return grown(Gemma3nForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32))


def load() -> Gemma3nForConditionalGeneration:
    """The checkpoint at float32, as it is after rounding to its stored type."""
    config = decoded(Gemma3nConfig.from_pretrained(CHECKPOINT))
    model: Gemma3nForConditionalGeneration = Gemma3nForConditionalGeneration.from_pretrained(
        CHECKPOINT, config=config, dtype=torch.float32
    )
    return model.requires_grad_(False).eval()


def save(model: Gemma3nForConditionalGeneration) -> None:
    """Write the Hugging Face checkpoint, rounded to bfloat16."""
    rounded = copy.deepcopy(model).bfloat16()
    rounded.config = media_config(model.config.text_config)
    rounded.config.dtype = torch.bfloat16
    rounded.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=BOS, eos_token_id=[EOS, END_OF_TURN], pad_token_id=PAD, do_sample=False
    )
    rounded.save_pretrained(CHECKPOINT)


def language_model(model: Gemma3nForConditionalGeneration) -> Gemma3nForCausalLM:
    """The text part as a causal model that shares its weights."""
    with torch.device("meta"):
        lm = Gemma3nForCausalLM(model.config.text_config)
    lm.model, lm.lm_head = model.model.language_model, model.lm_head
    return lm


def audio_features(
    model: Gemma3nForConditionalGeneration, features: torch.Tensor, lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Soft tokens of padded log-mel windows, without the padding rows.

    Args:
        model: the conditional model.
        features: [clips, frames, 128].
        lengths: frames of each clip.

    Returns:
        float32 [clips, rows, hidden] and the rows that each clip has.
    """
    missing = torch.arange(features.shape[1])[None] >= lengths[:, None]
    soft, beyond = model.model.get_audio_features(features, missing)
    return soft, (~beyond).sum(1)


def logits_with_media(
    lm: Gemma3nForCausalLM,
    examples: list[tuple[list[int], list[int]]],
    soft: torch.Tensor,
    hard: torch.Tensor,
    first_id: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of the answers to prompts with one medium each.

    Args:
        lm: the language model, as `model.select` left it.
        examples: (prompt, answer) ids.
        soft: [examples, soft tokens, hidden].
        hard: [GROUP, hidden], the embeddings of the medium's own ids.
        first_id: of these.

    Returns:
        [examples, answer tokens, vocabulary] and [examples, answer tokens].
    """
    batch = tensors([[example] for example in examples])
    width = max(len(prompt) + len(answer) - 1 for prompt, answer in examples)
    longest = max(len(answer) for _, answer in examples)
    batch = replace(
        batch,
        input_ids=batch.input_ids[:, :width],
        position_ids=batch.position_ids[:, :width],
        example_ids=batch.example_ids[:, :width],
        answer_index=batch.answer_index[:, :longest],
        labels=batch.labels[:, :longest],
    )
    ids = batch.input_ids
    embeds = lm.model.embed_tokens(ids.clamp(max=VOCAB_SIZE - 1))
    own = hard[(ids - first_id).clamp(min=0, max=GROUP - 1)]
    embeds = torch.where((ids >= first_id)[..., None], own, embeds)
    embeds = embeds.masked_scatter((ids == first_id + 1)[..., None], soft.to(embeds.dtype))
    return answer_logits(lm, batch, embeds), batch.labels


def hard_embeddings(embedder: nn.Module, first_id: int) -> torch.Tensor:
    """What an embedder makes of the ids of its medium: [GROUP, hidden]."""
    result: torch.Tensor = embedder(input_ids=torch.arange(first_id, first_id + GROUP))
    return result
