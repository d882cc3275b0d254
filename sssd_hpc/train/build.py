"""The model and schedule that a configuration asks for, on a given store."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from sssd_hpc.config import Config, TrainConfig
from sssd_hpc.ecg.leads import EIGHT, LEADS
from sssd_hpc.ecg.store import Store
from sssd_hpc.errors import UserError
from sssd_hpc.model import SSSDECG


def model_leads(config: Config) -> tuple[str, ...]:
    """Return the names of the model's leads, in its order."""
    return EIGHT if config.model.leads == "eight" else LEADS


def model_arguments(config: Config, store: Store) -> dict[str, Any]:
    """Return the keyword arguments of `SSSDECG`.

    Raises:
        UserError: the records are longer than the model's kernels.
    """
    if config.model.lmax < store.length:
        raise UserError(
            f"model.lmax is {config.model.lmax} but the records in {store.path} have "
            f"{store.length} samples; set --model.lmax {store.length}"
        )
    arguments = dataclasses.asdict(config.model)
    del arguments["leads"]
    return {
        "num_leads": len(model_leads(config)),
        "num_labels": len(store.label_names),
        **arguments,
    }


def build_model(config: Config, store: Store) -> SSSDECG:
    """Return the untrained model; its weights are decided by `train.seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        model = SSSDECG(**model_arguments(config, store))
    model.activation_checkpointing = config.train.activation_checkpointing
    return model


def parameter_groups(model: nn.Module, train: TrainConfig) -> list[dict[str, Any]]:
    """Return AdamW's groups: matrices, which decay, vectors, and the S4 kernels' C.

    `scale` multiplies the learning rate of a group.
    """
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "vectors": [], "kernels": []}
    for name, parameter in model.named_parameters():
        is_matrix = sum(size > 1 for size in parameter.shape) > 1
        kind = "kernels" if name.endswith(".C") else "matrices" if is_matrix else "vectors"
        groups[kind].append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": train.weight_decay if kind == "matrices" else 0.0,
            "scale": train.kernel_rate if kind == "kernels" else 1.0,
        }
        for kind, parameters in groups.items()
        if parameters
    ]


def schedule_arguments(config: Config) -> dict[str, Any]:
    """Return the keyword arguments of `NoiseSchedule.linear`."""
    arguments = dataclasses.asdict(config.diffusion)
    for name in ("scale_mv", "prediction", "distilled_steps"):
        del arguments[name]
    return arguments
