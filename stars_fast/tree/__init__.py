"""Slots, the segment tree over them, and the plug-in that lets a transformers model run on both."""
