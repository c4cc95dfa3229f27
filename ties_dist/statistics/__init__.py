"""Stores on disk: what is known of an expert besides its weights, and what scans counted."""
