"""A scripted engine with the daemon's engine-handle interface, and a manifest to go with it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

from nestd.bundle.manifest import Manifest, Modality
from nestd.daemon.engine.messages import (
    Cancel,
    ChatMessage,
    Command,
    Delta,
    Event,
    Exited,
    Failed,
    Finished,
    KeepEncoders,
    LoadFailed,
    MediaContent,
    Ready,
    Retain,
    SetSubmodel,
    Start,
    Stats,
    Stop,
    Switch,
    Timings,
)


class FakeEngine:
    """Does what a test tells it; `commands` are what the daemon sent."""

    def __init__(self, on_event: Callable[[Event], None]) -> None:
        self.emit = on_event
        self.commands: list[Command] = []
        self.alive = False
        self.killed = False
        self.pid: int | None = None
        self.cpu_seconds: float | None = None

    def start(self) -> None:
        self.alive = True

    def send(self, command: Command) -> None:
        self.commands.append(command)

    def stop(self, timeout: float) -> None:
        del timeout
        self.commands.append(Stop())
        self.alive = False

    def kill(self) -> None:
        self.killed = True
        self.die(-9)

    # The script

    def ready(self) -> None:
        self.emit(Ready(load_seconds=0.1, context_length=4096))

    def load_failed(self, message: str = "no memory") -> None:
        self.emit(LoadFailed(message=message))
        self.die(1)

    def die(self, returncode: int = -9) -> None:
        self.alive = False
        self.emit(Exited(returncode=returncode))

    def stats(self, encoders: tuple[Modality, ...] = ()) -> None:
        self.emit(
            Stats(
                rss_bytes=1,
                private_bytes=1,
                decode_tokens_per_second=20.0,
                prefill_tokens_per_second=200.0,
                submodel="small",
                encoders=encoders,
            )
        )

    @property
    def starts(self) -> list[Start]:
        return [c for c in self.commands if isinstance(c, Start)]

    @property
    def cancels(self) -> list[Cancel]:
        return [c for c in self.commands if isinstance(c, Cancel)]

    @property
    def switches(self) -> list[SetSubmodel]:
        return [c for c in self.commands if isinstance(c, SetSubmodel)]

    @property
    def keeps(self) -> list[KeepEncoders]:
        return [c for c in self.commands if isinstance(c, KeepEncoders)]

    @property
    def retained(self) -> list[str]:
        return [c.submodel for c in self.commands if isinstance(c, Retain)]

    def delta(self, text: str, tokens: int = 1) -> None:
        last = self.starts[-1]
        self.emit(Delta(id=last.id, text=text, completion_tokens=tokens, submodel=last.submodel))

    def finish(
        self,
        text: str = "hello",
        reason: str = "stop",
        start: Start | None = None,
        switches: Sequence[tuple[int, str]] = (),
    ) -> None:
        last = start or self.starts[-1]
        ran = switches or [(0, last.submodel)]
        self.emit(
            Finished.model_validate(
                {
                    "id": last.id,
                    "text": text,
                    "finish_reason": reason,
                    "prompt_tokens": 3,
                    "completion_tokens": 2,
                    "switches": [Switch(token=token, submodel=name) for token, name in ran],
                    "timings": Timings(encode_ms=0, prefill_ms=1, decode_ms=2),
                }
            )
        )

    def fail(self, code: str, message: str = "it failed") -> None:
        self.emit(Failed(id=self.starts[-1].id, code=code, message=message))


class EchoEngine(FakeEngine):
    """Answers by itself: streams the words of the last message, and honours cancel at once.

    A medium is told as its type, the length of its file and the pixels asked for.
    The message `wait` gets no answer, `die` ends the engine, `die once` only the first time.
    """

    died = False

    def start(self) -> None:
        super().start()
        self.ready()

    def send(self, command: Command) -> None:
        super().send(command)
        if isinstance(command, Start):
            text = _told(command.messages[-1])
            if text == "wait":
                return
            if text == "die" or (text == "die once" and not EchoEngine.died):
                EchoEngine.died = True
                self.die()
                return
            for number, word in enumerate(text.split()):
                self.delta(word + " ", number + 1)
            self.finish(text)
        elif isinstance(command, Cancel):
            start = next(s for s in self.starts if s.id == command.id)
            self.finish("", "cancelled", start)


def _told(message: ChatMessage) -> str:
    if isinstance(message.content, str):
        return message.content
    words = []
    for part in message.content:
        if isinstance(part, MediaContent):
            data = part.path.read_bytes()
            assert hashlib.sha256(data).hexdigest() == part.sha256
            words.append(f"{part.type}:{len(data)}:{part.size}")
        else:
            words.append(part.text)
    return " ".join(words)


def small_manifest(encoders: bool = False) -> Manifest:
    """A manifest with the sub-models small, half and full; no files."""
    layers = 4
    ids = {"begin": 20, "soft_token": 21, "end": 22, "first_hard_id": 21, "hard_ids": 1}
    media = {
        "modalities": ["text", "vision", "audio"],
        "sections": {"decoder": 1, "vision_encoder": 100 * 2**20, "audio_encoder": 300 * 2**20},
        "vision": ids | {"count": 4, "sizes": [256, 512, 768]},
        "audio": ids | {"count": 3},
    }
    return Manifest.model_validate(
        {
            "format_version": 2,
            "name": "fake",
            "source": {"checkpoint": "none", "architecture": "gemma3n", "converter": "test"},
            "model": {
                "hidden_size": 8,
                "intermediate_size": [16] * layers,
                "nested_intermediate_size": 8,
                "num_attention_heads": 1,
                "num_key_value_heads": 1,
                "head_dim": 8,
                "num_kv_shared_layers": 2,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
                "sliding_window": 8,
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
                "max_position_embeddings": 4096,
                "activation_sparsity_pattern": [0.0] * layers,
                "altup_num_inputs": 4,
                "altup_active_idx": 0,
                "altup_coef_clip": None,
                "altup_correct_scale": True,
                "laurel_rank": 2,
                "hidden_size_per_layer_input": 4,
                "vocab_size": 32,
                "vocab_size_per_layer_input": 32,
                "final_logit_softcapping": None,
                "rms_norm_eps": 1e-6,
            },
            "quantization": {
                "bits": 8,
                "block_size": 32,
                "embedding_bits": 8,
                "per_layer_embedding_bits": 8,
            },
            "modalities": ["text"],
            "sections": {"decoder": 1},
            "submodels": [
                {
                    "name": name,
                    "wide_layers": wide,
                    "skipped_layers": [],
                    "effective_params": 100 + 10 * len(wide),
                    "decoder_bytes": 100,
                }
                for name, wide in (("small", []), ("half", [2, 3]), ("full", [0, 1, 2, 3]))
            ],
            "tokens": {"bos": 1, "eos": [2], "pad": 0},
            "generation": {},
            "minimum_ram_bytes": 1,
            "files": {},
        }
        | (media if encoders else {})
    )
