"""Applies plans: `apply` runs the passes on a copy of the model, checks the result, and stores the plan on it.

Input: a model and a plan. Output: a model of the same kind. Changes to graphs are in `fxprune.passes`, checks in
`verification`, and the attributes that are stored on a pruned network in `history`.
"""
