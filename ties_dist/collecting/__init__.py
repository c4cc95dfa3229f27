"""Running a model over data for what some methods have to know of it."""
