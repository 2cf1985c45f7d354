"""Reads fx graphs and finds the regions that can be removed. No module here rewrites a graph.

Input: the graph of an island and the arguments of one call. Output: the symbolic shapes of its values, and the regions
that can be removed, with a reason for each layer that cannot. `records` holds the dataclasses that all stages share. A
new operator goes into the tables of `operators`.
"""
