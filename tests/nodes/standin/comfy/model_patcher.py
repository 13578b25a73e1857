import uuid

from .lora import calculate_weight


class ModelPatcher:
    """The host's handle on a module."""

    def __init__(self, model, load_device, offload_device):
        self.model, self.load_device, self.offload_device = model, load_device, offload_device
        self.patches, self.injections, self.is_injected, self.wrappers = {}, {}, False, {}
        self.patches_uuid = uuid.uuid4()

    def clone(self):
        other = type(self)(self.model, self.load_device, self.offload_device)
        other.patches = {name: [*patches] for name, patches in self.patches.items()}
        other.injections, other.patches_uuid = dict(self.injections), self.patches_uuid
        other.wrappers = dict(self.wrappers)
        return other

    def add_patches(self, patches, strength_patch=1.0):
        known = [name for name in patches if name in self.model.state_dict()]
        for name in known:
            self.patches.setdefault(name, []).append((strength_patch, patches[name]))
        self.patches_uuid = uuid.uuid4()
        return known

    def set_injections(self, key, injections) -> None:
        self.injections[key] = injections

    def get_injections(self, key):
        return self.injections.get(key)

    def add_wrapper_with_key(self, kind, key, wrapper) -> None:
        self.wrappers[kind, key] = [wrapper]

    def get_wrappers(self, kind, key):
        return self.wrappers.get((kind, key), [])

    def load(self) -> None:
        self.model.to(self.load_device)
        self.model.device = self.load_device  # fails, as in the host, where a module has this as a property
        unpatched = vars(self.model).setdefault("unpatched", {})
        for name in list(unpatched):
            self.model.get_parameter(name).data = unpatched.pop(name)
        for name, patches in self.patches.items():
            weight = self.model.get_parameter(name)
            unpatched[name] = weight.data
            weight.data = calculate_weight(patches, weight.data, name)
        for injection in (each for several in self.injections.values() for each in several):
            injection.inject(self)

    def model_size(self) -> int:
        return sum(tensor.nbytes for tensor in self.model.state_dict().values())

    def loaded_size(self) -> int:
        return self.model_size()
