"""YAML to validated values; where models are."""
