"""What ships inside kernels.so: the C side (`c/`), code written per artifact (`region.py`), the link (`link.py`)."""
