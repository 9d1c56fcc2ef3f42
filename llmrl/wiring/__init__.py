"""From settings to a wired run: the only package that knows every class.

Everything that can be wrong is found by `check_*` before any weights load; `build_*` then wires what was checked. Which
of them belong to which run is in `runs.py`.
"""
