"""Runs side by side: what was recorded, who is ahead, and at equal time."""
