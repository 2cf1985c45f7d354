"""Kinds of models: which batches each takes, how it gives a loss, how it gives boxes.

A model and a raw batch come in; a `Batch` in one common form, a loss or detections go out. For a new kind of model
write a module with an `Adapter`, see `protocol`, and add it to the table of `registry`.
"""
