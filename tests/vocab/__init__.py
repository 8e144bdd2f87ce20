"""Tests of megatron_sat.vocab."""
