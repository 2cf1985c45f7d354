"""Facts about fx graphs. Nothing here writes to a graph.

A model and a call come in. Out come its islands (submodules captured as one graph), the symbolic shapes of their
values, and the regions that can be removed, with a reason for each that cannot. `records` holds the values that all
stages hand on. A new operator goes into the tables of `operators`, or of `channels` if it changes channels.
"""
