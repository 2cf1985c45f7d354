"""A small trained detector with images, and the demo that prunes it.

`bundled` loads the detector and its images, which are in `data`. `run` prunes it by several criteria and prints a
table.
"""
