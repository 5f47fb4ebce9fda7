"""Trains pocket with the MatFormer objective and writes checkpoint/ (bfloat16 safetensors).

Every step trains the full size, the nested size and one size in between, each on its own rows, and
adds the gradients. `--finish` goes on from checkpoint/.
Only answer tokens have a loss, so the layers that share KV run on those positions alone: the same
early stop the engine makes in prefill, with KV sharing as in inference.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from data import examples
from model import Submodel, load_model, load_submodels, make_elastic, pocket_config, select
from tokenizer import (
    BOS,
    CHECKPOINT,
    END_OF_TURN,
    EOS,
    PAD,
    encode_answer,
    encode_prompt,
    load_tokenizer,
)  # fmt: skip
from tokenizers import Tokenizer
from torch import distributed, nn
from torch.multiprocessing.spawn import spawn
from torch.nn import functional
from transformers import Gemma3nForCausalLM, GenerationConfig

ROW, ANSWERS = 144, 72  # tokens of a packed row, of which at most so many predict an answer
IGNORE = -100
# The full size comes first; the smaller ones follow at a price they can bear.
LOSS_WEIGHTS = {"nested": 0.4, "between": 0.7, "full": 1.0}


@dataclass(frozen=True)
class Batch:
    """Packed rows: several examples side by side that do not see each other."""

    input_ids: torch.Tensor  # [rows, ROW]
    position_ids: torch.Tensor  # [rows, ROW], from 0 for every example
    example_ids: torch.Tensor  # [rows, ROW], -1 is padding
    answer_index: torch.Tensor  # [rows, ANSWERS], the positions that predict an answer token
    labels: torch.Tensor  # [rows, ANSWERS]


def batches(tokenizer: Tokenizer, rows: int, seed: int) -> Iterator[Batch]:
    """Pack the training stream, first fit."""
    stream = examples("train", seed)
    while True:
        packed: list[list[tuple[list[int], list[int]]]] = [[] for _ in range(rows)]
        free = [(ROW, ANSWERS)] * rows
        misses = 0
        while misses < 12:
            example = next(stream)
            prompt = encode_prompt(tokenizer, example.request)
            answer = encode_answer(tokenizer, example.command)
            size = len(prompt) + len(answer) - 1
            fits = [i for i, (t, a) in enumerate(free) if t >= size and a >= len(answer)]
            if not fits:
                misses += 1
                continue
            packed[fits[0]].append((prompt, answer))
            tokens, answers = free[fits[0]]
            free[fits[0]] = (tokens - size, answers - len(answer))
        yield tensors(packed)


def tensors(packed: list[list[tuple[list[int], list[int]]]]) -> Batch:
    """Lay out rows of (prompt, answer) pairs, which must fit."""
    rows = len(packed)
    batch = Batch(
        torch.full((rows, ROW), PAD),
        torch.zeros((rows, ROW), dtype=torch.long),
        torch.full((rows, ROW), -1),
        torch.zeros((rows, ANSWERS), dtype=torch.long),
        torch.full((rows, ANSWERS), IGNORE),
    )
    for row, members in enumerate(packed):
        at = answers = 0
        for number, (prompt, answer) in enumerate(members):
            ids = [*prompt, *answer[:-1]]
            end, first = at + len(ids), at + len(prompt) - 1
            batch.input_ids[row, at:end] = torch.tensor(ids)
            batch.position_ids[row, at:end] = torch.arange(len(ids))
            batch.example_ids[row, at:end] = number
            stop = answers + len(answer)
            batch.answer_index[row, answers:stop] = torch.arange(first, end)
            batch.labels[row, answers:stop] = torch.tensor(answer)
            at, answers = end, stop
    return batch


class SharedKV:
    """As much of a transformers cache as one pass over whole sequences needs."""

    def __init__(self) -> None:
        self.shared_layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, key: torch.Tensor, value: torch.Tensor, _layer: int, _kwargs: object = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Nothing came before: the states are all there is."""
        return key, value


