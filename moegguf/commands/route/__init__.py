"""`moegguf route`: routers of mixes."""

HELP = "Fit a router, put it into a finished mix, export it for a server, draw what it does."
EXAMPLES = """\
examples:
  moegguf route fit --mix mix.gguf --text math=sums.jsonl --text chat=talk.txt -o router.safetensors
  moegguf route set mix.gguf --router router.safetensors
  moegguf route map mix.gguf --text math=sums.jsonl --text chat=talk.txt
  moegguf route export mix.gguf --router router.safetensors -o router.gguf
"""

COMMANDS = {
    "fit": "compute a router from text of each expert's domain",
    "set": "replace the router inside a finished mix, in place",
    "export": "write a router as an adapter that llama.cpp can switch on for a request",
    "map": "draw which expert is chosen, per layer and domain",
}
