"""Messages with pictures and sound -> token ids and the rows that stand at their soft tokens.

    file -> decoder process -> features -> encoder -> rows, kept by the file's digest

A medium that came before costs nothing again: its rows are kept, least recently used first to go.
Everything here runs on one thread of the engine process, beside the one that makes answers.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nestd.bundle.errors import BundleError, Cancelled, Internal, ModalityUnavailable, TooLarge
from nestd.bundle.manifest import Bundle, Modality
from nestd.daemon.engine.encoders import Encoders, soft_tokens
from nestd.daemon.engine.messages import ChatMessage, EngineOptions, MediaContent, media_of
from nestd.daemon.prompt.audio import HOP, RATE, AudioWindow
from nestd.daemon.prompt.decoder_process import Decoder
from nestd.daemon.prompt.template import Prompt

Floats = npt.NDArray[np.float32]
Decoded = Sequence[Floats] | Sequence[AudioWindow]
Key = tuple[str, str, int | None]

# Of 10 ms: two convolutions of stride 2 and the reduction by 4 (Gemma3nAudioConfig).
FRAMES_PER_TOKEN = 16

log = logging.getLogger("nestd.engine")


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """What a generation starts from.

    Attributes:
        ids: the prompt's token ids.
        soft_rows: float32 [soft tokens in ids, hidden], in the order of the prompt; None without
            media.
    """

    ids: list[int]
    soft_rows: Floats | None = None


class MediaReader:
    """Reads the media of requests; `encoders` may be told to load and unload between two reads."""

    def __init__(self, bundle: Bundle, prompt: Prompt, options: EngineOptions) -> None:
        self.encoders = Encoders(bundle, options)
        self._prompt = prompt
        self._soft = soft_tokens(bundle)
        self._sizes = bundle.manifest.vision.sizes if bundle.manifest.vision else ()
        self._decoder = Decoder(options.media)
        self._rows: OrderedDict[Key, list[Floats]] = OrderedDict()
        self._limit = options.feature_cache_bytes

    def read(
        self,
        messages: Sequence[ChatMessage],
        check_length: Callable[[int], None],
        cancelled: Callable[[], bool],
    ) -> EncodedPrompt:
        """Return the prompt of `messages`.

        Args:
            messages: the conversation.
            check_length: called with the number of ids before anything is encoded, may raise.
            cancelled: asked between two pictures or windows of sound.

        Raises:
            RequestError: a medium is refused (UnsupportedMedia, TooLarge), the bundle lacks its
                encoder (ModalityUnavailable), the encoder fails (Internal); what `check_length`
                raises; Cancelled.
        """
        media = media_of(messages)
        known = [self._known(item) for item in media]
        decoded = [
            rows if rows is not None else self._decode(item)
            for item, rows in zip(media, known, strict=True)
        ]
        ids = self._prompt.encode(messages, [len(pieces) for pieces in decoded])
        check_length(len(ids))
        rows: dict[Modality, list[Floats]] = {"vision": [], "audio": []}
        for item, kept, pieces in zip(media, known, decoded, strict=True):
            rows[modality_of(item)] += kept or self._encode(item, pieces, cancelled)
        return EncodedPrompt(ids, self._in_order(np.array(ids), rows))

    def keep(self, modalities: Collection[Modality]) -> None:
        """Drop the encoders that are not of `modalities`, and the rows that they made."""
        for key in [key for key in self._rows if _modality(key[0]) not in modalities]:
            del self._rows[key]
        self.encoders.keep(modalities)

    def close(self) -> None:
        """End the decoder process."""
        self._decoder.close()

    def _known(self, item: MediaContent) -> list[Floats] | None:
        """Return the rows of a medium that came before, or None."""
        rows = self._rows.get(self._key(item))
        if rows is not None:
            self._rows.move_to_end(self._key(item))
        return rows

    def _decode(self, item: MediaContent) -> Decoded:
        """Return the pictures or windows of one medium."""
        modality = modality_of(item)
        if modality not in self._soft:
            raise ModalityUnavailable(
                f"this bundle has no {modality} encoder: leave the {item.type} out, or ask a node "
                "whose info lists the modality"
            )
        try:
            data = item.path.read_bytes()
        except OSError as error:
            log.error("cannot read %s: %s", item.path, error)
            raise Internal(f"the {item.type} has been lost: send the request again") from error
        if item.type == "audio":
            windows = self._decoder.audio(data, item.content_type)
            self._check_hearing(windows)
            return windows
        if item.type == "image":
            return [self._decoder.image(data, self._size(item), item.content_type)]
        frames = self._decoder.video(data, self._size(item), item.content_type)
        return [frame.pixel_values for frame in frames]

    def _check_hearing(self, windows: Sequence[AudioWindow]) -> None:
        """Refuse a clip that is longer than what a model smaller than Gemma's hears at once."""
        most = self._soft["audio"].count * FRAMES_PER_TOKEN
        if any(len(window.input_features) > most for window in windows):
            seconds = most * HOP / RATE
            raise TooLarge(f"this model hears at most {seconds:.0f} s at once: send a shorter clip")

    def _encode(
        self, item: MediaContent, pieces: Decoded, cancelled: Callable[[], bool]
    ) -> list[Floats]:
        known = self._known(item)
        if known is not None:  # the same medium twice in one request
            return known
        rows: list[Floats] = []
        for piece in pieces:
            if cancelled():
                raise Cancelled("the request was cancelled while its media were encoded")
            try:
                if isinstance(piece, AudioWindow):
                    rows.append(self.encoders.audio(piece))
                else:
                    rows.append(self.encoders.image(piece))
            except BundleError as error:
                log.error("%s", error)
                raise Internal(f"the {modality_of(item)} encoder fails: {error}") from error
        self._remember(self._key(item), rows)
        return rows

    def _remember(self, key: Key, rows: list[Floats]) -> None:
        self._rows[key] = rows
        total = sum(row.nbytes for kept in self._rows.values() for row in kept)
        while total > self._limit:
            _, old = self._rows.popitem(last=False)
            total -= sum(row.nbytes for row in old)

    def _in_order(
        self, ids: npt.NDArray[np.int64], rows: dict[Modality, list[Floats]]
    ) -> Floats | None:
        """Return all rows in the order in which their soft tokens stand in `ids`."""
        tokens = {modality: soft.soft_token for modality, soft in self._soft.items()}
        soft = ids[np.isin(ids, list(tokens.values()))]
        parts = {modality: np.concatenate(kept) for modality, kept in rows.items() if kept}
        if not parts:
            return None
        width = next(iter(parts.values())).shape[1]
        result = np.empty((len(soft), width), np.float32)
        for modality, part in parts.items():
            result[soft == tokens[modality]] = part
        return result

    def _size(self, item: MediaContent) -> int:
        return item.size or max(self._sizes)

    def _key(self, item: MediaContent) -> Key:
        return (item.type, item.sha256, None if item.type == "audio" else self._size(item))


def modality_of(item: MediaContent) -> Modality:
    """Return the encoder that `item` needs; a film's frames are pictures."""
    return _modality(item.type)


def _modality(kind: str) -> Modality:
    return "audio" if kind == "audio" else "vision"
