"""Brings the features of a pruned model close to those of the original; labels can help, but are not needed.

Input: the pruned model, the original and calibration batches. Output: a copy of the pruned model with other weights. To
add a method, write a function and add a row to `methods.METHODS`.
"""
