"""Drawings of a network and its plans: a page to explore, SVG, PNG, Graphviz and Mermaid.

An analysis, a plan or a pruned model comes in; a file goes out. `network_view` makes plain data of it, which the other
modules write. The JavaScript renderer is in `web`. A new file format is a function and a row in `draw.FORMATS`.
"""
