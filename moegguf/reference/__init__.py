"""The reference in PyTorch: every mix computed from its definition.

`model` is the network; `engine` generates and scores text with it, as the runtime does with a GGUF. Knows the build
side, which opens and checks a mix, and not the runtime: whoever needs a tokenizer brings it along.
"""
