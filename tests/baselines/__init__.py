"""The baselines against their arithmetic, written out."""
