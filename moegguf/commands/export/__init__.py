"""`moegguf export`: a finished mix for other programs."""

HELP = "Hand a finished mix to Ollama, to LM Studio, or to the Hugging Face Hub."
EXAMPLES = """\
examples:
  moegguf export ollama mix.gguf --name my-mix
  moegguf export lmstudio mix.gguf
  moegguf export card mix.gguf --results scores.json -o README.md
"""

COMMANDS = {
    "ollama": "write a Modelfile, and let Ollama create the model",
    "lmstudio": "put it where LM Studio finds it, with the number of its experts",
    "card": "write a README.md for the Hugging Face Hub, licences checked",
}
