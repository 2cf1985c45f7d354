"""Saves and loads pruned models, and prunes models while `torch.compile` compiles them.

`save_load` writes a pruned model to a folder and reads it back. `manifest` declares the files of the folder, and
`weights` converts the weights. `dynamo_backend` has the backends for `torch.compile`, and `dynamo_matching` finds the
regions of a plan in their graphs.
"""
