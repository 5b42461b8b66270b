"""Running a finished GGUF: `model` opens it, `chat` talks to it, `machine` says what it runs on.

Nothing here knows how a mix was made: what it needs to know is in the file. So running needs no builder.
"""
