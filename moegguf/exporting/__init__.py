"""A finished mix in the hands of other programs: Ollama's Modelfile, LM Studio's folders, a model card for the Hub.

Reads headers and cards, and writes files of text; no weight is read, but where one has to be copied.
"""
