"""Tensors in files: headers and catalogues."""
