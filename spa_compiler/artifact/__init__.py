"""The folder that comes out: verified, sealed by a manifest, and written whole or not at all."""
