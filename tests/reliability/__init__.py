"""Faults planted in real runs, many times over: `make test-reliability`, with a sample in `make test`.

Each module is one kind of fault. It yields trials, one dictionary each, with what was done and whether it came out
right; `__main__` writes them as a table.
"""
