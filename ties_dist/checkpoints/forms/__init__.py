"""The forms in which parameters are stored, one file each (`checkpoints.parameters.Form`)."""
