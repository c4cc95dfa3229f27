"""OUT: what stands there, who holds it, what is durable, how it gets its names."""
