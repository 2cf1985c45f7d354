"""Adapters: how to read the batches of a kind of model, compute its loss and find its boxes.

Input: a model and a raw batch. Output: a `Batch` in one common form, a loss, or detections. For a new kind of model,
write a module with an `Adapter` (see `protocol`) and add it to the table in `registry`.
"""
