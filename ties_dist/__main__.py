"""`python -m ties_dist` is `ties-dist`."""

from ties_dist.cli.commands import console

if __name__ == "__main__":
    console()
