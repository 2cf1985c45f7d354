"""Models of the package ultralytics: batches, loss and boxes, and what keeps a pruned network when it is trained on.

`adapter` defines the adapter; `letterbox` and `decoding` do its images and boxes. ultralytics trains a new network,
built from the yaml of the old one: `pruned_yaml` marks that yaml, `trainer` keeps the pruned network, `class_layers`
fits it to other classes, and `yolo` makes a `YOLO` object use that trainer.
"""
