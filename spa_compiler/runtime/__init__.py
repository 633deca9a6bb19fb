"""What ships inside kernels.so: the C side (`c/`), the code written per artifact (`region.py`), the link (`link.py`)."""
