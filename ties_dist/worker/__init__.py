"""All that a worker ever runs: reading, counting, merging, solving."""
