"""Tests of the text package, against llama.cpp where it can be asked."""
