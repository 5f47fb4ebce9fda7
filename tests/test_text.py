"""Streaming text never splits a character and never shows a stop string."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import byte_tokenizer
from tokenizers import Tokenizer, decoders, models

from nestd.daemon.engine.text import StreamingText

TOKENIZER = byte_tokenizer()


def stream(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], StreamingText]:
    """Feed the bytes of `text` one token at a time; return what was shown at each step."""
    result = StreamingText(TOKENIZER, stop)
    pieces = []
    for token in TOKENIZER.encode(text, add_special_tokens=False).ids:
        pieces.append(result.push(token))
        if result.stopped:
            return pieces, result
    pieces.append(result.finish())
    return pieces, result


@given(st.text(min_size=1, max_size=40))
@settings(max_examples=200, deadline=None)
def test_pieces_join_to_the_text_and_hold_whole_characters_only(text: str) -> None:
    pieces, result = stream(text)
    assert "".join(pieces) == text == result.text
    assert not any("\ufffd" in piece for piece in pieces if "\ufffd" not in text)


def test_a_character_of_four_bytes_appears_at_once_with_its_last_byte() -> None:
    pieces, _ = stream("a😀b")
    assert pieces == ["a", "", "", "", "😀", "b", ""]


def test_an_unfinished_character_appears_as_a_replacement_at_the_end() -> None:
    result = StreamingText(TOKENIZER, ())
    for token in TOKENIZER.encode("x€", add_special_tokens=False).ids[:-1]:
        result.push(token)
    assert result.text == "x"
    assert result.finish() == "\ufffd"


def test_a_stop_string_ends_the_text_before_it() -> None:
    pieces, result = stream("one END two", ("END",))
    assert result.stopped
    assert "".join(pieces) == result.text == "one "


def test_what_may_begin_a_stop_string_is_held_back_until_it_is_certain() -> None:
    pieces, result = stream("EN! E", ("END",))
    assert pieces[:3] == ["", "", "EN!"]
    assert result.text == "EN! E"
    assert not result.stopped


def test_the_earliest_of_several_stop_strings_counts() -> None:
    _, result = stream("a--b##c", ("##", "--"))
    assert result.text == "a"


@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
@settings(max_examples=300, deadline=None)
def test_no_stop_string_is_ever_shown(text: str, stops: list[str]) -> None:
    pieces, result = stream(text, tuple(stops))
    shown = ""
    for piece in pieces:
        shown += piece
        assert not any(stop in shown for stop in stops)
    # Of several stop strings the one that is complete first counts.
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    assert result.stopped == bool(found)
    assert shown == (text[: min(found)[1]] if found else text)


def test_special_tokens_do_not_appear() -> None:
    result = StreamingText(TOKENIZER, ())
    assert result.push(4) + result.push(TOKENIZER.token_to_id("a")) + result.finish() == "a"


def fallback_tokenizer() -> Tokenizer:
    """Return a tokenizer with byte fallback, as Gemma's is: ids 0 to 255 bytes, 256 the word."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"word": 256}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


FALLBACK = fallback_tokenizer()


@given(st.lists(st.integers(0, 256), max_size=12))
@settings(max_examples=500, deadline=None)
def test_bytes_that_are_no_text_harm_nothing_else(ids: list[int]) -> None:
    """tokenizers' DecodeStream raises on them, which would end the engine."""
    result = StreamingText(FALLBACK, ())
    shown = "".join([*(result.push(token) for token in ids), result.finish()])
    assert shown == result.text
    whole = FALLBACK.decode(ids)
    if "\ufffd" not in whole:
        assert shown == whole
    assert shown.count("word") >= ids.count(256)


def test_a_character_of_fallback_bytes_appears_at_once_with_its_last_byte() -> None:
    result = StreamingText(FALLBACK, ())
    assert [result.push(byte) for byte in "é€".encode()] == ["", "é", "", "", "€"]
