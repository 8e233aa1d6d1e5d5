"""Diptych: find out which data and which recipe make a better CLIP."""

__version__ = "0.1.0"
