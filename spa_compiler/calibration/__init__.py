"""Samples in, feeds and statistics out; example inputs and shapes where there are none."""
