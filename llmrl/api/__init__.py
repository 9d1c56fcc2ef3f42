"""The Python API: what a program calls. The same settings, checks, runs and bits as on the command line."""
