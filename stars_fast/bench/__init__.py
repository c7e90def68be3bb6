"""``stars-fast bench``: the engine beside what else does the same work, in one run, alternating."""
