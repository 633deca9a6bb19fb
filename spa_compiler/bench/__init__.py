"""Engines side by side, in turns, on the same inputs."""
