"""From a plan to a pruned model: `apply` runs the passes on a copy, checks the result, and notes the plan on it.

A model and a plan come in; a model of the same kind goes out. Changes to graphs go into `fxprune.passes`, checks into
`verification`, notes on a pruned network into `history`.
"""
