"""`moegguf route`: routers of mixes."""

HELP = "Put a router into a finished mix, or export it for a server."
EXAMPLES = """\
examples:
  moegguf route set mix.gguf --router router.safetensors
  moegguf route export mix.gguf --router router.safetensors -o router.gguf
"""

COMMANDS = {
    "set": "replace the router inside a finished mix, in place",
    "export": "write a router as an adapter that llama.cpp can switch on for a request",
}
