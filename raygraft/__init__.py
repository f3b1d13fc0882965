"""Raygraft: run a language model with each functional region on the device that suits it."""
