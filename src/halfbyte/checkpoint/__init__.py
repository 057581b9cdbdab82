"""Checkpoints on disk: where they come from (source), how they are read (reader) and written (layout)."""
