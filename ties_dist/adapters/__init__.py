"""PEFT adapters: as experts, computed where they are read, and merged with each other."""
