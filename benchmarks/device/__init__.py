"""What a machine with a GPU and many cores makes of this engine, in one command of minutes: see `device.md`."""
