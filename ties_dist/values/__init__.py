"""Plain values that travel between processes and layers."""
