class ModelPatcher:
    """The host's handle on a module."""

    def __init__(self, model, load_device, offload_device):
        self.model, self.load_device, self.offload_device = model, load_device, offload_device

    def load(self) -> None:
        self.model.to(self.load_device)
        self.model.device = self.load_device  # fails, as in the host, where a module has this as a property

    def model_size(self) -> int:
        return sum(tensor.nbytes for tensor in self.model.state_dict().values())

    def loaded_size(self) -> int:
        return self.model_size()
