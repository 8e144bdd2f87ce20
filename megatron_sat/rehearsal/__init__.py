"""A run that is looked at before a cluster exists for it: memory, machines, paths."""
