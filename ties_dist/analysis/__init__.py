"""What the experts' deltas look like, in numbers and on a page."""
