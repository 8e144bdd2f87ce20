"""A model's whole way into another language: stages from a Hugging Face folder to one, and the report of it."""
