"""Models over HTTP: a process of llama.cpp's server for each (`process`, `llama_server`), one `front` for all of them.

The wheel that brings the server, xllamacpp, has neither TLS nor llama.cpp's mode for several models, and its server
takes requests of any size at any pace. The front has all of this, and passes on what the servers answer as it comes.
Nor has the wheel RPC or a choice of devices: what asks for them is served by `own_server`, on moegguf's own runtime.
`serving` starts and ends everything.
"""
