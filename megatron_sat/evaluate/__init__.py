"""How good a model is: losses per domain, and benchmark tasks."""
