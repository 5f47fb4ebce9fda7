"""The decoder graph: one file per part of the model."""

from nestd.conversion.decoder.graph import DecoderBytes, write_decoder

__all__ = ["DecoderBytes", "write_decoder"]
