"""Services that every other folder uses: files, signals, processes, private copies of models, progress, text.

No module here depends on graphs or pruning. Functions take and return plain values, tensors or modules. A helper that
two folders need and that does not use torch.fx goes here.
"""
