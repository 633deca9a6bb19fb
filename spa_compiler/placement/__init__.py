"""Which form every site gets, decided by measurement, and the graph rewritten accordingly."""
