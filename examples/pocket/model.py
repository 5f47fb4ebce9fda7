"""pocket's model: the real `Gemma3nForCausalLM`, small, and the one way its nested sizes are cut.

`make_elastic` once, then `select` a submodel as often as wanted: a narrow layer uses the first rows
of gate and up and the first columns of down, a skipped layer is left out. Weights and their names
stay those of the checkpoint; nothing is copied. Training and evaluation both go through these two.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import yaml
from tokenizer import BOS, CHECKPOINT, END_OF_TURN, EOS, PAD, VOCAB_SIZE
from torch import nn
from torch.nn import functional
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig, logging
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP

SUBMODELS_FILE: Final = Path(__file__).parent / "checkpoint" / "submodels.yaml"
LAYERS: Final = 10


@dataclass(frozen=True)
class Submodel:
    """One nested size: which layers run wide, which do not run."""

    name: str
    wide_layers: tuple[int, ...]
    skipped_layers: tuple[int, ...]


def load_submodels() -> tuple[int, list[Submodel]]:
    """(nested FFN width, sizes from smallest to full)."""
    content = yaml.safe_load(SUBMODELS_FILE.read_text(encoding="utf-8"))
    sizes = [
        Submodel(entry["name"], tuple(entry["wide_layers"]), tuple(entry["skipped_layers"]))
        for entry in content["submodels"]
    ]
    return int(content["nested_intermediate_size"]), sizes


def pocket_config() -> Gemma3nTextConfig:
    """Every width is a multiple of 32, the block of int8 quantisation."""
    return Gemma3nTextConfig(
        architectures=["Gemma3nForCausalLM"],
        vocab_size=VOCAB_SIZE,
        vocab_size_per_layer_input=VOCAB_SIZE,
        hidden_size=128,
        hidden_size_per_layer_input=32,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_kv_shared_layers=5,
        sliding_window=32,
        max_position_embeddings=2048,
        laurel_rank=32,
        altup_num_inputs=4,
        activation_sparsity_pattern=[0.6, 0.6, 0.6] + [0.0] * (LAYERS - 3),
        final_logit_softcapping=30.0,
        pad_token_id=PAD,
        eos_token_id=[EOS, END_OF_TURN],  # type: ignore[arg-type]  # a list as in Gemma's own
        bos_token_id=BOS,
    )


class ElasticMLP(Gemma3nTextMLP):
    """The FFN of Gemma 3n with a width that may change between two calls."""

    active_width: int

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Run the first `active_width` neurons; gaussian top-k sees only those."""
        width = self.active_width
        gate = functional.linear(hidden_states, self.gate_proj.weight[:width])
        if self.activation_sparsity > 0.0:
            gate = self._gaussian_topk(gate)
        up = functional.linear(hidden_states, self.up_proj.weight[:width])
        return functional.linear(self.act_fn(gate) * up, self.down_proj.weight[:, :width])


def make_elastic(model: Gemma3nForCausalLM) -> list[Any]:
    """Give every layer's FFN a width; returns all layers, which `select` needs."""
    layers = list(model.model.layers)
    for layer in layers:
        layer.mlp.__class__ = ElasticMLP
        layer.mlp.active_width = layer.mlp.intermediate_size
    return layers


def select(
    model: Gemma3nForCausalLM, layers: list[Any], submodel: Submodel, nested_width: int
) -> None:
    """Turn the model into one of its submodels, from whichever it was before."""
    kept = [i for i in range(len(layers)) if i not in submodel.skipped_layers]
    for i in kept:
        full = layers[i].mlp.intermediate_size
        layers[i].mlp.active_width = full if i in submodel.wide_layers else nested_width
    model.model.layers = nn.ModuleList(layers[i] for i in kept)


def effective_parameters(config: Gemma3nTextConfig, submodel: Submodel, nested_width: int) -> int:
    """Weights a step reads, without token and per-layer embeddings and without unused K and V."""
    with torch.device("meta"):
        model = Gemma3nForCausalLM(config)
    unread = [f"layers.{layer}." for layer in submodel.skipped_layers]
    for layer in range(config.num_hidden_layers - config.num_kv_shared_layers, LAYERS):
        unread += [f"layers.{layer}.self_attn.{part}" for part in ("k_proj", "v_proj", "k_norm")]
    total = 0
    for name, weight in model.model.named_parameters():
        if name.startswith(("embed_tokens", *unread)):
            continue
        count = weight.numel()
        if name.startswith("per_layer_model_projection"):
            count = count * (LAYERS - len(submodel.skipped_layers)) // LAYERS
        elif ".mlp." in name and int(name.split(".")[1]) not in submodel.wide_layers:
            count = count * nested_width // config.intermediate_size[0]
        total += count
    return total


def load_model() -> Gemma3nForCausalLM:
    """The trained language model at float32, as it is after rounding to its stored type."""
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # of the towers, left out
    model: Gemma3nForCausalLM = Gemma3nForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    model.requires_grad_(False)
    return model
