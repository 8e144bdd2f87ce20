"""SAT inside transformers, against transformers."""
