"""How units are run: on this machine (`local`), later on a Ray cluster."""
