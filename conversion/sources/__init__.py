"""Where weights come from; what a file is decides, not what it is called.

resolve          what the user names -> a directory or a file of this machine
tensors          what every source of weights offers: rows of float numbers
safetensors      Hugging Face directories
mlx              MLX directories: safetensors with affine quantised groups
gguf             names of the text decoder in GGUF files of llama.cpp and Ollama; gguf_config and
                 gguf_tokenizer read their keys, gguf_file the rows of any such file
mmproj           names of the towers in llama.cpp's second file; mmproj_config reads its keys
gguf_model       both files -> a checkpoint
ollama           the local store of Ollama
"""
