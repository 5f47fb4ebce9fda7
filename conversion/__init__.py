"""Conversion of a Hugging Face Gemma 3n checkpoint to a bundle. Never imported by the daemon."""
