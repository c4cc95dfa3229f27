"""From a recipe and opened models to a plan: output files, units, memory, fingerprint."""
