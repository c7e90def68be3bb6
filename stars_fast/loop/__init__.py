"""The loop of all methods: who runs, what they draw, who is accepted, and what it costs."""
