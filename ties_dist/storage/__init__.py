"""Where bytes live: local files, and memory."""
