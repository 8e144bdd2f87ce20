"""Runs that queue for a device. Kept apart from `distributed`, for who starts runs needs neither torch nor Megatron."""

TURN = "MEGATRON_SAT_TURN"
"""An environment variable that names a file: of the runs that are told of it, one trains at a time."""
