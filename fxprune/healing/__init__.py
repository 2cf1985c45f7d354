"""Brings a pruned model's outputs back to those of the original, without labels.

The pruned model, the original and calibration batches come in; the pruned model with other weights goes out. A new
method is a function and a row in `methods.METHODS`.
"""
