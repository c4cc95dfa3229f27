"""The conductor: which passes run, in which order, until a model is published."""
