from operator import attrgetter

import torch


def set_torch_compile_wrapper(model, backend, options=None, mode=None, fullgraph=False, dynamic=None, keys=()) -> None:
    """Has what these names mean compiled while the model is at work."""
    settings = {"backend": backend, "options": options, "mode": mode, "fullgraph": fullgraph, "dynamic": dynamic}
    graphs = {key: torch.compile(attrgetter(key)(model.model), **settings) for key in keys}

    def wrapper(executor, *args, **kwargs):
        before = {key: attrgetter(key)(executor.class_obj) for key in graphs}
        try:
            _put(executor.class_obj, graphs)
            return executor(*args, **kwargs)
        finally:
            _put(executor.class_obj, before)

    model.add_wrapper_with_key("apply_model", "torch.compile", wrapper)


def _put(module, values) -> None:
    for key, value in values.items():
        owner, _, name = key.rpartition(".")
        setattr(attrgetter(owner)(module), name, value)
