"""Evaluation of decoding methods: the same prompts, a judge that guided nothing, and what it all cost."""
