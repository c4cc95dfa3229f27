"""`python -m ties_dist` is `ties-dist`."""

from ties_dist.cli import main

main()
