"""A model and texts to a result: composes evaluate/ with the rooms that open models and read text."""
