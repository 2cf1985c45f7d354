"""Captures a model as fx graphs and finds the regions that can be removed. No module here rewrites a graph.

Input: a model and the arguments of one call. Output: the islands (submodules captured as one graph), the symbolic
shapes of their values, and the regions that can be removed, with a reason for each layer that cannot. `records` holds
the dataclasses that all stages share. A new operator goes into the tables of `operators`, or of `channels` if it
changes the number of channels.
"""
