class VideoFromComponents:
    def __init__(self, components):
        self._components = components

    def get_components(self):
        return self._components
