"""Drawings of a network and its plans: a page to explore, SVG, PNG, Graphviz and Mermaid.

The input is an analysis, a plan or a pruned model; the output is a file. `network_view` converts the input to plain
data, which the other modules write. The JavaScript renderer is in `web`. A new file format is a function and a row in
`draw.FORMATS`.
"""
