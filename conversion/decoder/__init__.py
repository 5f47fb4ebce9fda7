"""The decoder graph: one file per part of the model."""

from nestd.conversion.decoder.graph import DecoderBytes, write_decoder
from nestd.conversion.decoder.int8_cache import write_int8_cache_decoder

__all__ = ["DecoderBytes", "write_decoder", "write_int8_cache_decoder"]
