"""Proposals: K decode steps of all candidates over tensors that stay where they are."""
