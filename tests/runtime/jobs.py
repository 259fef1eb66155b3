"""Builds trainer jobs for tests from a flat set of fields."""

from edge_runtime.adapters.initial import initial
from edge_runtime.methods import METHODS
from edge_runtime.protocol import codec
from edge_runtime.settings import Fleet, Model
from edge_runtime.trainer.job import Carried, Job, Machine


def job_of(**fields):
    """A Job in which each field is set where it belongs: in the job, its fleet, its machine or its carried files."""

    def take(kind):
        return {name: fields.pop(name) for name in kind.__struct_fields__ if name in fields}

    job, carried, machine = take(Job), take(Carried), take(Machine)
    fleet = Fleet(**{"name": "test", "catalog": (Model("m"),), **take(Fleet)})
    assert not fields, fields
    return Job(**job, fleet=fleet, carried=Carried(**carried), machine=Machine(**machine))


def chain_of(path, state, seed=5, method=METHODS["fedit"]):
    """A chain of one artifact in the file, whose version is nearly this state of a fleet of the seed."""
    differences = {
        key: value - initial(key, value.shape, seed, method.factor(key)) for key, value in state.items()
    }
    path.write_bytes(codec.encode(differences, step=2**-12))
    return (str(path),)
