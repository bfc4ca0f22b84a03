"""Tests of jhessians and converters; `tests.oracles` holds what they are measured against."""
