"""Which batches a model takes, how it gives a loss, and how it gives boxes: one adapter a family of models."""
