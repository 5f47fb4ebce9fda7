"""Where weights come from; what a file is decides, not what it is called.

resolve          what the user names -> a directory or a file of this machine
tensors          what every source of weights offers: rows of float numbers
safetensors      Hugging Face directories
mlx              MLX directories: safetensors with affine quantised groups
gguf             GGUF files of llama.cpp and Ollama; gguf_config and gguf_tokenizer read their keys
ollama           the local store of Ollama
"""