def masks(batch: Batch, window: int) -> dict[str, torch.Tensor]:
    """Additive masks: causal, within one example, and within the window for sliding layers."""
    example, at = batch.example_ids, torch.arange(batch.example_ids.shape[1])
    distance = at[:, None] - at[None, :]
    allowed = (example[:, :, None] == example[:, None, :]) & (distance >= 0)
    result = {"full_attention": allowed, "sliding_attention": allowed & (distance < window)}
    return {
        kind: torch.zeros(mask.shape).masked_fill(~mask, -1e9)[:, None]
        for kind, mask in result.items()
    }


def answer_logits(
    model: Gemma3nForCausalLM, batch: Batch, embeds: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits [rows, answers, vocabulary]; the same as model(...) gives at those positions.

    `embeds` [rows, tokens, hidden] replaces the token embeddings: train_media.py has soft tokens in
    it. Ids without a per-layer embedding count as id 0 there, as in Gemma3nModel.
    """
    text, config = model.model, model.config
    first_shared = config.num_hidden_layers - config.num_kv_shared_layers
    if embeds is None:
        embeds = text.embed_tokens(batch.input_ids)
    ids = batch.input_ids
    ids = ids.where(ids < config.vocab_size_per_layer_input, 0)
    per_layer = text.project_per_layer_inputs(embeds, text.get_per_layer_inputs(ids))
    rope = {
        "full": text.rotary_emb(embeds, batch.position_ids),
        "local": text.rotary_emb_local(embeds, batch.position_ids),
    }
    mask = masks(batch, config.sliding_window)
    hidden = torch.stack([embeds, *_same_size(embeds, [p(embeds) for p in text.altup_projections])])

    index, cache, cut = batch.answer_index, SharedKV(), False
    for layer in text.layers:
        if layer.layer_idx >= first_shared and not cut:
            hidden, per_layer = _take(hidden, index, 1, 2), _take(per_layer, index, 0, 1)
            rope = {k: (_take(c, index, 0, 1), _take(s, index, 0, 1)) for k, (c, s) in rope.items()}
            mask = {kind: _take(m, index, 0, 2) for kind, m in mask.items()}
            cut = True
        hidden = layer(
            hidden, rope["full"], rope["local"], per_layer[:, :, layer.layer_idx].contiguous(),
            attention_mask=mask[layer.attention_type], past_key_values=cache, use_cache=True,
        )[0]  # fmt: skip

    if not cut:  # every sharing layer is skipped
        hidden = _take(hidden, index, 1, 2)
    pairs = zip(text.altup_unembed_projections, hidden[1:], strict=True)
    merged = torch.stack([hidden[0], *_same_size(hidden[0], [p(h) for p, h in pairs])]).mean(0)
    cap = config.final_logit_softcapping
    return cap * torch.tanh(model.lm_head(text.norm(merged)).float() / cap)


def _same_size(like: torch.Tensor, others: list[torch.Tensor]) -> list[torch.Tensor]:
    """Scale each vector of `others` to the root mean square of `like`, as Gemma3nTextModel does."""
    target = like.pow(2).mean(-1, keepdim=True).sqrt()
    return [o * target / o.pow(2).mean(-1, keepdim=True).clamp(min=1e-5).sqrt() for o in others]


def _take(tensor: torch.Tensor, index: torch.Tensor, rows: int, positions: int) -> torch.Tensor:
    """Keep the positions `index` [rows, n]; `rows` and `positions` are dimensions of `tensor`."""
    shape, sizes = [1] * tensor.dim(), list(tensor.shape)
    shape[rows], shape[positions] = index.shape
    sizes[positions] = index.shape[1]
    return tensor.gather(positions, index.reshape(shape).expand(sizes))


def new_model() -> Gemma3nForCausalLM:
    """Fresh weights; the two defaults with which such a model does not learn are changed."""
    config = pocket_config()
    model = Gemma3nForCausalLM(config)
    for layer in model.model.layers:
        # Attention has scale 1.0, so a q_norm of ones starts with a saturated softmax.
        nn.init.constant_(layer.self_attn.q_norm.weight, config.head_dim**-0.5)
        # Hugging Face starts this at zero, which cuts the per-layer embeddings off.
        nn.init.ones_(layer.altup.correct_output_scale)
    return model


def optimizers(model: Gemma3nForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for embeddings, norms and the tiny AltUp matrices."""
    muon: list[nn.Parameter] = []
    adam: list[nn.Parameter] = []
    for name, weight in model.named_parameters():
        is_matrix = weight.dim() == 2 and min(weight.shape) >= 32 and "embed_tokens" not in name
        (muon if is_matrix else adam).append(weight)
    return [
        torch.optim.Muon(muon, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(adam, lr=lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def lr_factor(step: int, progress: float, warmup: int = 40) -> float:
    """Linear warm-up, then cosine to zero."""
    return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * progress)))


def save(model: Gemma3nForCausalLM) -> None:
    """Write the Hugging Face checkpoint, rounded to bfloat16."""
    rounded = copy.deepcopy(model).bfloat16()
    rounded.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=BOS, eos_token_id=[EOS, END_OF_TURN], pad_token_id=PAD, do_sample=False
    )
    rounded.save_pretrained(CHECKPOINT)


