"""What a model is: operators, regions, weights and states, read from GGUF files.

This package imports nothing else of Raygraft.
"""
