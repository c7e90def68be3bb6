"""Rows of JSON Lines: read, answered by an engine of models that users name, recorded so that a run can go on."""