def sum_gradients(weights: list[nn.Parameter]) -> None:
    """Add up the gradients of all workers."""
    gradients: list[torch.Tensor] = [weight.grad for weight in weights if weight.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    for gradient, part in zip(
        gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True
    ):
        gradient.copy_(part.view_as(gradient))


def train(worker: int, options: argparse.Namespace) -> None:
    """The training loop of one worker; all keep the same weights."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{options.meeting}", rank=worker, world_size=options.workers
    )
    torch.manual_seed(options.seed)
    rng = random.Random(options.seed)
    nested_width, submodels = load_submodels()
    nested, between, full = submodels[0], submodels[1:-1], submodels[-1]
    model = load_model().requires_grad_() if options.finish else new_model()
    model.train()
    average = copy.deepcopy(model)
    layers = make_elastic(model)
    if options.compile:
        torch._dynamo.config.recompile_limit = 128
        for layer in layers:
            layer.compile(dynamic=False)
    optims = optimizers(model, options.lr)
    weights = list(model.parameters())
    rows = options.rows // options.workers
    stream = batches(load_tokenizer(), rows, seed=options.seed * options.workers + worker)
    step, started, losses = 0, time.time(), dict.fromkeys(("nested", "between", "full"), 0.0)

    progress = torch.zeros(1)
    while progress < 1:
        for optimizer in optims:
            for group in optimizer.param_groups:
                group["lr"] = options.lr * lr_factor(step, progress.item())
        plan: dict[str, Submodel] = {"nested": nested, "between": rng.choice(between), "full": full}
        for kind, submodel in plan.items():
            select(model, layers, submodel, nested_width)
            batch = next(stream)
            with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
                logits = answer_logits(model, batch)
                loss = functional.cross_entropy(
                    logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE
                )
            (loss * LOSS_WEIGHTS[kind]).backward()  # type: ignore[no-untyped-call]
            losses[kind] += 0.05 * (loss.item() - losses[kind]) if step else loss.item()
        sum_gradients(weights)
        nn.utils.clip_grad_norm_(weights, 1.0)
        for optimizer in optims:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            decay = min(0.99, (step + 1) / (step + 20))
            for slow, fast in zip(average.parameters(), weights, strict=True):
                slow.lerp_(fast, 1 - decay)
        step += 1
        progress[0] = max(step / options.steps, (time.time() - started) / 60 / options.minutes)
        distributed.broadcast(progress, src=0)
        if worker == 0 and (step % 25 == 0 or progress >= 1):
            shown = " ".join(f"{kind} {loss:.4f}" for kind, loss in losses.items())
            print(f"step {step} {time.time() - started:.0f}s loss {shown}", flush=True)
        if worker == 0 and (step % 200 == 0 or progress >= 1):
            save(average)
    distributed.destroy_process_group()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=14, help="packed rows for each of three sizes")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--minutes", type=float, default=60.0, help="end earlier if slower")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--finish", action="store_true", help="go on from checkpoint/")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--no-bf16", dest="bf16", action="store_false")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options.meeting = f"{folder}/meeting"
        spawn(train, args=(options,), nprocs=options.workers)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
