"""Tests of megatron_sat.estimate."""
