"""Images and labels: reading them, making calibration batches of them, and measuring average precision on them.

Files in COCO's or YOLO's format or folders of images come in; batches and mAP go out. A new file format goes into a
module of its own that gives the rows `CocoDataset` gives.
"""
