"""Many merges of one recipe from one read of the inputs."""
