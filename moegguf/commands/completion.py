"""`moegguf completion`: commands and flags at TAB. The work is argcomplete's; `cli.main` answers its calls."""

from __future__ import annotations

import argparse

HELP = "Print what makes a shell complete moegguf's commands and flags at TAB."
EXAMPLES = """\
examples:
  eval "$(moegguf completion bash)"                                    a line for ~/.bashrc
  eval "$(moegguf completion zsh)"                                     a line for ~/.zshrc
  moegguf completion fish > ~/.config/fish/completions/moegguf.fish
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "fish", "powershell"))


def run(args: argparse.Namespace) -> int:
    import argcomplete

    print(argcomplete.shellcode(["moegguf"], shell=args.shell))
    return 0
