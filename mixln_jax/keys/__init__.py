"""Every key of a run: type, default, help, range, and whether it may change when a run continues.

The defaults are the Mix-LN paper's C4 recipe (arXiv 2412.13795, section 4.1), so a recipe states only what differs.
"""
