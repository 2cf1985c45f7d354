"""Captures the parts of a model as fx graphs. No module here rewrites a graph, and the model is left as it was.

Input: a model and the ways in which it is called. Output: the islands, which are the largest parts that are one graph,
and the reasons for all others. A graph is trusted only if it agrees with its module in every observed run.
"""
