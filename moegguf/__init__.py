"""moegguf: mix fine-tunes of one model into a Mixture of Experts, as one GGUF file."""

__version__ = "0.1.0"
