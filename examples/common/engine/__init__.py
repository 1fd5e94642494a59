"""The engine of every trainer: command line and options, run directory, loop, evaluation, restoration of folders."""
