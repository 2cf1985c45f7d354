"""Services that every other folder uses: files, signals, processes, private copies of models, progress, text.

Nothing here knows of graphs or of pruning. Functions take and give plain values, tensors or modules. A helper that two
folders need, and that has nothing to do with fx, goes here.
"""
