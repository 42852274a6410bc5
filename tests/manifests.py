"""A PyTorchJob against what the API server would check: Kubeflow's own models for the job, Kubernetes' schema for pods.

Strict where the server is not: a field that nobody knows is a mistake, not something to drop.
"""

import re
from collections.abc import Iterator
from typing import Any

import kubernetes_validate
from kubeflow.training import models

KUBERNETES = "1.30"
"""The version whose fields a manifest may use."""
_PLAIN = {"str": str, "int": int, "bool": bool}
_CHOICES = {
    "restartPolicy": ("Always", "OnFailure", "Never", "ExitCode"),
    "cleanPodPolicy": ("All", "Running", "None"),
    "apiVersion": ("kubeflow.org/v1",),
    "kind": ("PyTorchJob",),
}
_REPLICAS = ("Master", "Worker")


def check_pytorch_job(job: dict[str, Any]) -> list[str]:
    """Every problem, as ``where: what``."""
    return list(_check(job, "KubeflowOrgV1PyTorchJob", ""))


def _check(value: Any, kind: str, where: str) -> Iterator[str]:
    of_list, of_dict = re.fullmatch(r"list\[(\w+)\]", kind), re.fullmatch(r"dict\(str, (\w+)\)", kind)
    if kind in _PLAIN:
        if type(value) is not _PLAIN[kind]:
            yield f"{where}: {value!r} is no {kind}"
    elif of_list:
        for number, item in enumerate(value):
            yield from _check(item, of_list[1], f"{where}[{number}]")
    elif of_dict:
        for name, item in value.items():
            if of_dict[1] == "KubeflowOrgV1ReplicaSpec" and name not in _REPLICAS:
                yield f"{where}.{name}: expected one of {_REPLICAS}"
            yield from _check(item, of_dict[1], f"{where}.{name}")
    elif kind == "V1PodTemplateSpec":
        yield from _check_kubernetes({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}} | value, where)
    elif kind == "V1ObjectMeta":
        yield from _check_kubernetes({"apiVersion": "v1", "kind": "Namespace", "metadata": value}, where)
    else:
        yield from _check_model(value, kind, where)


def _check_model(value: Any, kind: str, where: str) -> Iterator[str]:
    """One of Kubeflow's objects: its fields are known, each has its type, and none that it insists on is missing."""
    model = getattr(models, kind)
    attributes = {name: attribute for attribute, name in model.attribute_map.items()}
    if not isinstance(value, dict):
        yield f"{where}: {value!r} is no {kind}"
        return
    for name, item in value.items():
        place = f"{where}.{name}".lstrip(".")
        if name not in attributes:
            yield f"{place}: unknown; expected one of {sorted(attributes)}"
        elif name in _CHOICES and item not in _CHOICES[name]:
            yield f"{place}: {item!r}; expected one of {_CHOICES[name]}"
        else:
            yield from _check(item, model.openapi_types[attributes[name]], place)
    try:
        model(**{attributes[name]: item for name, item in value.items() if name in attributes})
    except ValueError as error:
        missing = [name for name, attribute in attributes.items() if f"`{attribute}`" in str(error)]
        yield f"{where}.{missing[0] if missing else ''}: {error}"


def _check_kubernetes(value: dict[str, Any], where: str) -> Iterator[str]:
    try:
        kubernetes_validate.validate(value, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{where}.{'.'.join(map(str, error.absolute_path))}: {error.message}"
