"""`python -m moegguf` is `moegguf`."""

from moegguf.cli import main

raise SystemExit(main())
