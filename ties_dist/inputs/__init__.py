"""From models on disk to parameters that fit together."""
