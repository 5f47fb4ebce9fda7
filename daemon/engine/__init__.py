"""The engine: loaded graphs, caches and answers, in a process of its own."""
