"""Feature distillation: a short training in which the original is the teacher and the pruned model the student.

`feature_distance` is the loss, `feature_mimic` the training loop, `muon` the optimizer, `schedule` its learning rate. A
new loss takes the place of `Distance`.
"""
