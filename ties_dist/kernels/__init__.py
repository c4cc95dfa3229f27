"""Compiled loops: the merge of a slice (torch), and integer histograms of |delta| (numba)."""
