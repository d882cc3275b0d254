from __future__ import annotations

from types import SimpleNamespace

from sssd_hpc.train.build import build_model, parameter_groups


def test_matrices_decay_and_kernels_have_a_rate_of_their_own(small: SimpleNamespace) -> None:
    config = small.config(weight_decay=0.1, kernel_rate=0.3)
    model = build_model(config, small.store())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, config.train)
    found = [[names[id(parameter)] for parameter in group["params"]] for group in groups]
    assert sorted(name for group in found for name in group) == sorted(names.values())
    matrices, vectors, kernels = found
    assert all(name.endswith(".C") for name in kernels)
    assert len(kernels) == 2 * len(model.blocks)
    assert "blocks.0.step.weight" in matrices
    assert "blocks.0.conv.parametrizations.weight.original1" in matrices
    assert "blocks.0.conv.parametrizations.weight.original0" in vectors
    assert {"blocks.0.step.bias", "blocks.0.s4_in.D", "blocks.0.s4_in.norm.weight"} <= set(vectors)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.0]
    assert [group["scale"] for group in groups] == [1.0, 1.0, 0.3]
