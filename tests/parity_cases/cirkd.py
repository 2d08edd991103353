"""CIRKD against winycg/CIRKD."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from baselines.cirkd import Method, batch_loss, memory_loss
from parity_cases import Case, below, gradient, integers, load, maps, shape
from pipelines.maps import direction, labels_at


def compare(case: str, data: Case) -> Iterator[tuple[str, Tensor, np.ndarray]]:
    student, teacher = maps(data, "student", gradient=True), maps(data, "teacher")
    temperature = float(data["temperature"])
    if "labels" not in data:
        loss = batch_loss(student, teacher, temperature)
        yield "loss", loss, data["loss"]
        yield "grad_student", gradient(loss, student), data["grad_student"]
        return
    kd_temperature, classes = float(data["kd_temperature"]), int(data["classes"])
    config = Method.Config(
        weight_kd=0.0,
        weight_batch=0.0,
        weight_pixel=1.0,
        weight_region=1.0,
        temperature=temperature,
        kd_temperature=kd_temperature,
        pool=1,
        pixel_queue=data["before/teacher_pixel_queue"].shape[1],
        region_queue=data["before/teacher_segment_queue"].shape[1],
        pixel_keys=1,
        region_keys=1,
        pixels_per_class=int(data["pixel_update"]),
        pixels="authors",
    )
    shapes = {"logits": (classes, *student.shape[2:])}
    method = Method(config, shapes | {"fusion": shape(student)}, shapes | {"fusion": shape(teacher)})
    load(method.head, below(data, "param/"))
    queues = {
        "teacher_pixel_queue": method.pixel_queue,
        "pixel_queue_ptr": method.pixel_pointer,
        "teacher_segment_queue": method.region_queue,
        "segment_queue_ptr": method.region_pointer,
    }
    for name, buffer in queues.items():
        buffer.copy_(torch.from_numpy(data[f"before/{name}"]))
    labels = labels_at(integers(data, "labels"), student.shape[-2:])
    labels[labels == int(data["ignore_index"])] = 255
    teacher = direction(teacher)
    method.remember(teacher, labels, permuted(labels, classes, config.pixels_per_class, data))
    for name, buffer in queues.items():
        yield f"after/{name}", buffer, data[f"after/{name}"]
    projected, valid = direction(method.head(student)), (labels != 255).flatten(1)
    for name, queue in (("pixel", method.pixel_queue), ("region", method.region_queue)):
        keys = queue[:, integers(data, f"{name}_index")].flatten(0, 1)
        loss = memory_loss(projected, teacher, keys, valid, temperature, kd_temperature)
        yield f"loss_{name}", loss, data[f"loss_{name}"]
        yield f"grad_student_{name}", gradient(loss, student), data[f"grad_student_{name}"]


def permuted(labels: Tensor, classes: int, most: int, data: Case) -> Tensor:
    """The positions that the permutations of the file choose, image by image and class by class."""
    positions = torch.zeros(len(labels), classes, most, dtype=torch.long)
    number = 0
    for image, k in np.ndindex(len(labels), classes):
        if (labels[image] == k).any():
            chosen = integers(data, f"enqueue_perm/{number}")[:most]
            positions[image, k, : len(chosen)] = chosen
            number += 1
    return positions
