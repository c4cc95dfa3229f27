"""`ties-dist` and `python -m ties_dist`: ends as told from the first moment on, before there is anything to stop."""

import os
import signal

STOPPED = 75
"""`StoppedError.exit_status`, which takes a tenth of a second to import."""


def console() -> None:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(STOPPED))
    from ties_dist.cli.commands import console as run

    run()


if __name__ == "__main__":
    console()
