"""`python -m ties_dist` is `ties-dist`."""

from ties_dist.cli import main

if __name__ == "__main__":
    main()
