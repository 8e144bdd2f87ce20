"""The loop, what it says about itself, and what a run is told."""
