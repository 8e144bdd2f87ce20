"""How long a run will take: what one device was measured to do, and the sum of what a step asks of it."""
