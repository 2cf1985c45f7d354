"""Feature distillation: a short training in which the original is the teacher and the pruned model the student.

`feature_distance` defines the loss, `feature_mimic` the training loop, `muon` the optimizer and `schedule` the learning
rate. A new loss replaces `feature_distance.FeatureDistance`.
"""
