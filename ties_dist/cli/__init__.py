"""The command line: options, commands, what a person sees."""
