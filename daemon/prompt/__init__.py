"""Messages -> token ids: chat template and tokenizer."""
