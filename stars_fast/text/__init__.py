"""Prompts as users write them, and the frames that chat templates put around answers."""
