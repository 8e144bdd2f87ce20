"""Before a run on many hosts: who is there, and whether all are the same."""
