"""The wire: topics, messages of the contract, and the transports that carry them."""
