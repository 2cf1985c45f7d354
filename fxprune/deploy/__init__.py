"""Pruned models outside of the process that made them: files, and a backend of `torch.compile`.

`save_load` writes a folder of plan, weights and manifest, and reads it back. `dynamo_backend` carries a plan out on the
graphs that Dynamo captured. What a folder holds is declared in `manifest`.
"""
