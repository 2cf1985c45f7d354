"""Exports of ultralytics models, run and evaluated like the networks that they are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.runtime.private_copy import private_copy


class OpenVino:
    """An exported network on the CPU; it takes one image at a time.

    Parameters
    ----------
    folder : Path
        Folder that ultralytics' export wrote.
    threads : int
        Threads of an inference.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        import openvino

        (file,) = folder.glob("*.xml")
        self.model = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_NUM_THREADS": threads})

    @property
    def precision(self) -> str:
        """Data type that OpenVINO chose for this processor where the network is not quantized."""
        return str(self.model.get_property("INFERENCE_PRECISION_HINT").to_string())

    def __call__(self, images: Tensor) -> Tensor:
        """Run the network on images (N, 3, H, W); returns its first output."""
        return torch.cat([torch.from_numpy(self.model(image[None].numpy())[0].copy()) for image in images])


def export_openvino(weights: Path, size: int | None, data: Path, int8_images: int = 0) -> Path:
    """Export a checkpoint by ultralytics, in INT8 if there are images to calibrate its ranges on; returns the folder.

    Parameters
    ----------
    weights : Path
        Checkpoint of a `YOLO` object. The export is written beside it.
    size : int
        Side of the images in pixels.
    data : Path
        ultralytics' YAML file of the data set.
    int8_images : int
        Number of its training images for the calibration; 0 exports in floating point.
    """
    from ultralytics import YOLO
    from ultralytics.data.utils import check_det_dataset

    options: dict[str, Any] = {"format": "openvino", "imgsz": size, "device": "cpu"}
    if int8_images:
        count = len(list(Path(check_det_dataset(str(data))["train"]).iterdir()))
        options |= {"quantize": 8, "data": str(data), "split": "train", "fraction": min(1.0, int8_images / count)}
    return Path(YOLO(weights).export(**options))


def replace_forward(network: nn.Module, run: OpenVino) -> nn.Module:
    """Return a copy of a network whose outputs are those of an export. It can be evaluated like the network."""
    twin = private_copy(network)
    twin.forward = run.__call__
    return twin
