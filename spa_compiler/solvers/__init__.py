"""Numerics on arrays alone: which weights go, and what the others become. No ONNX in here.

A weight is `[n, k]` = [outputs, inputs], as everywhere; `problem.py` states what is solved.
"""
