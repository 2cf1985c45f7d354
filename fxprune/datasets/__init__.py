"""Reads images and labels, makes calibration batches from them, and measures average precision on them.

The inputs are files in COCO or YOLO format, or folders of images. The outputs are batches and mAP. A new file format
belongs in a module of its own, with items like those of `CocoDataset`.
"""
